"""Layer-adaptive magnitude pruning: sparsities from a global ranking of magnitudes, each seen against its own layer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from steelyard import selection
from steelyard import tree as tree_lib
from steelyard.sparsity import scores as scores_lib
from steelyard.sparsity.allocation import budget as budget_lib

PyTree = Any


def lamp(
    params: PyTree,
    sparsity: float,
    *,
    where: tree_lib.Where | None = None,
    override: budget_lib.Override = None,
) -> PyTree:
    """The share of each leaf that a global ranking by the LAMP score removes.

    With `scores.lamp`, k = round((1 - sparsity) N) and the k entries of highest score in all leaves together:

        s_l = 1 - survivors_l / n_l.

    The largest weight of every leaf has the score 1, so that no leaf dies as long as k is at least their number.

    Args:
      params: a tree of concrete arrays.
      sparsity: of the whole, in [0, 1].
      where: which leaves to prune; float leaves with two axes and more by default.
      override: path pattern -> sparsity of the leaves that it matches, which then stand outside of the budget.

    Returns:
      A tree of Python floats, `None` for a leaf that is not pruned.

    Raises:
      ValueError: a number is outside of [0, 1], a pattern matches nothing, or nothing is to be pruned.

    Cost: that of `scores.lamp`, which sorts each leaf, and of one `selection.top_mask`.

    Source: Layer-adaptive sparsity for the magnitude-based pruning (2021, Lee et al.).
    """
    budget = budget_lib.of(params, sparsity, where, override)
    sizes = budget.sizes
    k = round((1 - sparsity) * sizes.sum())
    # An integer of JAX has 32 bits; a larger number is written into the program.
    survivors = jax.jit(_survivors, static_argnums=() if k < 2**31 else 1)(budget.leaves, k)
    return budget.tree((sizes - np.array(survivors)) / np.maximum(sizes, 1))


def _survivors(params: PyTree, k: int | Int[jax.Array, ""]) -> list[jax.Array]:
    scores = scores_lib.lamp(params, where=lambda path, leaf: True)
    return [jnp.count_nonzero(mask) for mask in jax.tree.leaves(selection.top_mask(scores, k))]
