"""Asymmetric losses: where negatives are many and easy, positives and negatives are focused on differently.

One prediction may be several independent ones, each yes or no, or a single choice between classes.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from steelyard import choices
from steelyard.losses import checks, margins


def asymmetric_loss(
    logits: Float[Array, "*batch classes"],
    targets: Float[Array, "*batch classes"],
    *,
    gamma_positive: float = 0.0,
    gamma_negative: float = 4.0,
    margin: float = 0.05,
    stop_focus_gradient: bool = False,
) -> Float[Array, "*batch classes"]:
    """Binary cross-entropy that looks away from easy negatives, and ignores the easiest.

        -t (1 - p)^gamma_positive log p - (1 - t) q^gamma_negative log(1 - q)
        p = sigmoid(z),   q = max(p - margin, 0)

    Without gammas and margin it is `sigmoid_binary_cross_entropy`, with equal gammas and no margin
    `sigmoid_focal_loss`. A negative whose probability is at most `margin` has loss and gradient 0.

    Costs a few exponentials an entry, as binary cross-entropy and the focal loss do.

    Args:
      logits: z.
      targets: t, 0 or 1; what lies between mixes the two losses.
      gamma_positive: how much a positive counts the less, the better it is predicted; at least 0.
      gamma_negative: the same of a negative.
      margin: by which the probability of a negative is lowered, in [0, 1); a traced one must not be 0.
      stop_focus_gradient: whether the powers are constant weights, without a gradient, as in the authors' training.

    Returns:
      One number for each entry, in nats, at least 0.

    Raises:
      ValueError: a number out of its range, or shapes that do not match.

    Source: Asymmetric Loss For Multi-Label Classification (2020, Ridnik, Ben-Baruch et al.).
    """
    _check_gammas(gamma_positive, gamma_negative)
    choices.require_within("margin", margin, "[0, 1)")
    logits, targets = checks.alike("logits", logits, "targets", targets)
    log_q, log_rest = _lowered(logits, margin)
    weights = _power(jax.nn.log_sigmoid(-logits), gamma_positive), _power(log_q, gamma_negative)
    if stop_focus_gradient:
        weights = jax.lax.stop_gradient(weights)
    positive, negative = weights[0] * jax.nn.log_sigmoid(logits), weights[1] * log_rest
    return -targets * positive - (1 - targets) * negative


def asymmetric_softmax_loss(
    logits: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    *,
    gamma_positive: float = 0.0,
    gamma_negative: float = 4.0,
    label_smoothing: float = 0.1,
) -> Float[Array, "*batch"]:
    """The asymmetric loss of a single label: cross-entropy with smoothed labels, each class's term with its own power.

        -sum_k s_k w_k log p_k,   p = softmax(z),   s = (1 - label_smoothing) [k = y] + label_smoothing / classes
        w_y = (1 - p_y)^gamma_positive,   w_k = p_k^gamma_negative elsewhere

    Without gammas it is cross-entropy with smoothed labels; without smoothing `gamma_negative` does nothing. The
    gradient goes through the weights.

    Costs two exponentials for each class, where cross-entropy costs one.

    Args:
      logits: z, the classes are the last axis.
      labels: y.
      gamma_positive: of the label's class, at least 0.
      gamma_negative: of the others, at least 0.
      label_smoothing: the share of the target that all classes have in common, in [0, 1].

    Returns:
      One number for each example, in nats, at least 0.

    Raises:
      ValueError: a number out of its range, shapes that do not match, a label out of range (unless traced).

    Source: Asymmetric Loss For Multi-Label Classification (2020, Ridnik, Ben-Baruch et al.); this form is in the
    authors' code only.
    """
    _check_gammas(gamma_positive, gamma_negative)
    choices.require_within("label_smoothing", label_smoothing, "[0, 1]")
    logits, labels = checks.labelled(logits, labels)
    classes = logits.shape[-1]
    is_label = margins.label_mask(labels, classes)
    # Not -inf: of a single class the others would be empty, and inf - inf is no gradient.
    others = jax.nn.logsumexp(jnp.where(is_label, jnp.finfo(logits.dtype).min, logits), axis=-1)
    own = margins.at_label(logits, labels)
    log_p = logits - jnp.logaddexp(own, others)[..., None]
    # All that the label's term needs is by how much it leads: with 1 - p exact where p is nearly 1.
    lead = own - others
    of_label = _power(jax.nn.log_sigmoid(-lead), gamma_positive) * jax.nn.log_sigmoid(lead)
    of_others = jnp.sum(jnp.where(is_label, 0, _power(log_p, gamma_negative) * log_p), axis=-1)
    shared = label_smoothing / classes
    return -(1 - label_smoothing + shared) * of_label - shared * of_others


def _check_gammas(gamma_positive: float, gamma_negative: float) -> None:
    choices.require_within("gamma_positive", gamma_positive, "[0, inf)")
    choices.require_within("gamma_negative", gamma_negative, "[0, inf)")


def _power(log_base: Float[Array, "..."], gamma: float) -> Float[Array, "..."] | float:
    """The base to the power of gamma, from its logarithm: a power of zero would have no derivative."""
    if isinstance(gamma, int | float) and gamma == 0:
        return 1.0
    return jnp.exp(gamma * log_base)


def _lowered(logits: Float[Array, "..."], margin: float) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """`log q` and `log(1 - q)` for `q = sigmoid(logits) - margin`; 0 and 0 where that is not positive."""
    if not isinstance(margin, jax.core.Tracer) and margin == 0:
        return jax.nn.log_sigmoid(logits), jax.nn.log_sigmoid(-logits)
    p = jax.nn.sigmoid(logits)
    counts = p > margin
    # Not 1 - q, which for p near 1 has lost the digits of 1 - p.
    rest = jnp.minimum(jax.nn.sigmoid(-logits) + margin, 1)
    return jnp.log(jnp.where(counts, p - margin, 1)), jnp.log(jnp.where(counts, rest, 1))
