"""Domain penalisation: once an epoch, domains are weighed by their mean losses (2024, Jena et al.).

Domain penalisation for improved Out-of-Distribution Generalisation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from steelyard import choices
from steelyard.aggregate import epochs
from steelyard.aggregate import stacked as stacked_lib


class DomainPenaltyState(NamedTuple):
    """State of `domain_penalty`.

    Attributes:
      weights: the weights of the next step, float32.
      means: the losses of the current epoch so far, and their means over the epochs before.
    """

    weights: Float[Array, "K"]
    means: epochs.EpochMeans


def domain_penalty(num_domains: int, *, steps_per_epoch: int) -> stacked_lib.Aggregator:
    """Weighs each domain by the softmax of its mean loss in the epoch before.

        w = 1                                in epoch 0: ones, not 1 / K
        w = softmax(mean_{e - 1}(L))         in epoch e >= 1, the same for all its steps

    As in the paper, the weights sum to K at first and to 1 later: after the first epoch, the gradient is K times
    shorter. Use an optimizer that does not notice, such as Adam, or a learning rate K times higher from there on.

    Each loss is the mean over the domain's examples in the batch, and the mean over an epoch is over its steps: use
    batches with examples of all domains. A domain that the batch lacks comes with a loss of 0, which lowers its mean.
    An epoch with a mean that is not finite leaves the weights as they were. The state is 5 K numbers, and one backward
    pass suffices.

    Args:
      num_domains: K.
      steps_per_epoch: steps with the same weights.

    Returns:
      An aggregator with a `DomainPenaltyState`.

    Raises:
      ValueError: an argument below 1; while tracing, the number of losses is not `num_domains`.

    Source: Domain penalisation for improved Out-of-Distribution Generalisation (2024, Jena et al.), the batch and
    domain losses.
    """
    choices.require_within("num_domains", num_domains, "[1, inf)")
    choices.require_within("steps_per_epoch", steps_per_epoch, "[1, inf)")

    def init():
        return DomainPenaltyState(jnp.ones((num_domains,), jnp.float32), epochs.epoch_init(num_domains))

    def rule(losses, state):
        means = epochs.epoch_push(state.means, losses, steps_per_epoch)
        is_over = epochs.epoch(means, steps_per_epoch) > epochs.epoch(state.means, steps_per_epoch)
        is_new = is_over & jnp.all(jnp.isfinite(means.previous))
        weights = jnp.where(is_new, jax.nn.softmax(means.previous), state.weights)
        return state.weights, DomainPenaltyState(weights, means)

    return stacked_lib.from_losses(rule, init, num_tasks=num_domains)
