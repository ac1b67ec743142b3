"""Codes of a few bits, several in a byte.

Along one axis (the contracted one by default) `8 // bits` *consecutive* codes share a byte, the first in the lowest
bits:

    byte[i] = sum_f (code[e i + f] & (2^bits - 1)) << (bits f),   e = 8 // bits, f = 0 .. e-1

Consecutive rows, rather than the first and the second half of the axis, keep each shard of a sharded weight whole.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8

WIDTHS = (1, 2, 4, 8)


@functools.partial(jax.jit, static_argnames=("bits", "axis"))
def pack(codes: Int[Array, "..."], bits: int, axis: int = -2) -> UInt8[Array, "..."]:
    """Packs integer codes along `axis`.

    Args:
      codes: integers; only the lowest `bits` bits count, so signed and unsigned codes pack alike.
      bits: 1, 2, 4 or 8.
      axis: the axis to shorten; its length must be a multiple of `8 // bits`.

    Returns:
      uint8, with `axis` shorter by `8 // bits`.

    Raises:
      ValueError: another width, or a length that does not divide.

    >>> pack(jnp.array([[1], [-1]], jnp.int8), 4)
    Array([[241]], dtype=uint8)
    """
    per_byte = _per_byte(bits)
    axis = _axis(axis, codes.ndim)
    if codes.shape[axis] % per_byte:
        raise ValueError(
            f"codes of shape {codes.shape}: axis {axis} has {codes.shape[axis]} entries, which is not a multiple of "
            f"{per_byte} (codes of {bits} bits in a byte)"
        )
    fields = codes.astype(jnp.uint8) & np.uint8(2**bits - 1)
    fields = fields.reshape(*codes.shape[:axis], -1, per_byte, *codes.shape[axis + 1 :])
    return jnp.sum(fields << _shifts(bits, fields.ndim, axis + 1), axis=axis + 1, dtype=jnp.uint8)


@functools.partial(jax.jit, static_argnames=("bits", "axis", "signed"))
def unpack(packed: UInt8[Array, "..."], bits: int, axis: int = -2, *, signed: bool = True) -> Int[Array, "..."]:
    """Undoes `pack`.

    Args:
      packed: uint8 bytes.
      bits: 1, 2, 4 or 8.
      axis: the axis to lengthen.
      signed: whether the highest bit of a code is its sign.

    Returns:
      int8 codes if `signed`, else uint8 codes, with `axis` longer by `8 // bits`.

    Raises:
      ValueError: another width.

    >>> unpack(jnp.array([[241]], jnp.uint8), 4).tolist()
    [[1], [-1]]
    """
    per_byte = _per_byte(bits)
    axis = _axis(axis, packed.ndim)
    shifts = np.uint8(8 - bits) - _shifts(bits, packed.ndim + 1, axis + 1)
    # The code goes to the top of the byte first: shifting it down again then spreads its sign, or zeros.
    high = jnp.expand_dims(packed, axis + 1) << shifts
    if signed:
        codes = jax.lax.bitcast_convert_type(high, jnp.int8) >> np.int8(8 - bits)
    else:
        codes = high >> np.uint8(8 - bits)
    return codes.reshape(*packed.shape[:axis], per_byte * packed.shape[axis], *packed.shape[axis + 1 :])


def _per_byte(bits: int) -> int:
    if bits not in WIDTHS:
        raise ValueError(f"bits={bits!r} cannot be packed; the widths are {', '.join(map(str, WIDTHS))}")
    return 8 // bits


def _axis(axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise ValueError(f"axis={axis} is not an axis of an array of {ndim} axes")
    return axis % ndim


def _shifts(bits: int, ndim: int, axis: int) -> np.ndarray:
    shape = [1] * ndim
    shape[axis] = 8 // bits
    return (bits * np.arange(8 // bits)).astype(np.uint8).reshape(shape)
