"""Weights for classes of very different sizes: of their examples, and of the classifier's columns."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from steelyard import choices, precision
from steelyard.losses import checks, margins, pairs


def class_counts(
    labels: Int[Array, "*batch"],
    num_classes: int,
    *,
    where: Bool[Array, "*batch"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, "classes"]:
    """How many examples each class has.

    Args:
      labels: classes, in [0, num_classes).
      num_classes: how many there are.
      where: which examples count; None: all.
      axis_name: inside a `shard_map`, the mesh axis over which the examples are split: counts are then of all.

    Returns:
      Float32 numbers.

    Raises:
      ValueError: labels that are not integers, out of range (unless traced), or of another shape than `where`.
    """
    labels = jnp.asarray(labels)
    checks.check_labels(labels, choices.require_count("num_classes", num_classes, "[1, inf)"))
    ones = jnp.ones(labels.shape, jnp.float32)
    if where is not None:
        where = jnp.asarray(where)
        if where.shape != labels.shape:
            raise ValueError(f"where has shape {where.shape} and labels {labels.shape}: they must be the same")
        ones = ones * where
    hits = jnp.where(margins.label_mask(labels, num_classes), ones[..., None], 0)
    return pairs.total(jnp.sum(hits, axis=range(labels.ndim)), axis_name)


def class_weights(
    counts: Float[Array, "classes"],
    *,
    kind: Literal["none", "inverse", "effective_number"] = "effective_number",
    beta: float = 0.9999,
    power: float = 1.0,
    normalize: bool = True,
) -> Float[Array, "classes"]:
    """Weights of the classes, greater for those with fewer examples.

        none:             1
        inverse:          n_c^-power
        effective_number: (1 - beta) / (1 - beta^n_c)

    For `loss = mean(class_weights(counts)[labels] * per_example)`: the mean divides by the number of examples, not by
    the weights of the batch. A class without examples gets weight 0.

    Args:
      counts: n, not negative.
      kind: see above.
      beta: in [0, 1); 0 weighs all classes alike, beta near 1 tends to "inverse".
      power: 1/2 is the inverse square root.
      normalize: whether the weights are made to sum to the number of classes that have examples.

    Returns:
      Float32 at least.

    Raises:
      ValueError: an unknown kind, a number out of its range, counts that are not one number for each class.

    Source: Class-Balanced Loss Based on Effective Number of Samples (2019, Cui et al.), section 4.
    """
    choices.require("kind", kind, ("none", "inverse", "effective_number"))
    choices.require_within("beta", beta, "[0, 1)")
    choices.require_within("counts", counts, "[0, inf)")
    counts = precision.wide(counts)
    if counts.ndim != 1:
        raise ValueError(f"counts has shape {counts.shape}: it must be one number for each class")
    found = counts > 0
    safe = jnp.where(found, counts, 1)
    if kind == "none":
        weights = jnp.ones_like(safe)
    elif kind == "inverse":
        weights = safe**-power
    else:
        weights = (1 - beta) / -jnp.expm1(safe * _log(beta))
    weights = jnp.where(found, weights, 0)
    if normalize:
        weights = weights * jnp.sum(found) / jnp.maximum(jnp.sum(weights), jnp.finfo(weights.dtype).tiny)
    return weights


def softmax_focal_loss(
    logits: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    *,
    gamma: float = 2.0,
    alpha: Float[Array, "classes"] | None = None,
) -> Float[Array, "*batch"]:
    """Cross-entropy that counts examples the less, the better they are classified.

        -alpha_y (1 - p_y)^gamma log p_y,  p = softmax(z)

    p_y is a sigmoid of `m = z_y - logsumexp_{k != y} z_k`: the loss is a function of m alone, made by one logsumexp, as
    cross-entropy is. For independent binary predictions, as in the paper, there is
    `sigmoid_focal_loss(logits, labels, alpha=0.25, gamma=2.0)`.

    Args:
      logits: z, the classes are the last axis.
      labels: y.
      gamma: at least 0; 0 is cross-entropy.
      alpha: one number for each class; None: 1.

    Returns:
      One number for each example, in nats.

    Raises:
      ValueError: `gamma` is negative, shapes that do not match, or a label out of range (unless traced).

    Source: Focal Loss for Dense Object Detection (2017, Lin et al.), section 3.
    """
    choices.require_within("gamma", gamma, "[0, inf)")
    logits, labels = checks.labelled(logits, labels)
    classes = logits.shape[-1]
    alpha = None if alpha is None else checks.number_or("alpha", alpha, (classes,)).astype(logits.dtype)
    lead = margins.log_odds(logits, labels)
    losses = jnp.exp(gamma * jax.nn.log_sigmoid(-lead)) * jax.nn.softplus(-lead)
    if alpha is not None:
        losses = losses * jnp.broadcast_to(alpha, (classes,))[labels]
    return losses.astype(logits.dtype)


def deferred(
    step: Int[Array, ""] | int, *, start: int, before: Float[Array, "..."] | float, after: Float[Array, "..."] | float
) -> Float[Array, "..."]:
    """What changes once in training: `before` until step `start`, `after` from there on.

    Deferred re-weighting learns features with equal weights and then the decision with those of the classes:
    `deferred(step, start=0.8 * steps, before=1.0, after=class_weights(counts))`.

    Args:
      step: from 0.
      start: the first step of the new value, at least 0.
      before: weights or margins.
      after: the same, of a shape that broadcasts with `before`.

    Raises:
      ValueError: `start` is negative, or shapes do not broadcast.

    Source: Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss (2019, Cao et al.), algorithm 1.
    """
    choices.require_within("start", start, "[0, inf)")
    return jnp.where(jnp.asarray(step) >= start, precision.wide(after), precision.wide(before))


def tau_normalize(kernel: Float[Array, "features classes"], *, tau: float = 1.0) -> Float[Array, "features classes"]:
    """Takes from a trained classifier the lengths of its columns, which grow with the sizes of the classes.

        w_c / |w_c|^tau

    Args:
      kernel: w; a zero column stays zero.
      tau: 0 leaves the kernel alone, 1 makes all lengths 1; chosen on validation data.

    Returns:
      A kernel of the same dtype.

    Raises:
      ValueError: `tau` is negative, or the kernel is no matrix.

    Source: Decoupling Representation and Classifier for Long-Tailed Recognition (2020, Kang et al.), section 4.
    """
    choices.require_within("tau", tau, "[0, inf)")
    columns = precision.wide(_matrix(kernel))
    squares = jnp.sum(columns * columns, axis=0)
    safe = jnp.where(squares > 0, squares, 1)
    return (columns * safe ** (-tau / 2)).astype(kernel.dtype)


def max_norm(
    kernel: Float[Array, "features classes"], *, radius: float | Float[Array, "classes"]
) -> Float[Array, "features classes"]:
    """Shortens the columns of a classifier that are longer than `radius`: `w_c min(1, radius / |w_c|)`.

    A projection, for after every step.

    Args:
      kernel: w.
      radius: positive, a number or one for each class.

    Returns:
      A kernel of the same dtype.

    Raises:
      ValueError: `radius` is not positive or of another shape, or the kernel is no matrix.

    Source: Long-Tailed Recognition via Weight Balancing (2022, Alshammari et al.), section 4.
    """
    choices.require_within("radius", radius, "(0, inf)")
    columns = precision.wide(_matrix(kernel))
    radii = checks.number_or("radius", radius, (columns.shape[1],)).astype(columns.dtype)
    radii = jnp.broadcast_to(radii, columns.shape[1:])
    shortened = jax.vmap(optax.projections.projection_l2_ball, (1, 0), 1)(columns, radii)
    return shortened.astype(kernel.dtype)


def _log(beta: float) -> float | Float[Array, ""]:
    """Of a Python number in 64 bits: near 1 it has few digits in 32."""
    if isinstance(beta, int | float):
        return math.log(beta) if beta else -math.inf
    return jnp.log(precision.wide(beta))


def _matrix(kernel: Float[Array, "features classes"]) -> Float[Array, "features classes"]:
    if jnp.ndim(kernel) != 2:
        raise ValueError(f"kernel has shape {jnp.shape(kernel)}: it must be (features, classes)")
    return kernel
