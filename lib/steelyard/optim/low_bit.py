"""Optimizer state in 8 or 4 bits: any rule's moments are decoded before its update and encoded after it.

Two things go wrong where moments are rounded as weights are. A second moment that becomes zero beside a first moment
that does not makes the update explode; so in a leaf (4 bits: in a block without negative entries) what is not zero is
never stored as zero. And an average with decay 0.999 moves by less than half a step of any such grid in an update:
rounded to nearest, it would stand still. So entries are *dithered*: rounded up with a frequency that is their
remainder, by comparing it with a threshold d in [0, 1) that is a hash of the update's number, the leaf's path and the
entry's index in the whole array. That costs a few integer operations, and does not depend on how arrays are sharded.
Scales are powers of two, so that the grids stay where they are: a slow average v begins each update on its grid, leaves
it by a thousandth, and so wanders about its true value with no more than a variance of v step / 2.

| bits | codes | one scale for |
| --- | --- | --- |
| 8 | `fp8_e5m2`: four steps an octave, 22 octaves below the largest entry | the leaf, or `block` rows |
| 4 | `int4` codes of signed square roots, 15 values (7 on each side if signs differ) | a column, or `block` rows |

Square roots, because the values of 4 bits must reach far down: from 1 to 1/225. Rounding is unbiased in the value
itself, not in its root; a bias of the root would add up over a thousand steps.

Thresholds that run through the multiples of the golden ratio instead of a hash fill [0, 1) more evenly, and with 8 bits
leave a sixth less noise. But each determines the next, and with 4 bits there were entries that were rounded up in one
step and down in the next, for ever.

Sources: 8-bit Optimizers via Block-wise Quantization (2022, Dettmers et al.); Memory Efficient Optimizers with 4-bit
States (2023, Li et al.), for the trouble with zero. Float codes, roots and dither are not theirs.
"""

import functools
import itertools
import math
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Num, UInt32

from steelyard import choices, formats, precision
from steelyard import tree as tree_lib
from steelyard.quant import calibration
from steelyard_kernels import quant_matmul

PyTree = Any

# Odd numbers without a pattern, for the update and the first axes; and the multiplier of the hash.
_STEP, *_AXES = (np.uint32(math.sqrt(prime) % 1 * 2**32) | np.uint32(1) for prime in (2, 3, 5, 7, 11, 13, 17, 19, 23))
_MIX = np.uint32(0x7FEB352D)

# e5m2 reaches from 2^-14 to 2^15. The largest entry is put at 2^8: what it may grow before it is measured again.
_TOP = 8
_MANTISSA, _BIAS, _SMALLEST, _LARGEST, _NAN = 2, 15, 0x04, 0x7B, 0x7F
# On CPU the scale is measured in every so many steps, and when a gradient has grown by so much.
_INTERVAL, _GROWTH = 32, 4.0
# The largest code of the roots, without and with entries of both signs.
_ONE_SIGN, _TWO_SIGNS = 15, 7
# A shorter axis does not pay for scales along it.
_SHORT = 16


class LowBitState(NamedTuple):
    """State of `low_bit_state`.

    Attributes:
      count: number of updates made.
      norms: float32, of the gradient of each large leaf when scales were last due; `None` where they always are: with 4
        bits or blocks.
      inner_state: that of the inner rule, with large moments as `formats.Quantized`.
    """

    count: Int[Array, ""]
    norms: Float[Array, "leaves"] | None
    inner_state: optax.OptState


class _Scale(NamedTuple):
    scale: Float[Array, "..."]
    zero_point: Int[Array, "..."] | None


def low_bit_state(
    inner: optax.GradientTransformation, *, bits: int = 8, block: int | None = None, min_size: int = 4096
) -> optax.GradientTransformationExtraArgs:
    """Keeps the moments of any rule in 8 or 4 bits.

        updates, state = inner.update(updates, decode(state), params);  store encode(state)

    The rule computes with decoded moments of the dtype that it gave them, so that its arithmetic and its result are
    its own. Codes have the parameter's shape (4 bits: two a byte along axis -2) and sharding. Wrap rules that edit the
    moments of others, such as `sparse`, on the inside.

    AdamW with 8 bits keeps 2.0 bytes a parameter instead of 8, with 4 bits 1.0. On CPU an update of AdamW takes about
    twice as long with 8 bits, and four to five times with blocks or 4 bits, where all scales are measured in each step.

    What is not finite shows in the update as ever. With 8 bits it stays in the state, as NaN; with 4 it may not.

    Args:
      inner: the rule; extra arguments are passed on.
      bits: of an entry, 8 or 4.
      block: how many entries along axis -2 (along the last, where -2 is shorter than 16) share a scale. `None`: with 8
        bits the whole leaf, with 4 all along that axis. Fewer only pay where sizes differ much (tables of rare words):
        all scales are then measured in each step, and a TPU moves up to three times as many bytes. Where it does not
        divide the axis, the largest divisor below does, or the whole axis where that is less than half of it. It must
        divide each shard's part, or entries are gathered.
      min_size: leaves with fewer entries are left as they are, as are those that mirror no parameter (counters) and
        those that are not of a floating dtype.

    Returns:
      A transformation with the state `LowBitState`.

    Raises:
      ValueError: `bits`, `block` or `min_size` is not one of those that are allowed.
    """
    if bits not in (8, 4):
        raise ValueError(f"bits={bits!r} is not one of 8, 4")
    choices.require_within("block", 1 if block is None else block, "[1, inf)")
    choices.require_within("min_size", min_size, "[1, inf)")
    inner = optax.with_extra_args_support(inner)

    measure = functools.partial(_float_scale if bits == 8 else _root_scale, block=block)
    is_always_due = bits == 4 or block is not None

    @jax.jit  # One program a shape: init is mostly called without jit, and would then run op by op.
    def encode_first(salt, x):
        return _encode(salt, x, measure(x), jnp.zeros((), jnp.int32))

    def init(params):
        state, count = inner.init(params), jnp.zeros((), jnp.int32)
        mirrors = optax.tree.map_params(inner, lambda _: True, state, transform_non_params=lambda _: False)

        def encode(path, x, is_moment):
            return encode_first(_salt(path), x) if is_moment and _is_large(x, min_size) else x

        # At least one: Orbax refuses arrays without entries.
        norms = None if is_always_due else jnp.zeros(max(1, len(_large(params, min_size))), jnp.float32)
        return LowBitState(count, norms, tree_lib.map_with_path(encode, state, mirrors))

    def update(updates, state, params=None, **extra_args):
        old = tree_lib.flatten(state.inner_state, is_leaf=formats.is_weight)
        structure = jax.tree.structure(state.inner_state, is_leaf=formats.is_weight)

        def step():
            decoded = [_decode(leaf) for _, leaf in old]
            new_updates, inner_state = inner.update(updates, structure.unflatten(decoded), params, **extra_args)
            return new_updates, structure.flatten_up_to(inner_state)

        def measured():
            return [measure(x) for (_, leaf), x in zip(old, step()[1], strict=True) if formats.is_weight(leaf)]

        if is_always_due:
            scales, norms = measured(), state.norms
        else:
            kept = [_Scale(leaf.scale, leaf.zero_point) for _, leaf in old if formats.is_weight(leaf)]
            scales, norms = _measured_if_due(measured, kept, _large(updates, min_size), state)
        new_updates, leaves = step()
        count, scales = state.count + 1, iter(scales)
        leaves = [
            _encode(_salt(path), x, next(scales), count) if formats.is_weight(leaf) else x
            for (path, leaf), x in zip(old, leaves, strict=True)
        ]
        return new_updates, LowBitState(count, norms, structure.unflatten(leaves))

    return optax.GradientTransformationExtraArgs(init, update)


def _measured_if_due(measured, kept: list[_Scale], grads: list[Array], state: LowBitState):
    """Scales, and the norms of the gradients when they were due.

    Accelerators fuse the measuring with the update, and do it in each step. XLA on CPU stores each moment in float32 to
    measure it, which takes longer than all the rest; so there it is done when due, in a branch that computes the step
    for itself.
    """
    # The barrier keeps the norm from sharing g^2 with the inner rule, which would be stored for that.
    squares = [jnp.sum(g * g) for g in jax.lax.optimization_barrier([precision.wide(g) for g in grads])]
    norms = jnp.sqrt(jnp.stack(squares)).astype(jnp.float32) if grads else state.norms
    is_due = (state.count % _INTERVAL == 0) | jnp.any(norms > _GROWTH * state.norms)
    scales = jax.lax.platform_dependent(cpu=lambda: jax.lax.cond(is_due, measured, lambda: kept), default=measured)
    return scales, jnp.where(is_due, norms, state.norms)


def _is_large(x, min_size: int) -> bool:
    return x.size >= min_size and jnp.issubdtype(x.dtype, jnp.floating)


def _large(tree: PyTree, min_size: int) -> list[Array]:
    return [x for x in jax.tree.leaves(tree) if _is_large(x, min_size)]


def _decode(leaf):
    if not formats.is_weight(leaf):
        return leaf
    if leaf.format == "int4":
        roots = leaf.dense()
        return roots * jnp.abs(roots)
    # e5m2 is the upper half of float16, for which processors have an instruction; this halves the time of an update.
    halves = jax.lax.bitcast_convert_type(leaf.codes, jnp.uint8).astype(jnp.uint16) << np.uint16(8)
    codes = jax.lax.bitcast_convert_type(halves, jnp.float16).astype(jnp.float32)
    return (codes * _expand(leaf.scale, leaf.shape)).astype(leaf.dtype)


def _encode(salt: UInt32[Array, ""], x: Float[Array, "..."], scale: _Scale, count: Int[Array, ""]) -> formats.Quantized:
    dither = _dither(x.shape, salt, count)
    wide = x.astype(jnp.float32)
    if scale.zero_point is None:
        return formats.Quantized.from_codes(_float_codes(wide, scale, dither), scale.scale, None, "fp8_e5m2", x.dtype)
    return formats.Quantized.from_codes(_root_codes(wide, scale, dither), *scale, "int4", x.dtype)


def _salt(path: str) -> np.uint32:
    return np.uint32(zlib.crc32(path.encode()))


def _dither(shape: Sequence[int], salt: UInt32[Array, ""], count: Int[Array, ""]) -> UInt32[Array, "..."]:
    """The thresholds d of the module, times 2^32."""
    bits = salt + count.astype(jnp.uint32) * _STEP
    for axis, factor in zip(range(len(shape)), itertools.cycle(_AXES)):
        bits = bits + jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * factor
    bits = (bits ^ (bits >> np.uint32(16))) * _MIX
    return bits ^ (bits >> np.uint32(15))


def _float_scale(x: Float[Array, "..."], *, block: int | None) -> _Scale:
    """The power of two of which the largest entry, of the leaf or of a block, is 2^8 to 2^9."""
    values, axis = (x, None) if block is None else _split(x, block)
    largest = jnp.max(jnp.abs(values), axis, keepdims=block is None)
    _, exponent = jnp.frexp(largest.astype(jnp.float32))
    return _Scale(_power_of_two(exponent - 1 - _TOP, lowest=-100), None)


def _float_codes(x: Float[Array, "..."], scale: _Scale, dither: UInt32[Array, "..."]) -> Num[Array, "..."]:
    """Codes of e5m2 from the bits of float32: a carry out of the mantissa goes on to the next octave, as it should.

    Converting (and rounding by arithmetic) is five times as dear where the dtype is emulated.
    """
    dropped = 23 - _MANTISSA
    bits = jax.lax.bitcast_convert_type(x * (1 / _expand(scale.scale, x.shape)), jnp.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    rounded = ((magnitude + (dither >> np.uint32(32 - dropped))) >> np.uint32(dropped)).astype(jnp.int32)
    code = jnp.clip(rounded - ((127 - _BIAS) << _MANTISSA), _SMALLEST, _LARGEST)
    code = jnp.where(magnitude == 0, 0, jnp.where(jnp.isfinite(x), code, _NAN))
    code = code.astype(jnp.uint8) | (bits >> np.uint32(24)).astype(jnp.uint8) & np.uint8(0x80)
    return jax.lax.bitcast_convert_type(code, jnp.float8_e5m2)


def _root_scale(x: Float[Array, "..."], *, block: int | None) -> _Scale:
    """A power of two with which the root of the block's largest entry is on the grid."""
    blocks, axis = _split(x.astype(jnp.float32), block)
    low, high = jnp.min(blocks, axis), jnp.max(blocks, axis)
    highest = jnp.where(low >= 0, _ONE_SIGN, _TWO_SIGNS)
    largest = jnp.maximum(high, -low) / highest**2
    _, exponent = jnp.frexp(largest)
    scale = _power_of_two((exponent + 1) // 2, lowest=-50)
    zero_point = jnp.where(low >= 0, -8, 0).astype(jnp.int8)
    return _Scale(jnp.where(jnp.isfinite(largest), scale, jnp.nan), zero_point)


def _split(x: Float[Array, "..."], block: int | None) -> tuple[Array, int]:
    """The array with an axis for what is inside the blocks, and which axis that is."""
    axis, size = _block(x.shape, block)
    counts = calibration.block_counts(x.shape, [size if a == axis else 1 for a in range(x.ndim)])
    return x.reshape(*counts[: axis + 1], size, *counts[axis + 1 :]), axis + 1


def _block(shape: Sequence[int], block: int | None) -> tuple[int, int]:
    """The axis along which entries share a scale, and how many do."""
    axis = len(shape) - (2 if len(shape) > 1 and shape[-2] >= _SHORT else 1)
    size = shape[axis]
    block = size if block is None else block
    divisor = max(d for d in range(1, min(block, size) + 1) if size % d == 0)
    return axis, divisor if 2 * divisor >= block else size


def _root_codes(x: Float[Array, "..."], scale: _Scale, dither: UInt32[Array, "..."]) -> Int[Array, "..."]:
    """Codes of signed square roots, dithered between the squares of neighbouring roots."""
    step = _expand(scale.scale, x.shape)
    zero_point = quant_matmul.expand(scale.zero_point.astype(jnp.int32), x.shape)
    has_one_sign = zero_point < 0
    threshold = (dither >> np.uint32(8)).astype(jnp.float32) * np.float32(2.0**-24)
    squares = jnp.abs(x) * (1 / step**2)
    root = jnp.floor(jnp.sqrt(squares))
    root = root + (squares - root**2 > threshold * (2 * root + 1))
    root = jnp.clip(root, has_one_sign & (x != 0), jnp.where(has_one_sign, _ONE_SIGN, _TWO_SIGNS)).astype(jnp.int32)
    return jnp.where(x < 0, -root, root) + zero_point


def _expand(scale: Float[Array, "..."], shape: Sequence[int]) -> Float[Array, "..."]:
    return quant_matmul.expand(scale.astype(jnp.float32), tuple(shape))


def _power_of_two(exponent: Int[Array, "..."], lowest: int) -> Float[Array, "..."]:
    # bfloat16 holds the same powers of two as float32.
    return jnp.ldexp(jnp.float32(1), jnp.maximum(exponent, lowest)).astype(jnp.bfloat16)
