"""N:M sparsity from dense weights: the mask follows the weights while the removed entries fade out.

Sources: Progressive gradient flow for robust N:M sparsity training in transformers (2024), also for the names of the
recipes; Learning N:M fine-grained structured sparse neural networks from scratch (2021) for SR-STE.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from steelyard import choices, formats
from steelyard import tree as tree_lib
from steelyard.reparam import base, masking
from steelyard.sparsity import masks as masks_lib
from steelyard.sparsity import patterns, schedules

PyTree = Any

RECIPES = (
    "dense",
    "masked",
    "ste",
    "sr_ste",
    "mdgf_linear",
    "mdgf_exponential",
    "sdgf_stepwise",
    "sdgf_geometric",
    "sdgf_densify",
)


def nm_sparse(
    n: int,
    m: int,
    *,
    recipe: str = "mdgf_exponential",
    decay_rate: float = 2e-4,
    sr_ste_decay: float = 2e-4,
    dense_steps: int = 0,
    fine_tune_steps: int = 0,
    total_steps: int | None = None,
    frames: int = 4,
    backward: masking.Backward = "straight_through",
    axis: int = -2,
    where: tree_lib.Where = r".*kernel$",
    refresh_every: int = 1,
) -> base.Reparam:
    """Trains N:M-sparse weights from dense ones, while the removed entries fade out by value or by structure.

    With M the N:M mask of the current |w|, D the decay since `dense_steps`, g the gradient of what the model sees:

    | recipe | the model sees | gradient of the stored w |
    | --- | --- | --- |
    | dense | w | g |
    | masked | w M | g M |
    | ste | w M | g |
    | sr_ste | w M | g + sr_ste_decay (1 - M) w |
    | mdgf_linear, mdgf_exponential | w (M + D (1 - M)) | g, or g (M + D (1 - M)) with `backward="chain"` |
    | sdgf_stepwise, sdgf_geometric, sdgf_densify | w M of the current frame | g |

    D = max(1 - decay_rate (t - dense_steps), 0) or exp(-decay_rate (t - dense_steps)). Before `dense_steps` every
    recipe is dense. In the last `fine_tune_steps` D = 0, straight-through. The stored parameters stay dense. The
    published code passes g on, its abstract restricts it: `backward` offers both, and "straight_through" followed by
    `optim.decay_gradient_flow` is "chain".

    `apply(train=False)` and `finish` show w M of the pattern n:m, for every recipe and step (a "dense" training is so
    pruned in one shot; without a mask altogether use `identity`). `finish` stores `formats.NMSparse`, which has its
    groups along axis -2; with another `axis` the leaf stays an array with zeros.

    Args:
      n: entries kept in a group, 1 <= n <= m.
      m: entries in a group; the last group of an axis may be short.
      recipe: one of the table.
      decay_rate: of D, a step; published settings lie between 1e-4 and 2e-4.
      sr_ste_decay: for "sr_ste".
      dense_steps: steps at the start.
      fine_tune_steps: steps at the end.
      total_steps: of the whole training; needed for "sdgf_*" and with `fine_tune_steps`.
      frames: how many patterns "sdgf_geometric" and "sdgf_densify" pass through.
      backward: "straight_through" or "chain"; for "mdgf_*".
      axis: of the groups; the default is the contraction axis.
      where: which leaves; arrays with less than two axes or without floating numbers are skipped.
      refresh_every: 1 computes M at every forward; k > 1 keeps it in the state, and `update` refreshes it after the
        steps t with t mod k == 0, with the pattern of step t + 1.

    Raises:
      ValueError: an argument is out of range, or misspelt; at `init`, `where` matches no parameter; at `finish`, a
        selected leaf is already a weight node.
    """
    choices.require("recipe", recipe, RECIPES)
    choices.require("backward", backward, masking.BACKWARDS)
    _check_pattern(n, m, refresh_every)
    _check_steps(recipe, dense_steps, fine_tune_steps, total_steps)
    frame_list = _frames(recipe, n, m, total_steps, dense_steps, fine_tune_steps, frames)
    flow = _flow(recipe, decay_rate, backward, dense_steps, total_steps - fine_tune_steps if fine_tune_steps else None)

    def deployed(w):
        return masks_lib.nm_mask(jnp.abs(w), n, m, axis)

    def fresh(stored, step):
        return _select(lambda w: _frame_mask(w, frame_list, axis, step), stored, where)

    def current(stored, state, *, step):
        if recipe == "dense":
            return None
        tree = state.masks if refresh_every > 1 else fresh(stored, step)
        return jax.tree.map(lambda mask: mask | (jnp.asarray(step) < dense_steps), tree) if dense_steps else tree

    def init(params, rng):
        del rng
        if refresh_every > 1 and recipe != "dense":
            return params, masking.MaskedState(fresh(params, 0))
        jax.eval_shape(lambda tree: fresh(tree, 0), params)  # Checks `where` and the axes.
        return params, ()

    def apply(stored, state, *, step, rng, train):
        del rng
        if not train:
            return masks_lib.apply(stored, _select(deployed, stored, where))
        if recipe == "dense":
            return stored
        masks = current(stored, state, step=step)
        if recipe == "masked":
            return masks_lib.apply(stored, masks)
        if recipe == "sr_ste":
            return masking.map_masked(lambda w, mask: masking.sr_ste(w, mask, sr_ste_decay), stored, masks)
        if flow is None:
            return masking.map_masked(masking.straight_through, stored, masks)
        seen, passed = flow(step)
        return masking.map_masked(lambda w, mask: masking.faded(w, mask, seen, passed), stored, masks)

    def update(state, stored, grads, *, step, rng):
        del grads, rng
        if not isinstance(state, masking.MaskedState):
            return state
        step = jnp.asarray(step)
        due = step % refresh_every == 0
        return masking.MaskedState(jax.lax.cond(due, lambda: fresh(stored, step + 1), lambda: state.masks))

    def finish(stored, state):
        del state
        packed = _select(lambda w: _pack(w, n, m, axis), stored, where)
        return masking.map_masked(lambda w, node: node, stored, packed)

    return base.Reparam(init, apply, update, None, finish, current)


def _frames(recipe, n, m, total_steps, dense_steps, fine_tune_steps, frames) -> list[schedules.Frame]:
    if not recipe.startswith("sdgf_"):
        return [schedules.Frame(0, n, m)]
    return schedules.structure_frames(
        n,
        m,
        kind=recipe.removeprefix("sdgf_"),
        total_steps=total_steps,
        dense_steps=dense_steps,
        fine_tune_steps=fine_tune_steps,
        frames=frames,
    )


def _frame_mask(w, frames, axis, step):
    """The mask of the frame of a step, of the first frame before it starts."""
    scores = jnp.abs(w)
    branches = [functools.partial(masks_lib.nm_mask, n=n, m=m, axis=axis) for _, n, m in frames]
    if len(branches) == 1:
        return branches[0](scores)
    starts = jnp.array([frame.start for frame in frames[1:]])
    return jax.lax.switch(jnp.count_nonzero(jnp.asarray(step) >= starts), branches, scores)


def _flow(recipe, decay_rate, backward, dense_steps, binary_from):
    """step -> (what is seen, what of the gradient passes) of removed entries; `None` for a recipe without it."""
    decays = {"mdgf_linear": schedules.linear_decay, "mdgf_exponential": schedules.exponential_decay}
    if recipe not in decays:
        return None
    decay = decays[recipe](decay_rate, dense_steps)

    def flow(step):
        seen = decay(step)
        passed = seen if backward == "chain" else jnp.ones_like(seen)
        if binary_from is None:
            return seen, passed
        is_binary = jnp.asarray(step) >= binary_from
        return jnp.where(is_binary, 0, seen), jnp.where(is_binary, 1, passed)

    return flow


def _select(fn: Callable[[Any], Any], stored: PyTree, where: tree_lib.Where) -> PyTree:
    """`fn` of each selected leaf that can be pruned, `None` in place of every other."""
    chosen = tree_lib.select(stored, where, is_leaf=formats.is_weight)

    def leaf(path, w, is_chosen):
        if not is_chosen:
            return None
        masking.check_array(path, w)
        return fn(w) if jnp.ndim(w) >= 2 and jnp.issubdtype(w.dtype, jnp.floating) else None

    return tree_lib.map_with_path(leaf, stored, chosen, is_leaf=formats.is_weight)


def _pack(w, n, m, axis):
    """As a weight node where the groups run along its axis, otherwise as an array with zeros."""
    if axis % w.ndim == w.ndim - 2:
        return formats.NMSparse.from_dense(w, n=n, m=m)
    return masks_lib.apply(w, masks_lib.nm_mask(jnp.abs(w), n, m, axis))


def _check_pattern(n, m, refresh_every):
    patterns.check_nm(n, m)
    if n == 0:
        raise ValueError(f"n=0, m={m}: no weight would be left; n must be at least 1")
    if refresh_every < 1:
        raise ValueError(f"refresh_every={refresh_every} must be at least 1")


def _check_steps(recipe, dense_steps, fine_tune_steps, total_steps):
    if dense_steps < 0 or fine_tune_steps < 0:
        raise ValueError(f"dense_steps={dense_steps} and fine_tune_steps={fine_tune_steps} must be at least 0")
    if total_steps is None:
        if recipe.startswith("sdgf_") or fine_tune_steps:
            raise ValueError(f"total_steps is needed for recipe={recipe!r} with fine_tune_steps={fine_tune_steps}")
    elif dense_steps + fine_tune_steps >= total_steps:
        raise ValueError(
            f"dense_steps={dense_steps} + fine_tune_steps={fine_tune_steps} leave nothing of total_steps={total_steps}"
        )
