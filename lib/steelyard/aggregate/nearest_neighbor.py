"""MoNNA: each of K peers averages the vectors nearest to its own, without a server (2023, Farhadkhani et al.).

Robust Collaborative Learning with Linear Gradient Overhead.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from steelyard import choices
from steelyard.aggregate import robust
from steelyard.aggregate import stacked as stacked_lib

PyTree = Any


def nearest_neighbor(num_byzantine: int, *, pivot: int | Int[Array, ""] = 0) -> stacked_lib.Aggregator:
    """The mean of the `K - num_byzantine` rows nearest to the row of one peer, its own included.

        update = mean of the K - num_byzantine rows with the smallest |g_pivot - g_k| (ties: lower index)

    Guarantee: if `f <= n` rows are bad, n = `num_byzantine`, and that of the pivot is not, the update is within
    `(2 f / (K - n) + (n - f) / (K - f)) D` of the honest mean, D being the largest distance between two honest rows.
    (No chosen row is farther than D from the pivot, so that each bad one displaces an honest one by at most 2 D.)
    The paper's analysis of training wants n < K / 5 or so.

    A row that is not finite is infinitely far. If that of the pivot is not, the update is the mean of all finite rows.

    Cost: the Gram matrix (one all-reduce of K x K numbers on a mesh), a sort of one row, one weighted sum.

    Args:
      num_byzantine: how many rows to leave out.
      pivot: index of the peer; may be traced.

    Returns:
      An aggregator without state.

    Raises:
      ValueError: an argument is negative or not whole; while tracing, `2 num_byzantine < K` or `pivot < K` does not
        hold.

    Source: Robust Collaborative Learning with Linear Gradient Overhead (2023, Farhadkhani et al.), algorithm 1.
    """
    num_byzantine = choices.require_count("num_byzantine", num_byzantine, "[0, inf)")
    is_traced = isinstance(pivot, jax.core.Tracer)
    if not is_traced:
        pivot = choices.require_count("pivot", pivot, "[0, inf)")

    def check(count):
        if 2 * num_byzantine >= count:
            raise ValueError(
                f"nearest_neighbor: num_byzantine={num_byzantine} needs more than {2 * num_byzantine} gradients, "
                f"got K={count}"
            )
        if not is_traced:
            choices.require_within("pivot", pivot, f"[0, {count})")

    def rule(gram, valid):
        count = gram.shape[0]
        distances = stacked_lib.pairwise_sqdist(gram, valid)[pivot]
        return robust.mean_of_lowest(distances, jnp.where(valid[pivot], count - num_byzantine, count), valid)

    return stacked_lib.from_distances(rule, check)


def nearest_neighbor_mixing(
    stacked: PyTree,
    num_byzantine: int,
    *,
    mesh: jax.sharding.Mesh | None = None,
    specs: PyTree = None,
    axis_name: stacked_lib.AxisName | None = None,
) -> PyTree:
    """Every peer's `nearest_neighbor` average: the exchange at the end of a round of MoNNA.

    The stack is multiplied by a K x K matrix whose rows are averages. A round of peer j is

        m_j <- beta m_j + (1 - beta) grad_j     (`worker_momentum`; never mixed)
        theta_j <- theta_j - rate m_j
        theta <- nearest_neighbor_mixing(theta, num_byzantine)

    The guarantee of `nearest_neighbor` holds for each honest peer's new row.

    Cost: one Gram matrix of the parameters for all peers, and a K x K by K x P product.

    Args:
      stacked: the parameters (or any vectors) of the peers, leaves `[K, ...]`; `None` leaves stay `None`.
      num_byzantine: how many rows each peer leaves out.
      mesh, specs, axis_name: where the coordinates are split, as in `steelyard.aggregate.gram`.

    Returns:
      A tree like `stacked`.

    Raises:
      ValueError: as in `nearest_neighbor` and `steelyard.aggregate.gram`.

    Source: as `nearest_neighbor`; the paper's runs have beta = 0.99.
    """

    def mixed(pivot):
        rule = nearest_neighbor(num_byzantine, pivot=pivot)
        # Only the weights depend on the peer, so that this computes the distances once.
        return rule.update(stacked, rule.init(None), mesh=mesh, specs=specs, axis_name=axis_name)[0]

    return jax.vmap(mixed)(jnp.arange(stacked_lib.count_rows(stacked), dtype=jnp.int32))
