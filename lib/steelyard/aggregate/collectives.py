"""The collectives of fully sharded training in 8 and 4 bits (2023, Wang et al.).

ZeRO++: Extremely Efficient Collective Communication for Giant Model Training.

Words: a *block* is a run of consecutive entries, in row-major order, with a scale of its own; a *message* is what goes
over the wire for an array: the codes of its blocks, those of 4 bits two to a byte, and the float32 scales. A message of
b-bit codes in blocks of B has `b / 8 + 4 / B` bytes an entry: with B = 256 1.02 or 0.52, against 4 in float32.

The third part of the method, a secondary copy of the weights, is a choice of sharding: keep a bfloat16 copy split over
the devices of one node alone, and let the backward pass gather that one.
"""

import functools
import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float, Float32, Int8, UInt8

from steelyard import choices, precision, quant
from steelyard_kernels import quant_matmul

AxisName = Hashable | Sequence[Hashable]
_BITS = (4, 8)


class _Message(NamedTuple):
    packed: UInt8[Array, "blocks bytes"]
    scales: Float32[Array, "blocks"]


def block_quantize(
    x: Float[Array, "..."], *, bits: int = 8, block_size: int = 256
) -> tuple[Int8[Array, "blocks block"], Float32[Array, "blocks"]]:
    """Symmetric codes of an array, with one scale for each block.

        scale = max |x| / q,  code = round(x / scale),  q = 2^(bits - 1) - 1,

    rounding half to even, so that `|x - code scale| <= scale / 2`. One pass for the scales and one for the codes.

    Args:
      x: values; laid out flat and padded with zeros to a multiple of `block_size`.
      bits: 4 or 8; the codes are int8 either way.
      block_size: entries that share a scale.

    Returns:
      Codes and scales. A block whose largest entry is below about 1e-19 q counts as zero, with scale 1; a block with an
      entry that is not finite has scale NaN, so that all of it is NaN after `block_dequantize`.

    Raises:
      ValueError: `bits` or `block_size` is out of range.
    """
    _check(bits, block_size)
    flat = jnp.ravel(x)
    blocks = jnp.pad(flat, (0, -flat.size % block_size)).reshape(-1, block_size)
    scales = quant.calibrate(blocks, f"int{bits}", block=(1, -1), bound="max").scale
    codes = quant.encode(blocks, f"int{bits}", scales)
    # What a code becomes whose value is not finite depends on the device; NaN times any code is NaN.
    return codes, jnp.where(jnp.isfinite(scales), scales, jnp.nan)[:, 0]


def block_dequantize(
    codes: Int8[Array, "blocks block"],
    scales: Float32[Array, "blocks"],
    shape: Sequence[int],
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "..."]:
    """Undoes `block_quantize`: `code scale`, without the padding, computed in float32 at least.

    Args:
      codes: one int8 an entry.
      scales: one for each block.
      shape: of the result.
      dtype: of the result.

    Raises:
      ValueError: the shape has more entries than the codes, or a whole block fewer.
    """
    size = math.prod(shape)
    if not 0 <= codes.size - size < max(codes.shape[1], 1):
        raise ValueError(f"codes of shape {codes.shape} are not the blocks of an array of shape {tuple(shape)}")
    values = quant.decode(codes, "int8", scales[:, None], dtype=dtype)
    return values.reshape(-1)[:size].reshape(shape)


def quantized_all_gather(
    x: Float[Array, "part ..."], axis_name: AxisName, *, bits: int = 8, block_size: int = 256
) -> Float[Array, "whole ..."]:
    """All devices' parts of an array, one after the other along axis 0, sent as quantized blocks.

    For the weights of fully sharded training. Every device gets the same bits, also of its own part. It can be
    differentiated only as `quantized_gather`. Costs one message of x sent, and n received.

    Args:
      x: this device's part, inside `jax.shard_map` or `jax.vmap` with an axis name.
      axis_name: over which to gather; of several axes the first is the slowest.
      bits: 4 or 8.
      block_size: entries that share a scale, even for 4 bits. A part shorter than a block is one short block.

    Returns:
      The whole in x's dtype, on each device. To `jax.shard_map` it still looks different on each: returned as
      replicated, it needs `check_vma=False`.

    Raises:
      ValueError: `bits` or `block_size` is out of range; while tracing, x is a scalar.
    """
    _check(bits, block_size, on_wire=True)
    if jnp.ndim(x) == 0:
        raise ValueError(f"x must have a leading axis to gather along, got shape {jnp.shape(x)}")
    messages = jax.lax.all_gather(_write(x, bits, block_size), axis_name)
    parts = jax.vmap(lambda message: _read(message, x.shape, x.dtype, bits))(messages)
    return parts.reshape(parts.shape[0] * x.shape[0], *x.shape[1:])


def quantized_reduce_scatter(
    x: Float[Array, "whole ..."], axis_name: AxisName, *, bits: int = 4, block_size: int = 256, mean: bool = True
) -> Float[Array, "part ..."]:
    """This device's part of the mean of all devices' arrays, sent as quantized blocks by one all-to-all.

    For gradients. Each entry is quantized once, and summed in float32: unlike on a ring of partial sums, errors do not
    pile up. Costs one message of x sent and one received.

    Args:
      x: this device's array; its leading axis is the number n of devices times that of a part.
      axis_name, bits, block_size: as in `quantized_all_gather`; the blocks are those of a part.
      mean: the mean over the devices; else the sum.

    Returns:
      Part i of n on device i, in x's dtype.

    Raises:
      ValueError: `bits` or `block_size` is out of range; while tracing, the leading axis does not divide into n parts.
    """
    _check(bits, block_size, on_wire=True)
    count = jax.lax.axis_size(axis_name)
    parts = _split(x, (count,))
    messages = jax.vmap(lambda part: _write(part, bits, block_size))(parts)
    messages = jax.lax.all_to_all(messages, axis_name, split_axis=0, concat_axis=0)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    total = jnp.sum(jax.vmap(lambda message: _read(message, parts.shape[1:], wide, bits))(messages), axis=0)
    return (total / count if mean else total).astype(x.dtype)


def hierarchical_reduce_scatter(
    x: Float[Array, "whole ..."],
    inner_axis: AxisName,
    outer_axis: AxisName,
    *,
    bits: int = 4,
    block_size: int = 256,
    mean: bool = True,
) -> Float[Array, "part ..."]:
    """`quantized_reduce_scatter` in two steps: among the devices of a node, then between nodes.

    Of No nodes with Ni devices, device (o, i) ends with part `o Ni + i`, as if both axes were one. The slow network
    between nodes carries 1 / Ni of what one step over all devices would send there; each entry is quantized twice.

    Args:
      x: this device's array; its leading axis is No Ni times that of a part.
      inner_axis: over the devices of a node.
      outer_axis: over the nodes.
      bits, block_size, mean: as in `quantized_reduce_scatter`.

    Raises:
      ValueError: as there, with n = No Ni.
    """
    _check(bits, block_size, on_wire=True)
    outer, inner = jax.lax.axis_size(outer_axis), jax.lax.axis_size(inner_axis)
    parts = jnp.swapaxes(_split(precision.wide(x), (outer, inner)), 0, 1)
    reduce = functools.partial(quantized_reduce_scatter, bits=bits, block_size=block_size, mean=mean)
    return reduce(reduce(parts, inner_axis)[0], outer_axis)[0].astype(x.dtype)


def quantized_gather(
    x: Float[Array, "part ..."], axis_name: AxisName, *, bits: int = 8, gradient_bits: int = 4, block_size: int = 256
) -> Float[Array, "whole ..."]:
    """`quantized_all_gather` for training: its gradient is the sum over devices by `quantized_reduce_scatter`.

    Called on each weight inside a loss, it makes a fully sharded step of `jax.grad`: every device holds and updates its
    part of the weights, and gets the gradient of the sum of all devices' losses with respect to it (divide the loss by
    the number of devices for the mean). Rounding has the gradient of the identity. `jax.grad` must stand inside the
    `jax.shard_map`, or `jax.vmap`, that names the axis.

    Args:
      x: this device's part of a weight.
      axis_name: as in `quantized_all_gather`. A pair (between nodes, inside a node) is gathered over both, and its
        gradient takes the two steps of `hierarchical_reduce_scatter`.
      bits: of the weights, 4 or 8.
      gradient_bits: of the gradients, 4 or 8.
      block_size: entries that share a scale.

    Raises:
      ValueError: as `quantized_all_gather`.
    """
    _check(bits, block_size, on_wire=True)
    _check(gradient_bits, block_size, on_wire=True, name="gradient_bits")
    return _gather(x, axis_name, bits, gradient_bits, block_size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gather(x, axis_name, bits, gradient_bits, block_size):
    del gradient_bits
    return quantized_all_gather(x, axis_name, bits=bits, block_size=block_size)


def _gather_forward(x, axis_name, bits, gradient_bits, block_size):
    return _gather(x, axis_name, bits, gradient_bits, block_size), None


def _gather_backward(axis_name, bits, gradient_bits, block_size, residuals, cotangent):
    del bits, residuals
    options = {"bits": gradient_bits, "block_size": block_size, "mean": False}
    if isinstance(axis_name, tuple) and len(axis_name) == 2:
        outer, inner = axis_name
        return (hierarchical_reduce_scatter(cotangent, inner, outer, **options),)
    return (quantized_reduce_scatter(cotangent, axis_name, **options),)


_gather.defvjp(_gather_forward, _gather_backward)


def _write(x: Float[Array, "..."], bits: int, block_size: int) -> _Message:
    # A short array is not padded to a whole block, only to whole bytes.
    block_size = min(block_size, max(x.size + x.size % 2, 2))
    codes, scales = block_quantize(x, bits=bits, block_size=block_size)
    return _Message(quant_matmul.pack(codes, bits, axis=-1), scales)


def _read(message: _Message, shape: Sequence[int], dtype: DTypeLike, bits: int) -> Float[Array, "..."]:
    return block_dequantize(quant_matmul.unpack(message.packed, bits, axis=-1), message.scales, shape, dtype)


def _split(x: Float[Array, "whole ..."], counts: tuple[int, ...]) -> Float[Array, "..."]:
    """The leading axis as one axis for each count, and what is left of it."""
    parts = math.prod(counts)
    if jnp.ndim(x) == 0 or x.shape[0] % parts:
        sizes = " x ".join(map(str, counts))
        raise ValueError(f"x must have a leading axis that divides into {sizes} parts, got shape {jnp.shape(x)}")
    return x.reshape(*counts, x.shape[0] // parts, *x.shape[1:])


def _check(bits: int, block_size: int, *, on_wire: bool = False, name: str = "bits") -> None:
    if bits not in _BITS:
        raise ValueError(f"{name}={bits!r} must be one of {', '.join(map(str, _BITS))}")
    choices.require_count("block_size", block_size, "[1, inf)")
    if on_wire and bits == 4 and block_size % 2:
        raise ValueError(f"block_size={block_size} must be even with {name}=4: two codes share a byte")
