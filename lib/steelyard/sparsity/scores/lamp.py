"""LAMP: magnitudes that can be compared between layers."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from steelyard import precision
from steelyard import tree as tree_lib
from steelyard.sparsity import prunable

PyTree = Any


def lamp(params: PyTree, *, where: tree_lib.Where | None = None) -> PyTree:
    """w_u^2 / sum_{v >= u} w_v^2, with the entries of a leaf in ascending order of w^2.

    The largest entry of every leaf has the score 1, so that one threshold over all leaves, as `masks.global_masks`
    sets it, empties none before all are down to one entry. Within a leaf the order is that of the magnitudes; of equal
    ones the lower index counts as the larger, as in `sparsity.masks`. A leaf of zeros has the score 0 everywhere.

    Args:
      params: a tree of arrays; `None` leaves pass.
      where: the leaves that are scored: a regular expression for the whole path, a function of path and leaf, or
        `None` for those with two axes or more.

    Returns:
      A tree like `params`, `None` where `where` does not select.

    Cost: unlike the other scores this one sorts each leaf, because it needs sums over all larger entries: a leaf that
    is sharded is gathered for it.

    Raises:
      ValueError: a pattern selects nothing that can be pruned.

    Source: Layer-adaptive Sparsity for the Magnitude-based Pruning (2021, Lee et al.).
    """
    return jax.tree.map(lambda w, chosen: _lamp(w) if chosen else None, params, prunable.selected(params, where=where))


# Sorts are slow to compile: leaves of one shape share a program.
@functools.partial(jax.jit, inline=False)
def _lamp(w: Float[Array, "..."]) -> Float[Array, "..."]:
    flat = jnp.abs(precision.wide(w)).ravel()
    # The score does not depend on the scale, and squares of numbers up to 1 do not overflow.
    largest = jnp.max(flat, initial=0, where=~jnp.isnan(flat))
    squares = (flat / jnp.where(largest == 0, 1, largest)) ** 2
    places = jax.lax.iota(jnp.int32, flat.size)
    # Descending, and stable: the sum of all larger entries is then a running one, and starts with the largest terms.
    descending, order = jax.lax.sort((-squares, places), num_keys=1, is_stable=True)
    sums = jnp.cumsum(descending)
    scores = jnp.where(sums == 0, 0, descending / jnp.where(sums == 0, 1, sums))
    return jnp.zeros_like(scores).at[order].set(scores, unique_indices=True).reshape(w.shape).astype(w.dtype)
