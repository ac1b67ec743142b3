"""Scales and zero points from data.

With half-range a of a block (see `calibrate` for the methods) a symmetric scale is a / q: q = high + 1/2 for
`bound="edge"`, which uses the grid to the outer edge of its last cell, and q = high for `bound="max"`, which puts the
largest value on a grid point. An asymmetric range [mn, mx], widened to contain 0, has

    scale = (mx - mn) / (2^b - 1),   zero_point = clip(round(low - mn / scale), low, high),

so that 0 is represented exactly. Scales are float32, the dtype in which they are stored, whatever the dtype of x.

Source: A White Paper on Neural Network Quantization (2021, Nagel et al.), section 2.
"""

import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from steelyard import choices, precision
from steelyard.quant import affine
from steelyard_kernels import quant_matmul

# A smaller scale is that of an empty range: its square would underflow in float32.
SMALLEST_SCALE = float(np.sqrt(np.finfo(np.float32).tiny))


class QParams(NamedTuple):
    """A grid's place on the real line.

    Attributes:
      scale: float32; the distance of neighbouring grid points, one for each block.
      zero_point: int8, shaped like `scale`: the code of zero. `None` for a symmetric grid.
    """

    scale: Float[Array, "..."]
    zero_point: Int8[Array, "..."] | None


def block_counts(shape: Sequence[int], block: Sequence[int] | None) -> tuple[int, ...]:
    """How many blocks each axis has: the shape of a scale.

    Args:
      shape: of the array.
      block: for each axis how many consecutive elements share a scale, -1 for the whole axis; `None` is the whole of
        every axis but one element of the last (per output channel), and everything for fewer than two axes.

    Raises:
      ValueError: another number of entries than axes, or an entry that does not divide its axis.

    >>> block_counts((64, 6), None), block_counts((64, 6), (16, 1)), block_counts((64, 6), (-1, -1))
    ((1, 6), (4, 6), (1, 1))
    """
    if block is None:
        return (1,) * (len(shape) - 1) + tuple(shape[-1:]) if len(shape) > 1 else (1,) * len(shape)
    if len(block) != len(shape):
        raise ValueError(f"block={tuple(block)} has {len(block)} entries, but the shape {tuple(shape)} {len(shape)}")
    return tuple(_count(axis, size, entry) for axis, (size, entry) in enumerate(zip(shape, block, strict=True)))


def _count(axis: int, size: int, entry: int) -> int:
    if entry == -1:
        return 1
    if entry < 1 or size % entry:
        divisors = [d for d in range(1, size + 1) if size % d == 0]
        near = sorted(sorted(divisors, key=lambda d: abs(d - entry))[:2])
        raise ValueError(
            f"block entry {entry} does not divide axis {axis} of size {size}; the nearest divisors are "
            f"{' and '.join(map(str, near))}, and -1 takes the whole axis"
        )
    return size // entry


def calibrate(
    x: Float[Array, "..."],
    format: str,
    *,
    block: Sequence[int] | None = None,
    symmetric: bool = True,
    method: Literal["range", "rms", "percentile", "mse"] = "range",
    bound: Literal["edge", "max"] = "edge",
    power_of_two: bool = False,
    **options,
) -> QParams:
    """Chooses a scale, and a zero point if asymmetric, for each block of x.

    Methods, each giving the half-range a of a block:
      `range`: max |x|; asymmetric: [min x, max x].
      `rms`: factor * sqrt(mean x^2); needs `factor=`.
      `percentile`: the `q`-th (99.9) percentile of |x|, linearly interpolated; asymmetric: the (100 - q)-th and the
        q-th percentile of x.
      `mse`: the candidate a = max |x| (1 - i shrink), i = 0 .. steps - 1, with the smallest mean
        |decode(encode(x)) - x|^p; the largest on ties. Options p=2.4, steps=80, shrink=0.01.

    Args:
      x: the values to represent.
      format: name of the grid.
      block: see `block_counts`.
      symmetric: whether the grid is centred on 0. Only the integer formats can be asymmetric, with the methods `range`
        and `percentile`.
      method: see above.
      bound: what a symmetric integer scale divides by (see the module); float and level grids divide by their largest
        value.
      power_of_two: rounds the scale up to a power of two, after everything else.
      **options: of the method.

    Returns:
      `QParams`. A scale below about 1e-19 (an empty range) becomes 1.

    Raises:
      ValueError: an unknown name or option, or a combination that does not exist.
    """
    grid = affine.get_format(format)
    _check(grid, symmetric, method, bound, options)
    x = jnp.asarray(x)
    counts = block_counts(x.shape, block)
    return _calibrate(x, grid, counts, symmetric, method, bound, power_of_two, tuple(options.items()))


@functools.partial(jax.jit, static_argnums=range(1, 8))
def _calibrate(x, grid, counts, symmetric, method, bound, power_of_two, options):
    options = dict(options)
    x = precision.wide(x)
    blocks, axes = _split(x, counts)
    if symmetric:
        scale, zero_point = _symmetric_scale(blocks, axes, grid, method, bound, options), None
        scale = _power_of_two(scale) if power_of_two else scale
    else:
        scale, zero_point = _asymmetric(blocks, axes, grid, method, power_of_two, options)
        zero_point = zero_point.reshape(counts)
    return QParams(scale.reshape(counts).astype(jnp.float32), zero_point)


def _split(x: Array, counts: tuple[int, ...]) -> tuple[Array, tuple[int, ...]]:
    """x with two axes, which block and where inside it, for each one; and the axes inside the blocks."""
    pairs = zip(counts or (1,), x.shape or (1,), strict=True)
    shape = tuple(n for count, size in pairs for n in (count, size // max(count, 1)))
    return x.reshape(shape), tuple(range(1, len(shape), 2))


def _symmetric_scale(blocks, axes, grid, method, bound, options):
    divisor = grid.high + 0.5 if grid.kind == "integer" and bound == "edge" else grid.high
    if method == "mse":
        return _mse_scale(blocks, axes, grid, divisor, **options)
    return _to_scale(_HALF_RANGES[method](blocks, axes, **options), divisor)


def _to_scale(width, divisor):
    scale = quant_matmul.divide(width, divisor)
    return jnp.where(scale < SMALLEST_SCALE, 1.0, scale)


def _max_abs(x, axes):
    return jnp.max(jnp.abs(x), axis=axes, keepdims=True, initial=0.0)


def _rms(x, axes, *, factor):
    return factor * jnp.sqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True))


def _percentile(x, axes, *, q=99.9):
    return jnp.percentile(jnp.abs(x), q, axis=axes, keepdims=True)


_HALF_RANGES = {"range": _max_abs, "rms": _rms, "percentile": _percentile}


def _mse_scale(x, axes, grid, divisor, *, p=2.4, steps=80, shrink=0.01):
    largest = _max_abs(x, axes)

    def error(scale):
        difference = affine.decode(affine.encode(x, grid.name, scale), grid.name, scale, dtype=x.dtype) - x
        return jnp.mean(jnp.abs(difference) ** p, axis=axes, keepdims=True)

    def try_smaller(best, factor):
        scale = _to_scale(largest * factor, divisor)
        candidate = error(scale)
        better = candidate < best[0]
        return (jnp.where(better, candidate, best[0]), jnp.where(better, scale, best[1])), None

    first = _to_scale(largest, divisor)
    factors = jnp.asarray(1 - shrink * np.arange(1, steps), x.dtype)
    (_, scale), _ = jax.lax.scan(try_smaller, (error(first), first), factors)
    return scale


def _asymmetric(x, axes, grid, method, power_of_two, options):
    if method == "range":
        low, high = jnp.min(x, axis=axes, keepdims=True), jnp.max(x, axis=axes, keepdims=True)
    else:
        low, high = _two_percentiles(x, axes, **options)
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    scale = _to_scale(high - low, grid.high - grid.low)
    scale = _power_of_two(scale) if power_of_two else scale
    scale = scale.astype(jnp.float32).astype(x.dtype)
    zero_point = jnp.clip(jnp.round(grid.low - quant_matmul.divide(low, scale)), grid.low, grid.high)
    return scale, zero_point.astype(jnp.int8)


def _two_percentiles(x, axes, *, q=99.9):
    return tuple(jnp.percentile(x, level, axis=axes, keepdims=True) for level in (100 - q, q))


def _power_of_two(scale):
    # frexp rather than log2: the logarithm of an exact power of two may come out a little above the integer.
    mantissa, exponent = jnp.frexp(scale)
    return jnp.ldexp(jnp.ones_like(scale), jnp.where(mantissa == 0.5, exponent - 1, exponent))


def cast_scale(scale: Float[Array, "..."], dtype) -> Float[Array, "..."]:
    """The scale in a storage dtype; one that vanishes there becomes 1, as for an empty range."""
    scale = scale.astype(dtype)
    return jnp.where(scale == 0, jnp.ones_like(scale), scale)


_OPTIONS = {"range": (), "rms": ("factor",), "percentile": ("q",), "mse": ("p", "steps", "shrink")}
_BOUNDS = ("edge", "max")
_TWO_SIDED = ("range", "percentile")


def _check(grid, symmetric, method, bound, options) -> None:
    choices.require("method", method, _OPTIONS)
    choices.require("bound", bound, _BOUNDS)
    for option in options:
        if not _OPTIONS[method]:
            raise ValueError(f"method={method!r} has no options, but {option}= was given")
        choices.require(f"option of method={method!r}", option, _OPTIONS[method])
    if method == "rms" and "factor" not in options:
        raise ValueError("method='rms' needs factor=: the half-range in units of the root mean square")
    if method == "mse" and options.get("steps", 1) < 1:
        raise ValueError(f"steps={options['steps']} must be at least 1")
    if "q" in options and not 50 < options["q"] <= 100:
        raise ValueError(f"q={options['q']} is not a percentile in (50, 100]")
    if symmetric:
        return
    if grid.kind != "integer":
        raise ValueError(f"symmetric=False needs an integer format; {grid.name!r} has no zero point")
    if method not in _TWO_SIDED:
        raise ValueError(f"symmetric=False exists for the methods {' and '.join(_TWO_SIDED)}, not for {method!r}")
