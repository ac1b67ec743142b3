"""Which examples meet in a batch, for losses that compare them.

Indices of examples in, indices of batches out.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from steelyard import choices
from steelyard.losses import checks


def binding_examples(labels: Int[Array, "n"], num_classes: int) -> Int[Array, "num_classes"]:
    """The index of the first example of each class: what `bind_batches` adds to every batch.

    Args:
      labels: of all training examples, in [0, num_classes).
      num_classes: how many there are. Each must have an example, which can be checked only if `labels` is not traced.

    Raises:
      ValueError: labels that are not a vector of integers, or out of range; a class without examples.

    >>> binding_examples(jnp.array([1, 1, 0, 2, 0]), 3).tolist()
    [2, 0, 3]
    """
    classes = choices.require_count("num_classes", num_classes, "[1, inf)")
    labels = _integers("labels", labels, 1)
    if not isinstance(labels, jax.core.Tracer):
        choices.require_within("labels", labels, f"[0, {classes})")
        missing = np.setdiff1d(np.arange(classes), labels)
        if missing.size:
            raise ValueError(f"class {missing[0]} of num_classes={classes} has no example in labels")
    return jax.ops.segment_min(jnp.arange(len(labels)), labels, classes)


def bind_batches(batches: Int[Array, "*steps batch"], binding: Int[Array, "bound"]) -> Int[Array, "*steps batch+bound"]:
    """Adds the same examples to every batch.

    A contrastive loss determines how classes lie to each other only if every pair of classes meets in some batch and
    the batches that hold examples of one class share some. One example of each class in all batches, as
    `binding_examples` chooses them, gives both. An example that was in the batch already is then in it twice.

    With data parallelism the examples must be in the global batch once: append them before it is cut, unless the loss
    is one of each device's rows alone.

    Args:
      batches: indices of examples, a batch in each row.
      binding: indices of the examples to add.

    Raises:
      ValueError: arrays that are not integers, `batches` a scalar, `binding` not a vector.

    Source: Symmetric Neural-Collapse Representations with Supervised Contrastive Loss: The Impact of ReLU and Batching
    (2023, Kini et al.).

    >>> bind_batches(jnp.array([[5, 6], [7, 8]]), jnp.array([0, 3])).tolist()
    [[5, 6, 0, 3], [7, 8, 0, 3]]
    """
    batches, binding = _integers("batches", batches), _integers("binding", binding, 1)
    if not batches.ndim:
        raise ValueError(f"batches has shape {batches.shape}: its last axis must be the examples of a batch")
    return jnp.concatenate([batches, jnp.broadcast_to(binding, (*batches.shape[:-1], len(binding)))], axis=-1)


def pk_batch(
    key: Key[Array, ""], labels: Int[Array, "n"], *, classes: int, per_class: int
) -> Int[Array, "classes*per_class"]:
    """A batch of P classes with K examples each: every anchor has K - 1 positives and (P - 1) K negatives.

    The classes are drawn alike, whatever their sizes, and without repetition; so are the examples of a class. A class
    with fewer than K repeats all of its examples equally often, up to one. May be traced and vmapped over keys; costs
    one sort of all labels.

    Args:
      key: of this batch.
      labels: of all training examples, any integers.
      classes: P, at most the number of different labels, which can be checked only if `labels` is not traced.
      per_class: K, at least 1.

    Returns:
      Indices of examples, those of a class together.

    Raises:
      ValueError: a number out of its range, labels that are not a vector of integers.

    Source: In Defense of the Triplet Loss for Person Re-Identification (2017, Hermans et al.), section 2.
    """
    labels = _integers("labels", labels, 1)
    traced = isinstance(labels, jax.core.Tracer)
    found = len(labels) if traced else len(np.unique(labels))
    classes = choices.require_count("classes", classes, f"[1, {found}]")
    per_class = choices.require_count("per_class", per_class, "[1, inf)")
    class_key, example_key = jax.random.split(key)
    # The examples of a class together, in random order.
    order = jnp.lexsort((jax.random.bits(example_key, labels.shape), labels))
    ordered = labels[order]
    is_first = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    _, starts = jax.lax.top_k(jnp.where(is_first, jax.random.uniform(class_key, labels.shape), -1), classes)
    sizes = jnp.sum(ordered == ordered[starts][:, None], axis=1)
    return order[starts[:, None] + jnp.arange(per_class) % sizes[:, None]].reshape(-1)


def _integers(name: str, values: Int[Array, "..."], ndim: int | None = None) -> Int[Array, "..."]:
    values = jnp.asarray(values)
    if ndim not in (None, values.ndim):
        raise ValueError(f"{name} has shape {values.shape}: it must have {ndim} axis")
    checks.require_integers(name, values)
    return values
