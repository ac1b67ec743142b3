"""How sparse each leaf gets, and masks of that sparsity: what reparameterizations share that move their masks."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from steelyard import choices, formats
from steelyard import tree as tree_lib
from steelyard.reparam import masking
from steelyard.sparsity import allocation as allocation_lib
from steelyard.sparsity import masks as masks_lib
from steelyard.sparsity import patterns
from steelyard.sparsity.allocation import budget as budget_lib

PyTree = Any
Allocation = str | Callable[[PyTree, float], PyTree]

GLOBAL = "global"


def _every_leaf(path, leaf) -> bool:
    del path, leaf
    return True


_NAMED = {
    name: functools.partial(getattr(allocation_lib, name), where=_every_leaf)
    for name in ("uniform", "uniform_plus", "erdos_renyi")
}


def check_allocation(allocation: Allocation) -> None:
    """Refuses what is neither a function nor the name of an allocation.

    Raises:
      ValueError: the name is unknown.
    """
    if not callable(allocation):
        choices.require("allocation", allocation, (*_NAMED, GLOBAL))


def allocate(
    params: PyTree,
    sparsity: float,
    allocation: Allocation,
    where: tree_lib.Where | None,
    override: Mapping[str, float] | None,
) -> tuple[PyTree, PyTree]:
    """Chooses the leaves to prune and their sparsities.

    Returns:
      The parameters with `None` for a leaf that is not pruned; and a tree of sparsities, with `None` there and for the
      leaves that the allocation "global" ranks together.

    Raises:
      ValueError: a number is out of range, a pattern matches nothing, or nothing is to be pruned.
    """
    budget = budget_lib.of(params, sparsity, where, override)
    if allocation == GLOBAL or not budget.shapes:
        return restrict(params, tree_lib.combine(budget.leaves, budget.fixed)), budget.fixed
    shared = _NAMED.get(allocation, allocation)(budget.leaves, sparsity)
    for path, value in tree_lib.flatten(shared):
        choices.require_within(f"allocation: the sparsity of {path}", value, "[0, 1]")
    levels = tree_lib.combine(budget.fixed, shared)
    return restrict(params, levels), levels


def pick(
    scores: PyTree,
    sparsities: PyTree,
    pattern: patterns.Pattern,
    whole: float | Float[Array, ""] | None,
    **options: Any,
) -> PyTree:
    """Masks of the largest scores.

    Args:
      scores: a tree, `None` for a leaf that is not pruned.
      sparsities: a tree of the leaves' sparsities.
      pattern: of leaves that have a sparsity.
      whole: the sparsity of all leaves without one of their own, ranked together; `None`: such leaves are not pruned.
      **options: of `masks.global_masks`.
    """
    masks = masks_lib.masks(scores, sparsities, pattern)
    if whole is None:
        return masks
    shared = jax.tree.map(lambda own, x: x if own is None else None, sparsities, scores, is_leaf=tree_lib.is_none)
    return tree_lib.combine(masks, masks_lib.global_masks(shared, whole, **options))


def store(stored: PyTree, masks: PyTree, pattern: patterns.Pattern) -> PyTree:
    """What `finish` stores: a weight node where the pattern has one and is in force, else an array with zeros.

    Raises:
      ValueError: a masked leaf is already a weight node; the mask of an N:M pattern is traced.
    """

    def leaf(path, w, mask):
        if mask is None:
            return w
        masking.check_array(path, w)
        has_node = isinstance(pattern, patterns.NM) and pattern.axis % w.ndim == w.ndim - 2
        # Before the first refresh everything is kept. A traced mask goes on to `from_dense`, which refuses it.
        if has_node and (isinstance(mask, jax.core.Tracer) or not np.all(mask)):
            return formats.NMSparse.from_dense(w, n=pattern.n, m=pattern.m, mask=mask)
        return masks_lib.apply(w, mask)

    return tree_lib.map_with_path(leaf, stored, masks, is_leaf=formats.is_weight)


def restrict(tree: PyTree, masks: PyTree) -> PyTree:
    """The leaves of the tree that have a mask, `None` in place of the others."""
    return jax.tree.map(lambda x, mask: None if mask is None else x, tree, masks, is_leaf=tree_lib.is_none)
