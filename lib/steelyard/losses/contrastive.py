"""Contrast with the other rows of a batch that share a label, and with those that do not.

These losses depend on the whole batch: fewer rows are fewer pairs, another loss. Under `jax.jit` with sharded inputs a
loss is that of the global batch. Inside a `shard_map`, pass `axis_name`, or it is that of each device's rows alone.

The inner products of all pairs are never held at once: see `pairs.by_rows`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from steelyard import choices
from steelyard.losses import checks, margins, pairs
from steelyard.losses.declare import batch_dependent


def relu_normalize(x: Float[Array, "..."], *, axis: int = -1, eps: float = 1e-12) -> Float[Array, "..."]:
    """Unit vectors without negative entries, `normalize(max(x, 0))`; one without positive entries becomes zero.

    Supervised contrastive learning of such embeddings makes the classes orthogonal, however unequal their sizes; a row
    that has become zero has no gradient any more.

    Args:
      x: vectors along `axis`.
      axis: which.
      eps: the least squared length that is divided by, positive.

    Returns:
      Float32 at least.

    Raises:
      ValueError: `eps` is not positive.

    Source: Symmetric Neural-Collapse Representations with Supervised Contrastive Loss: The Impact of ReLU and Batching
    (2023, Kini et al.).
    """
    return margins.normalize(jax.nn.relu(x), axis, eps)


@batch_dependent
def supervised_contrastive(
    embeddings: Float[Array, "batch features"],
    labels: Int[Array, "batch"],
    *,
    temperature: float = 0.1,
    where: Bool[Array, "batch"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, "batch"]:
    """How much less an anchor resembles the rows of its class than all others.

        s_ij = x_i . x_j / temperature
        loss_i = logsumexp_{j != i} s_ij - mean_{j != i, y_j = y_i} s_ij

    Zero for an anchor without a row of its class besides itself. No factor of the temperature is added.

    Args:
      embeddings: x, taken as they are: `normalize` or `relu_normalize` them.
      labels: y, any integers.
      temperature: positive.
      where: the rows that count; the others are neither anchors nor positives nor negatives, and their loss is 0.
      axis_name: inside a `shard_map`, the mesh axis over which the rows are split.

    Returns:
      One number for each (local) row, float32 at least.

    Raises:
      ValueError: shapes that do not match, labels that are not integers, a temperature that is not positive.

    Source: Supervised Contrastive Learning (2020, Khosla et al.), equation 2.
    """
    choices.require_within("temperature", temperature, "(0, inf)")
    embeddings = checks.rows(embeddings, labels=labels)

    def of_rows(products, others, same):
        return _contrast(products / temperature, others & same["labels"], others)

    return _by_rows(of_rows, embeddings, {"labels": labels}, where, axis_name)


def supervised_contrastive_bound(labels: Int[Array, "batch"], *, temperature: float = 0.1) -> Float[Array, "batch"]:
    """What `supervised_contrastive` is at least, anchor by anchor, for unit embeddings without negative entries.

        log(n - 1 + (B - n) exp(-1 / temperature)),   n = number of rows with the anchor's label

    Attained if and only if all classes are single points, orthogonal to each other. 0 for n = 1, where the loss is 0.

    Args:
      labels: of the B rows of a batch, any integers.
      temperature: positive.

    Returns:
      Float32 numbers.

    Raises:
      ValueError: labels that are not integers or not a vector, a temperature that is not positive.

    Source: Symmetric Neural-Collapse Representations with Supervised Contrastive Loss: The Impact of ReLU and Batching
    (2023, Kini et al.).
    """
    choices.require_within("temperature", temperature, "(0, inf)")
    checks.require_integers("labels", labels)
    if jnp.ndim(labels) != 1:
        raise ValueError(f"labels has shape {jnp.shape(labels)}: it must be a vector, one number for each row")
    labels = jnp.asarray(labels)
    size = jnp.sum(labels[:, None] == labels, axis=1).astype(jnp.float32)
    repeated = size > 1
    terms = size - 1 + (len(size) - size) * jnp.exp(-1 / temperature)
    return jnp.where(repeated, jnp.log(jnp.where(repeated, terms, 1)), 0)


@batch_dependent
def subclass_contrastive(
    embeddings: Float[Array, "rows features"],
    labels: Int[Array, "rows"],
    subclasses: Int[Array, "rows"],
    instances: Int[Array, "rows"],
    *,
    temperature: float = 0.1,
    class_temperature: float | Float[Array, "rows"] | None = None,
    class_weight: float = 0.25,
    where: Bool[Array, "rows"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, "rows"]:
    """Contrast between subclasses of similar sizes, then, weaker, between classes.

        s = x x^T,   O: all rows but i,   S: those of its subclass,   C: of its class,   V: of its instance
        fine_i   = logsumexp_O s_ij / t - mean_S s_ij / t
        coarse_i = logsumexp_{V + (O - S)} s_ij / t2 - mean_{V + (C - S)} s_ij / t2
        loss_i   = fine_i + class_weight coarse_i

    where + is a union and - leaves rows out. A large class is cut into clusters as large as the small classes
    (`examples.subclass_count`, `examples.balanced_clusters`), so that it does not outweigh them. A term is zero for an
    anchor without a positive in it.

    Args:
      embeddings: x, unit vectors; a row is a view of an instance, such as one augmentation of an image.
      labels: classes, any integers.
      subclasses: any integers; a subclass is a pair of label and subclass, so that every class may count from 0.
      instances: any integers, equal for the views of one instance.
      temperature: t, positive.
      class_temperature: t2, a number or one for each (local) row, `examples.cluster_temperatures(...)[labels]`;
        positive. None: t.
      class_weight: of the coarse term, at least 0.
      where: the rows that count; the others are neither anchors nor positives nor negatives, and their loss is 0.
      axis_name: inside a `shard_map`, the mesh axis over which the rows are split.

    Returns:
      One number for each (local) row, float32 at least.

    Raises:
      ValueError: shapes that do not match, labels that are not integers, a number out of its range.

    Source: Subclass-balancing Contrastive Learning for Long-tailed Recognition (2023, Hou et al.).
    """
    choices.require_within("temperature", temperature, "(0, inf)")
    choices.require_within("class_weight", class_weight, "[0, inf)")
    ids = {"labels": labels, "subclasses": subclasses, "instances": instances}
    embeddings = checks.rows(embeddings, **ids)
    coarse_temperature = _per_row(temperature if class_temperature is None else class_temperature, len(embeddings))

    def of_rows(products, others, same, coarse_temperature):
        same_subclass = same["labels"] & same["subclasses"]
        views, elsewhere = others & same["instances"], others & ~same_subclass
        fine = _contrast(products / temperature, others & same_subclass, others)
        positives = views | (elsewhere & same["labels"])
        coarse = _contrast(products / coarse_temperature[:, None], positives, views | elsewhere)
        return fine + class_weight * coarse

    return _by_rows(of_rows, embeddings, ids, where, axis_name, coarse_temperature)


def _by_rows(of_rows, embeddings, ids, where, axis_name, *more) -> Float[Array, "n"]:
    """`of_rows(products, others, same, *more)` of some rows at a time, each paired with the rows of all devices.

    `products` are inner products, `others` says which pairs are of two different rows that count, and `same` which
    agree in each of the ids; `more` are arrays with something for each row.
    """
    valid = pairs.valid_rows(where, len(embeddings))
    # What is in the rows that do not count must not reach the gradient of the others, not even as 0 times NaN.
    x = jnp.where(valid[:, None], embeddings, 0)
    own = x, valid, pairs.row_numbers(len(x), axis_name), jax.tree.map(jnp.asarray, ids)
    all_x, all_valid, all_numbers, all_ids = jax.tree.map(lambda a: pairs.gather_rows(a, axis_name), own)

    def of_some(rows):
        (x, valid, numbers, ids), more = rows
        others = valid[:, None] & all_valid & (numbers[:, None] != all_numbers)
        same = jax.tree.map(lambda a, b: a[:, None] == b, ids, all_ids)
        return of_rows(pairs.products(x, all_x), others, same, *more)

    return pairs.by_rows(of_some, (own, more), len(all_x))


def _contrast(
    scores: Float[Array, "n m"], positives: Bool[Array, "n m"], others: Bool[Array, "n m"]
) -> Float[Array, "n"]:
    mean, found = pairs.masked_mean(scores, positives)
    return jnp.where(found, pairs.masked_logsumexp(scores, others) - mean, 0)


def _per_row(temperature: float | Float[Array, "n"], n: int) -> Float[Array, "n"]:
    choices.require_within("class_temperature", temperature, "(0, inf)")
    return jnp.broadcast_to(checks.number_or("class_temperature", temperature, (n,)), (n,))
