"""Surrogates of macro-AUC, the mean over labels of the area under the ROC curve.

They depend on the whole batch: fewer rows are fewer pairs of a positive and a negative, another loss. Under `jax.jit`
with sharded inputs they are those of the global batch. Inside a `shard_map`, pass `axis_name`, or they are those of
each device's rows alone.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from steelyard import choices
from steelyard.losses import checks, pairs
from steelyard.losses.declare import batch_dependent

Scores = Float[Array, "batch labels"]
Mask = Bool[Array, "batch labels"]
PerLabel = Float[Array, "labels"]
Rows = Bool[Array, "batch"] | None


@batch_dependent
def macro_auc_pairwise(
    scores: Scores, targets: Scores, *, surrogate: str = "logistic", where: Rows = None, axis_name: str | None = None
) -> PerLabel:
    """A surrogate of one minus AUC, label by label: the mean over all pairs of a positive and a negative.

        mean_{i positive, j negative} phi(s_i - s_j),   phi(d) = log(1 + exp(-d))   or   max(0, 1 - d)

    Costs batch^2 x labels evaluations of phi, and twice as many again for the gradient; the array of all of them is
    never held at once (`pairs.by_rows`).

    Args:
      scores: s, one column for each label; a constant added to a column changes nothing.
      targets: 1 for a positive, 0 for a negative.
      surrogate: phi, "logistic" or "hinge".
      where: the rows that count.
      axis_name: inside a `shard_map`, the mesh axis over which the rows are split.

    Returns:
      One number for each label, 0 if it has no positive or no negative; take the mean over the labels that have both.

    Raises:
      ValueError: an unknown surrogate, or shapes that do not match.

    Source: Towards Understanding Generalization of Macro-AUC in Multi-label Learning (2023, Wu et al.).
    """
    phi = _surrogate(surrogate)
    scores, positive, negative = _split(scores, targets, where)
    sums = _pair_sums(scores, positive, *(pairs.gather_rows(x, axis_name) for x in (scores, negative)), phi)
    count = _count(positive, axis_name) * _count(negative, axis_name)
    return _ratio(pairs.total(sums, axis_name), count)


@batch_dependent
def macro_auc_univariate(
    scores: Scores,
    targets: Scores,
    *,
    reweight: bool = False,
    surrogate: str = "logistic",
    where: Rows = None,
    axis_name: str | None = None,
) -> PerLabel:
    """A surrogate of one minus AUC, label by label, at a cost linear in the batch: every score against zero.

        1 / B (sum_{i positive} phi(s_i) + sum_{j negative} phi(-s_j))       B = number of rows
        mean_{i positive} phi(s_i) + mean_{j negative} phi(-s_j)             with `reweight`

    With `reweight` a rare label's few positives count as much as its many negatives, as they do in AUC.

    Arguments and errors are those of `macro_auc_pairwise`, and so is the source.

    Args:
      reweight: see above; without it the loss of a batch is the mean over its rows.

    Returns:
      One number for each label; with `reweight` 0 if it has no positive or no negative.
    """
    phi = _surrogate(surrogate)
    scores, *sides = _split(scores, targets, where)
    losses = phi(jnp.where(sides[0], scores, -scores))
    sums = [pairs.total(jnp.sum(jnp.where(side, losses, 0), axis=0), axis_name) for side in sides]
    counts = [_count(side, axis_name) for side in sides]
    if not reweight:
        return _ratio(sum(sums), sum(counts))
    both = (counts[0] > 0) & (counts[1] > 0)
    return jnp.where(both, _ratio(sums[0], counts[0]) + _ratio(sums[1], counts[1]), 0)


@jax.custom_jvp
def _logistic(gap: Float[Array, "..."]) -> Float[Array, "..."]:
    """`log(1 + exp(-gap))`."""
    return jax.nn.softplus(-gap)


# One function of the gap: what is derived from the softplus's own steps needs three arrays of pairs.
_logistic.defjvps(lambda tangent, value, gap: -jax.nn.sigmoid(-gap) * tangent)


def _surrogate(name: str) -> Callable[[Array], Array]:
    choices.require("surrogate", name, ("logistic", "hinge"))
    return _logistic if name == "logistic" else lambda gap: jax.nn.relu(1 - gap)


def _split(scores: Scores, targets: Scores, where: Rows) -> tuple[Scores, Mask, Mask]:
    """The scores, and which of them are of positives and of negatives."""
    scores, targets = checks.alike("scores", scores, "targets", targets)
    if scores.ndim != 2:
        raise ValueError(f"scores has shape {scores.shape}: it must be [batch, labels]")
    valid = pairs.valid_rows(where, len(scores))[:, None]
    is_positive = targets > 0.5
    return jnp.where(valid, scores, 0), valid & is_positive, valid & ~is_positive


def _pair_sums(
    scores: Scores, positive: Mask, others: Scores, negative: Mask, phi: Callable[[Array], Array]
) -> PerLabel:
    """Sum of `phi(s_i - s_j)` over the positives i of `scores` and the negatives j of `others`, label by label."""

    def of_rows(rows):
        own, counts = rows
        losses = jnp.where(negative, phi(own[:, None] - others), 0)
        return jnp.where(counts, jnp.sum(losses, axis=1), 0)

    return jnp.sum(pairs.by_rows(of_rows, (scores, positive), others.size), axis=0)


def _count(mask: Mask, axis_name: str | None) -> PerLabel:
    # As numbers: the pairs of a large batch are more than an int32 holds.
    return pairs.total(jnp.sum(mask, axis=0, dtype=jnp.float32), axis_name)


def _ratio(total: PerLabel, count: PerLabel) -> PerLabel:
    return total / jnp.maximum(count, 1)
