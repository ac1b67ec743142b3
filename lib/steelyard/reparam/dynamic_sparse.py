"""Dynamic sparse training: a sparse network from the first step on, whose connections move.

Sources: The unreasonable effectiveness of random pruning (2022, Liu et al.) for static random masks; Rigging the
lottery: making all tickets winners (2020, Evci et al.) for RigL and its schedule; Dynamic sparse learning: a novel
paradigm for efficient recommendation (2024, Wang et al.) for embeddings and for budgets that move between tables.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from steelyard import choices, precision, selection
from steelyard import tree as tree_lib
from steelyard.reparam import base, masking, sparsities
from steelyard.sparsity import dynamic, patterns, schedules, scores
from steelyard.sparsity import masks as masks_lib

PyTree = Any

SCOPES = ("layer", "global")
INITIAL = ("random", "magnitude")
DROPS = ("magnitude", "taylor")
GROWS = ("random", "gradient", "momentum")

_LAST_STEP = np.iinfo(np.int32).max


class DynamicState(NamedTuple):
    """State of `dynamic_sparse`.

    Attributes:
      masks: like the stored tree, bool arrays of the leaf's shape or `None`.
      momentum: a mean of past gradients of the leaves with a mask, float32 at least; `()` unless `grow="momentum"`.
    """

    masks: PyTree
    momentum: PyTree


def dynamic_sparse(
    allocation: sparsities.Allocation = "erdos_renyi",
    *,
    sparsity: float,
    initial: str = "random",
    scope: str = "layer",
    drop: str = "magnitude",
    grow: str | None = None,
    drop_fraction: float | Callable[[Any], Any] = 0.3,
    every: int = 100,
    end: int | None = None,
    decay: float = 0.9,
    min_kept: int = 0,
    where: tree_lib.Where | None = None,
    override: Mapping[str, float] | None = None,
) -> base.Reparam:
    """Trains at a constant number of weights: from time to time some are dropped and as many others grow.

    After each step t with 0 < t <= end and t mod every = 0, `dynamic.prune_and_grow` drops the fraction f of the active
    weights that are worth least and grows as many,

        f = drop_fraction / 2 (1 + cos(pi t / end)).

    | published as | settings |
    | --- | --- |
    | static random pruning | `grow=None` |
    | SET | `grow="random"` |
    | RigL | `grow="gradient"`, `end` at three quarters of the training |
    | sparse momentum (its growth) | `grow="momentum"` |
    | dynamic sparse learning | `allocation="uniform"`, `sparsity=0.5`, `grow="gradient"`, `every=3000`, and the \
        schedule `drop_fraction=optax.cosine_decay_schedule(0.5, steps, alpha=0.01)` |

    The gradient is straight-through, so that it is known where nothing is; inactive stored weights are put back to zero
    after every step, and a grown weight starts at zero. Train with `optim.sparse`, which keeps the moments of inactive
    weights at zero too. Where the step that moves the mask shall leave the weights alone, wrap the optimizer:
    `optax.conditionally_mask(optim.sparse(tx), lambda step: step % every != 0)`.

    Args:
      allocation: "uniform", "uniform_plus", "erdos_renyi", "global" (the initial scores are ranked together), or a
        function `(params, sparsity) -> tree of sparsities`.
      sparsity: the fraction removed, in [0, 1], of all weights together.
      initial: "random" or "magnitude": which weights are active at first.
      scope: "layer": each leaf keeps its count. "global": weights of all leaves compete, and the budget moves.
      drop: "magnitude": the smallest |w| go. "taylor": the smallest (w g)^2.
      grow: `None`: the mask stays. "random"; "gradient": the largest |g|; "momentum": the largest |mean of past g|.
      drop_fraction: f at step 0, or a schedule step -> f.
      every: steps between moves.
      end: the last step after which the mask moves, needed for the cosine; with a schedule `None` means no end.
      decay: of the mean of past gradients.
      min_kept: active weights that each row (the entries along the last axis: an item's embedding) never falls below,
        as far as the kept weights suffice; they are those worth most.
      where: which leaves; by default float leaves with two axes or more.
      override: path pattern -> sparsity of the leaves that it matches.

    Returns:
      A reparameterization with the state `DynamicState`; the number of active weights is constant in the scope.

    Raises:
      ValueError: an argument is out of range or misspelt, or `end` is missing; at `init`, a pattern matches nothing;
        while tracing `update`, a link before this one has reshaped the gradients; at `finish`, a masked leaf is already
        a weight node.

    Cost: between moves a select, which fuses with what reads the weights; "momentum" also reads and writes as much as
    the weights have. A move is two selections.
    """
    _check(sparsity, initial, scope, drop, grow, decay)
    sparsities.check_allocation(allocation)
    min_kept = choices.require_count("min_kept", min_kept, "[0, inf)")
    due, fraction = _plan(grow, drop_fraction, every, end)

    def init(params, rng):
        chosen, levels = sparsities.allocate(params, sparsity, allocation, where, override)
        whole = sparsity if allocation == sparsities.GLOBAL else None
        worth = scores.random(chosen, rng) if initial == "random" else scores.magnitude(chosen)
        everything = jax.tree.map(lambda w: jnp.ones(jnp.shape(w), bool), chosen)
        masks = sparsities.pick(_protect(worth, everything, min_kept), levels, patterns.Unstructured(), whole)
        momentum = jax.tree.map(lambda w: jnp.zeros_like(precision.wide(w)), chosen) if grow == "momentum" else ()
        state = DynamicState(masks, momentum)
        return project(params, state), state

    def apply(stored, state, *, step, rng, train):
        del step, rng, train
        return masking.map_masked(masking.straight_through, stored, state.masks)

    def update(state, stored, grads, *, step, rng):
        if grow is None:
            return state
        if grads is None:
            raise ValueError(f"grow={grow!r} needs gradients of the stored parameters: put dynamic_sparse first")
        weights, grads = (sparsities.restrict(tree, state.masks) for tree in (stored, grads))
        momentum = _average(state.momentum, grads, decay) if grow == "momentum" else ()

        def moved():
            worth = scores.magnitude(weights) if drop == "magnitude" else scores.saliency(weights, grads)
            worth = _protect(worth, state.masks, min_kept)
            if grow == "random":
                hope = scores.random(weights, rng)
            else:
                hope = scores.magnitude(momentum if grow == "momentum" else grads)
            if scope == "global":
                return dynamic.prune_and_grow(state.masks, worth, hope, fraction(step))
            return jax.tree.map(lambda *leaf: dynamic.prune_and_grow(*leaf, fraction(step)), state.masks, worth, hope)

        return DynamicState(jax.lax.cond(due(step), moved, lambda: state.masks), momentum)

    def project(stored, state):
        return masks_lib.apply(stored, state.masks)

    def finish(stored, state):
        return sparsities.store(stored, state.masks, patterns.Unstructured())

    def current(stored, state, *, step):
        del stored, step
        return state.masks

    return base.Reparam(init, apply, update, project, finish, current)


def _plan(grow, drop_fraction, every, end):
    """Functions of the step: whether the mask moves after it, and how much of it."""
    every = choices.require_count("every", every, "[1, inf)")
    if end is not None:
        end = choices.require_count("end", end, f"[{every}, inf)")
    due = schedules.every(every, 1, _LAST_STEP if end is None else end)
    if callable(drop_fraction):
        return due, drop_fraction
    choices.require_within("drop_fraction", drop_fraction, "[0, 1]")
    if end is None and grow is not None:
        raise ValueError(f"end is needed with drop_fraction={drop_fraction}: 3/4 of the training is usual")
    return due, optax.cosine_decay_schedule(float(drop_fraction), end or every)


def _protect(worth: PyTree, masks: PyTree, min_kept: int) -> PyTree:
    """Scores in which the best active entries of each row come first."""
    if min_kept == 0:
        return worth

    def leaf(x, mask):
        best = selection.keep_largest(jnp.where(mask, x, -jnp.inf), min_kept, axis=-1 if x.ndim else None)
        return jnp.where(best & mask, jnp.inf, x)

    return jax.tree.map(leaf, worth, masks)


def _average(momentum: PyTree, grads: PyTree, decay: float) -> PyTree:
    return jax.tree.map(lambda m, g: decay * m + (1 - decay) * g.astype(m.dtype), momentum, grads)


def _check(sparsity, initial, scope, drop, grow, decay) -> None:
    choices.require_within("sparsity", sparsity, "[0, 1]")
    choices.require_within("decay", decay, "[0, 1)")
    choices.require("initial", initial, INITIAL)
    choices.require("scope", scope, SCOPES)
    choices.require("drop", drop, DROPS)
    if grow is not None:
        choices.require("grow", grow, GROWS)
