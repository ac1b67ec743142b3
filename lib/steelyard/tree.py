"""Trees of parameters: the path of a leaf, selection by path, and sizes.

A *path* names a leaf by the keys on the way to it, joined by slashes: `block_0/attention/query/kernel`. Dicts, lists,
tuples, dataclasses, NNX states, Equinox modules and Haiku parameters all have such paths. A box that holds one
array under the attribute `value` (an NNX variable, a Flax partitioning box) does not lengthen it.

Everywhere in the library `where` is a regular expression that must match the *whole* path (`re.fullmatch`), or a
function `(path, leaf) -> bool`. A pattern that matches no leaf is an error, because it is nearly always misspelt.
`None` leaves are part of the structure: they are never selected and stay `None`.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

PyTree = Any
Where = str | Callable[[str, Any], bool]


def path_str(key_path: jax.tree_util.KeyPath) -> str:
    """Joins the keys of a JAX key path with slashes.

    >>> path_str((jax.tree_util.DictKey("dense"), jax.tree_util.SequenceKey(0), jax.tree_util.GetAttrKey("value")))
    'dense/0'
    """
    is_box = len(key_path) > 1 and key_path[-1] == jax.tree_util.GetAttrKey("value")
    return jax.tree_util.keystr(key_path[:-1] if is_box else key_path, simple=True, separator="/")


def is_none(x: Any) -> bool:
    """For `is_leaf=`, where a `None` stands for something, such as a leaf without a mask.

    >>> jax.tree.map(lambda x: 0 if x is None else x, [1, None], is_leaf=is_none)
    [1, 0]
    """
    return x is None


def flatten(tree: PyTree, *, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """Pairs of path and leaf, in the order of `jax.tree.leaves`.

    >>> flatten({"b": (1, None, 2), "a": 3})
    [('a', 3), ('b/0', 1), ('b/2', 2)]
    """
    return [(path_str(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)]


def paths(tree: PyTree, *, is_leaf: Callable[[Any], bool] | None = None) -> list[str]:
    """Paths of all leaves, in the order of `jax.tree.leaves`."""
    return [path for path, _ in flatten(tree, is_leaf=is_leaf)]


def map_with_path(
    fn: Callable[..., Any], tree: PyTree, *rest: PyTree, is_leaf: Callable[[Any], bool] | None = None
) -> PyTree:
    """`jax.tree.map` whose function gets the leaf's path first.

    >>> map_with_path(lambda path, x: f"{path}={x}", {"a": 1, "b": [2]})
    {'a': 'a=1', 'b': ['b/0=2']}
    """
    return jax.tree_util.tree_map_with_path(lambda path, *xs: fn(path_str(path), *xs), tree, *rest, is_leaf=is_leaf)


def matches(where: Where, path: str, leaf: Any) -> bool:
    """Whether the leaf at `path` is selected by `where`."""
    return re.fullmatch(where, path) is not None if isinstance(where, str) else bool(where(path, leaf))


def nearest(word: str, words: Iterable[str], count: int = 3) -> list[str]:
    """The spellings closest to `word`, for error messages."""
    return difflib.get_close_matches(word, list(words), n=count, cutoff=0.4)


def select(tree: PyTree, where: Where, *, name: str = "where", is_leaf: Callable[[Any], bool] | None = None) -> PyTree:
    """A tree of Python bools: which leaves `where` selects.

    Args:
      tree: any pytree; `None` leaves stay `None`.
      where: a regular expression for the whole path, or `(path, leaf) -> bool`.
      name: what the caller calls this argument, for the error text.
      is_leaf: as in `jax.tree.map`.

    Raises:
      ValueError: a regular expression is malformed or matches no leaf.

    >>> select({"a": {"kernel": 1, "bias": 2}}, r".*/kernel")
    {'a': {'bias': False, 'kernel': True}}
    """
    if isinstance(where, str):
        _require_match(tree, where, name, is_leaf)
    return map_with_path(lambda path, leaf: matches(where, path, leaf), tree, is_leaf=is_leaf)


def _require_match(tree: PyTree, where: str, name: str, is_leaf) -> None:
    try:
        pattern = re.compile(where)
    except re.error as error:
        raise ValueError(f"{name}={where!r} is not a regular expression: {error}") from error
    known = paths(tree, is_leaf=is_leaf)
    if any(pattern.fullmatch(path) for path in known):
        return
    near = nearest(where, known) or known[:3]
    raise ValueError(
        f"{name}={where!r} matches none of the {len(known)} parameters (the whole path must match). "
        f"Nearest paths: {', '.join(near) if near else 'the tree has no leaves'}."
    )


def partition(
    tree: PyTree, where: Where, *, name: str = "where", is_leaf: Callable[[Any], bool] | None = None
) -> tuple[PyTree, PyTree]:
    """Splits a tree in two of the same structure, selected and not, with `None` in the gaps.

    >>> partition({"kernel": 1, "bias": 2}, "kernel")
    ({'bias': None, 'kernel': 1}, {'bias': 2, 'kernel': None})
    """
    chosen = select(tree, where, name=name, is_leaf=is_leaf)
    inside = jax.tree.map(lambda x, keep: x if keep else None, tree, chosen, is_leaf=is_leaf)
    outside = jax.tree.map(lambda x, keep: None if keep else x, tree, chosen, is_leaf=is_leaf)
    return inside, outside


def combine(*trees: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> PyTree:
    """Undoes `partition`: in each position the first of the trees that is not `None`.

    >>> combine({"kernel": 1, "bias": None}, {"kernel": None, "bias": 2})
    {'bias': 2, 'kernel': 1}
    """

    def stop(x: Any) -> bool:
        return x is None or (is_leaf is not None and is_leaf(x))

    return jax.tree.map(lambda *xs: next((x for x in xs if x is not None), None), *trees, is_leaf=stop)


def size(tree: PyTree) -> int:
    """Number of array entries in the tree (packed codes count as stored)."""
    return sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(tree))


def nbytes(tree: PyTree) -> int:
    """Bytes of all arrays of the tree, as stored; works on shapes (`jax.ShapeDtypeStruct`) too."""
    return sum(math.prod(np.shape(leaf)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def axes_except(leaf: Any, axis: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """The axes over which a per-channel reduction runs: all but `axis`; all of them if `axis` is `None`.

    Raises:
      ValueError: `axis` names an axis that the leaf lacks.

    >>> axes_except(np.zeros((3, 4, 5)), -1)
    (0, 1)
    """
    ndim = np.ndim(leaf)
    kept = () if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -ndim <= a < ndim for a in kept):
        raise ValueError(f"axis {axis} is not an axis of an array of shape {np.shape(leaf)}")
    kept = {a % ndim for a in kept}
    return tuple(a for a in range(ndim) if a not in kept)
