"""Dynamic weight average: more weight to the losses that fall more slowly (2019, Liu et al.)."""

import jax
import jax.numpy as jnp

from steelyard import choices
from steelyard.aggregate import epochs
from steelyard.aggregate import stacked as stacked_lib

_FIRST_EPOCH = 2  # The first with two finished epochs before it.


def dynamic_weight_average(num_tasks: int, *, steps_per_epoch: int, temperature: float = 2.0) -> stacked_lib.Aggregator:
    """Weights from how much each mean loss fell between the last two epochs.

    In epochs 0 and 1 all weights are 1. In a later epoch e, with `M_k` the mean of loss k over an epoch,

        r_k = M_k(e - 1) / M_k(e - 2),    w = K softmax(r / temperature),

    constant within the epoch. The weights sum to K; the scale of a loss does not matter. Where `M_k(e - 2)` is zero,
    `r_k = 1`. The state is 4 K numbers and a counter, and one backward pass suffices.

    Args:
      num_tasks: K.
      steps_per_epoch: steps over which a mean is taken.
      temperature: positive; the larger, the closer the weights are to 1.

    Returns:
      An aggregator with an `EpochMeans` as state. Its update is the gradient itself if K is 1.

    Raises:
      ValueError: an argument out of its range; without losses, or while tracing if there are not `num_tasks` of them.

    Source: End-to-End Multi-Task Learning with Attention (2019, Liu et al.), section 3.3, equation 7.
    """
    choices.require_within("num_tasks", num_tasks, "[1, inf)")
    choices.require_within("steps_per_epoch", steps_per_epoch, "[1, inf)")
    choices.require_within("temperature", temperature, "(0, inf)")

    def rule(losses, state):
        ratios = jnp.where(state.before == 0, 1, state.previous / jnp.where(state.before == 0, 1, state.before))
        balanced = num_tasks * jax.nn.softmax(ratios / temperature)
        is_known = epochs.epoch(state, steps_per_epoch) >= _FIRST_EPOCH
        return jnp.where(is_known, balanced, 1), epochs.epoch_push(state, losses, steps_per_epoch)

    return stacked_lib.from_losses(rule, lambda: epochs.epoch_init(num_tasks), num_tasks=num_tasks)
