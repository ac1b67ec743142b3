"""Whole layers: the residual blocks of a network scored and removed.

A *block* is a residual branch whose input and output have one shape, so that the identity beside it remains where it
is taken out. Blocks are given as a sequence with a selector for each, first the block nearest to the input, or as one
regular expression for leaves in which all blocks are stacked along axis 0, as scanned layers are.

Source: When Layers Play the Lottery, all Tickets Win at Initialization (2023, Jordao et al.).
"""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from steelyard import choices, precision, selection
from steelyard import tree as tree_lib

PyTree = Any
Blocks = str | Sequence[tree_lib.Where]
Reduce = Literal["mean", "sum"]

__all__ = ["lowest_blocks", "remove_blocks", "score_blocks"]

REDUCTIONS = ("mean", "sum")


def score_blocks(scores: PyTree, blocks: Blocks, *, reduce: Reduce = "mean") -> Float[Array, " blocks"]:
    """How much each block counts: the mean, or the sum, of the scores of its weights.

        mean_b = sum_{i in b} s_i / |b|

    Which score is for the caller to say, of the initial or of trained weights: `scores.snip`, `scores.grasp`, the
    signed product of weight and gradient, noise. Magnitudes of layers at different depths cannot be compared. A block's
    score that is measured on activations is a vector already, and goes to `lowest_blocks` as it is.

    One pass over the scores; to measure them is most often one backward pass.

    Args:
      scores: a tree like the parameters, with a score for each entry; `None` leaves are left out.
      blocks: a selector of leaves for each block, or one regular expression for stacked leaves `[blocks, ...]`.
      reduce: "mean" or "sum" over all entries of the block.

    Returns:
      One number a block, in float32 at least; 0 for a block without entries.

    Raises:
      ValueError: an unknown `reduce`, a pattern without a leaf, a leaf in two blocks, or stacks of different depths.

    Source: When Layers Play the Lottery, all Tickets Win at Initialization (2023, Jordao et al.), algorithms 1 and 2.
    """
    choices.require("reduce", reduce, REDUCTIONS)
    if isinstance(blocks, str):
        leaves = jax.tree.leaves(tree_lib.partition(scores, blocks, name="blocks")[0])
        depth = _depth(leaves)
        totals = sum(jnp.sum(precision.wide(x), axis=tuple(range(1, x.ndim))) for x in leaves)
        return totals / (sum(x.size for x in leaves) // depth) if reduce == "mean" else totals
    members = _members(scores, blocks)
    leaves = [[x for _, x in _leaves(scores, chosen)] for chosen in members]
    totals = [sum((jnp.sum(precision.wide(x)) for x in own), start=jnp.float32(0)) for own in leaves]
    counts = [max(sum(x.size for x in own), 1) if reduce == "mean" else 1 for own in leaves]
    return jnp.stack([total / count for total, count in zip(totals, counts, strict=True)])


def lowest_blocks(scores: Float[Array, " blocks"], count: int) -> tuple[int, ...]:
    """The blocks to remove: those of the lowest scores; among equal ones the deeper goes first, and NaN before all.

    Args:
      scores: one number a block, concrete.
      count: how many blocks go.

    Returns:
      Their indices, ascending.

    Raises:
      ValueError: `count` is not a whole number, or no block would remain.

    >>> lowest_blocks(jnp.array([3.0, 1.0, 2.0, 1.0]), 1)
    (3,)
    """
    depth = len(scores)
    count = choices.require_count("count", count, f"[0, {depth})")
    kept = selection.keep_largest(jnp.asarray(scores), depth - count)
    return tuple(np.flatnonzero(~np.asarray(kept)).tolist())


def remove_blocks(params: PyTree, blocks: Blocks, drop: Sequence[int]) -> PyTree:
    """The parameters without some of their blocks.

    Leaves of a removed block become `None`, which the model must skip (`x + branch(x)` becomes `x`), and stacked leaves
    become shorter. Between jitted phases: the tree's structure or shapes change. Optimizer states made from the
    parameters are made anew, or their trees shaped like them go through this function too.

    No pass over the leaves that stay; stacked leaves are copied.

    Args:
      params: a tree of arrays.
      blocks: as in `score_blocks`.
      drop: indices of the blocks to remove; with none the parameters come back as they are.

    Raises:
      ValueError: an index that is no block's, no block would remain, or `blocks` is wrong as in `score_blocks`.

    Source: When Layers Play the Lottery, all Tickets Win at Initialization (2023, Jordao et al.), algorithms 1 and 2.
    """
    if isinstance(blocks, str):
        chosen = tree_lib.select(params, blocks, name="blocks")
        dropped = _checked_drop(drop, _depth([x for _, x in _leaves(params, chosen)]))
        index = np.asarray(dropped, int)
        return jax.tree.map(lambda x, inside: jnp.delete(x, index, axis=0) if inside else x, params, chosen)
    members = _members(params, blocks)
    removed = [members[i] for i in _checked_drop(drop, len(members))]
    return jax.tree.map(lambda x, *inside: None if any(inside) else x, params, *removed)


def _members(params: PyTree, blocks: Sequence[tree_lib.Where]) -> list[PyTree]:
    """For each block a tree of bool: which leaves are its own."""
    if not blocks:
        raise ValueError("blocks is empty: at least one selector is needed")
    members = [tree_lib.select(params, where, name=f"blocks[{i}]") for i, where in enumerate(blocks)]

    def check(path, *inside):
        owners = [i for i, own in enumerate(inside) if own]
        if len(owners) > 1:
            raise ValueError(f"{path} is in blocks {owners[0]} and {owners[1]}: a leaf must be in one block at most")

    tree_lib.map_with_path(check, *members)
    return members


def _leaves(params: PyTree, chosen: PyTree) -> list[tuple[str, Array]]:
    inside = jax.tree.map(lambda x, own: x if own else None, params, chosen)
    return tree_lib.flatten(inside)


def _depth(leaves: list[Array]) -> int:
    """How many blocks are stacked along axis 0."""
    shapes = [jnp.shape(x) for x in leaves]
    for shape in shapes:
        if not shape or shape[0] != shapes[0][0]:
            raise ValueError(f"leaves of shapes {shapes[0]} and {shape} are not stacks of equally many blocks")
    return shapes[0][0]


def _checked_drop(drop: Sequence[int], depth: int) -> list[int]:
    dropped = sorted({choices.require_count("drop", i, f"[0, {depth})") for i in drop})
    if len(dropped) >= depth:
        raise ValueError(f"drop={list(drop)} leaves none of the {depth} blocks: one must remain")
    return dropped
