"""Sparse training from scratch in which unimportant weights shrink at each step, rather than vanish.

Source: Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution (2023, Wang et al.).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from steelyard import choices, precision
from steelyard import tree as tree_lib
from steelyard.optim.reset import is_gap
from steelyard.sparsity import masks, patterns, prunable

PyTree = Any
Amount = float | Callable[[Int[Array, ""]], Float[Array, ""]]


class SoftShrinkageState(NamedTuple):
    """State of `soft_shrinkage`: the number of updates made."""

    count: Int[Array, ""]


def soft_shrinkage(
    sparsity: Amount | Mapping[str, Amount],
    *,
    retain: float | Float[Array, ""] = 0.95,
    every: int = 1,
    pattern: str | patterns.Pattern = "unstructured",
    where: tree_lib.Where | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Multiplies the weights that are now unimportant by a constant just under 1, after each step.

        w' = w + u,  M = mask(|w'|, sparsity) leaf by leaf,  w <- w' where M, else retain * w'

    so that the structure can change while it is learned. Put it last in the chain: it must see the update that is
    added. After a fixed number of steps prune once by `sparsity.masks` and go on under fixed masks (`reparam.masked`).
    `retain=0` is iterative hard thresholding.

    Costs one selection a leaf a step, with its passes over |w'|, and every k-th step only where `every` is k.

    Args:
      sparsity: the fraction that shrinks, in [0, 1]; a schedule of the number of updates made; or from a regular
        expression for the whole path of a leaf to one of these, where the first that matches counts and the other
        leaves pass. With an N:M pattern only whether it is 0 counts.
      retain: what is left of an unimportant weight, in [0, 1]; 1 changes nothing.
      every: updates 0, every, 2 every, ... shrink.
      pattern: of the masks, as in `sparsity.patterns.parse`: "unstructured", "1:20", "block:4x4", "channel:-1".
      where: which leaves may shrink; by default those of at least two axes.

    Returns:
      A transformation with the state `SoftShrinkageState`; its update needs params.

    Raises:
      ValueError: a number out of range, an unknown pattern; params are missing; an expression matches no leaf.
    """
    for name, amount in sparsity.items() if isinstance(sparsity, Mapping) else [(None, sparsity)]:
        if not callable(amount):
            choices.require_within("sparsity" if name is None else f"sparsity[{name!r}]", amount, "[0, 1]")
    choices.require_within("retain", retain, "[0, 1]")
    every = choices.require_count("every", every, "[1, inf)")
    pattern = patterns.parse(pattern)

    def init(params):
        # optax.tree.map_params looks at the state's form through a tree without leaves.
        if jax.tree.leaves(params):
            _amounts(params, sparsity, where)
        return SoftShrinkageState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("soft_shrinkage needs params: call tx.update(grads, state, params)")

        due = True if every == 1 else state.count % every == 0

        def leaf(u, w, amount):
            if is_gap(u) or amount is None:
                return u
            return _shrink(u, w, amount(state.count) if callable(amount) else amount, retain, pattern, due)

        updates = jax.tree.map(leaf, updates, params, _amounts(params, sparsity, where), is_leaf=is_gap)
        return updates, SoftShrinkageState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _amounts(params: PyTree, sparsity: Any, where: tree_lib.Where | None) -> PyTree:
    """The sparsity of each leaf, `None` for those that pass."""
    if not jax.tree.leaves(params):
        return params
    chosen = prunable.selected(params, where)
    if not isinstance(sparsity, Mapping):
        return jax.tree.map(lambda keep: sparsity if keep else None, chosen)
    amounts = jax.tree.map(lambda _: None, chosen)
    for name, amount in reversed(list(sparsity.items())):
        matched = prunable.selected(params, name, name="sparsity")
        amounts = jax.tree.map(
            lambda keep, match, old, amount=amount: amount if keep and match else old, chosen, matched, amounts
        )
    return amounts


def _shrink(u, w, amount, retain, pattern, due) -> Float[Array, "..."]:
    dtype = jnp.promote_types(jnp.result_type(u), jnp.result_type(w))
    u, w = precision.wide(u), precision.wide(w)

    def mask(moved) -> Bool[Array, "..."]:
        return masks.mask(jnp.abs(moved), amount, pattern)

    kept = mask(w + u) if due is True else jax.lax.cond(due, mask, lambda x: jnp.ones(x.shape, bool), w + u)
    # Not retain * (w + u) - w, which rounds where nothing is to happen (retain 1).
    return jnp.where(kept, u, retain * u - (1 - retain) * w).astype(dtype)
