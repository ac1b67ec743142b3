"""Pruning while training, in one shot or along a schedule: any score, allocation and pattern.

Sources: To prune, or not to prune: exploring the efficacy of pruning for model compression (2017, Zhu and Gupta) for
the gradual form; AC/DC: alternating compressed/decompressed training of deep neural networks (2021, Peste et al.) for
the phases.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from steelyard import choices, formats
from steelyard import tree as tree_lib
from steelyard.reparam import base, masking, sparsities
from steelyard.sparsity import masks as masks_lib
from steelyard.sparsity import patterns, schedules, scores

PyTree = Any
Score = str | Callable[[PyTree, PyTree | None, Any], PyTree | None]

_LAST_STEP = np.iinfo(np.int32).max


class PrunedState(NamedTuple):
    """State of `pruned`.

    Attributes:
      masks: like the stored tree, `None` for a dense leaf: bool arrays of the leaf's shape (so that they are sharded
        alike), or with `packed=True` uint8 with eight entries of the last axis a byte.
      sparsities: of the leaves at the target, float32 scalars; `None` for a leaf that is dense or ranked with others.
      rng: the key that scores draw from, `()` if they do not.
    """

    masks: PyTree
    sparsities: PyTree
    rng: Key[Array, ""] | tuple[()]


_SCORES = {
    "magnitude": scores.magnitude,
    "random": scores.random,
    "saliency": scores.saliency,
    "movement": scores.movement,
    "fisher": lambda params, grads: scores.fisher(params, jax.tree.map(jnp.square, grads)),
}


def _ranker(score: Score) -> tuple[Callable[[PyTree, PyTree | None, Any], PyTree | None], bool]:
    """`(params, grads, rng) -> scores` from a score that may want less, and whether it wants the key."""
    function = score if callable(score) else _SCORES[score]
    wanted = tuple(
        name for name, p in inspect.signature(function).parameters.items() if p.default is inspect.Parameter.empty
    )
    if wanted == ("params",):
        return lambda params, grads, rng: function(params), False
    if wanted == ("params", "rng"):
        return lambda params, grads, rng: function(params, rng), True
    if wanted == ("params", "grads"):
        return lambda params, grads, rng: None if grads is None else function(params, grads), False
    if len(wanted) != 3:
        raise ValueError(
            f"score={getattr(score, '__name__', score)!r} has the arguments {', '.join(wanted) or 'none'}: it must "
            f"have (params), (params, rng), (params, grads) or (params, grads, rng)"
        )
    return function, True


def pruned(
    sparsity: float,
    *,
    score: Score = "magnitude",
    allocation: sparsities.Allocation = "uniform",
    pattern: patterns.Pattern | str = "unstructured",
    schedule: Callable[[Any], Any] | None = None,
    phase: Callable[[Any], Any] | None = None,
    normalize: bool = False,
    min_kept: int | float = 0,
    where: tree_lib.Where | None = None,
    override: Mapping[str, float] | None = None,
    backward: masking.Backward = "straight_through",
    every: int | None = 1,
    start: int = 0,
    end: int | None = None,
    packed: bool = False,
) -> base.Reparam:
    """Removes the entries of lowest score; the masks are kept in the state and refreshed from time to time.

        seen = w mask,  mask = the largest scores of each leaf at the sparsity  s_l schedule(t) / sparsity

    with s_l the leaf's sparsity by the allocation. Up to step `start` everything is there. Masks are refreshed after
    each step t with start <= t <= end and t mod every = 0, for step t + 1, from the parameters that are then stored;
    with `start=0` also at `init`, for step 0. Between, the seen parameters cost a select, which fuses with what reads
    them.

    | recipe | settings |
    | --- | --- |
    | one shot, at the beginning or after step k | `every=None`, `start=k` |
    | gradual | `schedule=schedules.polynomial(0.9, start=100, end=900)`, `every=10`, `backward="chain"` |
    | the mask follows dense weights (straight-through estimator) | the defaults |
    | global magnitude | `allocation="global"`, `min_kept=0.0005` |
    | AC/DC | `phase=schedules.alternating(...)`, `every=None`, `backward="chain"` |

    With "straight_through" the gradient reaches every stored entry; removed ones move on and may come back. With
    "chain" the gradient is g mask, and after every step the removed stored entries are put to exactly zero. With
    either, `optim.sparse` keeps update and moments at zero outside of the masks.

    Args:
      sparsity: the fraction removed at last, in [0, 1].
      score: "magnitude", "random", "saliency", "movement", "fisher" (the latter three from the gradients of the step,
        of the stored parameters); a function of `sparsity.scores` with the arguments (params), (params, rng) or
        (params, grads); or `(params, grads, rng) -> tree of scores`. `params` and `grads` have `None` for leaves that
        are not pruned; at `init` grads is `None`, and a function that needs them keeps everything: one of three
        arguments by returning `None`. `rng` is the key of `init` each time, so that random masks are nested as the
        sparsity grows.
      allocation: "uniform", "uniform_plus", "erdos_renyi", "global" (all leaves are ranked together), or a function
        `(params, sparsity) -> tree of sparsities` of the leaves without an override, called at `init` alone.
      pattern: of `sparsity.patterns`, or a text such as "2:4", "block:4x4", "channel:-1". An N:M pattern has its own
        sparsity: as long as that of the schedule is 0 it keeps everything, else it is applied in full.
      schedule: step -> sparsity, such as `schedules.polynomial`; `None`: `sparsity` throughout.
      phase: step -> whether it is sparse; in other steps everything is kept. Masks are refreshed where it changes.
      normalize: for "global", see `masks.global_masks`.
      min_kept: for "global", see there.
      where: which leaves; by default float leaves with two axes or more.
      override: path pattern -> sparsity of the leaves that it matches, outside of the budget.
      backward: "straight_through" or "chain".
      every: steps between refreshes; `None`: a single one, at `start`.
      start: steps before the first refresh.
      end: the last step after which masks are refreshed; `None`: no end.
      packed: keeps masks as bits, an eighth of the memory, packed along the last axis, so that they are cut over a
        mesh like their leaf where each part has whole bytes; each step unpacks them.

    Returns:
      A reparameterization with the state `PrunedState`. `apply(train=False)` shows the masks of the state, whatever the
      step. `finish` stores an N:M pattern along axis -2 as `formats.NMSparse` and everything else as an array with
      zeros.

    Raises:
      ValueError: an argument is out of range or misspelt, or two exclude each other; at `init`, a pattern matches
        nothing; while tracing `update`, the score needs gradients that a link before this one has reshaped; at
        `finish`, a pruned leaf is already a weight node.
    """
    pattern = patterns.parse(pattern)
    _check(sparsity, score, allocation, pattern, normalize, min_kept, backward)
    rank, has_key = _ranker(score)
    due = _due(every, start, end, phase)
    is_global, is_chain = allocation == sparsities.GLOBAL, backward == "chain"
    options = {"normalize": normalize, "min_kept": min_kept}

    def fresh(chosen, grads, targets, key, step):
        """Masks for a step, or `None` without a score."""
        found = rank(chosen, grads, key)
        if found is None:
            return None
        now = sparsity if schedule is None else jnp.clip(schedule(step), 0, 1)
        levels = jax.tree.map(lambda s: jnp.clip(s * (now / (sparsity or 1)), 0, 1), targets)
        masks = sparsities.pick(found, levels, pattern, now if is_global else None, **options)
        return masks if phase is None else jax.tree.map(lambda mask: mask | ~phase(step), masks)

    def init(params, rng):
        """Everything is kept where there are no masks yet."""
        chosen, targets = sparsities.allocate(params, sparsity, allocation, where, override)
        targets = jax.tree.map(lambda s: jnp.asarray(s, jnp.float32), targets)
        key = rng if has_key else ()
        masks = fresh(chosen, None, targets, key, 0) if start == 0 else None
        if masks is None:
            if every is None and start == 0 and phase is None:
                raise ValueError(f"score={score!r} needs gradients, which come with the first step: start=1, or every=")
            masks = jax.tree.map(lambda w: jnp.ones(jnp.shape(w), bool), chosen)
        state = PrunedState(_pack(masks) if packed else masks, targets, key)
        return (project(params, state) if is_chain else params), state

    def current(stored, state, *, step=None):
        del step
        return _unpack(state.masks, stored) if packed else state.masks

    def apply(stored, state, *, step, rng, train):
        del step, rng, train
        if is_chain:
            return project(stored, state)
        return masking.map_masked(masking.straight_through, stored, current(stored, state))

    def update(state, stored, grads, *, step, rng):
        del rng
        chosen = sparsities.restrict(stored, state.masks)
        grads = None if grads is None else sparsities.restrict(grads, state.masks)

        def refreshed():
            masks = fresh(chosen, grads, state.sparsities, state.rng, step + 1)
            if masks is None:
                raise ValueError(f"score={score!r} needs gradients of the stored parameters: put the link first")
            return _pack(masks) if packed else masks

        return state._replace(masks=jax.lax.cond(due(jnp.asarray(step)), refreshed, lambda: state.masks))

    def project(stored, state):
        return masks_lib.apply(stored, current(stored, state))

    def finish(stored, state):
        return sparsities.store(stored, current(stored, state), pattern)

    return base.Reparam(init, apply, update, project if is_chain else None, finish, current)


def _pack(masks: PyTree) -> PyTree:
    return jax.tree.map(lambda mask: masks_lib.pack_bits(mask, _packed_axis(mask)), masks)


def _unpack(packed: PyTree, stored: PyTree) -> PyTree:
    return jax.tree.map(
        lambda w, bits: None if bits is None else masks_lib.unpack_bits(bits, jnp.shape(w), _packed_axis(w)),
        stored,
        packed,
        is_leaf=formats.is_weight,
    )


def _packed_axis(leaf) -> int | None:
    """Along the last axis a packed mask is cut over a mesh as its leaf is."""
    return -1 if jnp.ndim(leaf) else None


def _due(every, start, end, phase) -> Callable[[Any], Array]:
    """step -> whether the masks of the next step are new."""
    start = choices.require_count("start", start, "[0, inf)")
    if every is None:
        periodic = functools.partial(_once, start=start)
    else:
        every = choices.require_count("every", every, "[1, inf)")
        end = choices.require_count("end", _LAST_STEP if end is None else end, f"[{start}, inf)")
        if end - end % every < start:
            raise ValueError(
                f"every={every} has no multiple from start={start} to end={end}: masks are never refreshed"
            )
        periodic = schedules.every(every, start, end)
    if phase is None:
        return periodic
    return lambda step: (periodic(step) & phase(step + 1)) | (phase(step + 1) != phase(step))


def _once(step, start) -> Array:
    """With `start=0` it was done at the beginning."""
    return (step == start) & (start > 0)


def _check(sparsity, score, allocation, pattern, normalize, min_kept, backward) -> None:
    choices.require_within("sparsity", sparsity, "[0, 1]")
    choices.require("backward", backward, masking.BACKWARDS)
    if not callable(score):
        choices.require("score", score, _SCORES)
    sparsities.check_allocation(allocation)
    if allocation == sparsities.GLOBAL:
        if not isinstance(pattern, patterns.Unstructured):
            raise ValueError(f'pattern={pattern} with allocation="global": only "unstructured" is ranked over leaves')
    elif normalize or min_kept:
        raise ValueError(f'normalize={normalize}, min_kept={min_kept} are for allocation="global", not {allocation!r}')
