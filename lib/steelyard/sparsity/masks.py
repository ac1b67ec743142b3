"""Masks: which entries of a leaf stay, given a score for each.

A mask is a bool array of the leaf's shape, True where the entry is kept; a leaf that is not pruned has the mask `None`.
Every selection is exact in its count whatever the ties: equal scores keep the lower index (row-major), and NaN counts
as minus infinity, so that it is kept only when nothing else is left. The dtype of the scores is the one compared.
"""

import numbers
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, UInt8

from steelyard import tree as tree_lib

PyTree = Any

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
    sparsity = _checked_sparsity(sparsity)
    rounded = np.rint if isinstance(sparsity, float) else jnp.rint
    kept = rounded(scores.size * (1 - sparsity)).astype(int)
    return _keep_largest(scores.ravel(), _clip(kept, min_kept, scores.size), 0).reshape(scores.shape)


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
    return _keep_largest(scores, _clip(size - floor(size * sparsity + 1e-9).astype(int), 0, size), axis)


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
    check_nm(n, m)
    axis = _checked_axis(scores, axis)
    if n == 0 or n == m:
        return jnp.full(scores.shape, n > 0)
    size = scores.shape[axis]
    padding = [(0, -size % m if i == axis else 0) for i in range(scores.ndim)]
    # A padding entry ties at worst with a real one, and then loses because it comes later.
    padded = jnp.pad(_comparable(scores), padding, constant_values=_lowest(scores.dtype))
    groups = padded.reshape(*scores.shape[:axis], padded.shape[axis] // m, m, *scores.shape[axis + 1 :])
    kept = _keep_compared(groups, n, axis + 1) if m <= _MAX_COMPARED else _keep_largest(groups, n, axis + 1)
    return jax.lax.slice_in_dim(kept.reshape(padded.shape), 0, size, axis=axis)


def check_nm(n: int, m: int) -> None:
    """Refuses a pattern that is not 0 <= n <= m with m >= 1.

    Raises:
      ValueError: the pattern is impossible.
    """
    if m < 1 or not 0 <= n <= m:
        raise ValueError(f"n={n}, m={m} is not a pattern: 0 <= n <= m and m >= 1 are needed")


def pack_bits(mask: Bool[Array, "..."]) -> UInt8[Array, " bytes"]:
    """Eight entries a byte, row-major, the first in the highest bit; the last byte is filled with zeros."""
    return jnp.packbits(jnp.ravel(mask))


def unpack_bits(packed: UInt8[Array, " bytes"], shape: tuple[int, ...]) -> Bool[Array, "..."]:
    """Undoes `pack_bits` for a mask of `shape`.

    Raises:
      ValueError: `packed` does not have ceil(size / 8) bytes.
    """
    size = int(np.prod(shape))
    if jnp.shape(packed) != (-(-size // 8),):
        raise ValueError(f"packed has shape {jnp.shape(packed)}, but a mask of shape {shape} needs {(-(-size // 8),)}")
    return jnp.unpackbits(packed, count=size).astype(bool).reshape(shape)


def apply(params: PyTree, masks: PyTree) -> PyTree:
    """Zeros outside the masks; a leaf whose mask is `None` passes, and so does a `None` leaf.

    A removed entry becomes +0, also where the parameter was negative or not finite.

    Args:
      params: a tree of arrays.
      masks: a tree of the same structure of masks or `None`.
    """
    return jax.tree.map(_apply_leaf, params, masks, is_leaf=lambda x: x is None)


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


def _keep_largest(scores: Num[Array, "..."], kept: int | Int[Array, ""], axis: int) -> Bool[Array, "..."]:
    """The `kept` largest along an axis: all above the kept-th largest score, and the first of those equal to it."""
    if scores.shape[axis] == 0:
        return jnp.zeros(scores.shape, bool)
    scores = _comparable(scores)
    ascending = jnp.sort(scores, axis=axis)
    position = scores.shape[axis] - jnp.maximum(kept, 1)
    threshold = jax.lax.dynamic_slice_in_dim(ascending, position, 1, axis=axis)
    above, equal = scores > threshold, scores == threshold
    missing = kept - jnp.count_nonzero(above, axis=axis, keepdims=True)
    return (above | (equal & (jnp.cumsum(equal, axis=axis, dtype=jnp.int32) <= missing))) & (kept > 0)


def _comparable(scores: Num[Array, "..."]) -> Num[Array, "..."]:
    scores = jax.lax.stop_gradient(scores)
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        return scores
    return jnp.where(jnp.isnan(scores), _lowest(scores.dtype), scores)


def _lowest(dtype: Any) -> Any:
    return jnp.array(-jnp.inf if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo(dtype).min, dtype)


def _clip(kept: int | Int[Array, ""], low: int, high: int) -> int | Int[Array, ""]:
    if isinstance(kept, numbers.Integral):
        return min(max(int(kept), low), high)
    return jnp.clip(kept, min(low, high), high)


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
