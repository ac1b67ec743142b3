"""The state of an optimizer when the parameters lose channels."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Int

from steelyard import formats
from steelyard import tree as tree_lib
from steelyard.sparsity.channels import groups

PyTree = Any


def shrink_state(
    tx: optax.GradientTransformation,
    state: PyTree,
    params: PyTree,
    kept: Mapping[groups.ChannelGroup, Int[np.ndarray, " kept"]],
    *,
    under: str = "",
) -> PyTree:
    """The state of an optimizer for the shrunk parameters: moments lose the channels that their parameters lose.

    Args:
      tx: the optimizer.
      state: its state.
      params: the parameters before they were shrunk, or their shapes.
      kept, under: as for `shrink`.

    Returns:
      A state of the same structure, for `shrink(params, kept)`.

    Raises:
      ValueError: an entry belongs to a parameter that shrinks but has another shape (factored moments): make a new
        state by `tx.init`. Or as for `shrink`.
    """
    cut, shapes = groups.cutter(params, kept, under), {path: np.shape(leaf) for path, leaf in tree_lib.flatten(params)}
    shrunk = {path for group in kept for path in (member.path for member in groups.members(group, under))}

    def cut_moment(moment: Any, path: str | None) -> Any:
        if path not in shrunk or _is_gap(moment) or np.ndim(moment) == 0:
            return moment
        if formats.is_weight(moment) or np.shape(moment) != shapes[path]:
            raise ValueError(
                f"the state holds {type(moment).__name__} of shape {np.shape(moment)} for the parameter {path} of "
                f"shape {shapes[path]}: it cannot be shrunk; make a new state by tx.init"
            )
        return cut(path, moment)

    def cut_moments(moments: PyTree, paths: PyTree) -> PyTree:
        return jax.tree.map(cut_moment, moments, paths, is_leaf=_is_moment)

    paths = tree_lib.map_with_path(lambda path, _: path, params)
    return optax.tree.map_params(tx, cut_moments, state, paths, is_leaf=lambda _: True)


def _is_moment(x: Any) -> bool:
    """What stands for one parameter in a state and is no array: a packed moment, or a gap."""
    return _is_gap(x) or formats.is_weight(x)


def _is_gap(x: Any) -> bool:
    """Where the state has nothing for a parameter: what `optax.masked` leaves out."""
    return x is None or isinstance(x, optax.MaskedNode)
