"""What a checkpoint holds of a tree of arrays: arrays by path, and a record of shapes, dtypes and bits.

The tree is stored as nested dicts by path, so that a later version of the code, or another program, can read it
without our types. The record tells, before anything is read, whether a checkpoint fits; and after, whether the bits
are those that were written.
"""

import collections
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt32

from steelyard import tree as tree_lib

PyTree = Any
Record = dict[str, list]
"""Path to `[type, checksum]`, as in `["float32[3,4]", 17]`."""

SHOWN = 5
"""How many paths an error lists."""


def by_path(tree: PyTree) -> dict[str, Any]:
    """Leaves by path.

    Raises:
      ValueError: two paths would be one on disk, where dots separate keys too.
    """
    leaves = tree_lib.flatten(tree)
    counts = collections.Counter(path.replace(".", "/") for path, _ in leaves)
    parents = {name[: match.start()] for name in counts for match in re.finditer("/", name)}
    clashes = [name for name, count in counts.items() if count > 1 or name in parents]
    if clashes:
        raise ValueError(f"these paths name more than one leaf: {', '.join(clashes[:SHOWN])}")
    return dict(leaves)


def nest(flat: Mapping[str, Any]) -> dict:
    """Nested dicts from leaves by path.

    >>> nest({"a/b": 1, "a/c": 2})
    {'a': {'b': 1, 'c': 2}}
    """
    nested: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = nested
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return nested


def nonempty(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves with entries: storage takes no empty arrays, and the record says all about them."""
    return {path: x for path, x in flat.items() if math.prod(np.shape(x))}


def empty(shape: jax.ShapeDtypeStruct) -> Array:
    """An array without entries."""
    host = np.zeros(shape.shape, shape.dtype)
    return jax.make_array_from_callback(shape.shape, shape.sharding, lambda index: host[index])


# Typed random keys are stored as their key data.


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def key_data(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The same leaves with key data for typed keys, in arrays as in shapes; shardings stay.

    Raises:
      ValueError: a leaf is no array (a Python number has no dtype to come back to).
    """
    others = [f"{path} ({type(leaf).__name__})" for path, leaf in flat.items() if not hasattr(leaf, "dtype")]
    if others:
        raise ValueError(f"all leaves must be arrays; these are not: {_first(others)}")
    return {path: _data_of(leaf) if _is_key(leaf) else leaf for path, leaf in flat.items()}


def _data_of(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf)
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def wrap_keys(arrays: Mapping[str, Array], like: Mapping[str, Any]) -> dict[str, Array]:
    """Undoes `key_data`, where `like` has typed keys."""
    return {
        path: jax.random.wrap_key_data(x, impl=_impl(like[path])) if _is_key(like[path]) else x
        for path, x in arrays.items()
    }


def _impl(key: Any) -> Any:
    """The implementation of a key, also of one that is only a shape."""
    found = []
    jax.eval_shape(lambda x: found.append(jax.random.key_impl(x)), jax.ShapeDtypeStruct(key.shape, key.dtype))
    return found[0]


# Checksums.


def digest(arrays: Mapping[str, Array]) -> tuple[dict[str, int], dict[str, bool]]:
    """For each array the sum of its bits, and whether all entries are finite.

    The first is the sum modulo 2^32 of the array's bits, read as unsigned integers: exact, and the same for every
    sharding. Storage notices truncation by itself; this notices the flipped bit.
    """
    # One after the other, waiting for each: many collectives in flight at once can lock up the threads of fake devices.
    digests = {path: jax.device_get(_digest(x)) for path, x in arrays.items()}
    return {path: int(d[0]) for path, d in digests.items()}, {path: bool(d[1]) for path, d in digests.items()}


# A program for each shape, of which a model has few; one for all leaves together takes seconds to compile.
@jax.jit
def _digest(x: Array) -> tuple[UInt32[Array, ""], Bool[Array, ""]]:
    return _sum_of_bits(x), _all_finite(x)


def _sum_of_bits(x: Array) -> UInt32[Array, ""]:
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    if _bits(x.dtype) < 8:
        x = x.astype(jnp.float32)  # exact, and has whole bytes
    unsigned = {8: jnp.uint8, 16: jnp.uint16}.get(_bits(x.dtype), jnp.uint32)
    return jnp.sum(jax.lax.bitcast_convert_type(x, unsigned), dtype=jnp.uint32)


def _all_finite(x: Array) -> Bool[Array, ""]:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.array(True)
    # Not all types of 8 bits and fewer have an isfinite of their own.
    return jnp.all(jnp.isfinite(x.astype(jnp.float32) if _bits(x.dtype) < 32 else x))


def _bits(dtype: Any) -> int:
    if dtype == jnp.bool_:
        return 1
    return jnp.finfo(dtype).bits if jnp.issubdtype(dtype, jnp.inexact) else jnp.iinfo(dtype).bits


# The record.


def type_str(leaf: Any) -> str:
    """Dtype and shape.

    >>> type_str(np.zeros((3, 4), np.float32))
    'float32[3,4]'
    """
    return f"{leaf.dtype}[{','.join(map(str, np.shape(leaf)))}]"


def record(leaves: Mapping[str, Any], sums: Mapping[str, int]) -> Record:
    """The record of leaves by path and of the checksums of their data."""
    return {path: [type_str(leaf), sums[path]] for path, leaf in leaves.items()}


def require_fit(what: str, saved: Record, wanted: Mapping[str, Any]) -> None:
    """Checks that a checkpoint has the paths, shapes and dtypes that are wanted, and no others.

    Raises:
      ValueError: it has not; the text begins with `what` and lists the first five paths of each kind.
    """
    both = [(path, saved[path][0], type_str(leaf)) for path, leaf in wanted.items() if path in saved]
    kinds = {
        "not in the checkpoint": [path for path in wanted if path not in saved],
        "only in the checkpoint": [path for path in saved if path not in wanted],
        "of another type there": [f"{path} ({there}, here {here})" for path, there, here in both if there != here],
    }
    lines = [f"  {kind}: {_first(found)}" for kind, found in kinds.items() if found]
    if lines:
        raise ValueError("\n".join((f"{what} does not fit this state:", *lines)))


def require_same_bits(saved: Record, arrays: Mapping[str, Array]) -> None:
    """Checks the arrays' checksums.

    Raises:
      ValueError: some differ.
    """
    changed = [path for path, value in digest(arrays)[0].items() if value != saved[path][1]]
    if changed:
        raise ValueError(f"the bits are not those that were saved: {_first(changed)}")


def _first(found: list[str]) -> str:
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(found[:SHOWN]) + more
