"""Aggregation that a few bad workers cannot lead away: median, trimmed mean, Krum, geometric median.

K workers send a gradient each, f of them anything. The other `K - f` are *honest*: `h` is their mean and their
*diameter* D the largest distance between two of them. Each docstring states how far from `h` the update can be, for
every K, f and whatever the others send; what is not finite counts as sent by a bad worker. The guarantees of rules on
distances are those of exact arithmetic; float32 adds what it does to a distance, 1e-3 of the norms that are compared.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from steelyard import choices, precision
from steelyard.aggregate import stacked as stacked_lib

PyTree = Any

# A network of 16 rows has 63 exchanges, of 32 rows 191: the program grows, and each leaf has its own.
_NETWORK_ROWS = 16
_STARTS = ("majority", "mean", "zero")
# Four squares of such norms still add up in float32. A row that is longer after centring counts as not finite.
_LARGEST_SQUARE = 2.0**125


def median() -> stacked_lib.Aggregator:
    """The median of each coordinate: the middle value, or the mean of the two middle ones.

    NaN counts as +inf. Guarantee: for `2 f < K` each coordinate of the update lies between the smallest and the largest
    honest value of that coordinate.

    Cost: a sort of the K values of each coordinate, up to K = 16 by a sorting network, above by the much slower sort of
    XLA. No communication, once a device has all K values of its part of the coordinates: that takes an all-to-all
    (`over_workers`), not an all-gather of K gradients.

    Returns:
      An aggregator without state. For K = 1 and 2 its update is the mean.

    Source: Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates (2018, Yin et al.), definition 1.
    """

    def update(stacked, state, params=None, **extra_args):
        del params, extra_args
        return _mean_of_middle(stacked, (stacked_lib.count_rows(stacked) - 1) // 2), state

    return stacked_lib.Aggregator(optax.init_empty_state, update)


def trimmed_mean(num_trimmed: int) -> stacked_lib.Aggregator:
    """The mean of each coordinate without its `num_trimmed` largest and as many smallest values.

    NaN counts as +inf. Guarantee: for `f <= num_trimmed` each coordinate of the update lies between the smallest and
    the largest honest value of that coordinate. Cost: as `median`.

    Args:
      num_trimmed: at each end; 0 is the mean, `(K - 1) // 2` the median.

    Returns:
      An aggregator without state.

    Raises:
      ValueError: `num_trimmed` is negative or not whole; while tracing, `2 num_trimmed < K` does not hold.

    Source: Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates (2018, Yin et al.), definition 2.
    """
    num_trimmed = choices.require_count("num_trimmed", num_trimmed, "[0, inf)")

    def update(stacked, state, params=None, **extra_args):
        del params, extra_args
        if 2 * num_trimmed >= (count := stacked_lib.count_rows(stacked)):
            raise ValueError(
                f"trimmed_mean: num_trimmed={num_trimmed} needs more than {2 * num_trimmed} gradients, got K={count}"
            )
        return _mean_of_middle(stacked, num_trimmed), state

    return stacked_lib.Aggregator(optax.init_empty_state, update)


def krum(num_byzantine: int, *, num_selected: int = 1) -> stacked_lib.Aggregator:
    """The gradient that is closest to its nearest neighbours, or the mean of several such.

        score_k = sum of the K - num_byzantine - 2 smallest |g_k - g_l|^2, l != k
        update = mean of the num_selected rows with the lowest scores (ties: lower index)

    Guarantee: for `f <= num_byzantine` the update is within `(1 + sqrt((K - n - 2) / (K - 2 n - 1))) D` of the honest
    mean, n = `num_byzantine`. (An honest row scores at most `(K - n - 2) D^2`, and among the neighbours of a chosen
    bad one `K - 2 n - 1` are honest.)

    Cost: the Gram matrix (one all-reduce of K x K numbers on a mesh), a sort of it, and one weighted sum.

    Args:
      num_byzantine: how many bad workers to withstand.
      num_selected: how many rows to average; 1 is Krum, more is Multi-Krum.

    Returns:
      An aggregator without state.

    Raises:
      ValueError: a count is out of range or not whole; while tracing, `2 num_byzantine + 2 < K` or
        `num_selected <= K - num_byzantine` does not hold.

    Source: Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent (2017, Blanchard et al.), section 4.
    """
    num_byzantine = choices.require_count("num_byzantine", num_byzantine, "[0, inf)")
    num_selected = choices.require_count("num_selected", num_selected, "[1, inf)")

    def check(count):
        if 2 * num_byzantine + 2 >= count:
            raise ValueError(
                f"krum: num_byzantine={num_byzantine} needs more than {2 * num_byzantine + 2} gradients, got K={count}"
            )
        if num_selected > count - num_byzantine:
            raise ValueError(
                f"krum: num_selected={num_selected} must be at most K - num_byzantine = {count - num_byzantine}"
            )

    def rule(gram, valid):
        count = gram.shape[0]
        to_others = jnp.where(jnp.eye(count, dtype=bool), jnp.inf, stacked_lib.pairwise_sqdist(gram, valid))
        nearest = jnp.sort(to_others, axis=1)[:, : count - num_byzantine - 2]
        return mean_of_lowest(jnp.sum(nearest, axis=1), num_selected, valid)

    return stacked_lib.from_distances(rule, check)


def geometric_median(*, iterations: int = 8, smoothing: float = 1e-6, init: str = "majority") -> stacked_lib.Aggregator:
    """The point with the smallest sum of distances to the gradients, by Weiszfeld's iteration.

        b_k = 1 / max(|z - g_k|, smoothing),   z <- sum_k b_k g_k / sum_k b_k

    in coefficients `z = sum_k a_k g_k`, so that `|z - g_k|^2 = a^T G a - 2 (G a)_k + G_kk`.

    Guarantee: for `2 f < K`, from "majority" and after any number of iterations, the update is within
    `((5 K - 2 f) D + K smoothing / 2) / (K - 2 f)` of the honest mean h: no iteration raises the (smoothed) sum of
    distances, the start is within 3 D of h, and going r beyond costs that sum `(K - 2 f) r`. From another start z_0 it
    is within `(K |z_0 - h| + 2 (K - f) D + K smoothing / 2) / (K - 2 f)`. From "mean", 3 of 10 rows at 1e8 still weigh
    1e4 after 8 iterations, because each takes off a constant factor only.

    Cost: the Gram matrix (one all-reduce of K x K numbers on a mesh), K x K work per iteration, one weighted sum.

    Args:
      iterations: how many.
      smoothing: distances below count as this, in units of the gradient. Workers closer than that are averaged.
      init: "majority" starts at the mean of the smallest ball about a row that holds more than half of the rows,
        "mean" at the mean of all finite rows, "zero" at zero.

    Returns:
      An aggregator without state.

    Raises:
      ValueError: `iterations` is not a positive whole number, `smoothing` is not positive, or `init` is unknown.

    Source: Robust Aggregation for Federated Learning (2022, Pillutla et al.), algorithm 2; the start is our own.
    """
    iterations = choices.require_count("iterations", iterations, "[1, inf)")
    choices.require_within("smoothing", smoothing, "(0, inf)")
    choices.require("init", init, _STARTS)

    def rule(gram, valid):
        valid = valid & (jnp.diagonal(gram) < _LARGEST_SQUARE)
        gram = jnp.where(valid[:, None] & valid, gram, 0)

        def step(_, weights):
            product = stacked_lib.matvec(gram, weights)
            distances = jnp.sqrt(jnp.maximum(jnp.vdot(weights, product) - 2 * product + jnp.diagonal(gram), 0))
            pulls = jnp.where(valid, 1 / jnp.maximum(distances, smoothing), 0)
            return pulls / jnp.maximum(jnp.sum(pulls), jnp.finfo(pulls.dtype).tiny)

        return jax.lax.fori_loop(0, iterations, step, _start(init, gram, valid))

    # Zero is a point, which centring would move.
    return stacked_lib.from_distances(rule, center=init != "zero")


def mean_of_lowest(
    values: Float[Array, "K"], count: int | Int[Array, ""], valid: Bool[Array, "K"]
) -> Float[Array, "K"]:
    """Weights of the mean of the `count` valid rows with the lowest values, ties to the lower index.

    A value may be infinite. If fewer than `count` rows are valid all of them are averaged; if none is, weights are 0.
    """
    ranked = jnp.where(valid, jnp.minimum(values, jnp.finfo(values.dtype).max), jnp.inf)
    chosen = valid & (jnp.argsort(jnp.argsort(ranked)) < count)
    return chosen.astype(values.dtype) / jnp.maximum(jnp.sum(chosen), 1)


def sorted_rows(x: Float[Array, "K ..."]) -> Float[Array, "K ..."]:
    """Sorts along the first axis; few rows by minima and maxima of pairs of rows, which XLA fuses into one loop."""
    count = x.shape[0]
    if count > _NETWORK_ROWS:
        return jnp.sort(x, axis=0)
    rows = list(x)
    for i, j in _exchanges(count):
        rows[i], rows[j] = jnp.minimum(rows[i], rows[j]), jnp.maximum(rows[i], rows[j])
    return jnp.stack(rows)


def _mean_of_middle(stacked: PyTree, num_trimmed: int) -> PyTree:
    def leaf(x):
        rows = sorted_rows(jnp.where(jnp.isnan(x), jnp.inf, x))
        middle = rows[num_trimmed : x.shape[0] - num_trimmed]
        return jnp.mean(precision.wide(middle), axis=0).astype(x.dtype)

    return jax.tree.map(leaf, stacked)


def _exchanges(count: int) -> Iterator[tuple[int, int]]:
    """The pairs that a sorting network compares and exchanges: Batcher's merge exchange, for any count."""
    largest = 1 << (count - 1).bit_length() >> 1
    step = largest
    while step > 0:
        limit, remainder, distance = largest, 0, step
        while distance > 0:
            yield from ((i, i + distance) for i in range(count - distance) if i & step == remainder)
            distance, limit, remainder = limit - step, limit >> 1, step
        step >>= 1


def _start(init: str, gram: Float[Array, "K K"], valid: Bool[Array, "K"]) -> Float[Array, "K"]:
    """Coefficients of the first point."""
    if init == "majority":
        distances = stacked_lib.pairwise_sqdist(gram, valid)
        return _ball(jnp.maximum(distances, distances.T), valid)
    zeros = jnp.zeros(gram.shape[0], gram.dtype)
    return zeros if init == "zero" else mean_of_lowest(zeros, gram.shape[0], valid)


def _ball(distances: Float[Array, "K K"], valid: Bool[Array, "K"]) -> Float[Array, "K"]:
    """Weights of the mean of the smallest ball about a row that holds more than half of the valid rows.

    Radii are compared, not sums over all rows, in which a huge distance would round the others off. Two rows are often
    each on the rim of the other's ball; the smallest sum inside decides, so that the order of rows does not matter.
    """
    half = jnp.sum(valid) // 2
    ascending = jnp.sort(distances, axis=1)
    radii = jnp.take(ascending, half, axis=1)
    sums = jnp.sum(ascending, axis=1, where=jnp.arange(len(valid)) <= half)
    center = jnp.argmin(jnp.where(radii == jnp.min(radii), sums, jnp.inf))
    return mean_of_lowest(distances[center], half + 1, valid)
