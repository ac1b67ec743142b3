"""PAGCP: channels pruned group after group, each as far as no task's loss rises by more than it may.

Source: Performance-aware Approximation of Global Channel Pruning for Multitask CNNs (2023, Ye et al.).
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from steelyard import choices, precision, selection
from steelyard import tree as tree_lib
from steelyard.sparsity import masks
from steelyard.sparsity.channels import groups as groups_lib

PyTree = Any
ChannelGroup = groups_lib.ChannelGroup
Kept = dict[ChannelGroup, Int[np.ndarray, " kept"]]

_POWERS = {"l1": jnp.abs, "l2": jnp.square}
RATIOS = tuple(np.linspace(0.05, 0.95, 19).tolist())
# The share of a group by whose removal the groups are put in order.
_TRIAL_RATIO = 0.3

_keep_each = jax.jit(jax.vmap(selection.keep_largest, in_axes=(None, 0)))


class _Step(NamedTuple):
    """What one group came to: the channels that it keeps, and the rise of the summed loss."""

    kept: Int[np.ndarray, " kept"]
    rise: float


def drop_schedule(initial_drop: float, layers: int, total_drop: float) -> float:
    """The factor by which the permitted rise of the loss changes from layer to layer.

        prod_{i=0}^{layers-1} (1 + initial_drop lambda^i) = total_drop

    has one solution lambda > 0, because the product increases with it; a single layer has none, and gets 1.

    Args:
      initial_drop: by which fraction the loss may rise at the first layer, above 0.
      layers: how many layers are pruned one after the other.
      total_drop: the factor by which the loss may have risen after all of them, above 1 + initial_drop.

    Returns:
      lambda.

    Raises:
      ValueError: an argument is out of range.

    Source: Performance-aware Approximation of Global Channel Pruning for Multitask CNNs (2023, Ye et al.).
    """
    from scipy import optimize

    choices.require_within("initial_drop", initial_drop, "(0, inf)")
    layers = choices.require_count("layers", layers, "[1, inf)")
    choices.require_within("total_drop", total_drop, "(1, inf)")
    if layers == 1:
        return 1.0
    # With less the first layer alone would exceed the total, whatever the factor.
    choices.require_within("total_drop", total_drop, f"({1 + initial_drop}, inf)")
    exponents, first, total = np.arange(layers), math.log(initial_drop), math.log(total_drop)

    def excess(log_factor):
        return np.logaddexp(0, first + log_factor * exponents).sum() - total

    # log(1 + x) <= x bounds the product from above where lambda <= 1, and its second factor does from below; one more
    # on either side is for rounding.
    low = min(0.0, math.log((total - math.log1p(initial_drop)) / ((layers - 1) * initial_drop)))
    high = math.log(total_drop - 1) - first
    return math.exp(optimize.brentq(excess, low - 1, high + 1, xtol=1e-14))


def performance_aware(
    params: PyTree,
    groups: Sequence[ChannelGroup],
    task_losses: Callable[[PyTree], Float[Array, " tasks"]],
    *,
    ratios: Sequence[float] = RATIOS,
    initial_drop: float = 0.05,
    total_drop: float = 5.0,
    keep_fraction: float = 1.0,
    score: Literal["l1", "l2"] = "l1",
    flops: Callable[[ChannelGroup, int], float] | None = None,
    sequential: bool = True,
    under: str = "",
) -> Kept:
    """Prunes groups of channels one after the other, each as far as *no task* loses more than its budget.

    With t = initial_drop, base = the losses of the dense parameters and lambda = `drop_schedule`, for each group: its
    floor(ratio size) channels of lowest score are masked, on top of what is masked in earlier groups, for ever larger
    ratios while

        max_k losses_k / base_k <= 1 + t

    The last ratio that passed is taken; then t <- lambda t and base <- max(base, its losses). A group of which nothing
    can be taken leaves both as they are. Groups whose removal saves most come first, or last if lambda > 1. Fine-tune
    `shrink` of the result, and repeat.

    Costs at most an evaluation for each group and ratio, and one more; a ratio that removes no more than the one
    before is not evaluated. Runs on the host, between evaluations that `task_losses` may jit once: shapes stay.

    Args:
      params: a tree of arrays.
      groups: groups of channels; those of one channel are left alone.
      task_losses: `params -> non-negative losses [tasks]`, called with masked parameters.
      ratios: shares of a group to try, ascending, in (0, 1]; one channel always stays.
      initial_drop: by which fraction a loss may rise at the first group, above 0.
      total_drop: the factor by which it may have risen at last; see `drop_schedule`.
      keep_fraction: in [0, 1]: the share of the groups that is pruned in the end, those with the least rise of the
        summed loss for what they save; the others stay whole.
      score: of a channel, summed over the members of its group: the mean of |w|, or of w^2, over its entries.
      flops: `(group, kept) -> operations saved` when so many of its channels are kept; by default the number of
        parameters removed.
      sequential: whether the budget changes from group to group; else lambda = 1.
      under: see `channels.groups`.

    Returns:
      For each group the indices of the kept channels, ascending.

    Raises:
      ValueError: an unknown `score`, a number out of its range, ratios that do not ascend, losses that are not one
        axis of finite non-negative numbers at the start, or a group that does not fit the parameters.

    Source: Performance-aware Approximation of Global Channel Pruning for Multitask CNNs (2023, Ye et al.). Where the
    ratios run out before the budget, the last one is taken like any other.
    """
    choices.require("score", score, _POWERS)
    choices.require_within("keep_fraction", keep_fraction, "[0, 1]")
    choices.require_within("ratios", ratios, "(0, 1]")
    if any(b <= a for a, b in itertools.pairwise(ratios)):
        raise ValueError(f"ratios={list(ratios)} must ascend")
    prunable = [group for group in groups if group.size > 1]
    factor = drop_schedule(initial_drop, max(len(prunable), 1), total_drop)
    factor = factor if sequential else 1.0
    saved = _parameters_removed(params, under) if flops is None else flops
    prunable.sort(key=lambda g: saved(g, g.size - _removed(_TRIAL_RATIO, g.size)), reverse=factor <= 1)
    scores = jax.tree.map(lambda w: _POWERS[score](precision.wide(w)) / max(w.size, 1), params)
    candidates = {g: _candidates(groups_lib.score(scores, g, combine="sum", under=under), ratios) for g in prunable}
    evaluate = _evaluator(params, prunable, task_losses, under)
    steps = _descend(candidates, evaluate, initial_drop, factor)
    ranked = sorted(steps, key=lambda g: steps[g].rise / (saved(g, len(steps[g].kept)) + 1e-20))
    chosen = ranked[: math.floor(keep_fraction * len(prunable) + 1e-9)]
    return {g: steps[g].kept if g in chosen else np.arange(g.size) for g in groups}


def _removed(ratio: float, size: int) -> int:
    # The slack forgives a product that rounding left just below a whole number.
    return min(math.floor(ratio * size + 1e-9), size - 1)


def _candidates(scores: Float[Array, " size"], ratios: Sequence[float]) -> list[Int[np.ndarray, " kept"]]:
    """The channels kept at each ratio; a ratio that removes none, or no more than the one before, is left out."""
    counts = sorted({_removed(ratio, len(scores)) for ratio in ratios} - {0})
    kept = _keep_each(scores, len(scores) - np.asarray(counts, np.int32)) if counts else ()
    return [np.flatnonzero(row) for row in np.asarray(kept)]


@functools.partial(jax.jit, static_argnums=2)
def _masked(params: PyTree, keep: dict[ChannelGroup, Bool[Array, " size"]], under: str) -> PyTree:
    return masks.apply(params, groups_lib.mask_tree(params, keep, under=under))


def _evaluator(
    params: PyTree, groups: Sequence[ChannelGroup], task_losses: Callable[[PyTree], Array], under: str
) -> Callable[[Kept], Float[np.ndarray, " tasks"]]:
    """`kept of some groups -> losses`, the other groups being whole; one program whatever is masked."""

    def evaluate(kept: Kept) -> Float[np.ndarray, " tasks"]:
        keep = groups_lib.as_masks({group: kept.get(group, np.arange(group.size)) for group in groups})
        losses = np.asarray(task_losses(_masked(params, keep, under)), np.float64)
        if losses.ndim != 1 or not losses.size:
            raise ValueError(f"task_losses gives shape {losses.shape}; it must be (tasks,) with at least one task")
        return losses

    return evaluate


def _descend(
    candidates: dict[ChannelGroup, list[np.ndarray]],
    losses_of: Callable[[Kept], Float[np.ndarray, " tasks"]],
    budget: float,
    factor: float,
) -> dict[ChannelGroup, _Step]:
    """What each group gives within its budget, in the order given; groups that give nothing are left out."""
    base, taken, steps = losses_of({}), {}, {}
    choices.require_within("task_losses(params)", base, "[0, inf)")
    for group, tries in candidates.items():
        last = None
        for kept in tries:
            losses = losses_of(taken | {group: kept})
            # Turned around, so that a loss that is not a number ends the group too.
            if not np.max(_relative(losses, base)) <= 1 + budget:
                break
            last = kept, losses
        if last is not None:
            taken[group], losses = last
            steps[group] = _Step(taken[group], float(losses.sum() - base.sum()))
            base, budget = np.maximum(base, losses), budget * factor
    return steps


def _relative(losses: Float[np.ndarray, " tasks"], base: Float[np.ndarray, " tasks"]) -> Float[np.ndarray, " tasks"]:
    """losses / base, with 0 / 0 = 1 and anything else by 0 infinite."""
    return np.divide(losses, base, out=np.where(losses == 0, 1.0, np.inf), where=base > 0)


def _parameters_removed(params: PyTree, under: str) -> Callable[[ChannelGroup, int], float]:
    """By default a channel costs its parameters; a leaf of which it owns two axes shrinks along both."""

    def removed(group: ChannelGroup, kept: int) -> float:
        rest = jax.eval_shape(lambda p: groups_lib.shrink(p, {group: np.arange(kept)}, under=under), params)
        return float(tree_lib.size(params) - tree_lib.size(rest))

    return removed
