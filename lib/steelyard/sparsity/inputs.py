"""Which kernel has which inputs, and which window.

A tree of inputs holds under `path/inputs` what the kernels of the module `path` multiply, in one array or in a tuple
with one for each call. Kernels are known by their paths; tables from paths are put back into trees at the end.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from steelyard import tree as tree_lib
from steelyard.sparsity import moments

PyTree = Any
Shape = tuple[int, ...]

_INPUTS = re.compile(r"(?:(.*)/)?inputs(?:/\d+)?")


def kernels(params: PyTree, chosen: PyTree, inputs: PyTree) -> dict[str, Shape]:
    """The shapes, without the last axis, of the chosen kernels that have an input."""
    known, selected = _by_module(inputs), selected_paths(chosen)
    leaves = [(path, w) for path, w in tree_lib.flatten(params) if path in set(selected)]
    found = {path: jnp.shape(w)[:-1] for path, w in leaves if _module(path) in known}
    if not found:
        raise ValueError(
            f"no kernel has an input: selected are {', '.join(selected) or 'none'}; inputs has those of the modules "
            f"{', '.join(map(repr, known)) or 'none'}"
        )
    return found


def pairs(kernels: Iterable[str], inputs: PyTree) -> list[tuple[str, Any]]:
    """Each kernel's path with each of its inputs."""
    known = _by_module(inputs)
    if missing := [path for path in kernels if _module(path) not in known]:
        raise ValueError(f"inputs has nothing for {missing[0]!r}, only for the modules {', '.join(map(repr, known))}")
    return [(path, x) for path in kernels for x in known[_module(path)]]


def _by_module(inputs: PyTree) -> dict[str, list[Any]]:
    table = {}
    for path, x in tree_lib.flatten(inputs):
        if match := _INPUTS.fullmatch(path):
            table.setdefault(match[1] or "", []).append(x)
    return table


def _module(path: str) -> str:
    return path.rpartition("/")[0]


def selected_paths(chosen: PyTree) -> list[str]:
    """The paths of the leaves of a tree that are true."""
    return [path for path, use in tree_lib.flatten(chosen) if use]


def windows_of(params: PyTree, windows: Mapping[str, moments.Window] | None) -> dict[str, moments.Window]:
    """The window of each leaf that a pattern matches, that of the first such pattern."""
    table = {}
    for pattern, window in (windows or {}).items():
        # Kernels without statistics count, too, so that one set of windows serves any part of a model.
        paths = selected_paths(tree_lib.select(params, pattern, name="windows", is_leaf=tree_lib.is_none))
        table |= {path: moments.Window(*window) for path in paths if path not in table}
    return table


def by_path(tree: PyTree) -> dict[str, Any]:
    """A table of the leaves."""
    return dict(tree_lib.flatten(tree))


def placed(like: PyTree, table: Mapping[str, Any]) -> PyTree:
    """A tree of a table's entries, with `None` where `like` has it."""
    return tree_lib.map_with_path(lambda path, _: table[path], like)


def zeros(params: PyTree, shapes: Mapping[str, Shape]) -> PyTree:
    """A tree like `params` of zeros of these shapes, `None` where there is no shape."""
    return tree_lib.map_with_path(
        lambda path, _: jnp.zeros(shapes[path], jnp.float32) if path in shapes else None, params
    )
