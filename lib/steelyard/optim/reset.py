"""Moments put back to zero, where a weight starts anew: grown, reinitialised, moved to another task.

Which parts of a state belong to parameters is asked of optax (`optax.tree.map_params`), so that it works for any
transformation that is built of optax's conventions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from steelyard import formats
from steelyard import tree as tree_lib
from steelyard.quant import affine

PyTree = Any


def reset(state: optax.OptState, where: tree_lib.Where | PyTree, *, tx: optax.GradientTransformation) -> optax.OptState:
    """Zeroes what an optimizer remembers of the selected parameters, or entries of parameters.

    Everything in the state that is a tree like the parameters is taken for moments; counters, keys and schedules are
    left alone, so that the bias correction of Adam goes on counting for a leaf whose moments start anew. Not for states
    with trees that must not become zero: copies of parameters (`optax.contrib.schedule_free`), step sizes
    (`optax.rprop`).

    A moment that is stored as `formats.Quantized` stays so: the codes become those of zero, scales are kept.

    Cost: reads and writes the moments once; one elementwise select, without communication.

    Args:
      state: of `tx`, for any parameters.
      where: a regular expression for the whole path of a parameter, or `(path, moment) -> bool`: whole leaves. Or a
        tree like the parameters of bool masks, True where the moment becomes zero: an array of the parameter's shape;
        a single bool for the whole leaf (so `tree.select` makes such a tree); `None` leaves it alone.
      tx: the transformation that made the state; which part of it belongs to which parameter is asked of its `init`.

    Returns:
      A state of the same structure, shapes and dtypes. A moment of another shape than its parameter (factored) becomes
      zero where the whole leaf is selected, and is left alone by the mask of some entries, which it cannot tell apart.

    Raises:
      ValueError: a pattern is malformed or matches none of the parameters that have moments.
    """
    if isinstance(where, str) or _is_function(where):
        if isinstance(where, str):
            _check_pattern(state, where, tx)
        return _map_moments(tx, lambda moments: _reset_leaves(moments, where), state)
    return _map_moments(tx, lambda moments, masks: _reset_entries(moments, masks), state, where)


def _is_function(where: Any) -> bool:
    """Whether it is a function and not a tree whose root can be called, as an Equinox module's."""
    return callable(where) and jax.tree_util.all_leaves([where])


def _map_moments(tx, fn: Callable[..., PyTree], state: optax.OptState, *rest: PyTree) -> optax.OptState:
    """`fn` of each whole tree of the state that is like the parameters."""
    return optax.tree.map_params(tx, fn, state, *rest, is_leaf=lambda _: True)


def _check_pattern(state: optax.OptState, where: str, tx) -> None:
    found: dict[str, Any] = {}
    _map_moments(tx, lambda moments: found.update(tree_lib.flatten(moments, is_leaf=formats.is_weight)), state)
    if found:
        tree_lib.select(found, where, is_leaf=formats.is_weight)


def _reset_leaves(moments: PyTree, where: tree_lib.Where) -> PyTree:
    def leaf(path, moment):
        return zero(moment, jnp.asarray(True)) if tree_lib.matches(where, path, moment) else moment

    return tree_lib.map_with_path(leaf, moments, is_leaf=formats.is_weight)


def _reset_entries(moments: PyTree, masks: PyTree) -> PyTree:
    def leaf(moment, mask):
        if is_gap(moment) or mask is None:
            return moment
        is_fitting = jnp.shape(mask) in ((), jnp.shape(moment))
        return zero(moment, mask) if is_fitting else moment

    return jax.tree.map(leaf, moments, masks, is_leaf=lambda x: is_gap(x) or formats.is_weight(x))


def is_gap(x: Any) -> bool:
    """Where the tree has no moment but the parameters may have a leaf: what `optax.masked` leaves out."""
    return x is None or isinstance(x, optax.MaskedNode)


def zero(
    moment: Float[Array, "..."] | formats.Quantized, mask: Bool[Array, "..."]
) -> Float[Array, "..."] | formats.Quantized:
    """Zero where the mask is True; a quantized moment gets the codes of zero there.

    Args:
      moment: an array or a `formats.Quantized`.
      mask: of the moment's shape, or a single bool.

    Raises:
      ValueError: the moment is a weight node of another kind.
    """
    if not formats.is_weight(moment):
        return jnp.where(mask, jnp.zeros_like(moment), moment)
    if not isinstance(moment, formats.Quantized):
        raise ValueError(f"reset knows arrays and Quantized moments, not {type(moment).__name__}")
    grid = affine.get_format(moment.format)
    zeros = affine.encode(jnp.zeros(moment.shape), grid.name, moment.scale, moment.zero_point)
    codes = jnp.where(mask, zeros, moment.unpacked())
    outliers = moment.outliers
    if outliers is not None:
        outliers = jnp.where(_at(jnp.broadcast_to(mask, moment.shape), moment.index), 0, outliers)
    codes = formats.pack(codes, grid.bits) if moment.packed else codes
    return dataclasses.replace(moment, codes=codes, outliers=outliers)


def _at(mask: Bool[Array, "..."], index: Array) -> Bool[Array, "..."]:
    """Entries by flat index; leading axes of the index are those of a stack."""
    return jax.vmap(_at)(mask, index) if index.ndim > 1 else mask.ravel()[index]
