"""Groups of channels that live or die together: scored, selected, masked and cut out as one.

A channel is not a row of one kernel: it is an output of one layer, an input of the next, and an entry of the bias and
the norm between them. A `ChannelGroup` names all of these for a whole set of channels.

`under`: the paths of a group are those of the tree that it was inferred from, which may be a whole set of variables
(`params/dense_0/kernel`, `batch_stats/norm/mean`). A function that is given only a part of it takes the members whose
paths begin with `under`, and these must all be there.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from steelyard import choices, precision
from steelyard import tree as tree_lib

PyTree = Any
Layout = Literal["contiguous", "strided"]

LAYOUTS = ("contiguous", "strided")


class Member(NamedTuple):
    """The entries that each channel of a group owns along one axis of one leaf.

    Channel c of `size` owns c width + {0..width-1} if contiguous (a head of `width` features in a query kernel), and
    c + size {0..width-1} if strided (a channel in the input axis of a layer that follows the flattening of images).

    Attributes:
      path: of the leaf.
      axis: of the leaf; its length is size * width. Counted from the end it also fits leaves stacked along axis 0.
      width: entries of a channel.
      layout: "contiguous" or "strided".
    """

    path: str
    axis: int
    width: int = 1
    layout: Layout = "contiguous"


class ChannelGroup(NamedTuple):
    """Channels that can only be removed together; hashable, and the key of every mapping of this module.

    Attributes:
      name: for people; unique among the groups of one model.
      size: number of channels.
      members: where they lie. A leaf may be a member on several axes, and of several groups, but not twice on one axis.
      normalized: whether the model reduces over the channels other than by a product with a weight (layer
        normalization): with fewer channels, or with channels set to zero, the others then change.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    normalized: bool = False


def score(
    scores: PyTree,
    group: ChannelGroup,
    *,
    combine: str = "mean",
    normalize: str | None = None,
    under: str = "",
) -> Float[Array, " size"]:
    """One score a channel from scores of single entries.

        per member: sum over the channel's entries and all other axes;  then combined over members;  then normalized

    Args:
      scores: a tree of scores, not negative. Members whose leaf is `None` do not count.
      group: the channels.
      combine: "mean", "sum" or "max" over the members, or "first": of the first member that has scores alone.
      normalize: what the vector is divided by: its "mean", "sum", "max", "l2" norm + 1e-8, or `None`. A vector whose
        divisor is zero stays as it is.
      under: see the module.

    Returns:
      A vector of `group.size` in float32 at least.

    Raises:
      ValueError: an unknown name, a path that the tree lacks, an axis whose length is not size * width, or no member
        that has scores.
    """
    choices.require("combine", combine, ("mean", "sum", "max", "first"))
    if normalize is not None:
        choices.require("normalize", normalize, _DIVISORS)
    leaves = _leaves(scores)
    vectors = [
        _member_score(leaf, member, group)
        for member in members(group, under)
        if (leaf := _find(leaves, member, group)) is not None
    ]
    if not vectors:
        raise ValueError(f"group {group.name!r} has no member with scores (under={under!r})")
    combined = vectors[0] if combine == "first" else getattr(jnp, combine)(jnp.stack(vectors), axis=0)
    if normalize is None:
        return combined
    divisor = _DIVISORS[normalize](combined)
    return combined / jnp.where(divisor == 0, 1, divisor)


_DIVISORS: dict[str, Callable[[Array], Array]] = {
    "mean": jnp.mean,
    "sum": jnp.sum,
    "max": jnp.max,
    "l2": lambda v: jnp.linalg.norm(v) + 1e-8,
}


def _member_score(leaf: Array, member: Member, group: ChannelGroup) -> Float[Array, " size"]:
    axis = _checked_axis(leaf, member, group)
    lead, rest = leaf.shape[:axis], leaf.shape[axis + 1 :]
    contiguous = member.layout == "contiguous"
    cut = (group.size, member.width) if contiguous else (member.width, group.size)
    channels = axis if contiguous else axis + 1
    split = precision.wide(leaf).reshape(*lead, *cut, *rest)
    return jnp.sum(split, axis=tree_lib.axes_except(split, channels))


def as_masks(kept: Mapping[ChannelGroup, Int[np.ndarray, " kept"]]) -> dict[ChannelGroup, Bool[np.ndarray, " size"]]:
    """Kept indices as a vector of bools for each group: what `mask_tree` takes."""
    return {group: np.isin(np.arange(group.size), _checked_kept(group, index)) for group, index in kept.items()}


def mask_tree(params: PyTree, keep: Mapping[ChannelGroup, Bool[Array, " size"]], *, under: str = "") -> PyTree:
    """Masks of all leaves: an entry stays if every channel that owns it stays.

    Args:
      params: a tree of arrays, or of their shapes; `None` leaves stay.
      keep: which channels of each group stay; may be traced.
      under: see the module.

    Returns:
      A tree of bool arrays like `params`, all True where no group has a member.

    Raises:
      ValueError: a vector has not one entry a channel, or as for `score`.
    """
    for group, vector in keep.items():
        if np.shape(vector) != (group.size,):
            raise ValueError(f"keep of group {group.name!r} has shape {np.shape(vector)}, not ({group.size},)")
    owners = _owners(params, keep, under)

    def leaf_mask(path: str, leaf: Any) -> Any:
        mask = jnp.ones(np.shape(leaf), bool)
        for group, member, axis in owners.get(path, ()):
            spread = jnp.repeat if member.layout == "contiguous" else jnp.tile
            vector = spread(jnp.asarray(keep[group], bool), member.width)
            mask &= jnp.expand_dims(vector, tuple(i for i in range(mask.ndim) if i != axis))
        return mask

    return tree_lib.map_with_path(leaf_mask, params)


def shrink(tree: PyTree, kept: Mapping[ChannelGroup, Int[np.ndarray, " kept"]], *, under: str = "") -> PyTree:
    """The tree without the channels that go; every leaf gets shorter along the axes on which it is a member.

    Fits any tree with the paths and shapes of the one that the groups are of: parameters, batch statistics, masks,
    shapes (`jax.eval_shape`). For a state of an optimizer see `shrink_state`. A packed weight has other leaves: shrink
    first, then pack. The model is rebuilt for the new shapes by `models.resize`.

    Op by op this compiles a program for each shape of a JAX array: jit it, with `kept` bound, for a large tree.

    Args:
      tree: a tree of arrays; `None` leaves stay.
      kept: for each group the indices of the channels that stay, ascending; not traced.
      under: see the module.

    Returns:
      A tree of the same structure; leaves without a member are the same arrays.

    Raises:
      ValueError: indices that are not ascending, not in the group, or none; two groups on one axis of a leaf; or as for
        `score`.
    """
    return tree_lib.map_with_path(cutter(tree, kept, under), tree)


def cutter(tree: PyTree, kept: Mapping[ChannelGroup, Any], under: str) -> Callable[[str, Array], Array]:
    """`(path, leaf) -> leaf` without the channels that go."""
    indices = {group: _checked_kept(group, index) for group, index in kept.items()}
    owners = _owners(tree, kept, under)

    def cut(path: str, leaf: Array) -> Array:
        for group, member, axis in owners.get(path, ()):
            leaf = _take(leaf, _entries(indices[group], member, group.size), axis)
        return leaf

    return cut


def _entries(index: Int[np.ndarray, " kept"], member: Member, size: int) -> Int[np.ndarray, " entries"]:
    """Positions along the member's axis that the channels own."""
    if member.layout == "contiguous":
        return (index[:, None] * member.width + np.arange(member.width)).ravel()
    return (index + size * np.arange(member.width)[:, None]).ravel()


def _take(leaf: Any, entries: Int[np.ndarray, " entries"], axis: int) -> Any:
    # In range, as has been checked: no program need compare.
    return np.take(leaf, entries, axis) if isinstance(leaf, np.ndarray) else jnp.take(leaf, entries, axis, mode="clip")


def _leaves(tree: PyTree) -> dict[str, Any]:
    return dict(tree_lib.flatten(tree, is_leaf=tree_lib.is_none))


def members(group: ChannelGroup, under: str) -> Iterator[Member]:
    """The members in a part of the tree, with their paths in that part."""
    prefix = f"{under}/" if under else ""
    for member in group.members:
        if member.path.startswith(prefix):
            yield member._replace(path=member.path.removeprefix(prefix))


def _find(leaves: Mapping[str, Any], member: Member, group: ChannelGroup) -> Any:
    if member.path not in leaves:
        near = tree_lib.nearest(member.path, leaves) or list(leaves)[:3]
        raise ValueError(
            f"group {group.name!r} has a member {member.path!r}, which the tree lacks. Nearest paths: "
            f"{', '.join(near) if near else 'the tree has no leaves'}. (For a part of a tree give under=.)"
        )
    return leaves[member.path]


def _checked_axis(leaf: Any, member: Member, group: ChannelGroup) -> int:
    choices.require("layout", member.layout, LAYOUTS)
    shape = np.shape(leaf)
    if not -len(shape) <= member.axis < len(shape):
        raise ValueError(f"group {group.name!r}: {member.path} of shape {shape} has no axis {member.axis}")
    if shape[member.axis] != group.size * member.width:
        raise ValueError(
            f"group {group.name!r}: {member.path} of shape {shape} has length {shape[member.axis]} along axis "
            f"{member.axis}, not size * width = {group.size} * {member.width}"
        )
    return member.axis % len(shape)


def _checked_kept(group: ChannelGroup, index: Any) -> Int[np.ndarray, " kept"]:
    index = np.asarray(index)
    if index.ndim != 1 or not np.issubdtype(index.dtype, np.integer) or not len(index):
        raise ValueError(f"kept of group {group.name!r} must be a vector of at least one index, got {index!r}")
    if np.any(np.diff(index) <= 0) or index[0] < 0 or index[-1] >= group.size:
        raise ValueError(f"kept of group {group.name!r} must be ascending indices below {group.size}, got {index}")
    return index


def _owners(
    tree: PyTree, groups: Iterable[ChannelGroup], under: str
) -> dict[str, list[tuple[ChannelGroup, Member, int]]]:
    """For each path the groups that own an axis of it; `None` leaves have none."""
    leaves = _leaves(tree)
    owners: dict[str, list[tuple[ChannelGroup, Member, int]]] = {}
    for group in groups:
        for member in members(group, under):
            if (leaf := _find(leaves, member, group)) is None:
                continue
            axis = _checked_axis(leaf, member, group)
            others = owners.setdefault(member.path, [])
            for other, _, taken in others:
                if taken == axis:
                    names = f"{other.name!r} and {group.name!r}"
                    raise ValueError(f"axis {axis} of {member.path} has two members, of the groups {names}")
            others.append((group, member, axis))
    return owners
