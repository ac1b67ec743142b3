"""Improvable gap balancing: more weight to the tasks that are far from where they could get (2023, Dai et al.).

What is balanced are the logarithms of the losses, so that their scales do not matter, and what a task can still gain is
measured against its own mean loss early in training.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from steelyard import choices
from steelyard.aggregate import epochs
from steelyard.aggregate import stacked as stacked_lib

_SMALLEST_LOSS = 1e-12


def improvable_gap(
    num_tasks: int, *, steps_per_epoch: int, base_epoch: int = 1, log_loss: bool = True
) -> stacked_lib.Aggregator:
    """Descends `sum_k v_k log L_k` with gap weights v that follow the losses of each step.

    With `base_k` the mean of loss k over epoch `base_epoch`, counted from 0,

        v = 1                     in epochs up to base_epoch,
        v = K softmax(L / base)   later, with the losses L of the step itself,

    and the weight of the gradient of `L_k` is `w_k = v_k / max(L_k, 1e-12)`, or `v_k` without `log_loss`. The gap
    weights sum to K. Multiplying a loss by c from the start changes no v and divides its w by c. A base of zero is
    taken for the present loss, `L_k / base_k = 1`. Meant for losses that are never negative.

    The state is 4 K numbers and a counter, and one backward pass suffices.

    Args:
      num_tasks: K.
      steps_per_epoch: steps over which a mean is taken.
      base_epoch: the epoch that later losses are compared with.
      log_loss: whether the losses' logarithms are descended, or the losses.

    Returns:
      An aggregator with an `EpochMeans` as state. If K is 1, its update is the gradient of log L, or of L.

    Raises:
      ValueError: an argument out of its range; without losses, or while tracing if there are not `num_tasks` of them.

    Source: Improvable Gap Balancing for Multi-Task Learning (2023, Dai et al.), IGBv1.
    """
    check_epochs(num_tasks, steps_per_epoch, base_epoch)

    def rule(losses, state):
        losses = losses.astype(jnp.float32)
        gaps = jnp.where(state.base == 0, 1, losses / jnp.where(state.base == 0, 1, state.base))
        has_base = epochs.epoch(state, steps_per_epoch) > base_epoch
        gap_weights = jnp.where(has_base, num_tasks * jax.nn.softmax(gaps), 1)
        weights = of_log_losses(gap_weights, losses) if log_loss else gap_weights
        return weights, epochs.epoch_push(state, losses, steps_per_epoch, base_epoch)

    return stacked_lib.from_losses(rule, lambda: epochs.epoch_init(num_tasks), num_tasks=num_tasks)


def check_epochs(num_tasks: int, steps_per_epoch: int, base_epoch: int) -> None:
    """Raises `ValueError` for what both forms of the method refuse."""
    choices.require_within("num_tasks", num_tasks, "[1, inf)")
    choices.require_within("steps_per_epoch", steps_per_epoch, "[1, inf)")
    choices.require_within("base_epoch", base_epoch, "[0, inf)")


def of_log_losses(gap_weights: Float[Array, "K"], losses: Float[Array, "K"]) -> Float[Array, "K"]:
    """The weights of the gradients of the losses whose logarithms have the weights `gap_weights`."""
    return gap_weights / jnp.maximum(losses, _SMALLEST_LOSS)
