"""Sparsities that leave every layer a minimum of weights."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from steelyard import choices
from steelyard.sparsity.allocation.water_fill import is_traced, water_fill


def minimum_kept(
    sparsities: Float[np.ndarray, " L"], sizes: Int[np.ndarray, " L"], sparsity: float, min_kept: int | float
) -> Float[np.ndarray, " L"]:
    """Repairs the sparsities of layers so that each keeps some weights and the whole has the wanted sparsity.

    With n_l the sizes and P = sparsity sum(n) the weights to prune:

        pruned = water_fill(weights=s_l n_l, upper=max(n_l - min_kept, 0), total=P),  s_l := pruned_l / n_l,

    so that what may not be pruned in one layer is pruned in the others, in proportion. A layer smaller than `min_kept`
    is kept whole, and a layer that was dense stays so.

    Args:
      sparsities: of the layers, in [0, 1], such as those that a global ranking gave; may be traced.
      sizes: weights of each layer, not traced.
      sparsity: of the whole, in [0, 1]; may be traced.
      min_kept: weights that each layer keeps, or, as a float below 1, their number as a fraction of all weights
        (rounded up); published: 0.0005.

    Returns:
      The repaired sparsities: float64 in NumPy, or an array of JAX where an argument is traced.

    Raises:
      ValueError: a number is out of range, shapes differ, or so much cannot be pruned. (Traced: as much as can be.)

    Source: Is complexity required for neural network pruning? A case study on global magnitude pruning (2022, Gupta et
    al.), minimum threshold.
    """
    if np.shape(sparsities) != np.shape(sizes):
        raise ValueError(f"sparsities has shape {np.shape(sparsities)}, but sizes {np.shape(sizes)}")
    choices.require_within("sparsities", sparsities, "[0, 1]")
    choices.require_within("sparsity", sparsity, "[0, 1]")
    sizes = np.asarray(sizes, np.float64)
    total = sizes.sum()
    least = _entries(min_kept, total)
    room = np.maximum(sizes - least, 0)
    if is_traced(sparsities, sparsity):
        # So that the promotion to 64 bits is left to the sparsities.
        sizes, room = (x.astype(jnp.promote_types(jnp.result_type(sparsities), jnp.float32)) for x in (sizes, room))
    else:
        _check_feasible(np.asarray(sparsities), room, total, sparsity, least)
    pruned = water_fill(sparsities * sizes * (room > 0), room, sparsity * total)
    return pruned / np.maximum(sizes, 1)


def _entries(min_kept, total) -> int:
    """The minimum as a number of weights."""
    if 0 < min_kept < 1:
        return math.ceil(min_kept * total - 1e-9)
    return choices.require_count("min_kept", min_kept, "[0, inf)")


def _check_feasible(sparsities, room, total, sparsity, least):
    most = room[sparsities > 0].sum()
    if sparsity * total > most * (1 + 1e-9):
        raise ValueError(
            f"sparsity={sparsity} of {total:.0f} weights cannot be had: with min_kept={least} in each layer, and the "
            f"layers of sparsity 0 kept whole, at most {most:.0f} can be pruned"
        )
