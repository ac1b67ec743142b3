"""Metric learning from pairs and triplets that a batch holds: the hardest, weighted by hardness, and mixed.

`optax.triplet_margin_loss` takes triplets that are given. The pair losses here take a table of similarities, whose
columns may be the batch, or what `metric_mixup` makes of it:

    mixed = metric_mixup(key, embeddings, labels)
    similarity = jnp.einsum("bd,bmd->bm", embeddings, mixed.embeddings)
    multi_similarity_loss(similarity, mixed.targets, where=mixed.valid)
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from steelyard import choices
from steelyard.losses import checks, declare, margins, pairs

Embeddings = Float[Array, "batch features"]
Labels = Int[Array, "batch"]
Table = Float[Array, "batch partners"]


@declare.batch_dependent
def batch_hard_triplet(
    embeddings: Embeddings,
    labels: Labels,
    *,
    margin: Literal["soft"] | float = "soft",
    squared: bool = False,
    where: Bool[Array, "batch"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, "batch"]:
    """For each anchor, its farthest positive against its nearest negative in the batch.

        p = max_{j != i, y_j = y_i} |x_i - x_j|,  n = min_{y_j != y_i} |x_i - x_j|
        log(1 + exp(p - n))  for the soft margin,  else  max(p - n + margin, 0)

    Batches of a few classes with a few examples each (`examples.pk_batch`) give every anchor both. Microbatches hold
    fewer candidates and give another loss; so does a `shard_map` without `axis_name`, where each shard is mined alone:
    what is hardest then changes with the number of devices. Costs batch x batch distances forwards, never held all at
    once, and none backwards: the gradient passes through the two distances that were chosen.

    Args:
      embeddings: x, not normalised in the paper.
      labels: y, any integers.
      margin: "soft", or the margin of a hinge in units of the distance, not negative.
      squared: whether distances are squared. If not, 1e-12 is added under the root.
      where: the examples that count, the others are no anchors and in no triplet; None: all.
      axis_name: inside a `shard_map`, the mesh axis over which the batch is split: candidates are those of all devices.

    Returns:
      One number for each anchor, float32 at least; 0, with zero gradient, for one without a positive or a negative.

    Raises:
      ValueError: shapes that do not match, labels that are not integers, or an unknown or negative margin.

    Source: In Defense of the Triplet Loss for Person Re-Identification (2017, Hermans, Beyer, Leibe), section 2.
    """
    if isinstance(margin, str):
        choices.require("margin", margin, ("soft",))
    else:
        choices.require_within("margin", margin, "[0, inf)")
    embeddings, labels = checks.rows(embeddings, labels=labels), jnp.asarray(labels)
    valid = pairs.valid_rows(where, len(labels))
    embeddings = jnp.where(valid[:, None], embeddings, 0)
    numbers = pairs.row_numbers(len(labels), axis_name)
    own = embeddings, labels, valid, numbers
    columns = [pairs.gather_rows(x, axis_name) for x in own]

    def hardest(rows):
        """The farthest positive and the nearest negative of some anchors, and whether there are both."""
        (x, y, counts, i), (all_x, all_y, all_count, all_i) = rows, columns
        positive, negative = (counts[:, None] & all_count & mask for mask in _candidates(y, i, all_y, all_i))
        distances = pairs.pairwise_distances(x, all_x, squared=True)
        far = jnp.argmax(jnp.where(positive, distances, -jnp.inf), axis=1)
        near = jnp.argmin(jnp.where(negative, distances, jnp.inf), axis=1)
        return far, near, jnp.any(positive, axis=1) & jnp.any(negative, axis=1)

    farthest, nearest, found = pairs.by_rows(hardest, jax.lax.stop_gradient(own), len(columns[0]))
    far, near = (_distances(embeddings, columns[0][chosen], squared) for chosen in (farthest, nearest))
    gap = jax.nn.softplus(far - near) if isinstance(margin, str) else jnp.maximum(far - near + margin, 0)
    return jnp.where(found, gap, 0)


def contrastive_pair_loss(
    similarity: Table, targets: Table, *, margin: float = 0.5, where: Bool[Array, "batch partners"] | None = None
) -> Float[Array, "batch"]:
    """Pulls partners close by as much as they are positive, and pushes away those that are too near as they are not.

        sum_m  -y_m s_m + (1 - y_m) max(s_m - margin, 0)

    Args:
      similarity: s, of each anchor to its partners, such as cosines.
      targets: y, in [0, 1]: 1 for a positive, 0 for a negative, between for a mixture.
      margin: similarity below which a negative is left alone.
      where: the pairs that count; None: all.

    Returns:
      One number for each anchor, float32 at least; 0 without pairs.

    Raises:
      ValueError: shapes that do not match, targets out of range (unless traced).

    Source: It Takes Two to Tango: Mixup for Deep Metric Learning (2021, Venkataramanan et al.).
    """

    def of_rows(rows):
        s, y, where = rows
        terms = -y * s + (1 - y) * jnp.maximum(s - margin, 0)
        return jnp.sum(jnp.where(where, terms, 0), axis=-1)

    return _over_table(of_rows, similarity, targets, where)


def multi_similarity_loss(
    similarity: Table,
    targets: Table,
    *,
    positive_scale: float = 18.0,
    negative_scale: float = 75.0,
    margin: float = 0.77,
    where: Bool[Array, "batch partners"] | None = None,
) -> Float[Array, "batch"]:
    """Pulls and pushes every partner, the harder the more, by as much as it is positive or negative.

        1/b log(1 + sum_m y_m exp(-b (s_m - margin)))  +  1/g log(1 + sum_m (1 - y_m) exp(g (s_m - margin)))

    Args:
      similarity, targets, where: as in `contrastive_pair_loss`, as are the result and other errors.
      positive_scale: b, positive; a large one leaves the least similar positive alone to count.
      negative_scale: g, likewise for the most similar negative.
      margin: similarity at which a pair starts to count.

    Raises:
      ValueError: a scale that is not positive.

    Source: It Takes Two to Tango: Mixup for Deep Metric Learning (2021, Venkataramanan et al.).
    """
    choices.require_within("positive_scale", positive_scale, "(0, inf)")
    choices.require_within("negative_scale", negative_scale, "(0, inf)")

    def of_rows(rows):
        s, y, where = rows
        pull = _log_one_plus_sum(-positive_scale * (s - margin), jnp.where(where, y, 0))
        push = _log_one_plus_sum(negative_scale * (s - margin), jnp.where(where, 1 - y, 0))
        return pull / positive_scale + push / negative_scale

    return _over_table(of_rows, similarity, targets, where)


class Mixed(NamedTuple):
    """Partners of each anchor that are partly positive.

    Attributes:
      embeddings: of length 1.
      targets: the share of the positive, in [0, 1], the same number throughout.
      valid: False for an anchor without a positive or a negative in the batch.
    """

    embeddings: Float[Array, "batch pairs features"]
    targets: Float[Array, "batch pairs"]
    valid: Bool[Array, "batch pairs"]


def metric_mixup(
    key: Key[Array, ""], embeddings: Embeddings, labels: Labels, *, pairs: int = 4, concentration: float = 2.0
) -> Mixed:
    """Mixes, for each anchor, a positive with a negative: between the two a pair's label is a number in [0, 1].

        normalize(lam positive + (1 - lam) negative),  target lam,  lam ~ Beta(concentration, concentration)

    Negatives, and positives other than the anchor, are drawn uniformly, with replacement; for half of all batches the
    positive is the anchor itself. There is one lam for a batch. In the paper the loss of these partners is added to
    that of the batch with weight 0.4. Inside a `shard_map` each shard mixes its own rows. Costs batch x pairs x
    features, and a matrix [batch, batch].

    Args:
      key: for the draws.
      embeddings: of length 1; the result is differentiable with respect to them.
      labels: any integers.
      pairs: how many partners each anchor gets, at least 1.
      concentration: positive; a larger one draws lam nearer to 1/2.

    Returns:
      Float32 at least.

    Raises:
      ValueError: a number out of its range, shapes that do not match, labels that are not integers.

    Source: It Takes Two to Tango: Mixup for Deep Metric Learning (2021, Venkataramanan et al.); that the positive is
    the anchor in half of the batches is a reading of it.
    """
    pairs = choices.require_count("pairs", pairs, "[1, inf)")
    choices.require_within("concentration", concentration, "(0, inf)")
    embeddings, labels = checks.rows(embeddings, labels=labels), jnp.asarray(labels)
    anchors = jnp.arange(len(labels))
    positive, negative = _candidates(labels, anchors, labels, anchors)
    keys = jax.random.split(key, 4)
    with_anchor = jax.random.bernoulli(keys[0])
    pull, push = (
        jnp.where(with_anchor, anchors[:, None], _draw(keys[1], positive, pairs)),
        _draw(keys[2], negative, pairs),
    )
    lam = jax.random.beta(keys[3], concentration, concentration, dtype=embeddings.dtype)
    mixture = lam * embeddings[pull] + (1 - lam) * embeddings[push]
    valid = jnp.any(positive, axis=1) & jnp.any(negative, axis=1)
    shape = mixture.shape[:-1]
    return Mixed(margins.normalize(mixture), jnp.broadcast_to(lam, shape), jnp.broadcast_to(valid[:, None], shape))


def utilization(queries: Float[Array, "n features"], examples: Float[Array, "m features"]) -> Float[Array, ""]:
    """Mean over the queries of the squared distance to the nearest example: the lower, the better they are covered.

    Args:
      queries: embeddings of test examples.
      examples: embeddings that were trained on, mixed ones among them. Costs a matrix [n, m].

    Raises:
      ValueError: shapes that do not match.

    Source: It Takes Two to Tango: Mixup for Deep Metric Learning (2021, Venkataramanan et al.), section 4.
    """
    shapes = jnp.shape(queries), jnp.shape(examples)
    if not len(shapes[0]) == len(shapes[1]) == 2 or shapes[0][1] != shapes[1][1]:
        raise ValueError(f"queries has shape {shapes[0]} and examples {shapes[1]}: both must be [n, features]")
    return jnp.mean(jnp.min(pairs.pairwise_distances(queries, examples, squared=True), axis=1))


def _candidates(
    labels: Labels, numbers: Labels, row_labels: Int[Array, "all"], row_numbers: Int[Array, "all"]
) -> tuple[Bool[Array, "batch all"], Bool[Array, "batch all"]]:
    """The positives of each anchor, itself excluded, and its negatives."""
    same = labels[:, None] == row_labels
    return same & (numbers[:, None] != row_numbers), ~same


def _distances(a: Embeddings, b: Embeddings, squared: bool) -> Float[Array, "batch"]:
    squares = jnp.sum((a - b) ** 2, axis=-1)
    return squares if squared else jnp.sqrt(squares + 1e-12)


def _over_table(
    of_rows: Callable, similarity: Table, targets: Table, where: Bool[Array, "batch partners"] | None
) -> Float[Array, "batch"]:
    """`of_rows` on the similarities, targets and truth values of some anchors at a time."""
    similarity, targets = checks.alike("similarity", similarity, "targets", targets)
    choices.require_within("targets", targets, "[0, 1]")
    where = None if where is None else jnp.asarray(where)
    if where is not None and where.shape != similarity.shape:
        raise ValueError(f"where has shape {where.shape} and similarity {similarity.shape}: they must be the same")

    def of_some(rows):
        s, y, where = rows
        return of_rows((s, y, jnp.ones(s.shape, bool) if where is None else where))

    return pairs.by_rows(of_some, (similarity, targets, where), similarity.shape[-1])


def _log_one_plus_sum(x: Table, weights: Table) -> Float[Array, "batch"]:
    """`log(1 + sum w exp(x))` over the last axis, for any size of x."""
    # An entry without weight must not decide the shift: the others would vanish beside it, or it would overflow.
    x = jnp.where(weights > 0, x, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(x, axis=-1, initial=0))
    return top + jnp.log(jnp.exp(-top) + jnp.sum(weights * jnp.exp(x - top[..., None]), axis=-1))


def _draw(key: Key[Array, ""], mask: Bool[Array, "batch all"], count: int) -> Int[Array, "batch count"]:
    """For each row, positions drawn uniformly from where the mask is True; the last one if it is so nowhere."""
    positions = jnp.cumsum(mask, axis=1)
    ranks = jax.random.randint(key, (len(mask), count), 0, jnp.maximum(positions[:, -1:], 1))
    found = jnp.sum(positions[:, None, :] <= ranks[..., None], axis=-1)
    return jnp.minimum(found, mask.shape[1] - 1)
