"""Random search over nodes: the best of many random subnetworks, before any training.

Source: Random Search as a Baseline for Sparse Neural Network Architecture Search (2024, Farahani).
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from steelyard import choices
from steelyard.sparsity import channels, masks

PyTree = Any


def random_search(
    loss_fn: Callable[[PyTree], Float[Array, ""]],
    params: PyTree,
    groups: Sequence[channels.ChannelGroup],
    *,
    density: float,
    rng: Key[Array, ""],
    trials: int = 100,
    batch_size: int = 16,
    under: str = "",
) -> tuple[dict[channels.ChannelGroup, Int[Array, " kept"]], Float[Array, " trials"]]:
    """Draws nodes at random, again and again, and keeps the draw whose loss is lowest.

        best = argmin_t loss(params * mask_t),  mask_t: max(1, round(density * size)) nodes of each group, at random

    Trial t has the same nodes however many trials there are, so that more of them never give a worse loss. One trial is
    a random subnetwork, density 1 the whole one. Train `channels.shrink` of the result.

    Costs a forward pass a trial; `batch_size` masked copies of the parameters exist at a time.

    Args:
      loss_fn: `params -> scalar`, on a fixed batch; what is not a number counts as worst.
      params: where training would start.
      groups: groups of channels, here called nodes; a node is kept or removed in all leaves of its group.
      density: the share of each group's nodes that is kept, in (0, 1]; halves round to even.
      rng: a key.
      trials: how many draws.
      batch_size: how many of them are evaluated at once.
      under: see `channels.groups`.

    Returns:
      For each group the indices of the kept nodes, ascending, of the best trial, the first on ties; and the losses of
      all trials, in order.

    Raises:
      ValueError: `density`, `trials` or `batch_size` is out of range.

    Source: Random Search as a Baseline for Sparse Neural Network Architecture Search (2024, Farahani).
    """
    choices.require_within("density", density, "(0, 1]")
    trials = choices.require_count("trials", trials, "[1, inf)")
    batch_size = choices.require_count("batch_size", batch_size, "[1, inf)")
    counts = {group: max(1, round(density * group.size)) for group in groups}

    def draw(trial: Int[Array, ""]) -> dict[channels.ChannelGroup, Bool[Array, " size"]]:
        keys = jax.random.split(jax.random.fold_in(rng, trial), len(counts))
        return {
            group: jax.random.permutation(key, group.size) < kept
            for key, (group, kept) in zip(keys, counts.items(), strict=True)
        }

    def loss(keep: dict[channels.ChannelGroup, Bool[Array, " size"]]) -> Float[Array, ""]:
        return loss_fn(masks.apply(params, channels.mask_tree(params, keep, under=under)))

    drawn = jax.vmap(draw)(jnp.arange(trials))
    losses = jax.lax.map(loss, drawn, batch_size=batch_size) if counts else jnp.full(trials, loss({}))
    best = jnp.argmin(jnp.where(jnp.isnan(losses), jnp.inf, losses))
    return {group: jnp.flatnonzero(keep[best], size=counts[group]) for group, keep in drawn.items()}, losses
