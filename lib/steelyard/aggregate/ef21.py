"""EF21 and EF21-W: workers send only a compressed change of their gradient estimate (2024, Richtarik et al.).

Error Feedback Reloaded: From Quadratic to Arithmetic Mean of Smoothness Constants.
"""

from collections.abc import Hashable
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from steelyard import choices, precision
from steelyard import tree as tree_lib
from steelyard.aggregate import compressors
from steelyard.aggregate import stacked as stacked_lib

PyTree = Any


class EF21State(NamedTuple):
    """State of `ef21`.

    Attributes:
      step: how many updates there were, int32.
      estimates: what the server knows of each worker's gradient, leaves `[K, ...]`, in float32 at least.
    """

    step: Int[Array, ""]
    estimates: PyTree


class EF21ExchangeState(NamedTuple):
    """State of `ef21_exchange`; trees are in float32 at least.

    Attributes:
      step: how many updates there were, int32; the same on all devices.
      estimate: what the others know of this device's gradient; local.
      mean: the weighted sum of all estimates; the same on all devices.
    """

    step: Int[Array, ""]
    estimate: PyTree
    mean: PyTree


def ef21(
    num_workers: int, compressor: compressors.Compressor, *, weights: Float[ArrayLike, "K"] | None = None
) -> stacked_lib.Aggregator:
    """The weighted sum of gradient estimates that each worker keeps up to date by sending compressed differences.

        h_k <- h_k + C(g_k / (K w_k) - h_k),   update = sum_k w_k h_k

    from h = 0. With uniform weights this is EF21, and `w_k = L_k / sum_l L_l` of the smoothness constants of the
    workers' losses is EF21-W; both approach the mean of the gradients. Because h starts at zero, the first updates are
    far from it; one update with the compressor `lambda tree, step, worker: tree`, whose state is then used, sends the
    first gradients as they are.

    Its update sees all K rows; where workers are devices of a mesh use `ef21_exchange`, which sends only what is
    compressed. Not robust: what is not finite stays in h.

    Cost: K times the parameters of state, and the K compressions. Traffic, if it were sent: k of P numbers.

    Args:
      num_workers: K.
      compressor: `(tree, step, worker) -> tree` with integers `step` and `worker`, such as `top_k` and `random_k`. It
        is vmapped over the workers.
      weights: positive, with the sum 1; `1 / K` if `None`.

    Returns:
      An aggregator with an `EF21State`.

    Raises:
      ValueError: `num_workers` is not a whole number of at least 1, `compressor` is not a function, `weights` are not
        K positive numbers or do not sum to 1 within 1e-5; while tracing, the number of gradients is not `num_workers`,
        or `axis_name` says that each device has a part of each row only.

    Source: Error Feedback Reloaded: From Quadratic to Arithmetic Mean of Smoothness Constants (2024, Richtarik et al.).
    """
    choices.require_count("num_workers", num_workers, "[1, inf)")
    if not callable(compressor):
        raise ValueError(f"compressor={compressor!r} must be a function (tree, step, worker) -> tree")
    if weights is not None:
        _check_weights(weights, num_workers)

    def init(params):
        return EF21State(jnp.zeros((), jnp.int32), stacked_lib.wide_zeros(params, num_workers))

    def update(stacked, state, params=None, *, axis_name=None, **extra_args):
        del params, extra_args
        if axis_name is not None:
            raise ValueError(f"ef21 compresses whole rows, not the parts along axis_name={axis_name!r}: ef21_exchange")
        stacked_lib.check_losses("ef21", None, stacked_lib.count_rows(stacked), num_workers)
        shares = jnp.full(num_workers, 1 / num_workers) if weights is None else jnp.asarray(weights, jnp.float32)

        def push(row, estimate, share, worker):
            share = None if weights is None else share
            return _add(estimate, compressor(_difference(row, estimate, share, num_workers), state.step, worker))

        estimates = jax.vmap(push)(stacked, state.estimates, shares, jnp.arange(num_workers))
        total = stacked_lib.combine(shares, estimates)
        update = jax.tree.map(lambda u, g: u.astype(g.dtype), total, stacked)
        return update, EF21State(state.step + 1, estimates)

    return stacked_lib.Aggregator(init, update)


def ef21_exchange_init(params: PyTree) -> EF21ExchangeState:
    """The state of `ef21_exchange` before the first step, of zeros."""
    estimate, mean = stacked_lib.wide_zeros(params), stacked_lib.wide_zeros(params)
    return EF21ExchangeState(jnp.zeros((), jnp.int32), estimate, mean)


def ef21_exchange(
    gradient: PyTree,
    state: EF21ExchangeState,
    compressor: compressors.Compressor,
    axis_name: Hashable,
    *,
    weight: Float[ArrayLike, ""] | None = None,
    sparse: bool | None = None,
) -> tuple[PyTree, EF21ExchangeState]:
    """`ef21` inside `jax.shard_map`, where each of K devices has its own gradient: a step of one worker.

    Each device compresses the change of its own estimate; the sum of the weighted changes is added to a running mean,
    of which every device has a copy. Either the changes are summed as they are (one psum), or their k values and k
    indices are gathered (`sparse`) and added one worker after the other, in the same order everywhere, so that the
    copies stay equal bit by bit. The running mean differs from `sum_k w_k h_k` by the rounding of its sums.

    Cost: twice the parameters of state per device. Traffic: an all-reduce of P numbers, which saves nothing, or an
    all-gather of k values and k indices of each worker.

    Args:
      gradient: this device's own, an ordinary tree; on a mesh with other axes too, the whole of each leaf.
      state: from `ef21_exchange_init`; `step` and `mean` are replicated, `estimate` is not.
      compressor: as in `ef21`; the worker's number is its index on the axis.
      axis_name: the mesh axis of the workers.
      weight: w_k of this device; they are positive and sum to 1. `1 / K` if `None`.
      sparse: whether to gather values and indices; `None` does so where that is less on the wire, `K k < P`.

    Returns:
      The update, replicated, in the dtypes of the gradient, and the new state.

    Raises:
      ValueError: `sparse` is `True` with a compressor that is not a `Sparsifier`.

    Source: as `ef21`.
    """
    count, worker = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    difference = _difference(gradient, state.estimate, weight, count)
    share = 1 / count if weight is None else weight
    if _is_sparse(sparse, compressor, count, gradient):
        change, total = _gathered(difference, compressor, share, axis_name, state.step)
    else:
        change = compressor(difference, state.step, worker)
        total = jax.lax.psum(jax.tree.map(lambda c: jnp.asarray(share, c.dtype) * c, change), axis_name)
    mean = _add(state.mean, total)
    update = jax.tree.map(lambda m, g: m.astype(g.dtype), mean, gradient)
    return update, EF21ExchangeState(state.step + 1, _add(state.estimate, change), mean)


def ef21_step_size(
    smoothness: Float[ArrayLike, "K"], *, alpha: float, overall: float | None = None, weighted: bool = True
) -> Float[Array, ""]:
    """The largest step size of gradient descent for which theory guarantees that EF21 converges.

        gamma = 1 / (L + M sqrt(beta / theta)),   theta = 1 - sqrt(1 - alpha),   beta = (1 - alpha) / theta

    where M is the arithmetic mean of the smoothness constants for EF21-W (weights `L_k / sum_l L_l`), and the quadratic
    mean, which is larger, for EF21 in the older theory. Descent without compression has `alpha = 1` and `1 / L`.

    Args:
      smoothness: L_k, the Lipschitz constants of the gradients of the workers' losses, positive.
      alpha: contraction of the compressor, `|C(x) - x|^2 <= (1 - alpha) |x|^2`, in (0, 1]; `k / P` for `top_k`.
      overall: L, that of the mean of the losses; the mean of L_k, which it cannot exceed, if `None`.
      weighted: whether the arithmetic mean is used.

    Raises:
      ValueError: an argument out of its range, or `smoothness` is not a vector of positive numbers.

    Source: Error Feedback Reloaded: From Quadratic to Arithmetic Mean of Smoothness Constants (2024, Richtarik et al.).
    """
    if np.ndim(smoothness) != 1 or not np.size(smoothness):
        raise ValueError(f"smoothness must be a vector, one number per worker, got shape {np.shape(smoothness)}")
    _require_positive("smoothness", smoothness)
    choices.require_within("alpha", alpha, "(0, 1]")
    smoothness = precision.wide(smoothness)
    mean = jnp.mean(smoothness)
    if overall is not None:
        choices.require_within("overall", overall, "(0, inf)")
    # 1 - sqrt(1 - alpha) without its cancellation: alpha is tiny where compression is strong.
    theta = alpha / (1 + jnp.sqrt(1 - alpha))
    middle = mean if weighted else jnp.sqrt(jnp.mean(smoothness**2))
    return 1 / ((mean if overall is None else overall) + middle * jnp.sqrt(1 - alpha) / theta)


def _difference(gradient: PyTree, estimate: PyTree, share: Float[ArrayLike, ""] | None, count: int) -> PyTree:
    """`g / (K w) - h`."""

    def leaf(g, h):
        g = precision.wide(g).astype(h.dtype)
        return g - h if share is None else g / jnp.asarray(count * share, h.dtype) - h

    return jax.tree.map(leaf, gradient, estimate)


def _add(tree: PyTree, change: PyTree) -> PyTree:
    return jax.tree.map(lambda x, c: x + c.astype(x.dtype), tree, change)


def _is_sparse(sparse: bool | None, compressor: compressors.Compressor, count: int, gradient: PyTree) -> bool:
    is_possible = isinstance(compressor, compressors.Sparsifier)
    if sparse and not is_possible:
        raise ValueError(
            f"sparse=True needs a Sparsifier, such as top_k(k), which says what it keeps; got {compressor}"
        )
    # A gather brings (K - 1) k values and indices to each device, a ring's all-reduce 2 (K - 1) / K P numbers.
    return is_possible and count * compressor.count < tree_lib.size(gradient) if sparse is None else sparse


def _gathered(
    difference: PyTree,
    compressor: compressors.Sparsifier,
    share: Float[ArrayLike, ""],
    axis_name: Hashable,
    step: Int[Array, ""],
) -> tuple[PyTree, PyTree]:
    """This device's compressed difference, and the weighted sum of all devices'."""
    flat, unravel = jax.flatten_util.ravel_pytree(difference)
    values, indices = compressor.sparse(flat, step, jax.lax.axis_index(axis_name))
    change = jnp.zeros_like(flat).at[indices].set(values, unique_indices=True)
    sent = (jnp.asarray(share, flat.dtype) * values, indices.astype(jnp.int32))
    all_values, all_indices = (jax.lax.all_gather(x, axis_name, to="invarying") for x in sent)

    def add_worker(k, total):
        return total.at[all_indices[k]].add(all_values[k], unique_indices=True)

    # Worker by worker, because one scatter with repeated indices has no fixed order of sums on a GPU.
    total = jax.lax.fori_loop(0, all_values.shape[0], add_worker, jnp.zeros(flat.shape, flat.dtype))
    return unravel(change), unravel(total)


def _check_weights(weights: Float[ArrayLike, "K"], num_workers: int) -> None:
    if np.shape(weights) != (num_workers,):
        raise ValueError(f"weights must have shape ({num_workers},), one per worker, got {np.shape(weights)}")
    _require_positive("weights", weights)
    if not isinstance(weights, jax.core.Tracer) and abs(np.sum(np.asarray(weights, np.float64)) - 1) > 1e-5:
        raise ValueError(f"weights must sum to 1 within 1e-5, got {weights} with the sum {np.sum(weights)}")


def _require_positive(name: str, values: Float[ArrayLike, "K"]) -> None:
    if isinstance(values, jax.core.Tracer):
        return
    values = np.asarray(values)
    if not np.all(np.isfinite(values) & (values > 0)):
        raise ValueError(f"{name} must be positive numbers, got {values}")
