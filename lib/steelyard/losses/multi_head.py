"""Contrast by several heads, each with a temperature of its own for every pair (2023, Wang et al.).

Adaptive Multi-head Contrastive Learning. A temperature is to a pair's similarity what a variance is to a Gaussian
error: it may grow where the pair is doubtful, and pays for that by its logarithm.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from steelyard import choices, precision
from steelyard.losses import checks, declare, pairs

Heads = Float[Array, "heads batch d"]


def adaptive_temperatures(
    a: Heads,
    b: Heads,
    *,
    lower: float | Float[Array, ""] = 0.05,
    upper: float | Float[Array, ""] = 1.0,
    axis_name: str | None = None,
) -> Float[Array, "heads batch all"]:
    """A bounded temperature for each head and pair, from features that the heads learn for it.

        t_hij = lower + (upper - lower) sigmoid(<a_hi, b_hj>)

    Args:
      a: features of the anchors, from a small network that the heads may share.
      b: features of what they are compared with.
      lower: the least temperature, positive.
      upper: the greatest, above `lower`.
      axis_name: inside a `shard_map`, the mesh axis over which the batch is split; the last axis is then that of all
        devices' rows.

    Returns:
      Float32 at least; (lower + upper) / 2 where the features are zero.

    Raises:
      ValueError: shapes that do not match, bounds out of order.

    Source: Adaptive Multi-head Contrastive Learning (2023, Wang et al.); the sigmoid between bounds is a reading of it.
    """
    choices.require_within("lower", lower, "(0, inf)")
    if not isinstance(lower, jax.core.Tracer):
        choices.require_within("upper", upper, f"({lower}, inf)")
    a, b = _heads("a", a, "b", b)
    return lower + (upper - lower) * jax.nn.sigmoid(pairs.products(a, _gather(b, axis_name)))


@declare.batch_dependent
def multi_head_contrastive(
    heads_a: Heads,
    heads_b: Heads,
    temperatures: Float[Array, "heads batch all"],
    *,
    regularizer: float | Float[Array, ""] = 0.1,
    where: Bool[Array, "batch"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, "batch"]:
    """Sum over the heads of the cross-entropy of finding an example's other view, and what its temperatures cost.

        loss_i = sum_h log sum_j exp(s_hij) - s_hii + regularizer mean_j (d/2 log t_hij + 1 / t_hij)
        s_hij = <a_hi, b_hj> / t_hij

    The gradient flows into the temperatures; what they cost is least at t = 2 / d. For a symmetric loss, add that of
    the views exchanged.

    Depends on the batch. Costs a product of batch times batch for each head, which is never held as a whole. Inside a
    `shard_map`, without `axis_name`, each device contrasts its own rows only, which are fewer negatives and a different
    loss; with it the rows of `heads_b` are gathered, as they must have been for the temperatures.

    Args:
      heads_a: embeddings of one view by each head, of length 1.
      heads_b: of the other view, row by row.
      temperatures: t, positive, for all pairs: `adaptive_temperatures(...)` with the same `axis_name`.
      regularizer: weight of the cost of the temperatures, at least 0.
      where: which rows count; the others are neither anchor, positive nor negative. None: all.
      axis_name: inside a `shard_map`, the mesh axis over which the batch is split.

    Returns:
      Nats per row of `heads_a`, float32 at least; 0 for a masked row.

    Raises:
      ValueError: shapes that do not match, `regularizer` is negative, a temperature is not positive.

    Source: Adaptive Multi-head Contrastive Learning (2023, Wang et al.); the constants are a reading of it.
    """
    choices.require_within("regularizer", regularizer, "[0, inf)")
    choices.require_within("temperatures", temperatures, "(0, inf)")
    a, b = _heads("heads_a", heads_a, "heads_b", heads_b)
    valid = pairs.valid_rows(where, a.shape[1])
    b, columns = _gather(b, axis_name), pairs.gather_rows(valid, axis_name)
    expected = (*a.shape[:2], b.shape[1])
    if jnp.shape(temperatures) != expected:
        raise ValueError(f"temperatures has shape {jnp.shape(temperatures)}: it must be {expected}, one for each pair")
    numbers = pairs.row_numbers(a.shape[1], axis_name)

    def of_head(a, b, temperatures):
        def of_rows(rows):
            a, temperatures, numbers = rows
            return _head(a, b, temperatures, numbers, columns)

        contrast, cost = pairs.by_rows(of_rows, (a, temperatures, numbers), len(b))
        return contrast + regularizer * cost

    return jnp.where(valid, jnp.sum(jax.vmap(of_head)(a, b, precision.wide(temperatures)), axis=0), 0)


def _head(a, b, temperatures, numbers, columns) -> tuple[Float[Array, "rows"], Float[Array, "rows"]]:
    """Of some rows and one head: the cross-entropies, and what the temperatures cost."""
    scores = pairs.products(a, b) / temperatures
    others = numbers[:, None] != jnp.arange(len(b))
    own = jnp.sum(jnp.where(others, 0, scores), axis=-1)
    mask = others & columns
    # Not a difference of nearly equal numbers where the positive is found: log(1 + exp(rest - own)).
    contrast = jax.nn.softplus(pairs.masked_logsumexp(scores, mask) - own)
    cost = a.shape[-1] / 2 * jnp.log(temperatures) + 1 / temperatures
    cost, _ = pairs.masked_mean(cost, jnp.broadcast_to(columns, cost.shape))
    return jnp.where(jnp.any(mask, axis=-1), contrast, 0), cost


def _heads(name_a: str, a: Heads, name_b: str, b: Heads) -> tuple[Heads, Heads]:
    a, b = checks.alike(name_a, a, name_b, b)
    if a.ndim != 3:
        raise ValueError(f"{name_a} and {name_b} have shape {a.shape}: they must be [heads, batch, d]")
    return a, b


def _gather(x: Heads, axis_name: str | None) -> Heads:
    """The rows of all devices, for each head."""
    return jax.vmap(functools.partial(pairs.gather_rows, axis_name=axis_name))(x)
