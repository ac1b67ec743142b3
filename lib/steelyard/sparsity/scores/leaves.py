"""Trees that must be alike, and functions of their leaves in float32 at least."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from steelyard import precision
from steelyard import tree as tree_lib

PyTree = Any


def check_alike(**trees: PyTree) -> None:
    """Refuses trees, given by the names of the arguments, that differ in their paths or shapes from the first.

    Raises:
      ValueError: a leaf (other than `None`) of one tree is missing in another, or has another shape there.
    """
    (first, reference), *others = trees.items()
    shapes = {path: jnp.shape(leaf) for path, leaf in tree_lib.flatten(reference)}
    for name, other in others:
        found = {path: jnp.shape(leaf) for path, leaf in tree_lib.flatten(other)}
        if odd := sorted(shapes.keys() ^ found.keys()):
            here, there = (first, name) if odd[0] in shapes else (name, first)
            raise ValueError(
                f"{first} and {name} must have the same leaves, but {odd[0]!r} of {here} is not in {there}"
            )
        for path, shape in shapes.items():
            if found[path] != shape:
                raise ValueError(f"{path!r} has shape {shape} in {first}, but {found[path]} in {name}")


def map_wide(fn: Callable[..., Array], **trees: PyTree) -> PyTree:
    """`fn` of the leaves of like trees, in float32 at least, rounded once to the dtype to which the leaves promote.

    Raises:
      ValueError: see `check_alike`.
    """
    check_alike(**trees)

    def leaf(*xs):
        return fn(*map(precision.wide, xs)).astype(jnp.result_type(*xs))

    return jax.tree.map(leaf, *trees.values())


def total(tree: PyTree) -> Array:
    """The sum of all entries of all leaves, in float32 at least; 0 for a tree without leaves."""
    return sum((jnp.sum(precision.wide(x)) for x in jax.tree.leaves(tree)), start=jnp.float32(0))
