"""GradNorm: weights learned so that tasks which lag behind get longer gradients (2018, Chen et al.)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float

from steelyard import choices
from steelyard.aggregate import stacked as stacked_lib

_RATE = 0.025


class GradNormState(NamedTuple):
    """State of `gradnorm`.

    Attributes:
      logits: v, float32.
      first: the losses to which progress is relative, float32; zeros until they are known.
      is_known: whether they are.
      optimizer: state of the optimizer of v.
    """

    logits: Float[Array, "K"]
    first: Float[Array, "K"]
    is_known: Bool[Array, ""]
    optimizer: optax.OptState


def gradnorm(
    num_tasks: int,
    *,
    alpha: float = 1.5,
    optimizer: optax.GradientTransformation | None = None,
    initial_losses: Float[Array, "K"] | None = None,
) -> stacked_lib.Aggregator:
    """Learns weights under which a task's gradient is the longer, the less its loss has fallen.

    With `w = K softmax(v)`, v from zero, the norms `n_k = |g_k|` and `r_k = (L_k / L0_k) / mean(L / L0)`, the weights
    of a step are w, and v then moves by the optimizer along the gradient of

        sum_k |w_k n_k - t_k|,    t_k = mean_j(w_j n_j) r_k^alpha held fixed.

    `L0` are the losses of the first step if not given; where one is 0, 1 stands for it. Losses must not be negative;
    those that are count as 0. The gradient scales with those of the model: Adam does not notice.

    The norms may be those of a part of the parameters (the last shared layer): apply `gram_weights` to the Gram matrix
    of that part, or balance there by `steelyard.aggregate.value_and_grad_at`, at one backward pass through the trunk.
    Else it costs K backward passes ("lean" is possible), and the optimizer's step on K numbers.

    Args:
      num_tasks: K.
      alpha: how strongly tasks that lag behind are favoured; 0 makes all `w_k n_k` equal.
      optimizer: of v, learning rate included; `optax.adam(0.025)` if `None`.
      initial_losses: L0, one for each task.

    Returns:
      An aggregator with a `GradNormState`.

    Raises:
      ValueError: an argument out of its range, or `initial_losses` not of shape (K,); in the update, no losses, or
        gradients that are not `num_tasks`.

    Source: GradNorm: Gradient Normalization for Adaptive Loss Balancing in Deep Multitask Networks (2018, Chen et al.),
    equations 1 and 2; the softmax takes the place of the paper's renormalisation of w to the sum K.
    """
    choices.require_within("num_tasks", num_tasks, "[1, inf)")
    choices.require_within("alpha", alpha, "[0, inf)")
    if initial_losses is not None and np.shape(initial_losses) != (num_tasks,):
        raise ValueError(f"initial_losses must have shape ({num_tasks},), got {np.shape(initial_losses)}")
    optimizer = optax.adam(_RATE) if optimizer is None else optimizer

    def init():
        logits = jnp.zeros((num_tasks,), jnp.float32)
        first = jnp.zeros_like(logits) if initial_losses is None else jnp.asarray(initial_losses, jnp.float32)
        return GradNormState(logits, first, jnp.bool_(initial_losses is not None), optimizer.init(logits))

    def rule(gram, losses, state):
        if losses is None:
            raise ValueError("gradnorm needs the losses: update(stacked, state, losses=...) with one loss per gradient")
        losses = losses.astype(jnp.float32)
        norms = jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0)).astype(jnp.float32)
        first = jnp.where(state.is_known, state.first, losses)
        rates = jnp.maximum(losses / jnp.where(first == 0, 1, first), 0)
        weights = num_tasks * jax.nn.softmax(state.logits)
        slope = _slope(weights, norms, rates, alpha)
        moved, optimizer_state = optimizer.update(slope, state.optimizer, state.logits)
        return weights, GradNormState(state.logits + moved, first, jnp.ones_like(state.is_known), optimizer_state)

    return stacked_lib.from_gram(rule, init, num_tasks=num_tasks)


def _slope(
    weights: Float[Array, "K"], norms: Float[Array, "K"], rates: Float[Array, "K"], alpha: float
) -> Float[Array, "K"]:
    """The gradient with respect to v of the sum of distances: `w_k (s_k n_k - mean_j(w_j s_j n_j))`, s the signs."""
    mean = jnp.mean(rates)
    lengths = weights * norms
    targets = jnp.mean(lengths) * (rates / jnp.where(mean == 0, 1, mean)) ** alpha
    distances = lengths - targets
    # Distances that are rounding have no sign: Adam would make full steps of it.
    is_there = jnp.abs(distances) > 8 * jnp.finfo(jnp.float32).eps * (lengths + targets)
    signed = jnp.where(is_there, jnp.sign(distances), 0) * norms
    return weights * (signed - jnp.mean(weights * signed))
