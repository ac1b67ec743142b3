"""Clipping every worker's vector around the last aggregate, and momentum at the workers (2021, Karimireddy et al.).

Learning from History for Byzantine Robust Optimization.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from steelyard import choices, precision
from steelyard.aggregate import stacked as stacked_lib

PyTree = Any


class CenteredClipState(NamedTuple):
    """State of `centered_clip`.

    Attributes:
      center: the last aggregate, a tree like the parameters, in float32 at least.
    """

    center: PyTree


class WorkerMomentumState(NamedTuple):
    """State of `worker_momentum`.

    Attributes:
      momenta: one per worker, leaves `[K, ...]`, in float32 at least.
    """

    momenta: PyTree


def centered_clip(*, radius: float = 10.0, iterations: int = 1) -> stacked_lib.Aggregator:
    """Moves the last aggregate v by the mean of the workers' differences from it, each clipped to a radius.

    From v = 0 at the start, each step repeats `iterations` times

        v <- v + (1/K) sum_k (g_k - v) min(1, radius / |g_k - v|)

    with norms over all leaves, and gives v, which is kept for the next step. One worker moves v by `radius / K` an
    iteration at most, whatever it sends, and a worker that sends what is not finite does not move it; K is the number
    of all workers. An infinite radius is the mean.

    An attack that is small in each step and the same in all of them stays below any radius that lets honest noise
    through: use it as `optax.chain(worker_momentum(K), centered_clip(), optimizer)`, because momentum averages the
    noise away and not the attack.

    Costs a copy of the parameters, and for each iteration one pass over the K rows and, where their coordinates are
    split over devices, one all-reduce of K numbers. Its update takes the extra arguments `mesh` and `specs`, or
    `axis_name`, of `steelyard.aggregate.square_norms`.

    Args:
      radius: in the unit of the gradients' norms; `inf` is allowed. With `worker_momentum(ema=False)` vectors are
        `1 / (1 - decay)` times as long, and so should the radius be.
      iterations: how often v is moved in a step.

    Returns:
      An aggregator with a `CenteredClipState`.

    Raises:
      ValueError: `radius` is not positive, or `iterations` not a whole number of at least 1.

    Source: Learning from History for Byzantine Robust Optimization (2021, Karimireddy et al.).
    """
    choices.require_within("radius", radius, "(0, inf]")
    choices.require_count("iterations", iterations, "[1, inf)")

    def init(params):
        return CenteredClipState(stacked_lib.wide_zeros(params))

    def update(stacked, state, params=None, *, mesh=None, specs=None, axis_name=None, **extra_args):
        del params, extra_args
        where = {"mesh": mesh, "specs": specs, "axis_name": axis_name}
        valid = stacked_lib.finite_rows(stacked, **where)
        center = state.center
        # Unrolled: in a loop the center, replicated at first, would change its type inside of shard_map.
        for _ in range(int(iterations)):
            center = _moved(stacked, center, valid, radius, where)
        return jax.tree.map(lambda v, g: v.astype(g.dtype), center, stacked), CenteredClipState(center)

    return stacked_lib.Aggregator(init, update)


def worker_momentum(num_workers: int, *, decay: float = 0.9, ema: bool = True) -> optax.GradientTransformationExtraArgs:
    """A momentum for each worker: K gradients in, K momenta out, to come before a robust rule in a chain.

        m_k <- decay m_k + (1 - decay) g_k    with ema,
        m_k <- decay m_k + g_k                without,

    from zero and without a correction for that. A gradient that is not finite (as `steelyard.aggregate.finite_rows`
    says) leaves its worker's momentum as it is and takes its place in the output, so that a robust rule leaves the
    worker out of this step and has it back in the next.

    Costs K times the parameters of state, and one all-reduce of K numbers where coordinates are split over devices. Its
    update takes the extra arguments `mesh` and `specs`, or `axis_name`, of `steelyard.aggregate.square_norms`.

    Args:
      num_workers: K.
      decay: in [0, 1); 0 has no memory.
      ema: whether momenta are as long as gradients, or `1 / (1 - decay)` times as long.

    Returns:
      A transformation of stacked trees with a `WorkerMomentumState`; its `init` takes parameters, without an axis K.

    Raises:
      ValueError: `num_workers` is not a whole number of at least 1, or `decay` is out of its range; while tracing, the
        number of gradients is not `num_workers`.

    Source: Learning from History for Byzantine Robust Optimization (2021, Karimireddy et al.).
    """
    choices.require_count("num_workers", num_workers, "[1, inf)")
    choices.require_within("decay", decay, "[0, 1)")
    share = 1 - decay if ema else 1.0

    def init(params):
        return WorkerMomentumState(stacked_lib.wide_zeros(params, num_workers))

    def update(stacked, state, params=None, *, mesh=None, specs=None, axis_name=None, **extra_args):
        del params, extra_args
        stacked_lib.check_losses("worker_momentum", None, stacked_lib.count_rows(stacked), num_workers)
        valid = stacked_lib.finite_rows(stacked, mesh=mesh, specs=specs, axis_name=axis_name)
        pushed = jax.tree.map(
            lambda m, g: (decay * m + share * precision.wide(g)).astype(m.dtype), state.momenta, stacked
        )
        momenta = stacked_lib.choose_rows(valid, pushed, state.momenta)
        out = jax.tree.map(lambda m, g: m.astype(g.dtype), momenta, stacked)
        return stacked_lib.choose_rows(valid, out, stacked), WorkerMomentumState(momenta)

    return optax.GradientTransformationExtraArgs(init, update)


def _moved(rows: PyTree, center: PyTree, valid: Bool[Array, "K"], radius: float, where: dict[str, Any]) -> PyTree:
    """The center after one iteration."""
    differences = jax.tree.map(lambda g, v: precision.wide(g) - v, rows, center)
    differences = stacked_lib.zero_rows(differences, valid)
    norms = jnp.sqrt(stacked_lib.square_norms(differences, **where))
    factors = jnp.where(norms <= radius, 1, radius / norms)
    step = stacked_lib.combine(factors / factors.shape[0], differences)
    return jax.tree.map(lambda v, d: v + d.astype(v.dtype), center, step)
