"""Cross-entropy and predictions with logits moved by the sizes of the classes.

Each is vectors made of the class counts, `adjust_logits`, and cross-entropy, at the cost of cross-entropy. A count of
zero is refused; where counts are traced it cannot be, and its logarithm is -inf.
"""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from steelyard import choices
from steelyard.losses import checks, margins

Logits = Float[Array, "*batch classes"]
Labels = Int[Array, "*batch"]
Counts = Float[Array, "classes"]
PerExample = Float[Array, "*batch"]


def logit_adjusted_cross_entropy(logits: Logits, labels: Labels, *, counts: Counts, tau: float = 1.0) -> PerExample:
    """Cross-entropy of `z + tau log pi`, with `pi_c = n_c / sum n` the classes' shares of the training data.

    The network must then find a logit that exceeds the prior, and z alone predicts as if all classes were equally
    frequent.

    Args:
      logits: z, the classes are the last axis.
      labels: their classes.
      counts: n, training examples of each class; only their ratios matter.
      tau: at least 0; 0 is cross-entropy.

    Returns:
      One number for each example, in nats.

    Raises:
      ValueError: a number out of its range, shapes that do not match, a label out of range (unless traced).

    Source: Long-tail learning via logit adjustment (2021, Menon et al.), section 5.
    """
    return adjusted_cross_entropy(logits, labels, offset=_log_priors(counts, tau))


def posthoc_logit_adjustment(logits: Logits, *, counts: Counts, tau: float = 1.0) -> Logits:
    """Logits `z - tau log pi` of a model trained with plain cross-entropy, for prediction.

    Args:
      logits: z, the classes are the last axis.
      counts: training examples of each class; only their ratios matter.
      tau: at least 0; 0 changes nothing.

    Raises:
      ValueError: a number out of its range, or counts that are not one number for each class.

    Source: Long-tail learning via logit adjustment (2021, Menon et al.), section 4.
    """
    return margins.adjust_logits(logits, offset=-_log_priors(counts, tau))


def multiplicative_logit_adjustment(logits: Logits, *, counts: Counts, gamma: float) -> Logits:
    """Logits `z_c (max n / n_c)^gamma` of a trained model, for prediction.

    A negative logit of a rare class moves down, not up.

    Args:
      logits: z, the classes are the last axis.
      counts: n, training examples of each class; only their ratios matter.
      gamma: at least 0; 0 changes nothing; chosen on validation data.

    Raises:
      ValueError: a number out of its range, or counts that are not one number for each class.

    Source: Exploring Weight Balancing on Long-Tailed Recognition Problem (2023, Hasegawa and Sato).
    """
    return margins.adjust_logits(logits, scale=1 / _relative_sizes(counts, gamma))


def vector_scaling_loss(
    logits: Logits, labels: Labels, *, counts: Counts, gamma: float = 0.2, tau: float = 1.25
) -> PerExample:
    """Cross-entropy of `(n_c / max n)^gamma z_c + tau log(n_c / sum n)`; predictions are made from z.

    Past the point where all training examples are fitted an offset changes nothing, but a factor does: the smaller it
    is, the larger must be the margin of its class.

    Args:
      logits: z, the classes are the last axis.
      labels: their classes.
      counts: n, training examples of each class; only their ratios matter.
      gamma: at least 0; 0 is logit adjustment.
      tau: at least 0.

    Returns:
      One number for each example, in nats.

    Raises:
      ValueError: a number out of its range, shapes that do not match, a label out of range (unless traced).

    Source: Label-Imbalanced and Group-Sensitive Classification under Overparameterization (2021, Kini et al.),
    equation 2. The best gamma and tau depend on the data.
    """
    return adjusted_cross_entropy(logits, labels, scale=_relative_sizes(counts, gamma), offset=_log_priors(counts, tau))


def ldam_margins(counts: Counts, *, max_margin: float = 0.5) -> Counts:
    """Margins `m_c = max_margin (min n / n_c)^(1/4)`, greatest for the smallest class.

    Args:
      counts: n, training examples of each class; only their ratios matter.
      max_margin: of the smallest class, at least 0.

    Raises:
      ValueError: `max_margin` is negative, or counts that are not one positive number for each class.

    Source: Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss (2019, Cao et al.), section 3.2.
    """
    choices.require_within("max_margin", max_margin, "[0, inf)")
    counts = checks.class_sizes(counts)
    return max_margin * (jnp.min(counts) / counts) ** 0.25


def ldam_loss(
    cosines: Logits, labels: Labels, *, counts: Counts, max_margin: float = 0.5, scale: float = 30.0
) -> PerExample:
    """Cross-entropy of `scale (cos_c - m_y [c = y])` with the margins of `ldam_margins`.

    The paper weighs it by class only late in training: `deferred`. Predictions are made from the cosines.

    Args:
      cosines: of features and the classes' weights, in [-1, 1]; the classes are the last axis.
      labels: y.
      counts: training examples of each class; only their ratios matter.
      max_margin: of the smallest class, at least 0.
      scale: positive.

    Returns:
      One number for each example, in nats.

    Raises:
      ValueError: a number out of its range, shapes that do not match, a label out of range (unless traced).

    Source: Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss (2019, Cao et al.), section 3.2.
    """
    choices.require_within("scale", scale, "(0, inf)")
    margin = scale * ldam_margins(counts, max_margin=max_margin)
    return adjusted_cross_entropy(cosines, labels, scale=scale, margin=margin)


def adjusted_cross_entropy(logits: Logits, labels: Labels, **vectors: Counts) -> PerExample:
    """Cross-entropy of `adjust_logits(logits, labels, **vectors)`."""
    logits, labels = checks.labelled(logits, labels)
    return optax.softmax_cross_entropy_with_integer_labels(margins.adjust_logits(logits, labels, **vectors), labels)


def _log_priors(counts: Counts, tau: float) -> Counts:
    choices.require_within("tau", tau, "[0, inf)")
    counts = checks.class_sizes(counts)
    return tau * jnp.log(counts / jnp.sum(counts))


def _relative_sizes(counts: Counts, gamma: float) -> Counts:
    choices.require_within("gamma", gamma, "[0, inf)")
    counts = checks.class_sizes(counts)
    return (counts / jnp.max(counts)) ** gamma
