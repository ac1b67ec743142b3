"""Fixed masks between the stored and the seen parameters."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from steelyard import choices
from steelyard import tree as tree_lib
from steelyard.reparam import base, masking, sparsities
from steelyard.sparsity import masks as masks_lib
from steelyard.sparsity import patterns

PyTree = Any


def masked(
    masks: PyTree | Callable[[PyTree], PyTree], *, backward: masking.Backward = "straight_through"
) -> base.Reparam:
    """Fixed masks: the model sees w * mask.

    With "straight_through" the gradient reaches every entry, and the stored removed entries stay and move. With
    "chain" the gradient is g * mask, and the mask is also a veto: stored removed entries are zeroed at the start and
    after every step, so that neither momentum nor weight decay moves them.

    Args:
      masks: a tree like the parameters of bool arrays, `None` for a dense leaf; or a function of the tree that `init`
        gets. Behind it in a chain a link may add leaves to that tree: then give a function.
      backward: "straight_through" or "chain".

    Raises:
      ValueError: `backward` is unknown; at `init`, the masks have another structure or shape than the parameters; at
        `finish`, a masked leaf is already a weight node.
    """
    choices.require("backward", backward, masking.BACKWARDS)
    is_chain = backward == "chain"

    def init(params, rng):
        del rng
        state = masking.MaskedState(_checked_masks(params, masks(params) if callable(masks) else masks))
        return (project(params, state) if is_chain else params), state

    def apply(stored, state, *, step, rng, train):
        del step, rng, train
        return project(stored, state) if is_chain else masking.map_masked(masking.straight_through, stored, state.masks)

    def project(stored, state):
        return masks_lib.apply(stored, state.masks)

    def finish(stored, state):
        return sparsities.store(stored, state.masks, patterns.Unstructured())

    def current(stored, state, *, step):
        del stored, step
        return state.masks

    return base.Reparam(init, apply, None, project if is_chain else None, finish, current)


def _checked_masks(params: PyTree, masks: PyTree) -> PyTree:
    """The masks as bool arrays, if they fit the parameters."""
    expected, given = tree_lib.paths(params, is_leaf=tree_lib.is_none), tree_lib.paths(masks, is_leaf=tree_lib.is_none)
    if expected != given:
        odd = sorted(set(expected) ^ set(given))
        raise ValueError(
            f"masks has {len(given)} leaves (None included), the parameters {len(expected)}; differing: {odd}"
        )

    def leaf(path, w, mask):
        if mask is None:
            return None
        if jnp.shape(w) != jnp.shape(mask):
            raise ValueError(f"masks: {path} has shape {jnp.shape(mask)}, but its parameter {jnp.shape(w)}")
        return jnp.asarray(mask, bool)

    return tree_lib.map_with_path(leaf, params, masks, is_leaf=tree_lib.is_none)
