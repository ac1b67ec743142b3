"""What the losses of the room are made of: logits moved class by class, unit vectors, entries chosen by a label."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from steelyard import choices, precision
from steelyard.losses import checks

PerClass = Float[Array, "classes"] | Float[Array, ""] | float


def adjust_logits(
    logits: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"] | None = None,
    *,
    scale: PerClass | None = None,
    offset: PerClass | None = None,
    margin: PerClass | None = None,
) -> Float[Array, "*batch classes"]:
    """Scales, shifts and puts a margin on logits, class by class.

        z' = scale z + offset - margin_y [class = y]

    Logit adjustment is an offset, vector scaling a scale and an offset, LDAM a margin: each is vectors made of the
    class counts, this function, and cross-entropy.

    Args:
      logits: z, the classes are the last axis.
      labels: y; only `margin` needs them.
      scale: a number, or one for each class; None leaves the step out, as in the next two.
      offset: likewise.
      margin: likewise, in units of z', and taken from the logit of the label's class.

    Returns:
      z', float32 at least.

    Raises:
      ValueError: a margin without labels, shapes that do not match, a label out of range (unless traced).
    """
    logits = precision.wide(logits)
    classes = logits.shape[-1]
    if scale is not None:
        logits = logits * checks.number_or("scale", scale, (classes,)).astype(logits.dtype)
    if offset is not None:
        logits = logits + checks.number_or("offset", offset, (classes,)).astype(logits.dtype)
    if margin is None:
        return logits
    if labels is None:
        raise ValueError("margin needs labels: it is taken from the logit of the label's class; labels is None")
    logits, labels = checks.labelled(logits, labels)
    margin = checks.number_or("margin", margin, (classes,)).astype(logits.dtype)
    return logits - jnp.where(label_mask(labels, classes), margin, 0)


def normalize(x: Float[Array, "..."], axis: int = -1, eps: float = 1e-12) -> Float[Array, "..."]:
    """Vectors of length 1: `x / sqrt(max(sum x^2, eps))`; a zero vector stays zero, with a finite gradient.

    Args:
      x: vectors along `axis`.
      axis: which.
      eps: the least squared length that is divided by, positive.

    Returns:
      Float32 at least.

    Raises:
      ValueError: `eps` is not positive.
    """
    choices.require_within("eps", eps, "(0, inf)")
    x = precision.wide(x)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis, keepdims=True), eps))


def log_one_minus_p(logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Log of the probability of all classes but the label's, exact for probabilities near 1.

        log(1 - p_y) = logsumexp_{k != y} z_k - logsumexp_k z_k

    Args:
      logits: z.
      labels: y.

    Returns:
      At most 0; about -3e38 if there is one class only.

    Raises:
      ValueError: shapes that do not match, a label out of range (unless traced).
    """
    logits, labels = checks.labelled(logits, labels)
    return -jax.nn.softplus(log_odds(logits, labels))


def label_mask(labels: Int[Array, "*batch"], classes: int) -> Bool[Array, "*batch classes"]:
    """Where the class is the label's."""
    return labels[..., None] == jnp.arange(classes)


def at_label(values: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """The entry of the label's class; labels may lack leading axes that the values have."""
    labels = jnp.broadcast_to(labels, values.shape[:-1])
    return jnp.take_along_axis(values, labels[..., None], axis=-1)[..., 0]


def log_odds(logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"]) -> Float[Array, "*batch"]:
    """By how much the label wins: `log(p / (1 - p)) = z_y - logsumexp_{k != y} z_k`; about 3e38 for a single class.

    Cross-entropy is softplus(-log_odds) and p is sigmoid(log_odds), exact for any p at the cost of one logsumexp.
    """
    # Not -inf: of a single class the others would be empty, and inf - inf is no gradient.
    others = jnp.where(label_mask(labels, logits.shape[-1]), jnp.finfo(logits.dtype).min, logits)
    return at_label(logits, labels) - jax.nn.logsumexp(others, axis=-1)
