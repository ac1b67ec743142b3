"""Contrast for embeddings with mined negatives: over the whole batch, over graded pairs, and when a negative is stale.

Conan-embedding: General Text Embedding with More and Better Negative Samples (2024, Li et al.). Its step holds both
tasks, on all devices, in fixed proportion: `mean(info_nce(...)) + 0.8 * cosent(...)`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from steelyard import choices
from steelyard.losses import checks, declare, margins, pairs


@declare.batch_dependent
def info_nce(
    queries: Float[Array, "batch d"],
    positives: Float[Array, "batch d"],
    negatives: Float[Array, "batch m d"] | None = None,
    *,
    temperature: float | Float[Array, ""] = 0.05,
    in_batch: bool = True,
    share_negatives: bool = False,
    where: Bool[Array, "batch"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, "batch"]:
    """Cross-entropy of finding the positive of a query among negatives.

        loss_i = log sum_c exp(s_ic) - s_i+,    s = cosine / temperature

    over the columns c: its own positive; those of the other queries if `in_batch`; its own negatives or, if
    `share_negatives`, those of all queries.

    Depends on the batch. Costs the products of queries and columns, never held all at once. Inside a `shard_map`,
    without `axis_name`, each device contrasts its own rows only, which are fewer negatives and a different loss; with
    it the positives, and the negatives if they are shared, are gathered from all devices, and gradients reach them
    there.

    Args:
      queries: one embedding for each example, of any length.
      positives: what is to be found, row by row.
      negatives: mined ones for each query; None is the same as m = 0.
      temperature: positive.
      in_batch: whether the positives of other queries are negatives.
      share_negatives: whether the negatives of other queries are.
      where: which rows count; the others are neither query, positive nor negative. None: all.
      axis_name: inside a `shard_map`, the mesh axis over which the rows are split.

    Returns:
      Nats per query, float32 at least; 0 for a masked query, and for one without any negative.

    Raises:
      ValueError: shapes that do not match, or `temperature` is not positive.

    Source: Conan-embedding (2024, Li et al.), cross-GPU batch balance loss; Representation Learning with Contrastive
    Predictive Coding (2018, van den Oord et al.).
    """
    choices.require_within("temperature", temperature, "(0, inf)")
    queries, positives = (margins.normalize(x) for x in checks.alike("queries", queries, "positives", positives))
    if queries.ndim != 2:
        raise ValueError(f"queries and positives have shape {queries.shape}: they must be [batch, d]")
    valid = pairs.valid_rows(where, len(queries))
    negatives = _unit_negatives(negatives, queries)
    columns = jnp.zeros((0, queries.shape[1]), queries.dtype), jnp.zeros(0, int), jnp.zeros(0, bool)
    numbers = pairs.row_numbers(len(queries), axis_name)
    if in_batch:
        columns = positives, numbers, valid
    if share_negatives:
        # They are nobody's own positive, which the number -1 says.
        shared = negatives.reshape(-1, queries.shape[1]), jnp.full(negatives[..., 0].size, -1)
        shared = *shared, jnp.repeat(valid, negatives.shape[1])
        columns = jax.tree.map(lambda *parts: jnp.concatenate(parts), columns, shared)
        negatives = negatives[:, :0]
    found, losses = _contrast(queries, positives, negatives, numbers, valid, temperature, columns, axis_name)
    return jnp.where(found, losses, 0)


def _contrast(queries, positives, negatives, numbers, valid, temperature, columns, axis_name):
    """Which queries have a negative, and their losses; those of other queries are columns (vectors, numbers, valid)."""
    vectors, column_numbers, column_valid = (pairs.gather_rows(x, axis_name) for x in columns)

    def of_rows(rows):
        queries, positives, negatives, numbers, valid = rows
        scores = [pairs.products(queries, vectors), pairs.products(queries[:, None], negatives)[:, 0]]
        masks = [column_valid & (numbers[:, None] != column_numbers), jnp.ones(scores[1].shape, bool)]
        mask = jnp.concatenate(masks, axis=1) & valid[:, None]
        rest = pairs.masked_logsumexp(jnp.concatenate(scores, axis=1) / temperature, mask)
        own = jnp.sum(queries * positives, axis=-1) / temperature
        # Not a difference of nearly equal numbers where the positive is found: log(1 + exp(rest - own)).
        return jnp.any(mask, axis=1), jax.nn.softplus(rest - own)

    rows = (queries, positives, negatives, numbers, valid)
    return pairs.by_rows(of_rows, rows, len(vectors) + negatives.shape[1])


def _unit_negatives(negatives: Float[Array, "batch m d"] | None, queries: Float[Array, "batch d"]) -> Array:
    n, d = queries.shape
    if negatives is None:
        return jnp.zeros((n, 0, d), queries.dtype)
    if jnp.ndim(negatives) != 3 or (negatives.shape[0], negatives.shape[2]) != (n, d):
        raise ValueError(
            f"negatives has shape {jnp.shape(negatives)} and queries {queries.shape}: "
            f"negatives must be ({n}, m, {d}), m for each query"
        )
    return margins.normalize(negatives)


@declare.batch_dependent
def cosent(
    similarity: Float[Array, "pairs"],
    targets: Float[Array, "pairs"],
    *,
    temperature: float | Float[Array, ""] = 0.05,
    where: Bool[Array, "pairs"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, ""]:
    """Pairs that should be more similar than others, but are not, cost.

        log(1 + sum_{a, b: target_a > target_b} exp((similarity_b - similarity_a) / temperature))

    One number for a set of pairs: only the order of their targets counts. Costs pairs times pairs, never held all at
    once. Inside a `shard_map`, without `axis_name`, each device compares its own pairs only, a different loss.

    Args:
      similarity: of the two parts of each pair, most often a cosine.
      targets: how similar they should be, on any scale.
      temperature: positive.
      where: which pairs count; None: all.
      axis_name: inside a `shard_map`, the mesh axis over which the pairs are split; the result is then that of all.

    Returns:
      Float32 at least; 0 if all targets are equal.

    Raises:
      ValueError: shapes that do not match, or `temperature` is not positive.

    Source: Conan-embedding: General Text Embedding with More and Better Negative Samples (2024, Li et al.), the loss of
    its STS task.
    """
    choices.require_within("temperature", temperature, "(0, inf)")
    similarity, _ = checks.alike("similarity", similarity, "targets", targets)
    if similarity.ndim != 1:
        raise ValueError(f"similarity and targets have shape {similarity.shape}: they must be [pairs]")
    targets = jnp.asarray(targets)
    valid = pairs.valid_rows(where, len(similarity))
    similarities, all_targets, all_valid = (pairs.gather_rows(x, axis_name) for x in (similarity, targets, valid))

    def of_rows(rows):
        similarity, targets, valid = (x[:, None] for x in rows)
        mask = (targets > all_targets) & valid & all_valid
        return jnp.any(mask, axis=1), pairs.masked_logsumexp((similarities - similarity) / temperature, mask)

    found, excess = pairs.by_rows(of_rows, (similarity, targets, valid), len(similarities))
    return _softplus_over(excess, found, axis_name)


def _softplus_over(x: Float[Array, "n"], found: Bool[Array, "n"], axis_name: str | None) -> Float[Array, ""]:
    """`log(1 + sum exp x)` over all that was found on all devices, the same number on each."""
    highest = jax.lax.stop_gradient(jnp.max(jnp.where(found, x, -jnp.inf), initial=-jnp.inf))
    highest = highest if axis_name is None else jax.lax.pmax(highest, axis_name)
    highest = jnp.where(jnp.isfinite(highest), highest, 0)
    sums = pairs.total(jnp.sum(jnp.where(found, jnp.exp(jnp.where(found, x - highest, 0)), 0)), axis_name)
    some = sums > 0
    return jnp.where(some, jax.nn.softplus(highest + jnp.log(jnp.where(some, sums, 1))), 0)


def stale_negatives(
    score: Float[Array, "*batch"],
    initial: Float[Array, "*batch"],
    *,
    ratio: float | Float[Array, ""] = 1.15,
    ceiling: float | Float[Array, ""] = 0.8,
) -> Bool[Array, "*batch"]:
    """Negatives that the model has learned to tell apart, so that harder ones should take their place.

        ratio score < initial  and  |score| < ceiling

    Args:
      score: similarity of query and negative by the model as it is.
      initial: the same when the negative was chosen.
      ratio: how far it must have fallen, positive.
      ceiling: a negative that scores as high as this is hard still, positive.

    Raises:
      ValueError: shapes that differ, a number out of its range.

    Source: Conan-embedding: General Text Embedding with More and Better Negative Samples (2024, Li et al.), dynamic
    hard negative mining; the paper looks every 100 steps.
    """
    choices.require_within("ratio", ratio, "(0, inf)")
    choices.require_within("ceiling", ceiling, "(0, inf)")
    score, initial = checks.alike("score", score, "initial", initial)
    return (ratio * score < initial) & (jnp.abs(score) < ceiling)
