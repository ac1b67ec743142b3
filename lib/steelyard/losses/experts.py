"""Several experts on one example: trained to differ, most where examples are many, and asked one after the other.

Routing Diverse Distribution-Aware Experts, RIDE. An expert is a classifier of its own, on top of shared layers; their
logits are stacked on a leading axis. The router is any network with one output for each expert but the last, trained by
`sigmoid_binary_cross_entropy` on `routing_targets` after the experts have been frozen (RIDE weighs a positive target
by 100, and shows it the features and the largest logits of the mean so far).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from steelyard import choices, precision
from steelyard.losses import checks, logit_adjustment

ExpertLogits = Float[Array, "experts *batch classes"]


def diversity_temperatures(
    counts: Float[Array, "classes"], *, strength: float = 0.05, base: float = 1.0
) -> Float[Array, "classes"]:
    """Temperatures of `ride_loss` for each class, lower for rarer ones.

        w_c = strength C n_c / sum n + 1 - strength,   T_c = base w_c / max w

    Args:
      counts: n, how many training examples each class has, positive.
      strength: in [0, 1]; at 0 all temperatures are `base`.
      base: of the largest class, positive.

    Returns:
      Float32 at least.

    Raises:
      ValueError: a number out of its range, counts that are not one number for each class.

    Source: Long-tailed Recognition by Routing Diverse Distribution-Aware Experts (2020, Wang et al.).
    """
    choices.require_within("strength", strength, "[0, 1]")
    choices.require_within("base", base, "(0, inf)")
    counts = checks.class_sizes(counts)
    weights = strength * counts / jnp.mean(counts) + (1 - strength)
    return base * weights / jnp.max(weights)


def ride_loss(
    expert_logits: ExpertLogits,
    labels: Int[Array, "*batch"],
    *,
    margin: float | Float[Array, "classes"] | None = None,
    class_weight: float | Float[Array, "classes"] | None = None,
    temperature: float | Float[Array, "classes"] = 1.0,
    diversity: float = 0.2,
) -> Float[Array, "*batch"]:
    """Every expert's own cross-entropy, less its divergence from the mean of all.

        sum_e  class_weight_y CE(z_e - margin_y onehot(y), y)
               - diversity mean(T)^2 KL(softmax(m / T) || softmax(z_e / T)),      m = mean_e z_e

    T divides the logits class by class. Nothing differentiates through the mean: each expert moves away from where the
    mean is. `diversity_temperatures` and a weight for each class are best switched on late in training, as `deferred`
    does it. Costs two softmaxes for each expert. It can be negative.

    Args:
      expert_logits: z, stacked over the experts.
      labels: y.
      margin: a number, or one for each class; `ldam_margins(counts)` times the factor that is in the logits. None: 0.
      class_weight: likewise, of the cross-entropy. None: 1.
      temperature: T, likewise, positive.
      diversity: at least 0.

    Returns:
      Summed over the experts, float32 at least.

    Raises:
      ValueError: shapes that do not match, no experts, a label (unless traced) or number out of its range.

    Source: Long-tailed Recognition by Routing Diverse Distribution-Aware Experts (2020, Wang et al.).
    """
    choices.require_within("temperature", temperature, "(0, inf)")
    choices.require_within("diversity", diversity, "[0, inf)")
    logits, labels = _labelled(expert_logits, labels)
    classes = logits.shape[-1]
    temperature = checks.number_or("temperature", temperature, (classes,))
    every_label = jnp.broadcast_to(labels, logits.shape[:-1])
    own = logit_adjustment.adjusted_cross_entropy(logits, every_label, margin=margin)
    if class_weight is not None:
        class_weight = checks.number_or("class_weight", class_weight, (classes,))
        own = own * jnp.broadcast_to(class_weight, classes)[labels]
    log_q = jax.nn.log_softmax(logits / temperature)
    log_p = jax.lax.stop_gradient(jax.nn.log_softmax(jnp.mean(logits, axis=0) / temperature))
    divergences = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    return jnp.sum(own - diversity * jnp.mean(temperature) ** 2 * divergences, axis=0)


def routing_targets(expert_logits: ExpertLogits, labels: Int[Array, "*batch"]) -> Bool[Array, "experts-1 *batch"]:
    """Whether to go on after an expert: the mean so far is wrong, and that of some more experts would be right.

        r_e = [argmax(mean of experts 0..e) = y],   target_e = not r_e and (r_j for some j > e),   e = 0..E-2

    Args:
      expert_logits: stacked over the experts.
      labels: y.

    Raises:
      ValueError: shapes that do not match, no experts, a label out of range (unless traced).

    Source: Long-tailed Recognition by Routing Diverse Distribution-Aware Experts (2020, Wang et al.).
    """
    logits, labels = _labelled(expert_logits, labels)
    # The largest of a sum is the largest of the mean.
    right = jnp.argmax(jnp.cumsum(logits, axis=0), axis=-1) == labels
    later = jax.lax.cummax(right.astype(jnp.int32), axis=0, reverse=True)[1:] > 0
    return ~right[:-1] & later


def routed_mean(
    expert_logits: ExpertLogits, routing_logits: Float[Array, "experts-1 *batch"], *, threshold: float = 0.5
) -> Float[Array, "*batch classes"]:
    """The mean of the experts that the router asks: the first, and one more as long as it says to go on.

        example i uses experts 0..k_i,   k_i = first e with sigmoid(routing_logits_ei) <= threshold, else E - 1

    All experts are computed, and the mean is over those that are used; what would be saved is a matter of how the
    model is served.

    Args:
      expert_logits: stacked over the experts.
      routing_logits: for each expert but the last.
      threshold: in [0, 1].

    Returns:
      Float32 at least. Nothing differentiates through the choice.

    Raises:
      ValueError: shapes that do not match, no experts, a threshold out of its range.

    Source: Long-tailed Recognition by Routing Diverse Distribution-Aware Experts (2020, Wang et al.).
    """
    choices.require_within("threshold", threshold, "[0, 1]")
    logits, routing = _stacked(expert_logits), precision.wide(routing_logits)
    expected = (len(logits) - 1, *logits.shape[1:-1])
    if routing.shape != expected:
        raise ValueError(
            f"routing_logits has shape {routing.shape} and expert_logits {logits.shape}: "
            f"routing_logits must be {expected}, one number for each expert but the last"
        )
    goes_on = jnp.cumprod(jax.nn.sigmoid(routing) > threshold, axis=0, dtype=jnp.int32) > 0
    used = jnp.concatenate([jnp.ones((1, *expected[1:]), bool), goes_on])[..., None]
    return jnp.sum(jnp.where(used, logits, 0), axis=0) / jnp.sum(used, axis=0)


def _stacked(expert_logits: ExpertLogits) -> ExpertLogits:
    logits = precision.wide(expert_logits)
    if logits.ndim < 2 or not len(logits):
        raise ValueError(f"expert_logits has shape {logits.shape}: it must be [experts, *batch, classes], experts >= 1")
    return logits


def _labelled(expert_logits: ExpertLogits, labels: Int[Array, "*batch"]) -> tuple[ExpertLogits, Int[Array, "*batch"]]:
    logits = _stacked(expert_logits)
    _, labels = checks.labelled(logits[0], labels, name="expert_logits[0]")
    return logits, labels
