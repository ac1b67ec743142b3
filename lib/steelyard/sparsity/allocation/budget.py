"""What all allocations over a tree share: which leaves have the budget, and which have a sparsity of their own."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from steelyard import choices
from steelyard import tree as tree_lib
from steelyard.sparsity import prunable

PyTree = Any
Override = Mapping[str, float] | None


class Budget(NamedTuple):
    """The leaves that share a budget, in the order of `jax.tree.leaves`.

    Attributes:
      leaves: a tree like the parameters, `None` where a leaf is not pruned or has a sparsity of its own.
      fixed: a tree of the sparsities of those that have their own, `None` elsewhere.
      shapes: of `leaves`.
    """

    leaves: PyTree
    fixed: PyTree
    shapes: list[tuple[int, ...]]

    @property
    def sizes(self) -> np.ndarray:
        return np.array([np.prod(shape) for shape in self.shapes], np.float64)

    def tree(self, sparsities) -> PyTree:
        """Sparsities of the leaves as a tree of Python floats, the fixed ones included."""
        shared = jax.tree.unflatten(jax.tree.structure(self.leaves), [float(x) for x in sparsities])
        return tree_lib.combine(self.fixed, shared)


def of(params: PyTree, sparsity: float, where: tree_lib.Where | None, override: Override) -> Budget:
    """Sets the leaves apart that `override` names, and checks the rest.

    Raises:
      ValueError: `sparsity` or an override is not in [0, 1], nothing is to be pruned, or a pattern matches nothing.
    """
    choices.require_within("sparsity", sparsity, "[0, 1]")
    chosen = prunable.selected(params, where)
    leaves = jax.tree.map(lambda x, is_chosen: x if is_chosen else None, params, chosen)
    if not jax.tree.leaves(leaves):
        raise ValueError(f"none of the {len(jax.tree.leaves(params))} leaves is to be pruned: where={where!r}")
    fixed = jax.tree.map(lambda x: None, leaves)
    for pattern, value in (override or {}).items():
        choices.require_within(f"override[{pattern!r}]", value, "[0, 1]")
        named = tree_lib.select(leaves, pattern, name="override")
        own = jax.tree.map(lambda is_named, value=float(value): value if is_named else None, named)
        fixed = tree_lib.combine(fixed, own)
    shared = jax.tree.map(lambda x, own: x if own is None else None, leaves, fixed)
    return Budget(shared, fixed, [np.shape(x) for x in jax.tree.leaves(shared)])
