"""Losses of one classification that add something to cross-entropy, or take its place."""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from steelyard import choices
from steelyard.losses import checks, margins

Logits = Float[Array, "*batch classes"]
Labels = Int[Array, "*batch"]
PerExample = Float[Array, "*batch"]


def squentropy(logits: Logits, labels: Labels) -> PerExample:
    """Cross-entropy plus the mean square of the other classes' logits; there is nothing to tune.

        -log softmax(z)_y + 1 / (C - 1) sum_{j != y} z_j^2

    The logits matter themselves and not only their differences: do not centre them. Where classes are rare the square
    holds their logits at zero, in all the examples of the others: on long-tailed data cross-entropy is better.

    Costs a sum over the logits more than cross-entropy.

    Args:
      logits: z, finite; the C >= 2 classes are the last axis.
      labels: y, in [0, C).

    Returns:
      At least 0.

    Raises:
      ValueError: one class only, shapes that do not match, a label out of range (unless traced).

    Source: Cut your Losses with Squentropy (2023, Hui, Belkin and Wright).
    """
    logits, labels = checks.labelled(logits, labels)
    classes = logits.shape[-1]
    if classes < 2:
        raise ValueError(
            f"logits has shape {logits.shape}: squentropy needs at least 2 classes, it is a mean over the others"
        )
    others = jnp.where(margins.label_mask(labels, classes), 0, logits)
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return cross_entropy + jnp.sum(others**2, axis=-1) / (classes - 1)


def rescaled_square_loss(
    logits: Logits, labels: Labels, *, true_weight: float = 1.0, target: float = 1.0
) -> PerExample:
    """Mean square of the distance to `target` at the label's class and to zero at the others, without a softmax.

        1 / C (true_weight (z_y - target)^2 + sum_{j != y} z_j^2)

    With many classes the sum of the others drowns the label's term; its weight and a far target bring it back.

    Costs no more than cross-entropy, and no exponentials.

    Args:
      logits: z, the C classes are the last axis.
      labels: y, in [0, C).
      true_weight: of the label's class, at least 0.
      target: of the label's logit.

    Returns:
      At least 0.

    Raises:
      ValueError: a number out of its range, shapes that do not match, a label out of range (unless traced).

    Source: Cut your Losses with Squentropy (2023, Hui, Belkin and Wright), where it is what is compared with.
    """
    choices.require_within("true_weight", true_weight, "[0, inf)")
    choices.require_within("target", target, "(-inf, inf)")
    logits, labels = checks.labelled(logits, labels)
    is_label = margins.label_mask(labels, logits.shape[-1])
    return jnp.mean(jnp.where(is_label, true_weight * (logits - target) ** 2, logits**2), axis=-1)


def encouraging_loss(logits: Logits, labels: Labels, *, log_end: float = 0.75) -> PerExample:
    """Cross-entropy plus a bonus by which examples that are right already go on to be rewarded.

        -log p + bonus(p),   p = softmax(z)_y
        bonus(p) = log(1 - p)                                           for p <= log_end
                   log(1 - log_end) - (p - log_end) / (1 - log_end)     beyond, the tangent there

    Up to `log_end` the derivative by the label's logit is -1, however good the prediction. With `log_end=1` the bonus
    never ends and the loss has no lower bound: it falls with the margin of the label, as far as that goes.

    Costs what cross-entropy costs.

    Args:
      logits: z, the classes are the last axis.
      labels: y.
      log_end: the probability from which the bonus is straight, in (0, 1], a Python number.

    Returns:
      Of any sign.

    Raises:
      ValueError: `log_end` out of its range, shapes that do not match, a label out of range (unless traced).

    Source: Well-classified Examples are Underestimated in Classification with Deep Neural Networks (2021, Zhao et al.).
    """
    choices.require_within("log_end", log_end, "(0, 1]")
    logits, labels = checks.labelled(logits, labels)
    odds = margins.log_odds(logits, labels)
    # Below the end -log p + log(1 - p) is minus the log-odds, exactly.
    if log_end == 1:
        return -odds
    p = jax.nn.sigmoid(odds)
    tangent = math.log1p(-log_end) - (p - log_end) / (1 - log_end)
    return jnp.where(p <= log_end, -odds, jax.nn.softplus(-odds) + tangent)
