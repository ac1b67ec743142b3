"""The worst case over which class is the label's rival, held back by a temperature: from SVM to cross-entropy and on.

Words: a *gap* d_k = z_k - z_y + margin [k != y] is by how much class k wins over the label's, the margin included. The
loss is a soft maximum of the gaps. A low temperature looks at the strongest rival only; a high one at all classes
alike, which makes the loss symmetric and so robust to wrong labels.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from steelyard import choices
from steelyard.losses import checks, margins

Logits = Float[Array, "*batch classes"]
Labels = Int[Array, "*batch"]
PerExample = Float[Array, "*batch"]
Temperature = PerExample | Float[Array, ""] | float


def ldr_loss(logits: Logits, labels: Labels, *, temperature: Temperature = 1.0, margin: float = 0.0) -> PerExample:
    """Label-distributionally robust loss: the worst weighted mean of the gaps, less the weights' divergence.

        max_q sum_k q_k d_k - T KL(q || uniform) = T (logsumexp_k(d_k / T) - log C)
        d_k = z_k - z_y + margin [k != y]

    T = 1 without a margin is cross-entropy less log C; T -> 0 is the multi-class hinge max(0, max_{k != y} d_k); T ->
    inf is the mean of the gaps. It falls as T grows, and lies between that mean and that maximum. A value is rounded to
    T log C times the precision, its gradient to the precision itself.

    Costs what cross-entropy costs.

    Args:
      logits: z, the C classes are the last axis.
      labels: y.
      temperature: T, a number or one for each example, positive.
      margin: by how much the label must win, in units of the logits, at least 0.

    Returns:
      Of any sign.

    Raises:
      ValueError: a number out of its range, shapes that do not match, a label out of range (unless traced).

    Source: Label Distributionally Robust Losses for Multi-class Classification (2023, Zhu, Ying and Yang).
    """
    choices.require_within("margin", margin, "[0, inf)")
    logits, labels = checks.labelled(logits, labels)
    return _soft_gap(logits, labels, _temperature(temperature, logits), margin)


def adaptive_ldr_loss(
    logits: Logits,
    labels: Labels,
    temperature: Temperature,
    *,
    reference: float = 1.0,
    alpha: float = 2.0,
    margin: float = 1.0,
    smoothing: float = 1e-5,
    min_temperature: float = 1e-4,
) -> tuple[PerExample, PerExample]:
    """`ldr_loss` of normalised logits with a temperature for each training example, which falls as it gets certain.

        z <- z / mean_k |z_k|
        q = softmax(z / T) + smoothing, over its sum
        T' = max(reference (1 - KL(q || uniform) / (alpha log C)), min_temperature)
        ldr(z, y; T', margin) - alpha log C / (2 reference) (T' - reference)^2

    A uniform prediction keeps T' at `reference`, a certain one takes it down to reference (1 - 1 / alpha). The caller
    keeps the temperature of each training example, at first `reference`, hands in those of the batch and stores what
    comes back. The gradient goes through the logits and their mean size, not through T'. As only the logits' direction
    counts, it grows like 1 / mean_k |z_k|, up to 1e12 for logits that are zero: a last layer should not start at zero.

    Costs a softmax and a logarithm of its entries on top of cross-entropy, and a number for each training example.

    Args:
      logits: z, the C >= 2 classes are the last axis.
      labels: y.
      temperature: T, what the last visit to each example has returned, positive.
      reference: where T starts, positive. To be tuned, together with the margin: the more wrong labels, the higher.
      alpha: how stiff T is, positive.
      margin: by how much the label must win, in mean sizes of a logit, at least 0.
      smoothing: what is added to the probabilities, at least 0.
      min_temperature: the least T', positive.

    Returns:
      The losses, of any sign, and T' without a gradient.

    Raises:
      ValueError: a number out of its range, one class only, shapes that do not match, a label out of range (unless
        traced).

    Source: Label Distributionally Robust Losses for Multi-class Classification (2023, Zhu, Ying and Yang), the adaptive
    loss (ALDR).
    """
    for name, value in (("reference", reference), ("alpha", alpha), ("min_temperature", min_temperature)):
        choices.require_within(name, value, "(0, inf)")
    for name, value in (("margin", margin), ("smoothing", smoothing)):
        choices.require_within(name, value, "[0, inf)")
    logits, labels = checks.labelled(logits, labels)
    classes = logits.shape[-1]
    if classes < 2:
        raise ValueError(f"logits has shape {logits.shape}: a temperature that adapts needs at least 2 classes")
    before = _temperature(temperature, logits)
    size = jnp.maximum(jnp.mean(jnp.abs(logits), axis=-1), 1e-12)
    stiffness = alpha * math.log(classes)
    certainty = _divergence(jax.lax.stop_gradient(logits / (size * before)[..., None]), smoothing)
    after = jnp.maximum(reference * (1 - certainty / stiffness), min_temperature)
    penalty = stiffness / (2 * reference) * (after - reference) ** 2
    return _soft_gap(logits, labels, after, margin, size) - penalty, after


def _soft_gap(
    logits: Logits,
    labels: Labels,
    temperature: Temperature,
    margin: float,
    size: PerExample | float = 1.0,
) -> PerExample:
    """The loss of `logits / size`; dividing once, by the size and the temperature together, saves passes over them."""
    odds = margins.log_odds(logits / (size * temperature)[..., None], labels)
    return temperature * (jax.nn.softplus(margin / temperature - odds) - math.log(logits.shape[-1]))


def _divergence(logits: Logits, smoothing: float) -> PerExample:
    """From the uniform distribution to the smoothed prediction, in nats."""
    classes = logits.shape[-1]
    q = (jax.nn.softmax(logits) + smoothing) / (1 + classes * smoothing)
    return jnp.sum(jax.scipy.special.xlogy(q, classes * q), axis=-1)


def _temperature(temperature: Temperature, logits: Logits) -> PerExample | Float[Array, ""]:
    choices.require_within("temperature", temperature, "(0, inf)")
    return checks.number_or("temperature", temperature, logits.shape[:-1]).astype(logits.dtype)
