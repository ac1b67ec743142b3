"""The k largest entries of an array or of a whole tree, exactly, by bisection on counts.

A sort of a sharded array gathers it. Here the k-th largest score is found bit by bit: each round counts, in one pass
over the entries where they lie, how many reach a candidate, and only the counts are summed over the mesh. That takes 32
rounds for scores of 32 bits or 64; ties take at most 7 more, of several candidates each.

The order is total, so that the result does not depend on how the entries are laid out: NaN counts as minus infinity,
-0 as +0, and of equal scores the lower index wins (leaves in the order of `jax.tree.leaves`, entries row-major).
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num, UInt

PyTree = Any

_LIMB = 16  # bits of a count's lower half
_TIE_ROUNDS = 7


class _Count(NamedTuple):
    """A count high * 2^16 + low of up to 2^47 entries, without 64-bit integers."""

    high: Int[Array, "..."]
    low: Int[Array, "..."]

    def reaches(self, other: "_Count") -> Bool[Array, "..."]:
        return (self.high > other.high) | ((self.high == other.high) & (self.low >= other.low))


def keep_largest(scores: Num[Array, "..."], k: int | Int[Array, ""], axis: int | None = None) -> Bool[Array, "..."]:
    """A mask of the k largest entries of an array, or of each of its slices along an axis.

    Args:
      scores: any shape; compared in its own dtype.
      k: how many; may be traced. None are kept below 1, all from the size on.
      axis: the axis along which entries compete; `None`: all of them do.

    Returns:
      A mask of the same shape with exactly min(max(k, 0), size) entries True, in all or along the axis. No gradient
      flows through it.

    >>> keep_largest(jnp.array([3.0, 1.0, jnp.nan, 3.0, 3.0]), 2).tolist()
    [True, False, False, True, False]
    """
    scores = jnp.asarray(scores)
    if axis is None:
        return top_mask(scores, k)
    if scores.size == 0:
        return jnp.zeros(scores.shape, bool)
    return _top_along(scores, jnp.asarray(k, jnp.int32), axis % scores.ndim)


def top_mask(
    tree: PyTree, k: int | Int[Array, ""], *, mesh: jax.sharding.Mesh | None = None, specs: PyTree | None = None
) -> PyTree:
    """A mask of the k largest entries of all leaves together.

    Under jit the leaves may be sharded in any way: what crosses the mesh in a round is a few counts for each leaf, in
    one all-reduce for each set of mesh axes over which some leaf is cut. With `mesh` and `specs` it is exactly one.

    Args:
      tree: scores; leaves of several dtypes are compared in their common one. `None` leaves stay.
      k: how many, a Python int, or traced: an integer, or a whole number as a float. None are kept below 1, all from
        the size on.
      mesh: the mesh of the leaves.
      specs: a tree of `PartitionSpec` like `tree`.

    Returns:
      A tree of masks with exactly min(max(k, 0), size) entries True. No gradient flows through it.

    Cost: 32 passes over 32-bit scores (16 for 16 bits), each a comparison an entry, and one that counts ties; where the
    k-th largest is tied, at most 7 more, each of 3 comparisons for leaves of up to 2^14 entries, 7 up to 2^21, 15 up to
    2^28.

    Raises:
      ValueError: a leaf has 2^31 entries or more; only one of `mesh` and `specs` is given.
    """
    leaves, treedef = jax.tree.flatten(tree)
    if (mesh is None) != (specs is None):
        raise ValueError("mesh and specs come together: one was given without the other")
    for leaf in leaves:
        if math.prod(np.shape(leaf)) >= 2**31:
            raise ValueError(f"a leaf of shape {np.shape(leaf)} has 2^31 entries or more: cut it into several")
    if not any(math.prod(np.shape(leaf)) for leaf in leaves):
        return jax.tree.unflatten(treedef, [jnp.zeros(np.shape(leaf), bool) for leaf in leaves])
    dtype = jnp.result_type(*leaves)
    leaves = [jnp.asarray(leaf, dtype) for leaf in leaves]
    k = _count_of(k)
    if mesh is None:
        return jax.tree.unflatten(treedef, _top(leaves, k))
    places = tuple(treedef.flatten_up_to(specs))
    local = functools.partial(_top, mesh=mesh, specs=places)
    masks = jax.shard_map(local, mesh=mesh, in_specs=(list(places), jax.P()), out_specs=list(places))(leaves, k)
    return jax.tree.unflatten(treedef, masks)


def among(scores: Num[Array, "..."], eligible: Bool[Array, "..."]) -> Float[Array, "..."]:
    """Scores in which every eligible entry, whatever its score, comes before all others.

    Args:
      scores: of any real dtype; NaN of an eligible entry is the least of them, and ties with minus infinity.
      eligible: of the same shape.

    >>> among(jnp.array([-jnp.inf, 2.0, 3.0]), jnp.array([True, True, False])).tolist()[1:]
    [2.0, -inf]
    """
    scores = jnp.asarray(scores)
    scores = scores if jnp.issubdtype(scores.dtype, jnp.floating) else scores.astype(jnp.float32)
    lowest = jnp.finfo(scores.dtype).min
    return jnp.where(eligible, jnp.where(scores >= lowest, scores, lowest), -jnp.inf)


@functools.partial(jax.jit, static_argnames="axis")
def _top_along(scores: Array, k: Array, axis: int) -> Array:
    keys = _ordered(scores)

    def count(chosen):
        return jnp.sum(chosen, axis=axis, keepdims=True, dtype=jnp.int32)

    start = jnp.zeros((*keys.shape[:axis], 1, *keys.shape[axis + 1 :]), keys.dtype)
    threshold = _largest_true(lambda t: count(keys >= t) >= k, start)
    above, equal = keys > threshold, keys == threshold
    places = jax.lax.broadcasted_iota(jnp.uint32, keys.shape, axis)
    missing = k - count(above)
    return _first_ties([above], [equal], [places], keys.shape[axis], [missing], lambda x: [count(x[0])])[0]


@functools.partial(jax.jit, static_argnames=("mesh", "specs"))
def _top(leaves: Sequence[Array], k: _Count, mesh: Any = None, specs: Sequence[Any] = ()) -> list[Array]:
    """The masks of the leaves; inside a `shard_map`, of their local parts."""
    keys = [_ordered(leaf) for leaf in leaves]
    total = _total(mesh, specs)
    threshold = _largest_true(lambda t: _sum(total([x >= t for x in keys])).reaches(k), jnp.zeros((), keys[0].dtype))
    above, equal = [x > threshold for x in keys], [x == threshold for x in keys]
    missing = _share(k, _sum(total(above)), jnp.stack(total(equal)))
    indices = [_flat_index(x.shape, mesh, specs[i] if specs else None) for i, x in enumerate(keys)]
    most = max(math.prod(shape) for _, shape in indices)
    return _first_ties(above, equal, [index for index, _ in indices], most, list(missing), total)


def _total(mesh: Any, specs: Sequence[Any]) -> Callable[[list[Array]], list[Array]]:
    """Counts the True entries of each of some bool arrays, over the whole mesh."""

    def local(chosen):
        return [jnp.sum(x, dtype=jnp.int32) for x in chosen]

    if mesh is None:
        return local

    def over_mesh(chosen):
        # A leaf that is whole on several devices is counted on the first of them.
        owned = [
            math.prod([jax.lax.axis_index(axis) == 0 for axis in mesh.axis_names if axis not in _axes(spec)])
            for spec in specs
        ]
        counts = jnp.stack([x * own for x, own in zip(local(chosen), owned, strict=True)])
        return list(jax.lax.psum(counts, mesh.axis_names))

    return over_mesh


def _axes(spec: Any) -> list[str]:
    return [axis for entry in spec if entry is not None for axis in (entry if isinstance(entry, tuple) else (entry,))]


def _flat_index(shape: tuple[int, ...], mesh: Any, spec: Any) -> tuple[UInt[Array, "..."], tuple[int, ...]]:
    """The row-major position of every local entry in the whole leaf, and the shape of that."""
    cuts = [()] * len(shape)
    for axis, entry in enumerate(spec or ()):
        cuts[axis] = () if entry is None else entry if isinstance(entry, tuple) else (entry,)
    whole = tuple(size * math.prod(mesh.shape[name] for name in cut) for size, cut in zip(shape, cuts, strict=True))
    index = jnp.zeros(shape, jnp.uint32)
    for axis, (size, cut) in enumerate(zip(shape, cuts, strict=True)):
        first = jax.lax.axis_index(cut).astype(jnp.uint32) * size if cut else jnp.uint32(0)
        place = jax.lax.broadcasted_iota(jnp.uint32, shape, axis) + first
        index = index + place * jnp.uint32(math.prod(whole[axis + 1 :]))
    return index, whole


def _ordered(x: Num[Array, "..."]) -> UInt[Array, "..."]:
    """Unsigned integers in the order of the scores."""
    x = jax.lax.stop_gradient(x)
    if x.dtype == bool or jnp.issubdtype(x.dtype, jnp.unsignedinteger):
        return x.astype(jnp.uint8) if x.dtype == bool else x
    bits = 8 * x.dtype.itemsize
    unsigned = jnp.dtype(f"uint{bits}")
    sign = jnp.array(1 << (bits - 1), unsigned)
    if jnp.issubdtype(x.dtype, jnp.integer):
        return jax.lax.bitcast_convert_type(x, unsigned) ^ sign
    raw = jax.lax.bitcast_convert_type(jnp.where(jnp.isnan(x), jnp.array(-jnp.inf, x.dtype), x), unsigned)
    # -0 by its bits: a comparison with 0 would hold for subnormal numbers too, where these are flushed.
    return jnp.where(raw > sign, ~raw, raw | sign)


def _largest_true(holds: Callable[[Array], Array], start: Array) -> Array:
    """The largest t for which `holds(t)`, which is monotone, and where it holds nowhere 0; `start` is zeros like t."""
    bits = 8 * start.dtype.itemsize
    return _digits(holds, bits, 2 if bits > 32 else 1, start)


def _digits(holds: Callable[[Array], Array], bits: int, width: int, start: Array) -> Array:
    """Finds a number of `bits` bits from its highest digit down, a digit of `width` bits a round."""
    dtype = start.dtype
    rounds = -(-bits // width)

    def one_round(i, found):
        shift = jnp.asarray((rounds - 1 - i) * width, dtype)
        digit = sum(holds(found + (jnp.array(j, dtype) << shift)).astype(dtype) for j in range(1, 1 << width))
        return found + (digit << shift)

    return jax.lax.fori_loop(0, rounds, one_round, start)


def _first_ties(
    above: list[Array],
    equal: list[Array],
    indices: list[Array],
    size: int,
    missing: list[Array],
    count: Callable[[list[Array]], list[Array]],
) -> list[Array]:
    """Above the threshold, or equal to it and among the first `missing` of such."""
    held = count(equal)

    def search():
        def enough(limits):
            below = count([e & (i < t) for e, i, t in zip(equal, indices, limits, strict=True)])
            return jnp.stack(below) <= jnp.stack(missing)

        bits = max(size, 1).bit_length()  # so that the largest number found is at least the size
        width = -(-bits // _TIE_ROUNDS)
        start = jnp.zeros((len(missing), *missing[0].shape), jnp.uint32)
        return list(_digits(enough, -(-bits // width) * width, width, start))

    untied = functools.reduce(jnp.logical_and, [jnp.all(h <= m) for h, m in zip(held, missing, strict=True)])
    everything = [jnp.full(m.shape, 2**32 - 1, jnp.uint32) for m in missing]
    limits = jax.lax.cond(untied, lambda: everything, search)
    return [a | (e & (i < t) & (m > 0)) for a, e, i, t, m in zip(above, equal, indices, limits, missing, strict=True)]


def _count_of(k: int | Int[Array, ""]) -> _Count:
    if isinstance(k, jax.Array):
        k = jnp.maximum(k, 0)
        if jnp.issubdtype(k.dtype, jnp.floating):  # a whole number that may be too large for an int32
            high = jnp.floor(k / 2**_LIMB)
            return _Count(high.astype(jnp.int32), (k - high * 2**_LIMB).astype(jnp.int32))
        return _Count((k >> _LIMB).astype(jnp.int32), (k & (2**_LIMB - 1)).astype(jnp.int32))
    k = min(max(int(k), 0), 2**47 - 1)
    return _Count(jnp.int32(k >> _LIMB), jnp.int32(k & (2**_LIMB - 1)))


def _sum(counts: list[Array]) -> _Count:
    counts = jnp.stack(counts)
    low = jnp.sum(counts & (2**_LIMB - 1))
    return _Count(jnp.sum(counts >> _LIMB) + (low >> _LIMB), low & (2**_LIMB - 1))


def _share(k: _Count, above: _Count, equal: Int[Array, "leaves"]) -> Int[Array, "leaves"]:
    """How many of its tied entries each leaf keeps: the first leaves keep theirs until there are k in all."""
    low = jnp.cumsum(equal & (2**_LIMB - 1)) - (equal & (2**_LIMB - 1))
    high = jnp.cumsum(equal >> _LIMB) - (equal >> _LIMB)
    low = k.low - above.low - low
    high = k.high - above.high - high + (low >> _LIMB)  # an arithmetic shift: borrows where low is negative
    low = low & (2**_LIMB - 1)
    left = (jnp.clip(high, 0, 2**15 - 1) << _LIMB) + low
    return jnp.where(high < 0, 0, jnp.where(high >= 2**15, equal, jnp.minimum(left, equal)))
