"""GroupDRO: weight moves to the group of largest loss (2020, Sagawa et al.).

Distributionally Robust Neural Networks for Group Shifts: On the Importance of Regularization for Worst-Case
Generalization.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from steelyard import choices
from steelyard.aggregate import stacked as stacked_lib


class GroupDROState(NamedTuple):
    """State of `group_dro`.

    Attributes:
      log_weights: logarithms of the current weights, float32; a weight too small for float32 can still come back.
    """

    log_weights: Float[Array, "K"]


def group_dro(
    num_groups: int,
    *,
    step_size: float = 0.01,
    adjustment: float = 0.0,
    counts: Float[Array, "K"] | None = None,
) -> stacked_lib.Aggregator:
    """Trains for the worst group: weights on the simplex, raised exponentially by the groups' losses.

    From `q_k = 1 / K`, each step does

        q_k <- q_k exp(step_size (L_k + adjustment / sqrt(counts_k))),  then  q <- q / sum(q)

    and weighs the losses by the new q. Each loss is the mean over the group's examples in the batch. A group that the
    batch lacks must come with a loss of 0: then it has no gradient, and its weight falls relative to the others.

    A network that can fit every training example brings all groups' losses to zero, and then the weights change nothing
    on unseen data: regularize it, or stop early. The state is K numbers, and one backward pass suffices.

    Args:
      num_groups: K.
      step_size: of the weights, in 1 / unit of the loss; 0 keeps them equal.
      adjustment: the unit of an expected gap between a group's training and test loss, which falls with the square root
        of its size.
      counts: training examples of each group, needed for `adjustment`.

    Returns:
      An aggregator with a `GroupDROState`. `optax.inject_hyperparams(group_dro, static_args=("num_groups",
      "adjustment"))` takes a schedule for `step_size`.

    Raises:
      ValueError: an argument out of its range, `adjustment` without `counts`, or counts that are not one positive
        number per group; while tracing, the number of losses is not `num_groups`.

    Source: Distributionally Robust Neural Networks for Group Shifts (2020, Sagawa et al.), algorithm 1 and section 3.3.
    """
    choices.require_within("num_groups", num_groups, "[1, inf)")
    choices.require_within("step_size", step_size, "[0, inf)")
    margins = _margins(num_groups, adjustment, counts)

    def init():
        return GroupDROState(jnp.full((num_groups,), -np.log(num_groups), jnp.float32))

    def rule(losses, state):
        gains = step_size * (losses.astype(jnp.float32) + margins)
        log_weights = jax.nn.log_softmax(state.log_weights + gains)
        return jnp.exp(log_weights), GroupDROState(log_weights)

    return stacked_lib.from_losses(rule, init, num_tasks=num_groups)


def _margins(num_groups: int, adjustment: float, counts: Float[Array, "K"] | None) -> Float[Array, "K"] | float:
    """What is added to the losses: more for small groups."""
    choices.require_within("adjustment", adjustment, "[0, inf)")
    if counts is None:
        if isinstance(adjustment, jax.core.Tracer) or adjustment != 0:
            raise ValueError(f"adjustment={adjustment} needs counts, the number of training examples of each group")
        return 0.0
    counts = np.asarray(counts, np.float32)
    if counts.shape != (num_groups,) or not np.all(np.isfinite(counts) & (counts > 0)):
        raise ValueError(f"counts must be {num_groups} positive numbers, one per group, got {counts}")
    return adjustment / np.sqrt(counts)
