"""Means of the losses over epochs, as state: what rules that look at progress between epochs are made of."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from steelyard import choices


class EpochMeans(NamedTuple):
    """Means of the losses over the epochs so far; all zero before they are known.

    Attributes:
      step: steps so far, int32.
      total: sum of the losses since the epoch began, float32.
      previous: mean over the last finished epoch.
      before: mean over the epoch before that.
      base: mean over the epoch that everything is compared with.
    """

    step: Int[Array, ""]
    total: Float[Array, "K"]
    previous: Float[Array, "K"]
    before: Float[Array, "K"]
    base: Float[Array, "K"]


def epoch_init(num_tasks: int) -> EpochMeans:
    """The state before the first step.

    Raises:
      ValueError: `num_tasks` is below 1.
    """
    choices.require_within("num_tasks", num_tasks, "[1, inf)")
    # An array each, so that the state can be donated.
    return EpochMeans(jnp.zeros((), jnp.int32), *(jnp.zeros((num_tasks,), jnp.float32) for _ in range(4)))


def epoch(state: EpochMeans, steps_per_epoch: int) -> Int[Array, ""]:
    """The number of finished epochs, which is the index of the one that the next step belongs to."""
    return state.step // steps_per_epoch


def epoch_push(state: EpochMeans, losses: Float[Array, "K"], steps_per_epoch: int, base_epoch: int = 0) -> EpochMeans:
    """The state after a step with these losses.

    At the last step of an epoch its mean becomes `previous`, which becomes `before`; it becomes `base` too if the epoch
    is number `base_epoch`, counted from 0.
    """
    total = state.total + losses.astype(jnp.float32)
    last = (state.step + 1) % steps_per_epoch == 0
    is_base = last & (epoch(state, steps_per_epoch) == base_epoch)
    mean = total / steps_per_epoch
    return EpochMeans(
        step=state.step + 1,
        total=jnp.where(last, 0, total),
        previous=jnp.where(last, mean, state.previous),
        before=jnp.where(last, state.previous, state.before),
        base=jnp.where(is_base, mean, state.base),
    )
