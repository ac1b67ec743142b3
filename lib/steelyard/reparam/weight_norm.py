"""Weight normalization: the direction and the length of each output channel train apart.

A stored kernel becomes a node `WeightNormed(direction, length)` in its place, so that paths go on where they ended
(`dense/kernel/direction`, `dense/kernel/length`) and a sharding rule for the kernel holds for both.

Source: Weight Normalization: A Simple Reparameterization to Accelerate Training of Deep Neural Networks (2016,
Salimans and Kingma).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from steelyard import formats, precision
from steelyard import tree as tree_lib
from steelyard.reparam import base

PyTree = Any
Axes = int | tuple[int, ...]
AxesRule = Axes | Callable[[jax.tree_util.KeyPath, Any], Axes | None]


class WeightNormed(NamedTuple):
    """What is stored of a kernel: both parts train.

    Attributes:
      direction: shaped like the kernel, in its dtype; only its direction within a channel matters.
      length: shaped like the kernel with 1 in place of the axes that are summed, float32 at least; the length of each
        channel, and its sign.
    """

    direction: Float[Array, "..."]
    length: Float[Array, "..."]


def weight_norm_split(
    kernel: Float[Array, "..."], *, axis: Axes = -1
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Direction and length of each channel.

        v = kernel,  g = |v|

    Args:
      kernel: a kernel such as Dense `[in, out]` or Conv `[h, w, in, out]`.
      axis: the axes of the output channels, and of what is stacked; the norm runs over all others.

    Returns:
      v, which is the kernel, and g with all axes (`[1, out]`, `[1, 1, 1, out]`), in float32 at least, so that
      `weight_norm_merge` gives a bfloat16 kernel back.

    Raises:
      ValueError: the kernel lacks the axis.

    Source: Weight Normalization (2016, Salimans and Kingma), equation 2.
    """
    kernel = jnp.asarray(kernel)
    return kernel, jnp.sqrt(_squared_norm(kernel, tree_lib.axes_except(kernel, axis)))


def weight_norm_merge(v: Float[Array, "..."], g: Float[Array, "..."], *, axis: Axes = -1) -> Float[Array, "..."]:
    """The kernel of directions and lengths.

        w = g v / |v|
        dg = <dw, v> / |v|,  dv = (g / |v|) (dw - (<dw, v> / |v|^2) v)

    dv is orthogonal to v, so plain gradient descent never makes |v| smaller. A channel whose v is zero (or so small
    that its squares are no normal float32 numbers) is zero and has zero gradients.

    Args:
      v: directions.
      g: lengths, as `weight_norm_split` gives them.
      axis: as there.

    Returns:
      Of the shape and dtype of `v`; computed in float32 at least.

    Raises:
      ValueError: `v` lacks the axis, or `g` has another shape than `v` with 1 in place of the axes that are summed.

    Source: Weight Normalization (2016, Salimans and Kingma), equations 2 and 3.
    """
    v, g = jnp.asarray(v), jnp.asarray(g)
    return _scale(v, _factor(v, g, axis))


def weight_norm_data_init(
    v: Float[Array, "..."], pre_activations: Float[Array, "..."], *, axis: Axes = -1
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Lengths and biases with which a batch of pre-activations has mean 0 and variance 1 in every channel.

        t = x . v / |v|,  g = 1 / std(t),  b = -mean(t) / std(t)

    A channel that is constant over the batch gets g = 1.

    Args:
      v: directions.
      pre_activations: t, those of the layer with g = 1 and b = 0; its last axes are the output channels.
      axis: the axes of the output channels in `v`.

    Returns:
      g, shaped as `weight_norm_split` gives it, and b, shaped like the output channels; float32 at least.

    Raises:
      ValueError: `v` lacks the axis, or the last axes of `pre_activations` are not its channels.

    Source: Weight Normalization (2016, Salimans and Kingma), equations 5 and 6.
    """
    v, t = jnp.asarray(v), jnp.asarray(pre_activations)
    summed = tree_lib.axes_except(v, axis)
    channels = tuple(n for i, n in enumerate(v.shape) if i not in summed)
    if t.shape[t.ndim - len(channels) :] != channels:
        raise ValueError(f"pre_activations of shape {t.shape} must end with the channels {channels} of v {v.shape}")
    batch = tuple(range(t.ndim - len(channels)))
    mean, std = jnp.mean(precision.wide(t), batch), jnp.std(precision.wide(t), batch)
    g = 1 / jnp.where(std > 0, std, 1)
    return g.reshape(_length_shape(v, summed)), -mean * g


def weight_norm(*, axis: AxesRule = -1) -> base.Reparam:
    """The model sees g v / |v|, and v and g are stored and trained (see `weight_norm_merge`).

    Every array of floating numbers with two axes or more is replaced by a `WeightNormed`; `reparam.only` restricts
    that. `finish` gives plain kernels again. Weight decay belongs on the lengths, since the size of v means nothing:
    `optax.add_decayed_weights(1e-2, mask=lambda p: tree.select(p, ".*/length"))`.

    In a chain, links behind see merged kernels: `chain(weight_norm(), fake_quant())`. Links before it see the parts,
    by their paths: `chain(nm_sparse(2, 4, where=".*/direction"), weight_norm())`, which finishes N:M weights.

    One sum over the kernel per step, and an entry more for each output channel.

    Args:
      axis: the axes of the output channels, and of what is stacked (scanned layers, experts): an int, a tuple, or
        `(key path, leaf) -> one of these`, `None` to leave the leaf alone. Last for Dense `[in, out]` and Conv
        `[h, w, in, out]`; 0 for embedding tables `[vocab, dim]`.

    Raises:
      ValueError: at `init`, a leaf lacks the axis or is weight-normalized already; at `finish`, the direction is a
        weight node that cannot be scaled exactly: quantized, or an N:M weight whose groups run along `axis`.

    Source: Weight Normalization (2016, Salimans and Kingma), section 2.
    """

    def init(params, rng):
        del rng
        return jax.tree_util.tree_map_with_path(functools.partial(_split, axis=axis), params, is_leaf=_is_normed), ()

    def merge(fn, stored):
        def leaf(path, x):
            return fn(path, x, _axis_of(axis, path, x.direction)) if _is_normed(x) else x

        return jax.tree_util.tree_map_with_path(leaf, stored, is_leaf=_is_normed)

    def apply(stored, state, *, step, rng, train):
        del state, step, rng
        return merge(_see if train else _show, stored)

    def finish(stored, state):
        del state
        return merge(_store, stored)

    return base.Reparam(init, apply, None, None, finish)


def _split(path, x, *, axis: AxesRule):
    if _is_normed(x):
        raise ValueError(f"{tree_lib.path_str(path)} is weight-normalized already; one weight_norm is enough")
    if jnp.ndim(x) < 2 or not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        return x
    axis = _axis_of(axis, path, x)
    if axis is None:
        return x
    try:
        return WeightNormed(*weight_norm_split(x, axis=axis))
    except ValueError as error:
        raise ValueError(f"{tree_lib.path_str(path)}: {error}") from error


def _axis_of(axis: AxesRule, path, leaf) -> Axes | None:
    return axis(path, leaf) if callable(axis) else axis


def _see(path, node: WeightNormed, axis: Axes) -> Array:
    del path
    return weight_norm_merge(*node, axis=axis)


def _show(path, node: WeightNormed, axis: Axes) -> Array:
    return _positive_zeros(_see(path, node, axis))


def _store(path, node: WeightNormed, axis: Axes) -> Any:
    v = node.direction
    if not formats.is_weight(v):
        return _show(path, node, axis)
    factor = _factor(v.dense(), node.length, axis)
    if not isinstance(v, formats.NMSparse) or formats.is_weight(v.values) or factor.shape[-2] != 1:
        raise ValueError(
            f"{tree_lib.path_str(path)}: its direction is stored as {type(v).__name__}, which weight_norm cannot scale "
            "without another rounding. Put weight_norm before the link that quantizes: chain(weight_norm(), ...)"
        )
    return dataclasses.replace(v, values=_positive_zeros(_scale(v.values, factor)))


def _factor(v: Array, g: Array, axis: Axes) -> Array:
    """g / |v|, and 0 for a channel of zeros."""
    summed = tree_lib.axes_except(v, axis)
    if g.shape != _length_shape(v, summed):
        raise ValueError(
            f"g of shape {g.shape} does not fit v of shape {v.shape} with axis={axis}: its shape must be "
            f"{_length_shape(v, summed)}"
        )
    return _quotient(v, g, summed)


# Compiled as one piece wherever it is called, and kept apart from what uses it: sums, roots and divisions that are
# fused differently differ in the last bit, and `finish` would not store exactly what evaluation has shown.
@functools.partial(jax.jit, static_argnums=2)
def _quotient(v: Array, g: Array, summed: tuple[int, ...]) -> Array:
    squares = _squared_norm(v, summed)
    is_live = squares >= jnp.finfo(squares.dtype).tiny
    # The inner `where` keeps the gradient finite where it is not chosen.
    return jax.lax.optimization_barrier(
        jnp.where(is_live, precision.wide(g) / jnp.sqrt(jnp.where(is_live, squares, 1)), 0)
    )


def _scale(v: Array, factor: Array) -> Array:
    return (precision.wide(v) * factor).astype(v.dtype)


def _positive_zeros(w: Array) -> Array:
    """Without negative zeros: a masked entry of a channel with a negative length is +0, as in a sparse format."""
    return jnp.where(w == 0, jnp.zeros_like(w), w)


def _squared_norm(v: Array, axes: tuple[int, ...]) -> Array:
    return jnp.sum(jnp.square(precision.wide(v)), axes, keepdims=True)


def _length_shape(v: Any, summed: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if i in summed else n for i, n in enumerate(np.shape(v)))


def _is_normed(x: Any) -> bool:
    return isinstance(x, WeightNormed)
