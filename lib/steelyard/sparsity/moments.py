"""What an input of a kernel adds up to: its rows, the sums of their squares, and of their products.

A kernel is given by its shape without the last axis: [in]; [height, width, in] for a convolution, which has a `Window`;
[layers, in] for a stack, whose input has the same leading axes. Sums are in float32.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from steelyard import precision

Shape = tuple[int, ...]


class Window(NamedTuple):
    """How a convolution moves over its images, as in `models.layers.Conv`."""

    strides: tuple[int, int] = (1, 1)
    padding: str | Sequence[tuple[int, int]] = "SAME"


def check(path: str, kernel: Shape, x: Shape, window: Window | None) -> None:
    """Whether x, of this shape, can be multiplied by a kernel, of this shape without the last axis."""
    fits = len(x) == 4 and len(kernel) == 3 if window else len(x) >= len(kernel) and x[: len(kernel) - 1] == kernel[:-1]
    if not fits or x[-1] != kernel[-1]:
        raise ValueError(
            f"an input of shape {x} does not fit {path!r} of shape {(*kernel, '...')} "
            + ("as a convolution" if window else "as a stack of matrices; a convolution needs an entry in windows")
        )


def rows(kernel: Shape, x: Float[Array, "..."], window: Window | None) -> int:
    """How many vectors are multiplied by each matrix of a kernel."""
    if window is None:
        return math.prod(x.shape[len(kernel) - 1 : -1])
    patches = jax.eval_shape(functools.partial(_patches, kernel=kernel, window=window), x)
    return math.prod(patches.shape[:3])


def squares(kernel: Shape, x: Float[Array, "..."], window: Window | None) -> Float32[Array, "..."]:
    """The sums of the squared features, in the shape of the kernel."""
    squared = precision.wide(x) ** 2
    if window is None:
        return jnp.sum(squared, tuple(range(len(kernel) - 1, x.ndim - 1))).astype(jnp.float32)
    # A sum over images comes first: it leaves a single one to be cut into patches.
    sums = jnp.sum(_patches(jnp.sum(squared, axis=0, keepdims=True), kernel, window), axis=(0, 1, 2))
    return jnp.transpose(sums.reshape(kernel[2], *kernel[:2]), (1, 2, 0)).astype(jnp.float32)


def gram(kernel: Shape, x: Float[Array, "..."], window: Window | None) -> Float32[Array, "..."]:
    """X^T X, features in the kernel's order, of each matrix of a stack."""
    if window is None:
        fn = _outer
        for _ in kernel[:-1]:
            fn = jax.vmap(fn)
        return fn(x)
    channels, size = kernel[2], math.prod(kernel)
    products = _outer(_patches(x, kernel, window)).reshape(channels, *kernel[:2], channels, *kernel[:2])
    return jnp.transpose(products, (1, 2, 0, 4, 5, 3)).reshape(size, size)


def gram_shape(kernel: Shape, window: Window | None) -> Shape:
    """The shape of what `gram` gives."""
    return (math.prod(kernel),) * 2 if window else (*kernel[:-1], kernel[-1], kernel[-1])


def _outer(x: Float[Array, "*rows n"]) -> Float32[Array, "n n"]:
    """X^T X. The rows keep their axes, so that a cut along one of them needs no new layout."""
    axes = tuple(range(x.ndim - 1))
    product = jnp.tensordot(
        x,
        x,
        (axes, axes),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
    )
    return product.astype(jnp.float32)


def _patches(x: Float[Array, "B H W C"], kernel: Shape, window: Window) -> Float[Array, "B H2 W2 n"]:
    """What the kernel lies on at each place, channel by channel."""
    padding = window.padding if isinstance(window.padding, str) else tuple(map(tuple, window.padding))
    return jax.lax.conv_general_dilated_patches(
        x,
        kernel[:2],
        window.strides,
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=jax.lax.Precision.HIGHEST,
    )
