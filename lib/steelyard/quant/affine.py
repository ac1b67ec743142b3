"""Grids of few values, and the way there and back: encode, decode, fake-quantize.

Codes of b bits are *signed*, in [-2^(b-1), 2^(b-1) - 1], also with a zero point, and

    code = clip(round(x / scale + zero_point), low, high),   x ~ (code - zero_point) * scale,

rounding half to even. The float grids (`fp8_e4m3`, `fp8_e5m2`, `fp4_e2m1`) and the 16 NormalFloat levels (`nf4`) have
no zero point. `scale.shape[i]` divides `x.shape[i]`, and each scale serves the block of consecutive entries that
follows from it; a scalar scale serves everything. All arithmetic is in float32 at least.

Sources: Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference (2018, Jacob et
al.); FP8 Formats for Deep Learning (2022, Micikevicius et al.); the NormalFloat levels are those of QLoRA: Efficient
Finetuning of Quantized LLMs (2023, Dettmers et al.).
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, PRNGKeyArray

from steelyard import choices, precision
from steelyard_kernels import quant_matmul


class Format(NamedTuple):
    """A grid.

    Attributes:
      name: its name.
      bits: of one code.
      kind: "integer", "float" or "levels" (a table of values).
      low: the smallest point of the grid, at scale 1.
      high: the largest.
      dtype: of codes that are not packed.
    """

    name: str
    bits: int
    kind: Literal["integer", "float", "levels"]
    low: float
    high: float
    dtype: np.dtype


def _integer(bits: int) -> Format:
    return Format(f"int{bits}", bits, "integer", -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1, np.dtype("int8"))


def _float(name: str, bits: int, dtype) -> Format:
    high = float(jnp.finfo(dtype).max)
    return Format(name, bits, "float", -high, high, jnp.dtype(dtype))


FORMATS: dict[str, Format] = {
    grid.name: grid
    for grid in (
        *(_integer(bits) for bits in range(2, 9)),
        _float("fp8_e4m3", 8, jnp.float8_e4m3fn),
        _float("fp8_e5m2", 8, jnp.float8_e5m2),
        _float("fp4_e2m1", 4, jnp.float4_e2m1fn),
        Format("nf4", 4, "levels", -1.0, 1.0, np.dtype("uint8")),
    )
}

NF4_LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022833234, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def get_format(format: str) -> Format:
    """The grid of that name.

    Raises:
      ValueError: there is none; the text names the nearest one.
    """
    choices.require("format", format, FORMATS)
    return FORMATS[format]


@functools.partial(jax.jit, static_argnames=("format", "rounding"))
def encode(
    x: Float[Array, "..."],
    format: str,
    scale: Float[Array, "..."],
    zero_point: Num[Array, "..."] | None = None,
    *,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    rng: PRNGKeyArray | None = None,
) -> Num[Array, "..."]:
    """The codes of x.

    Stochastic rounding is floor(x / scale + zero_point + u), u uniform in [0, 1): unbiased inside the range.

    Args:
      x: values.
      format: name of the grid.
      scale: a scale for each block.
      zero_point: the code of zero for each block, shaped like `scale`; integer grids only. `None`: 0.
      rounding: `"nearest"` (half to even), or `"stochastic"` (integer grids only).
      rng: key for stochastic rounding.

    Returns:
      Codes of x's shape, one an element: int8, uint8 (`nf4`) or the grid's float dtype.

    Raises:
      ValueError: an unknown format or rounding, a zero point on a grid that has none, or a missing key.
    """
    grid = get_format(format)
    _check_rounding(grid, zero_point, rounding, rng)
    scaled = _scaled(jnp.asarray(x), scale, zero_point)
    if grid.kind == "levels":
        return jnp.searchsorted(_midpoints(scaled.dtype), scaled, method="compare_all").astype(grid.dtype)
    if grid.kind == "float":
        # e4m3 has no infinity: an overflow would become nan. A negative zero is stored as zero, so that an entry that
        # a mask removed and one that is not stored at all read alike.
        return jnp.where(scaled == 0, 0, jnp.clip(scaled, grid.low, grid.high)).astype(grid.dtype)
    if rounding == "stochastic":
        scaled = jnp.floor(scaled + jax.random.uniform(rng, scaled.shape, scaled.dtype))
    return jnp.clip(jnp.round(scaled), grid.low, grid.high).astype(grid.dtype)


@functools.partial(jax.jit, static_argnames=("format", "dtype"))
def decode(
    codes: Num[Array, "..."],
    format: str,
    scale: Float[Array, "..."],
    zero_point: Num[Array, "..."] | None = None,
    *,
    dtype=jnp.float32,
) -> Float[Array, "..."]:
    """The values of codes: `(codes - zero_point) * scale`.

    Args:
      codes: as `encode` makes them (not packed).
      format: name of the grid.
      scale: a scale for each block.
      zero_point: shaped like `scale`, or `None`.
      dtype: of the result; the arithmetic is in float32 at least.

    Raises:
      ValueError: an unknown format, or a zero point on a grid that has none.
    """
    grid = get_format(format)
    _check_zero_point(grid, zero_point)
    compute = jnp.promote_types(dtype, jnp.float32)
    if grid.kind == "levels":
        codes = jnp.take(jnp.asarray(NF4_LEVELS, compute), codes, mode="clip")
    zero_point = None if zero_point is None else jnp.asarray(zero_point)
    return quant_matmul.decode(codes, jnp.asarray(scale), zero_point, dtype=compute).astype(dtype)


@functools.partial(jax.jit, static_argnames=("format", "gradient"))
def fake_quantize(
    x: Float[Array, "..."],
    format: str,
    scale: Float[Array, "..."],
    zero_point: Num[Array, "..."] | None = None,
    *,
    gradient: Literal["clipped", "identity"] = "clipped",
) -> Float[Array, "..."]:
    """`decode(encode(x))` in x's dtype, with a straight-through gradient.

    Args:
      x: values.
      format: name of the grid.
      scale: a scale for each block; no gradient flows into it.
      zero_point: shaped like `scale`, or `None`; no gradient flows into it.
      gradient: `"clipped"` passes the gradient where x / scale + zero_point lies inside the grid's range and stops it
        outside; `"identity"` passes it everywhere.

    Raises:
      ValueError: an unknown format or gradient, or a zero point on a grid that has none.
    """
    choices.require("gradient", gradient, ("clipped", "identity"))
    return _straight_through(format, gradient, jnp.asarray(x), scale, zero_point)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1))
def _straight_through(format, gradient, x, scale, zero_point):
    return decode(encode(x, format, scale, zero_point), format, scale, zero_point, dtype=x.dtype)


@_straight_through.defjvp
def _straight_through_jvp(format, gradient, primals, tangents):
    x, scale, zero_point = primals
    tangent = tangents[0]
    if gradient == "clipped":
        grid = get_format(format)
        scaled = _scaled(x, scale, zero_point)
        tangent = jnp.where((scaled >= grid.low) & (scaled <= grid.high), tangent, jnp.zeros_like(tangent))
    return _straight_through(format, gradient, x, scale, zero_point), tangent


@jax.custom_jvp
def round_ste(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Rounds half to even; the gradient is that of the identity (straight-through estimator)."""
    return jnp.round(x)


@round_ste.defjvp
def _round_ste_jvp(primals, tangents):
    return round_ste(*primals), tangents[0]


def _scaled(x, scale, zero_point):
    """x in units of the grid's step: x / scale + zero_point."""
    x = precision.wide(x)
    scaled = quant_matmul.divide(x, quant_matmul.expand(jnp.asarray(scale, x.dtype), x.shape))
    if zero_point is None:
        return scaled
    return scaled + quant_matmul.expand(jnp.asarray(zero_point, x.dtype), x.shape)


def _midpoints(dtype):
    """Borders between the levels; a value on a border belongs to the lower level."""
    levels = np.asarray(NF4_LEVELS)
    return jnp.asarray((levels[1:] + levels[:-1]) / 2, dtype)


def _check_zero_point(grid: Format, zero_point) -> None:
    if zero_point is not None and grid.kind != "integer":
        raise ValueError(f"format={grid.name!r} has no zero point: only the integer formats can be asymmetric")


def _check_rounding(grid: Format, zero_point, rounding: str, rng) -> None:
    _check_zero_point(grid, zero_point)
    choices.require("rounding", rounding, ("nearest", "stochastic"))
    if rounding == "stochastic" and grid.kind != "integer":
        raise ValueError(f"rounding='stochastic' needs an integer format, not {grid.name!r}")
    if rounding == "stochastic" and rng is None:
        raise ValueError("rounding='stochastic' needs a key: pass rng=")
