"""Masks: which entries of a leaf stay, given a score for each.

A mask is a bool array of the leaf's shape, True where the entry is kept; a leaf that is not pruned has the mask `None`.
Every selection is exact in its count whatever the ties: equal scores keep the lower index (row-major), and NaN counts
as minus infinity, so that it is kept only when nothing else is left. The dtype of the scores is the one compared. No
selection gathers a sharded leaf (see `steelyard.selection`).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, UInt8

from steelyard import choices, precision, selection
from steelyard import tree as tree_lib
from steelyard.sparsity import patterns
from steelyard.sparsity.allocation.minimum_kept import minimum_kept

PyTree = Any

__all__ = [
    "activation",
    "apply",
    "block_mask",
    "channel_mask",
    "global_masks",
    "mask",
    "masks",
    "nm_mask",
    "overlap",
    "pack_bits",
    "summarize",
    "topk_mask",
    "topk_mask_along",
    "unpack_bits",
]

# Up to this group size every entry is compared with the m of its group, in one fused loop; the loop is unrolled, so
# that beyond it the time to compile grows, and a sort is no slower.
_MAX_COMPARED = 64

# Up to this group size each position has a program of its own: compiled for a TPU that moves half the bytes, because
# a group that is shorter than a tile is not padded to one. The program grows with the square of the size.
_MAX_UNROLLED = 4


def topk_mask(
    scores: Num[Array, "..."], sparsity: float | Float[Array, ""], *, min_kept: int = 1
) -> Bool[Array, "..."]:
    """Keeps the largest scores of an array.

    k = max(min_kept, round_half_even(size * (1 - sparsity))).

    Args:
      scores: any shape.
      sparsity: the fraction removed, in [0, 1]; may be traced, and is then used in its own precision.
      min_kept: entries that stay at least (all of a smaller array).

    Returns:
      A mask of the same shape with exactly min(k, size) entries True.

    Raises:
      ValueError: a concrete `sparsity` lies outside [0, 1].
    """
    scores = jnp.asarray(scores)
    return selection.keep_largest(scores, _kept(scores.size, sparsity, min_kept))


def topk_mask_along(
    scores: Num[Array, "..."], sparsity: float | Float[Array, ""], axis: int = -2
) -> Bool[Array, "..."]:
    """Keeps the largest scores of each slice along one axis, each slice by itself.

    k = K - floor(K * sparsity + 1e-9), with K the length of the axis; the slack forgives a product that rounding left
    just below a whole number.

    Args:
      scores: any shape with that axis.
      sparsity: the fraction removed, in [0, 1]; may be traced.
      axis: the axis along which entries compete; the default is the contraction axis of a kernel.

    Returns:
      A mask of the same shape.

    Raises:
      ValueError: a concrete `sparsity` lies outside [0, 1], or `scores` lacks the axis.
    """
    scores = jnp.asarray(scores)
    axis = _checked_axis(scores, axis)
    sparsity = _checked_sparsity(sparsity)
    size = scores.shape[axis]
    floor = np.floor if isinstance(sparsity, float) else jnp.floor
    return selection.keep_largest(scores, size - floor(size * sparsity + 1e-9).astype(int), axis)


def block_mask(
    scores: Num[Array, "rows *rest"],
    sparsity: float | Float[Array, ""],
    shape: tuple[int, int] = (4, 4),
    *,
    pool: str = "mean",
) -> Bool[Array, "rows *rest"]:
    """Keeps the best blocks of the first two axes; all later axes are pooled in.

    Args:
      scores: two axes or more; a vector is taken as a single row.
      sparsity: the fraction of blocks removed, in [0, 1]; may be traced.
      shape: rows and columns of a block. Blocks at the edges may be smaller, and pool what is there.
      pool: "mean" or "max" of the scores of a block.

    Returns:
      A mask of the same shape, equal within each block. At least one block stays.

    Raises:
      ValueError: `pool` is unknown, `shape` has a number below 1, or a concrete `sparsity` lies outside [0, 1].
    """
    patterns.check(patterns.Block(shape, pool))
    scores = jnp.asarray(scores)
    whole = scores.reshape(1, -1) if scores.ndim < 2 else scores
    wide = precision.wide(whole) if jnp.issubdtype(whole.dtype, jnp.floating) else whole.astype(jnp.float32)
    pooled = _pool(wide.reshape(*whole.shape[:2], -1), shape, pool)
    kept = topk_mask(pooled, sparsity)
    for axis, size in enumerate(shape):
        kept = jnp.repeat(kept, size, axis, total_repeat_length=kept.shape[axis] * size)
    kept = kept[: whole.shape[0], : whole.shape[1]]
    kept = kept.reshape(*kept.shape, *(1 for _ in whole.shape[2:]))
    return jnp.broadcast_to(kept, whole.shape).reshape(scores.shape)


def channel_mask(scores: Num[Array, "..."], sparsity: float | Float[Array, ""], axis: int = -1) -> Bool[Array, "..."]:
    """Keeps the best slices along an axis; the score of a slice is the sum of its entries' scores.

    Args:
      scores: any shape with that axis.
      sparsity: the fraction of slices removed, in [0, 1]; may be traced.
      axis: whose slices live or die; the default is the output axis.

    Returns:
      A mask of the same shape, equal within each slice. At least one slice stays.

    Raises:
      ValueError: a concrete `sparsity` lies outside [0, 1], or `scores` lacks the axis.
    """
    scores = jnp.asarray(scores)
    axis = _checked_axis(scores, axis)
    wide = precision.wide(scores) if jnp.issubdtype(scores.dtype, jnp.floating) else scores
    others = tree_lib.axes_except(scores, axis)
    kept = topk_mask(jnp.sum(wide, others), sparsity)
    return jnp.broadcast_to(jnp.expand_dims(kept, others), scores.shape)


def mask(
    scores: Num[Array, "..."], sparsity: float | Float[Array, ""] | None, pattern: str | patterns.Pattern
) -> Bool[Array, "..."]:
    """Keeps the best entries of an array in the units of a pattern.

    Args:
      scores: a score for each entry.
      sparsity: the fraction removed, in [0, 1]. For N:M, 0 and `None` keep all, and any other number removes what the
        pattern says.
      pattern: see `patterns.parse`.

    Raises:
      ValueError: as `patterns.parse` and the mask of the pattern.
    """
    pattern = patterns.parse(pattern)
    if isinstance(pattern, patterns.NM):
        scores = jnp.asarray(scores)
        groups = nm_mask(scores, pattern.n, pattern.m, pattern.axis)
        if isinstance(sparsity, jax.core.Tracer):
            return groups | (sparsity == 0)
        return jnp.ones(scores.shape, bool) if sparsity is None or _checked_sparsity(sparsity) == 0 else groups
    if sparsity is None:
        raise ValueError(f"sparsity=None: the pattern {pattern} needs the fraction to remove")
    if isinstance(pattern, patterns.Block):
        return block_mask(scores, sparsity, pattern.shape, pool=pattern.pool)
    if isinstance(pattern, patterns.Channel):
        return channel_mask(scores, sparsity, pattern.axis)
    return topk_mask(scores, sparsity)


def masks(scores: PyTree, sparsities: PyTree, pattern: str | patterns.Pattern = "unstructured") -> PyTree:
    """Keeps the best entries of every leaf by itself.

    Args:
      scores: a tree of scores.
      sparsities: like `scores`, the fraction removed of each leaf (see `steelyard.sparsity.allocation`), `None` for one
        that is not pruned; or one number for all.
      pattern: see `patterns.parse`.

    Returns:
      A tree of masks; `None` where the sparsity or the leaf is `None`.

    Raises:
      ValueError: as `mask`.
    """
    pattern = patterns.parse(pattern)
    if isinstance(sparsities, float | int) or hasattr(sparsities, "dtype"):
        sparsities = jax.tree.map(lambda _: sparsities, scores)

    def leaf(x, sparsity):
        return None if x is None or sparsity is None else mask(x, sparsity, pattern)

    return jax.tree.map(leaf, scores, sparsities, is_leaf=tree_lib.is_none)


def global_masks(
    scores: PyTree,
    sparsity: float | Float[Array, ""],
    *,
    normalize: bool = False,
    min_kept: int | float = 0,
    mesh: jax.sharding.Mesh | None = None,
    specs: PyTree | None = None,
) -> PyTree:
    """Keeps the best entries of all leaves together.

    k = round_half_even(N (1 - sparsity)) of the N entries stay. With `min_kept` the shares of the leaves that come out
    are repaired so that no leaf is left with less (`allocation.minimum_kept`), and each leaf then keeps its best.

    Args:
      scores: a tree of scores; `None` leaves stay `None`.
      sparsity: the fraction removed of all entries, in [0, 1]; may be traced.
      normalize: divide the scores of each leaf by their L2 norm (plus 1e-8) first.
      min_kept: entries that every leaf keeps at least: an int, or a float below 1 as a fraction of all N entries.
      mesh, specs: where the leaves lie, see `selection.top_mask`; only to have one all-reduce a round for sure.

    Returns:
      A tree of masks.

    Raises:
      ValueError: a concrete `sparsity` lies outside [0, 1]; `min_kept` is negative, or leaves less than the target to
        remove (outside jit).

    Source: Is Complexity Required for Neural Network Pruning? (2022, Gupta et al.), for the minimum.
    """
    choices.require_within("min_kept", min_kept, "[0, inf)")
    sizes = [np.size(x) for x in jax.tree.leaves(scores)]
    if normalize:
        scores = jax.tree.map(_normalized, scores)
    kept = selection.top_mask(scores, _kept(sum(sizes), sparsity, 0), mesh=mesh, specs=specs)
    if not min_kept or not sizes:
        return kept
    counts = jnp.stack([jnp.count_nonzero(x) for x in jax.tree.leaves(kept)])
    counts = counts if isinstance(counts, jax.core.Tracer) else np.asarray(counts)
    repaired = minimum_kept(1 - counts / np.maximum(sizes, 1), sizes, sparsity, min_kept)
    leaves, treedef = jax.tree.flatten(scores)
    return jax.tree.unflatten(treedef, [topk_mask(x, s, min_kept=0) for x, s in zip(leaves, repaired, strict=True)])


def activation(
    x: Float[Array, "..."], sparsity: float | Float[Array, ""], pattern: str | patterns.Pattern = "unstructured"
) -> Float[Array, "..."]:
    """x with its smallest magnitudes set to zero: sparse activations, as a function to call inside a model.

    Args:
      x: activations; with "unstructured" all of them compete, batch included.
      sparsity: the fraction removed, in [0, 1].
      pattern: see `patterns.parse`; N:M groups along the last axis are "2:4:-1".

    Returns:
      x times the mask of |x|; the gradient is that of what stays.
    """
    return _apply_leaf(x, mask(jnp.abs(x), sparsity, pattern))


def nm_mask(scores: Num[Array, "..."], n: int, m: int, axis: int = -2) -> Bool[Array, "..."]:
    """Keeps the n largest scores of every m consecutive entries along an axis.

    rank_i = #{j: s_j > s_i} + #{j < i: s_j = s_i} within the group; entry i is kept when rank_i < n. Groups start at
    index 0. If m does not divide the axis, the last group is short: r entries keep min(n, r).

    Args:
      scores: any shape with that axis, for instance `abs(kernel)`; negative scores are legal.
      n: entries kept in a group, 0 <= n <= m.
      m: entries in a group.
      axis: the axis of the groups; the default is the contraction axis of a kernel.

    Returns:
      A mask of the same shape. No gradient flows through it.

    Raises:
      ValueError: `n` or `m` is out of range, or `scores` lacks the axis.

    >>> nm_mask(jnp.array([3.0, 1.0, 2.0, 2.0, 5.0]), 2, 4, axis=0).tolist()
    [True, False, True, False, True]
    """
    scores = jnp.asarray(scores)
    patterns.check_nm(n, m)
    axis = _checked_axis(scores, axis)
    if n == 0 or n == m:
        return jnp.full(scores.shape, n > 0)
    size = scores.shape[axis]
    padding = [(0, -size % m if i == axis else 0) for i in range(scores.ndim)]
    # A padding entry ties at worst with a real one, and then loses because it comes later.
    padded = jnp.pad(_comparable(scores), padding, constant_values=_lowest(scores.dtype))
    groups = padded.reshape(*scores.shape[:axis], padded.shape[axis] // m, m, *scores.shape[axis + 1 :])
    kept = _keep_compared(groups, n, axis + 1) if m <= _MAX_COMPARED else selection.keep_largest(groups, n, axis + 1)
    return jax.lax.slice_in_dim(kept.reshape(padded.shape), 0, size, axis=axis)


def pack_bits(mask: Bool[Array, "..."], axis: int | None = None) -> UInt8[Array, "..."]:
    """Eight entries a byte, the first in the highest bit; the last byte is filled with zeros.

    Args:
      mask: any shape.
      axis: packs along this axis, ceil(length / 8) bytes long, so that a sharded mask stays cut as it is; `None` packs
        all entries in row-major order into one row of bytes.
    """
    return jnp.packbits(jnp.ravel(mask) if axis is None else mask, axis=axis)


def unpack_bits(packed: UInt8[Array, "..."], shape: tuple[int, ...], axis: int | None = None) -> Bool[Array, "..."]:
    """Undoes `pack_bits` for a mask of `shape` packed along `axis`.

    Raises:
      ValueError: `packed` does not have the shape that such a mask is packed into.
    """
    if axis is None:
        expected, count = (-(-math.prod(shape) // 8),), math.prod(shape)
    else:
        count = shape[axis]
        expected = tuple(-(-n // 8) if i == axis % len(shape) else n for i, n in enumerate(shape))
    if jnp.shape(packed) != expected:
        raise ValueError(f"packed has shape {jnp.shape(packed)}, but a mask of shape {shape} needs {expected}")
    return jnp.unpackbits(packed, axis=axis, count=count).astype(bool).reshape(shape)


def apply(params: PyTree, masks: PyTree) -> PyTree:
    """Zeros outside the masks; a leaf whose mask is `None` passes, and so does a `None` leaf.

    A removed entry becomes +0, also where the parameter was negative or not finite.

    Args:
      params: a tree of arrays.
      masks: a tree of the same structure of masks or `None`.
    """
    return jax.tree.map(_apply_leaf, params, masks, is_leaf=tree_lib.is_none)


def summarize(params: PyTree) -> dict[str, float | int]:
    """The share of zeros of each leaf, and of the whole tree.

    Args:
      params: a tree of concrete arrays.

    Returns:
      path -> sparsity for every leaf, and "total" (sparsity of the whole), "nonzero" and "size" (entries).
    """
    leaves = tree_lib.flatten(params)
    sizes = [int(np.size(leaf)) for _, leaf in leaves]
    nonzeros = [int(jnp.count_nonzero(leaf)) for _, leaf in leaves]
    report: dict[str, float | int] = {
        path: 1 - nonzero / max(size, 1) for (path, _), nonzero, size in zip(leaves, nonzeros, sizes, strict=True)
    }
    total, nonzero = sum(sizes), sum(nonzeros)
    return report | {"total": 1 - nonzero / max(total, 1), "nonzero": nonzero, "size": total}


def overlap(a: PyTree, b: PyTree) -> dict[str, Float[Array, ""]]:
    """How much of mask `a` mask `b` keeps too: |a & b| / max(|a|, 1).

    Args:
      a: a tree of masks; `None` leaves are left out.
      b: a tree of masks of the same structure.

    Returns:
      path -> overlap for every mask, and "total" over all of them.
    """
    both = jax.tree.map(lambda x, y: jnp.count_nonzero(x & y), a, b)
    counts = [(path, jnp.count_nonzero(x)) for path, x in tree_lib.flatten(a)]
    common = jax.tree.leaves(both)
    shares = {path: shared / jnp.maximum(count, 1) for (path, count), shared in zip(counts, common, strict=True)}
    total = jnp.asarray(sum(common)) / jnp.maximum(sum(count for _, count in counts), 1)
    return shares | {"total": total}


def _keep_compared(scores: Num[Array, "..."], n: int, axis: int) -> Bool[Array, "..."]:
    """The n largest along a short axis by counting, for each entry, those that come before it."""
    entries = [jax.lax.slice_in_dim(scores, j, j + 1, axis=axis) for j in range(scores.shape[axis])]
    if len(entries) > _MAX_UNROLLED:
        index = jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis)
        return _rank(scores, entries, index) < n
    return jnp.concatenate([_rank(entry, entries, i) < n for i, entry in enumerate(entries)], axis=axis)


def _rank(scores: Num[Array, "..."], entries: list[Num[Array, "..."]], index: int | Int[Array, "..."]) -> Array:
    """How many entries of the group come before each of the scores, whose positions are `index`."""
    before = (jnp.where(j < index, entry >= scores, entry > scores) for j, entry in enumerate(entries))
    return sum(x.astype(jnp.int8) for x in before)


def _comparable(scores: Num[Array, "..."]) -> Num[Array, "..."]:
    scores = jax.lax.stop_gradient(scores)
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        return scores
    return jnp.where(jnp.isnan(scores), _lowest(scores.dtype), scores)


def _lowest(dtype: Any) -> Any:
    return jnp.array(-jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min, dtype)


def _kept(size: int, sparsity: float | Float[Array, ""], min_kept: int) -> int | Int[Array, ""]:
    """How many of some entries stay."""
    sparsity = _checked_sparsity(sparsity)
    if isinstance(sparsity, float):
        return max(int(np.rint(size * (1 - sparsity))), min_kept)
    return jnp.maximum(jnp.rint(size * (1 - sparsity)), min_kept)


def _pool(scores: Num[Array, "rows columns rest"], shape: tuple[int, int], pool: str) -> Num[Array, "a b"]:
    """The mean or the max of every block, and of every later axis; edge blocks count what they have."""
    rows, columns, rest = scores.shape
    padding = [(0, -rows % shape[0]), (0, -columns % shape[1])]

    def blocks(x):
        a, b = x.shape[0] // shape[0], x.shape[1] // shape[1]
        return x.reshape(a, shape[0], b, shape[1], -1)

    if pool == "max":
        padded = jnp.pad(_comparable(scores), [*padding, (0, 0)], constant_values=_lowest(scores.dtype))
        return jnp.max(blocks(padded), (1, 3, 4))
    counts = jnp.sum(blocks(jnp.pad(jnp.ones((rows, columns)), padding)), (1, 3, 4)) * rest
    return jnp.sum(blocks(jnp.pad(scores, [*padding, (0, 0)])), (1, 3, 4)) / counts


def _normalized(scores: Num[Array, "..."]) -> Float[Array, "..."]:
    wide = precision.wide(scores)
    return wide / (jnp.linalg.norm(wide.ravel()) + 1e-8)


def _checked_sparsity(sparsity: float | Float[Array, ""]) -> float | Float[Array, ""]:
    if isinstance(sparsity, jax.core.Tracer):
        return sparsity
    sparsity = np.float64(sparsity)
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity={sparsity} is not the fraction removed: it must be in [0, 1]")
    return sparsity


def _checked_axis(scores: Num[Array, "..."], axis: int) -> int:
    if not -scores.ndim <= axis < scores.ndim:
        raise ValueError(f"axis={axis} is not an axis of scores of shape {scores.shape}")
    return axis % scores.ndim


def _apply_leaf(param: Any, mask: Any) -> Any:
    if param is None or mask is None:
        return param
    return jnp.where(mask, param, jnp.zeros((), jnp.result_type(param)))
