"""Loss weights that are learned beside the model: from a noise for each task (2018, Kendall et al.), or on the simplex.

Both rules descend a total loss in K numbers of their own. Their gradients are known in closed form, so that they cost
neither a backward pass nor room among the parameters of the model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float

from steelyard import choices
from steelyard.aggregate import stacked as stacked_lib

_LOG_VARIANCE_BOUND = 20.0
_RATE = 1e-3


class UncertaintyWeightingState(NamedTuple):
    """State of `uncertainty_weighting`.

    Attributes:
      log_variances: s, float32.
      optimizer: the state of its optimizer.
    """

    log_variances: Float[Array, "K"]
    optimizer: optax.OptState


class SoftmaxWeightingState(NamedTuple):
    """State of `softmax_weighting`.

    Attributes:
      logits: s, float32; the weights are softmax(s).
      optimizer: the state of its optimizer.
    """

    logits: Float[Array, "K"]
    optimizer: optax.OptState


def uncertainty_weighting(
    num_tasks: int, *, init_log_variance: float = 0.0, optimizer: optax.GradientTransformation | None = None
) -> stacked_lib.Aggregator:
    """Learns a log-variance `s_k` for each task, jointly with the model, by descending

        sum_k exp(-s_k) L_k / 2 + s_k / 2.

    This step's weights are `w_k = exp(-s_k) / 2` with the s before its update; then s follows `optimizer` along

        grad_k = (1 - exp(-s_k) L_k) / 2

    and is clipped to [-20, 20]. For a constant loss s settles at log L, where `w_k L_k = 1/2` whatever the scale of the
    loss. A loss of 0 drives s to the lower bound. A negative loss has no optimum: s falls to the bound, and its weight
    grows to exp(20) / 2.

    With one plain SGD for the model and for s this is the same as having s among the parameters. The state is K numbers
    and those of the optimizer, and one backward pass suffices.

    Args:
      num_tasks: K.
      init_log_variance: s before the first step, in [-20, 20].
      optimizer: of s, learning rate included; `optax.adam(1e-3)` if `None`.

    Returns:
      An aggregator with an `UncertaintyWeightingState`.

    Raises:
      ValueError: an argument out of its range; without losses, or while tracing if there are not `num_tasks` of them.

    Source: Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and Semantics (2018, Kendall et
    al.), section 3.2, with `s = log sigma^2`.
    """
    choices.require_within("num_tasks", num_tasks, "[1, inf)")
    choices.require_within("init_log_variance", init_log_variance, f"[-{_LOG_VARIANCE_BOUND}, {_LOG_VARIANCE_BOUND}]")
    optimizer = optax.adam(_RATE) if optimizer is None else optimizer

    def init():
        log_variances = jnp.full((num_tasks,), init_log_variance, jnp.float32)
        return UncertaintyWeightingState(log_variances, optimizer.init(log_variances))

    def rule(losses, state):
        weights = jnp.exp(-state.log_variances) / 2
        grads = 0.5 - weights * losses.astype(jnp.float32)
        moved, optimizer_state = _descend(optimizer, grads, state.optimizer, state.log_variances)
        bounded = jnp.clip(moved, -_LOG_VARIANCE_BOUND, _LOG_VARIANCE_BOUND)
        return weights, UncertaintyWeightingState(bounded, optimizer_state)

    return stacked_lib.from_losses(rule, init, num_tasks=num_tasks)


def softmax_weighting(
    num_tasks: int,
    *,
    prior: Float[ArrayLike, "K"] | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> stacked_lib.Aggregator:
    """Learns weights on the simplex by descending the weighted loss `sum_k w_k L_k` itself, `w = softmax(s)`.

    This step's weights are those before the update of s, which follows `optimizer` along

        grad_k = w_k (L_k - sum_j w_j L_j).

    Nothing holds the weights back: they collapse onto the task of smallest loss, at a speed that the optimizer sets.
    The rule is for losses of one scale over a run that is short for this rate, or to be stopped with the run; where
    each task has to be learned, use `uncertainty_weighting`.

    Losses with weights that are normalised apart, such as regularisers, take an aggregator of their own. The state is K
    numbers and those of the optimizer, and one backward pass suffices.

    Args:
      num_tasks: K.
      prior: K positive numbers, the weights before the first step up to a factor; equal ones if `None`.
      optimizer: of s, learning rate included; `optax.adam(1e-3)` if `None`.

    Returns:
      An aggregator with a `SoftmaxWeightingState`. Its update is the gradient itself if K is 1.

    Raises:
      ValueError: `num_tasks` is below 1, or `prior` is not as above; without losses, or while tracing if there are not
        `num_tasks` of them.

    Source: Learning deep abdominal CT registration through adaptive loss weighting and synthetic data generation (2023,
    Perez de Frutos et al.), adaptive loss weighting.
    """
    choices.require_within("num_tasks", num_tasks, "[1, inf)")
    prior = np.ones(num_tasks) if prior is None else np.asarray(prior, np.float64)
    _check_prior(prior, num_tasks)
    optimizer = optax.adam(_RATE) if optimizer is None else optimizer

    def init():
        logits = jnp.asarray(np.log(prior), jnp.float32)
        return SoftmaxWeightingState(logits, optimizer.init(logits))

    def rule(losses, state):
        losses = losses.astype(jnp.float32)
        weights = jax.nn.softmax(state.logits)
        grads = weights * (losses - jnp.sum(weights * losses))
        return weights, SoftmaxWeightingState(*_descend(optimizer, grads, state.optimizer, state.logits))

    return stacked_lib.from_losses(rule, init, num_tasks=num_tasks)


def _check_prior(prior: np.ndarray, num_tasks: int) -> None:
    if prior.shape != (num_tasks,):
        raise ValueError(f"prior must have one number per task, shape ({num_tasks},); its shape is {prior.shape}")
    if not np.all(np.isfinite(prior) & (prior > 0)):
        raise ValueError(f"prior={prior} must lie in (0, inf)")


def _descend(
    optimizer: optax.GradientTransformation, grads: Float[Array, "K"], state: optax.OptState, at: Float[Array, "K"]
) -> tuple[Float[Array, "K"], optax.OptState]:
    updates, state = optimizer.update(grads, state, at)
    return optax.apply_updates(at, updates), state
