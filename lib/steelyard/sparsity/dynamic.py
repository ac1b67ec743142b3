"""Sparse training in which the mask moves: some weights are dropped, as many others grow.

Sources: Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network science
(2018, Mocanu et al.) for SET, which grows at random; Rigging the lottery: making all tickets winners (2020, Evci et
al.) for RigL, which grows by the gradient.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from steelyard import choices, selection

PyTree = Any

__all__ = ["prune_and_grow"]


def prune_and_grow(
    mask: PyTree, weights_score: PyTree, grow_score: PyTree, drop_fraction: float | Float[Array, ""]
) -> PyTree:
    """Drops a fraction of the active weights, and grows as many among all that are then inactive.

        A = |mask|,  kept = the round(A (1 - drop_fraction)) largest weights_score of the mask,
        mask := kept and the A - |kept| largest grow_score outside of kept

    What has just been dropped may grow again. Ties keep the lower index, and NaN counts as the lowest score.

    Args:
      mask: a bool array, or a tree of them; the leaves of a tree compete with each other, so that A is constant over
        the tree but not in each leaf. For leaves that keep their counts, map this function over them.
      weights_score: what an active weight is worth, such as |w|; of the mask's structure and shapes.
      grow_score: what an inactive weight is worth, such as |gradient|.
      drop_fraction: in [0, 1]; may be traced.

    Returns:
      Masks with as many entries True as before.

    Raises:
      ValueError: a concrete `drop_fraction` is outside.

    Cost: two selections (`selection.top_mask`), each 32 passes over 32-bit scores; nothing is gathered.
    """
    choices.require_within("drop_fraction", drop_fraction, "[0, 1]")
    return _prune_and_grow(mask, weights_score, grow_score, drop_fraction)


@jax.jit
def _prune_and_grow(mask, weights_score, grow_score, drop_fraction):
    active = sum((jnp.count_nonzero(x) for x in jax.tree.leaves(mask)), start=jnp.int32(0))
    rounded = jnp.rint(active * (1 - jnp.asarray(drop_fraction, jnp.float32))).astype(jnp.int32)
    # float32 counts to 2^24 alone: a fraction of 0 drops nothing from a larger mask either.
    kept = jnp.where(drop_fraction == 0, active, jnp.minimum(rounded, active))
    survivors = selection.top_mask(jax.tree.map(selection.among, weights_score, mask), kept)
    inactive = jax.tree.map(jnp.logical_not, survivors)
    grown = selection.top_mask(jax.tree.map(selection.among, grow_score, inactive), active - kept)
    return jax.tree.map(jnp.logical_or, survivors, grown)
