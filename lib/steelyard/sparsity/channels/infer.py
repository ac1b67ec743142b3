"""Groups of channels found in a program, whatever it is written in.

The program is traced, not run. Of every axis of every parameter it is followed where its channels go (`axes`): two
axes that must agree are one, so that what remains are sets of axes that can only be shortened together. A set that
reaches an input, an output, a constant, or an operation that is not the same thing on fewer channels, cannot be.
"""

import collections
import os.path
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend import core

from steelyard import tree as tree_lib
from steelyard.sparsity.channels import axes
from steelyard.sparsity.channels.atoms import Atoms, Axes
from steelyard.sparsity.channels.groups import ChannelGroup, Member

PyTree = Any
Protect = tree_lib.Where | Sequence[tree_lib.Where]


class _Place(NamedTuple):
    """An atom in an axis of a parameter: the axis is outer x atom x inner."""

    leaf: int
    axis: int
    outer: int
    inner: int


class _Traced(NamedTuple):
    """What is known after the program has been followed.

    Attributes:
      paths: of the parameters.
      axes: of the parameters, in atoms that are not cut.
      order: when each parameter is first used.
      atoms: the state of all atoms.
    """

    paths: list[str]
    axes: list[Axes]
    order: list[int]
    atoms: Atoms


def infer(
    apply_fn: Callable[..., PyTree], params: PyTree, *inputs: PyTree, protect: Protect = ()
) -> list[ChannelGroup]:
    """The groups of channels that can be removed from a model.

    Two axes are of one group where an elementwise operation, a product or a convolution needs them to agree. Axes of
    the inputs, the outputs and constants, spatial axes, and axes along which entries are joined, cut, sorted, looked up
    or counted stay. So does everything an operation touches that is not known here; `blocked` names it. An axis cut
    into (h, d), as for attention, gives channels h of d entries; a merged axis (h, w, c) gives channels c of h w
    entries.

    Channels that are zeroed (`mask_tree`) or removed (`shrink`) give the same outputs where no group is `normalized`.

    Args:
      apply_fn: `(params, *inputs) -> outputs`, in evaluation mode; other arguments are bound. What it closes over is
        constant: give batch statistics as a part of `params`.
      params: a tree of arrays or of their shapes. Groups name the leaves by their paths in it, and count axes from the
        end.
      *inputs: trees of arrays or shapes. Axes of length 1 tell nothing: give two examples at least.
      protect: leaves whose axes all stay: a regular expression for the path, a function `(path, leaf) -> bool`, or
        several of them.

    Returns:
      Groups in the order in which the model uses them. Every one has at least 2 channels.

    Raises:
      ValueError: there are none; the text says which operations stand in the way. Or `protect` matches no leaf.
    """
    traced = _trace(apply_fn, params, inputs, protect)
    places = _places(traced)
    free = {atom: found for atom, found in places.items() if traced.atoms.reason(atom) is None}
    if not free:
        raise ValueError(f"no channel of this model can be removed: {_summary(_reasons(traced))}")
    ordered = sorted(free.items(), key=lambda item: min(traced.order[place.leaf] for place in item[1]))
    names: collections.Counter[str] = collections.Counter()
    groups = []
    for atom, found in ordered:
        name = _group_name(traced, found)
        names[name] += 1
        unique = name if names[name] == 1 else f"{name}#{names[name]}"
        members = tuple(_member(traced, place) for place in sorted(found, key=lambda p: (traced.order[p.leaf], p)))
        groups.append(ChannelGroup(unique, traced.atoms.size(atom), members, "reduced" in traced.atoms.marks((atom,))))
    return groups


def blocked(
    apply_fn: Callable[..., PyTree], params: PyTree, *inputs: PyTree, protect: Protect = ()
) -> dict[tuple[str, int], str]:
    """Why the other axes of the parameters are in no group.

    Args:
      apply_fn, params, *inputs, protect: as for `infer`.

    Returns:
      (path, axis counted from the end) -> the operation and what is wrong with it. Axes of length 1 are left out.
    """
    return _reasons(_trace(apply_fn, params, inputs, protect))


def describe(groups: Iterable[ChannelGroup]) -> str:
    """A table of groups: name, size, and on each line a member: path, axis, and width if it is not 1."""
    groups = list(groups)
    name_width = max([4, *(len(group.name) for group in groups)])
    lines = [f"{'name':{name_width}}  {'size':>6}  members"]
    for group in groups:
        flag = ["(normalized over the channels)"] if group.normalized else []
        for i, text in enumerate([*map(_describe_member, group.members), *flag]):
            head = (group.name, group.size) if i == 0 else ("", "")
            lines.append(f"{head[0]:{name_width}}  {head[1]:>6}  {text}")
    return "\n".join(lines)


def _describe_member(member: Member) -> str:
    width = "" if member.width == 1 else f", {member.width} {member.layout} entries a channel"
    return f"{member.path} axis {member.axis}{width}"


def _trace(apply_fn: Callable[..., PyTree], params: PyTree, inputs: Sequence[PyTree], protect: Protect) -> _Traced:
    closed = jax.make_jaxpr(apply_fn)(params, *inputs)
    leaves = tree_lib.flatten(params)
    atoms = Atoms()
    arrays = [atoms.array(np.shape(leaf)) for _, leaf in leaves]
    for array, stays in zip(arrays, _protected(params, protect), strict=True):
        if stays:
            _block_all(atoms, [array], "protected by the caller")
    order = _first_uses(closed.jaxpr)[: len(leaves)]
    for array, first in zip(arrays, order, strict=True):
        if first == len(closed.jaxpr.eqns):
            _block_all(atoms, [array], "the function does not use the parameter")
    rest = [atoms.array(var.aval.shape, "an axis of the inputs") for var in closed.jaxpr.invars[len(leaves) :]]
    for axis in sum(rest, ()):
        atoms.mark(axis, "input")
    results = axes.follow(atoms, closed.jaxpr, closed.consts, [*arrays, *rest])
    _block_all(atoms, results, "an axis of the outputs")
    traced = _Traced([path for path, _ in leaves], arrays, order, atoms)
    _block_interleaved(traced)
    return traced._replace(axes=[tuple(map(atoms.resolve, array)) for array in arrays])


def _protected(params: PyTree, protect: Protect) -> list[bool]:
    rules = [protect] if isinstance(protect, str) or callable(protect) else protect
    chosen = [jax.tree.leaves(tree_lib.select(params, where, name="protect")) for where in rules]
    return [any(row) for row in zip(*chosen, strict=True)] if chosen else [False] * len(jax.tree.leaves(params))


def _block_all(atoms: Atoms, arrays: Iterable[Axes], reason: str) -> None:
    for array in arrays:
        for axis in array:
            atoms.block(axis, reason)


def _first_uses(jaxpr: Any) -> list[int]:
    """For each argument the number of the first equation that reads it; the number of all if none does."""
    uses: dict[Any, int] = {}
    for i, eqn in enumerate(jaxpr.eqns):
        for var in eqn.invars:
            if not isinstance(var, core.Literal):
                uses.setdefault(var, i)
    return [uses.get(var, len(jaxpr.eqns)) for var in jaxpr.invars]


def _places(traced: _Traced) -> dict[int, list[_Place]]:
    """For each atom of a parameter where it lies."""
    places: dict[int, list[_Place]] = {}
    for leaf, array in enumerate(traced.axes):
        for i, axis in enumerate(array):
            axis = traced.atoms.resolve(axis)
            for j, atom in enumerate(axis):
                outer, inner = traced.atoms.size(*axis[:j]), traced.atoms.size(*axis[j + 1 :])
                places.setdefault(atom, []).append(_Place(leaf, i - len(array), outer, inner))
    return places


def _block_interleaved(traced: _Traced) -> None:
    """A member is contiguous or strided, and on an axis once."""
    for atom, found in _places(traced).items():
        if any(place.outer > 1 and place.inner > 1 for place in found):
            traced.atoms.block((atom,), "its channels lie in the middle of an axis of a parameter")
        if len({(place.leaf, place.axis) for place in found}) < len(found):
            traced.atoms.block((atom,), "its channels lie twice on one axis of a parameter")


def _member(traced: _Traced, place: _Place) -> Member:
    layout = "strided" if place.outer > 1 else "contiguous"
    return Member(traced.paths[place.leaf], place.axis, max(place.outer, place.inner), layout)


def _reasons(traced: _Traced) -> dict[tuple[str, int], str]:
    reasons = {}
    for path, array in zip(traced.paths, traced.axes, strict=True):
        for i, axis in enumerate(array):
            found = [traced.atoms.reason(atom) for atom in axis]
            if found and all(reason is not None for reason in found):
                reasons[path, i - len(array)] = str(found[0])
    return reasons


def _summary(reasons: dict[tuple[str, int], str]) -> str:
    """Each reason once, with the first axis that it holds back."""
    first: dict[str, tuple[str, int]] = {}
    for place, reason in reasons.items():
        first.setdefault(reason, place)
    listed = [f"{reason} ({path} axis {axis})" for reason, (path, axis) in first.items()]
    return "; ".join(listed) if listed else "it has no parameter with an axis of 2 or more"


def _group_name(traced: _Traced, found: Sequence[_Place]) -> str:
    """What the kernels that make the channels have in common: their module, or the first of them."""
    ordered = sorted(found, key=lambda place: (traced.order[place.leaf], place))
    makers = [p for p in ordered if p.axis == -1 and len(traced.axes[p.leaf]) > 1] or ordered
    modules = [os.path.dirname(traced.paths[place.leaf]) for place in makers]
    common = os.path.commonpath(modules) if all(modules) else ""
    roots = {path.split("/")[0] for path in traced.paths}
    name = modules[0] if common in ("", *roots) and len(set(modules)) > 1 else common
    return name or traced.paths[makers[0].leaf]
