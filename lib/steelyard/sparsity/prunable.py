"""Which leaves may be pruned."""

from typing import Any

import jax.numpy as jnp

from steelyard import tree as tree_lib

PyTree = Any


def selected(params: PyTree, where: tree_lib.Where | None = None, *, name: str = "where") -> PyTree:
    """A tree of Python bools: the leaves to prune.

    Args:
      params: a tree of arrays or shapes; `None` leaves stay `None`.
      where: `None` selects all leaves of floating numbers with two axes or more. A regular expression selects those of
        the leaves that it matches; a function `(path, leaf) -> bool` is taken at its word, vectors included.
      name: what the caller calls the argument.

    Raises:
      ValueError: a regular expression matches nothing, or nothing but leaves that have less than two axes or no
        floating numbers.
    """
    if callable(where):
        return tree_lib.select(params, where, name=name)
    if where is None:
        return tree_lib.map_with_path(lambda path, leaf: _is_kernel(leaf), params)
    chosen = tree_lib.select(params, where, name=name)
    flags = [keep for _, keep in tree_lib.flatten(chosen)]
    leaves = tree_lib.flatten(params)
    matched = [(path, leaf) for (path, leaf), keep in zip(leaves, flags, strict=True) if keep]
    if not any(_is_kernel(leaf) for _, leaf in matched):
        raise ValueError(
            f"{name}={where!r} matches {', '.join(path for path, _ in matched[:3])} and nothing else that could be "
            f"pruned: a leaf needs two axes and floating numbers, unless {name} is a function that selects it. Such "
            f"leaves: {', '.join(path for path, leaf in leaves if _is_kernel(leaf)) or 'none'}"
        )
    return tree_lib.map_with_path(lambda path, leaf, keep: keep and _is_kernel(leaf), params, chosen)


def _is_kernel(leaf: Any) -> bool:
    return jnp.ndim(leaf) >= 2 and jnp.issubdtype(jnp.result_type(leaf), jnp.floating)
