"""Rules over workers that are devices of a mesh: each holds its own gradient, and none ever holds all K of them."""

from collections.abc import Hashable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

PyTree = Any


def transpose_workers(x: Float[Array, "rows ..."], axis_name: Hashable) -> Float[Array, "K part ..."]:
    """From one worker's values of all coordinates to all workers' values of one part of the coordinates.

    Inside `jax.shard_map` over an axis of K devices, device k passes its `x` and gets `out[l]`, the k-th of K equal
    parts of the `x` of device l. One all-to-all: each device sends and receives as much as it holds, like the
    reduce-scatter of a plain mean, so that robust aggregation costs no bandwidth beyond that of data parallelism.

    Args:
      x: its leading axis is K times the size of a part.
      axis_name: the mesh axis of the workers.

    Raises:
      ValueError: the leading axis does not divide into K parts.
    """
    count = jax.lax.axis_size(axis_name)
    if jnp.ndim(x) == 0 or x.shape[0] % count:
        raise ValueError(f"x must have a leading axis that divides into {count} parts, got shape {jnp.shape(x)}")
    parts = x.reshape(count, x.shape[0] // count, *x.shape[1:])
    return jax.lax.all_to_all(parts, axis_name, split_axis=0, concat_axis=0)


def over_workers(
    aggregator: optax.GradientTransformationExtraArgs, axis_name: Hashable, *, gather: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Runs an aggregator inside `jax.shard_map`, where each of K devices has its own gradient as an ordinary tree.

    Every leaf is laid out flat, padded to a multiple of K, and transposed (`transpose_workers`); the aggregator then
    sees all K rows of this device's part of the coordinates, with `axis_name` as the extra argument by which it
    completes its sums over coordinates (one psum of K x K numbers for a rule on the Gram matrix). Its state covers the
    same part, so that 8 workers hold an eighth each.

    Args:
      aggregator: any rule whose update takes `axis_name`; `optax.chain` passes it on.
      axis_name: the mesh axis of the workers.
      gather: `True` gathers the parts of the result, so that every device has the whole update; `False` leaves this
        device's part of each leaf, flat, as a fully sharded optimizer wants it.

    Returns:
      A transformation whose `init` and `update` are called inside the `shard_map`; one that returns the gathered
      update as replicated needs `check_vma=False`, because the type of an all-gather's result does not say so.
    """

    def rows(leaf):
        return transpose_workers(_padded(leaf, axis_name), axis_name)

    def part(leaf):
        flat = _padded(leaf, axis_name)
        size = flat.shape[0] // jax.lax.axis_size(axis_name)
        return jax.lax.dynamic_slice_in_dim(flat, jax.lax.axis_index(axis_name) * size, size)

    def whole(flat, like):
        flat = jax.lax.all_gather(flat, axis_name, tiled=True)
        return flat[: like.size].reshape(like.shape)

    def init(params):
        return aggregator.init(jax.tree.map(part, params))

    def update(grads, state, params=None, **extra_args):
        params = None if params is None else jax.tree.map(part, params)
        update, state = aggregator.update(jax.tree.map(rows, grads), state, params, **extra_args, axis_name=axis_name)
        return (jax.tree.map(whole, update, grads) if gather else update), state

    return optax.GradientTransformationExtraArgs(init, update)


def _padded(leaf: Array, axis_name: Hashable) -> Float[Array, "rows"]:
    flat = jnp.ravel(leaf)
    return jnp.pad(flat, (0, -flat.size % jax.lax.axis_size(axis_name)))
