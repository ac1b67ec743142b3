"""Allocations that only look at the shapes: the same everywhere, or more in the larger layers.

Each takes `where`, the leaves to prune (float leaves with two axes and more by default), and `override`, path pattern
-> sparsity of the leaves that it matches. Such leaves stand outside of the budget: neither are they counted, nor do
the others make up for them. The first pattern that matches a leaf counts.
"""

from typing import Any

import numpy as np

from steelyard import choices
from steelyard import tree as tree_lib
from steelyard.sparsity.allocation import budget as budget_lib
from steelyard.sparsity.allocation.water_fill import water_fill

PyTree = Any


def uniform(
    params: PyTree,
    sparsity: float,
    *,
    where: tree_lib.Where | None = None,
    override: budget_lib.Override = None,
) -> PyTree:
    """The same sparsity for every leaf.

    Args:
      params: a tree of arrays, or of their shapes.
      sparsity: the fraction removed, in [0, 1].
      where: which leaves; see the module.
      override: sparsities of their own; see the module.

    Returns:
      A tree of Python floats, `None` for a leaf that is not pruned.

    Raises:
      ValueError: a number is outside of [0, 1], a pattern matches nothing, or nothing is to be pruned.
    """
    budget = budget_lib.of(params, sparsity, where, override)
    return budget.tree([sparsity] * len(budget.shapes))


def uniform_plus(
    params: PyTree,
    sparsity: float,
    last_kept: float = 0.2,
    *,
    where: tree_lib.Where | None = None,
    override: budget_lib.Override = None,
) -> PyTree:
    """The same sparsity for every leaf, except that a first convolution stays dense and the last leaf keeps a part.

    The first leaf stays dense if it has four axes, the last one keeps at least round(last_kept n) of its n weights;
    the others make up for both alike. First and last are meant in the order of `jax.tree.leaves`.

    Args:
      params: a tree of arrays, or of their shapes.
      sparsity: of the whole, in [0, 1]; round(sparsity N) weights go.
      last_kept: the share that the last leaf keeps, in [0, 1].
      where: which leaves; see the module.
      override: sparsities of their own; see the module.

    Returns:
      A tree of Python floats, `None` for a leaf that is not pruned.

    Raises:
      ValueError: as `uniform`; `last_kept` is outside of [0, 1]; or so much cannot be pruned.

    Source: Layer-adaptive sparsity for the magnitude-based pruning (2021, Lee et al.), "uniform+"; it names The
    state of sparsity in deep neural networks (2019, Gale et al.) as its source.
    """
    choices.require_within("last_kept", last_kept, "[0, 1]")
    budget = budget_lib.of(params, sparsity, where, override)
    sizes = budget.sizes
    if not len(sizes):
        return budget.tree([])
    room = np.where([i == 0 and len(shape) == 4 for i, shape in enumerate(budget.shapes)], 0, sizes)
    total = round(sparsity * sizes.sum())
    share = total / max(room.sum(), 1)
    pruned = share * room
    last = sizes[-1] - round(last_kept * sizes[-1])
    if round((1 - share) * sizes[-1]) < sizes[-1] - last and room[-1]:
        room[-1] = 0
        share = (total - last) / max(room.sum(), 1)
        pruned = np.append(share * room[:-1], last)
    if share > 1 or pruned.sum() < total - 0.5:
        raise ValueError(
            f"sparsity={sparsity} with last_kept={last_kept}: {total} of {sizes.sum():.0f} weights cannot be pruned "
            f"from leaves of shapes {budget.shapes}"
        )
    return budget.tree(pruned / np.maximum(sizes, 1))


def erdos_renyi(
    params: PyTree,
    sparsity: float,
    *,
    kernel: bool = True,
    power: float = 1.0,
    where: tree_lib.Where | None = None,
    override: budget_lib.Override = None,
) -> PyTree:
    """Densities in proportion to (sum of the axes) / (their product): thin leaves stay denser.

        p_l = (sum(shape) / prod(shape))^power,  kept_l = min(c p_l, 1) n_l,  sum(kept) = (1 - sparsity) sum(n).

    A leaf whose share exceeds it stays dense, and the others share the rest.

    Args:
      params: a tree of arrays, or of their shapes.
      sparsity: of the whole, in [0, 1].
      kernel: whether all axes count (ERK), or only the last two, in and out (ER).
      power: of the proportion; 0 is uniform.
      where: which leaves; see the module.
      override: sparsities of their own; see the module.

    Returns:
      A tree of Python floats, `None` for a leaf that is not pruned; 0 for one that stays dense.

    Raises:
      ValueError: as `uniform`; or `power` is negative.

    Source: Rigging the lottery: making all tickets winners (2020, Evci et al.), section 3, after Scalable training of
    artificial neural networks with adaptive sparse connectivity inspired by network science (2018, Mocanu et al.).
    """
    choices.require_within("power", power, "[0, inf)")
    budget = budget_lib.of(params, sparsity, where, override)
    axes = [np.array(shape if kernel else shape[-2:], np.float64) for shape in budget.shapes]
    densities = np.array([(x.sum() / max(x.prod(), 1)) ** power for x in axes])
    kept = water_fill(densities * budget.sizes, budget.sizes, (1 - sparsity) * budget.sizes.sum())
    return budget.tree((budget.sizes - kept) / np.maximum(budget.sizes, 1))
