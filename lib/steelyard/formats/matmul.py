"""Products with a weight, however it is stored.

A plain array goes to jax.numpy; a node of `formats` multiplies itself. So a model that uses these functions runs on
packed weights unchanged.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from steelyard import tree as tree_lib
from steelyard.formats import base

PyTree = Any


def is_weight(x: Any) -> bool:
    """Whether x is a weight node (a plain array is not); fit for `is_leaf` of `jax.tree.map`."""
    return isinstance(x, base.Weight)


def dense(w: Array | base.Weight) -> Float[Array, "..."]:
    """The weight as an array."""
    return base.dense(w)


def matmul(x: Float[Array, "*rows K"], w: Float[Array, "K N"] | base.Weight) -> Float[Array, "*rows N"]:
    """`x @ w` for an array or a weight node.

    The dtype is what both promote to; sums are accumulated in float32 at least. Differentiable in x, and in the float
    children of a node; its integer children have no gradient.

    Args:
      x: activations; leading axes are allowed.
      w: the weight. More than two axes multiply as in `jnp.matmul`.

    Raises:
      ValueError: the contracted axes of x and a node differ.
    """
    if is_weight(w):
        return w.matmul(x)
    # Without preferred_element_type: XLA accumulates half-precision products in float32 and rounds once anyway, while
    # asking for a float32 result would make the two products of the backward pass float32 ones.
    return jnp.matmul(x, w)


def conv(
    x: Float[Array, "B H W I"],
    w: Float[Array, "h w I O"] | base.Weight,
    *,
    strides: int | tuple[int, int] = 1,
    padding: str | Sequence[tuple[int, int]] = "SAME",
) -> Float[Array, "B H2 W2 O"]:
    """Two-dimensional convolution, NHWC with an HWIO kernel; a node is expanded first.

    Args:
      x: images.
      w: the kernel.
      strides: of the window, one number or one for each axis.
      padding: `"SAME"`, `"VALID"`, or pairs of (low, high) for both axes.

    Raises:
      ValueError: x or w has not four axes, or their channels differ.
    """
    if len(x.shape) != 4 or len(w.shape) != 4 or x.shape[3] != w.shape[2]:
        raise ValueError(f"x of shape {x.shape} (NHWC) does not fit a kernel of shape {w.shape} (HWIO)")
    strides = (strides, strides) if isinstance(strides, int) else tuple(strides)
    padding = padding if isinstance(padding, str) else tuple(map(tuple, padding))
    return _expanded_conv(w, x, strides, padding) if is_weight(w) else _conv(w, x, strides, padding)


def _conv(w, x, strides, padding):
    dtype = jnp.result_type(x, w)
    return jax.lax.conv_general_dilated(
        x.astype(dtype), w.astype(dtype), strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


# As for the product: the backward pass expands the kernel again rather than keep it.
@functools.partial(jax.jit, static_argnums=(2, 3))
@functools.partial(jax.checkpoint, static_argnums=(2, 3))
def _expanded_conv(w, x, strides, padding):
    return _conv(w.dense(), x, strides, padding)


def take(w: Float[Array, "V D"] | base.Weight, indices: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Rows of a table, `jnp.take(w, indices, axis=0)`: an embedding. An index outside the table gives nan."""
    return w.take(indices) if is_weight(w) else jnp.take(w, indices, axis=0)


def nbytes(tree: PyTree) -> int:
    """Bytes of all arrays and weight nodes of a tree, as they are stored; works on shapes too."""
    return tree_lib.nbytes(tree)


def explain(w: Array | base.Weight) -> str:
    """One line: what the weight is, the path that `matmul` takes and why, and its bytes.

    >>> explain(np.zeros((4, 2), np.float32))
    'array float32 (4, 2): jnp.matmul; 32 bytes'
    """
    kind = type(w).__name__ if is_weight(w) else "array"
    path = w.describe() if is_weight(w) else "jnp.matmul"
    stored = nbytes(w)
    whole = math.prod(w.shape) * np.dtype(w.dtype).itemsize
    share = f" ({100 * stored / whole:.1f} % of {whole})" if is_weight(w) and whole else ""
    return f"{kind} {w.dtype} {tuple(w.shape)}: {path}; {stored} bytes{share}"
