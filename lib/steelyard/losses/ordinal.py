"""Ordered classes by cumulative logits, with weights of its own for each threshold, fused towards the common ones.

Between K ordered classes there are K - 1 thresholds, each a logistic regression of "at most this class". With common
weights that is the proportional odds model, which learns a rare last class from the frequent ones before it. PRESTO
lets the weights differ, and charges for the differences of neighbouring thresholds:

    minimise  mean(cumulative_nll(logits, labels)) + strength * fused_penalty(weights)

In terms of the differences psi that is a lasso: after each gradient step on the first term,
`psi = soft_threshold(psi, step * strength)`, with `weights = from_differences(psi)`. Intercepts are not charged.

Source: Predicting Rare Events by Shrinking Towards Proportional Odds (2023, Faletto, Bien).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from steelyard import choices, precision
from steelyard.losses import checks, margins


def cumulative_logits(
    features: Float[Array, "*batch d"], weights: Float[Array, "d thresholds"], intercepts: Float[Array, "thresholds"]
) -> Float[Array, "*batch thresholds"]:
    """Log-odds of "at most class k" for each threshold, `eta_k = intercept_k + <x, W_:k>`.

    Args:
      features: x.
      weights: W, a column for each of the K - 1 thresholds.
      intercepts: one for each threshold; increasing ones keep the thresholds in order where the weights are alike.

    Returns:
      Float32 at least.

    Raises:
      ValueError: shapes that do not match.
    """
    features, weights, intercepts = (precision.wide(x) for x in (features, weights, intercepts))
    if weights.ndim != 2 or features.shape[-1:] != weights.shape[:1] or intercepts.shape != weights.shape[1:]:
        raise ValueError(
            f"features, weights and intercepts have shapes {features.shape}, {weights.shape}, {intercepts.shape}: "
            "they must be (..., d), (d, thresholds), (thresholds,)"
        )
    return jnp.matmul(features, weights, precision="highest") + intercepts


def cumulative_probabilities(logits: Float[Array, "*batch thresholds"]) -> Float[Array, "*batch classes"]:
    """Probability of each class: differences of `P(y <= k) = sigmoid(eta_k)`, without cancellation.

    They sum to 1. Where thresholds cross, `eta_k < eta_{k-1}`, that of class k is negative: the model is none there.

    Args:
      logits: eta, of K - 1 thresholds; at least one.

    Returns:
      K probabilities, float32 at least.

    Raises:
      ValueError: no threshold.
    """
    logits = _thresholds(logits)
    infinite = jnp.full_like(logits[..., :1], jnp.inf)
    low, high = jnp.concatenate([-infinite, logits], axis=-1), jnp.concatenate([logits, infinite], axis=-1)
    # sigmoid(high) - sigmoid(low) = sigmoid(high) sigmoid(-low) (1 - exp(low - high)); exchanged where they cross, so
    # that the exponential cannot overflow.
    ordered = high >= low
    upper, lower = jnp.where(ordered, high, low), jnp.where(ordered, low, high)
    mass = jax.nn.sigmoid(upper) * jax.nn.sigmoid(-lower) * -jnp.expm1(lower - upper)
    return jnp.where(ordered, mass, -mass)


def cumulative_nll(
    logits: Float[Array, "*batch thresholds"], labels: Int[Array, "*batch"], *, min_gap: float = 1e-6
) -> Float[Array, "*batch"]:
    """Negative log-likelihood of ordered classes.

        -log(sigmoid(eta_y) - sigmoid(eta_{y-1})),    eta_{-1} = -inf,  eta_{K-1} = inf
        = -log_sigmoid(eta_y) - log_sigmoid(-eta_{y-1}) - log(1 - exp(-max(eta_y - eta_{y-1}, min_gap)))

    in the second form, which does not cancel. A label between thresholds that have crossed costs a finite amount, and
    its gradient pushes them apart. With one threshold it is logistic regression.

    Args:
      logits: eta, of K - 1 thresholds; at least one.
      labels: y, in [0, K).
      min_gap: the least distance between thresholds that is reckoned with, positive.

    Returns:
      Nats for each example, float32 at least.

    Raises:
      ValueError: shapes that do not match, a label out of range (unless traced), or `min_gap` not positive.

    Source: Predicting Rare Events by Shrinking Towards Proportional Odds (2023, Faletto, Bien), for the model.
    """
    choices.require_within("min_gap", min_gap, "(0, inf)")
    logits, labels = _thresholds(logits), jnp.asarray(labels)
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels has shape {labels.shape} and logits {logits.shape}: labels must have the shape of all but the "
            "last axis, which are the thresholds"
        )
    last = logits.shape[-1]
    checks.check_labels(labels, last + 1)
    high = jnp.where(labels == last, jnp.inf, margins.at_label(logits, jnp.minimum(labels, last - 1)))
    low = jnp.where(labels == 0, -jnp.inf, margins.at_label(logits, jnp.maximum(labels - 1, 0)))
    gap = jnp.maximum(high - low, min_gap)
    return jax.nn.softplus(-high) + jax.nn.softplus(low) - jax.nn.log1mexp(gap)


def to_differences(weights: Float[Array, "d thresholds"]) -> Float[Array, "d thresholds"]:
    """The first column, and by how much each later one differs from the one before; float32 at least."""
    weights = precision.wide(weights)
    return jnp.diff(weights, axis=-1, prepend=jnp.zeros_like(weights[..., :1]))


def from_differences(differences: Float[Array, "d thresholds"]) -> Float[Array, "d thresholds"]:
    """The weights of which these are the differences: cumulative sums, float32 at least."""
    return jnp.cumsum(precision.wide(differences), axis=-1)


def fused_penalty(weights: Float[Array, "d thresholds"]) -> Float[Array, ""]:
    """`sum |to_differences(weights)|`: 0 for no weights at all, and the less, the more thresholds share theirs.

    The first threshold's weights are charged too.

    Source: Predicting Rare Events by Shrinking Towards Proportional Odds (2023, Faletto, Bien).
    """
    return jnp.sum(jnp.abs(to_differences(weights)))


def soft_threshold(x: Float[Array, "..."], threshold: float) -> Float[Array, "..."]:
    """Each number moved towards 0 by the threshold, and to 0 if it is nearer: the proximal map of `threshold |x|`.

    Args:
      x: parameters; their dtype is kept.
      threshold: at least 0, in units of x; the learning rate times the penalty's strength.

    Raises:
      ValueError: `threshold` is negative (unless traced).
    """
    choices.require_within("threshold", threshold, "[0, inf)")
    x = jnp.asarray(x)
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - jnp.asarray(threshold, x.dtype), 0)


def _thresholds(logits: Float[Array, "*batch thresholds"]) -> Float[Array, "*batch thresholds"]:
    logits = precision.wide(logits)
    if not logits.ndim or not logits.shape[-1]:
        raise ValueError(f"logits has shape {logits.shape}: its last axis must have one threshold at least")
    return logits
