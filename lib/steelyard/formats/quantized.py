"""Weights stored in few bits.

| format | codes are stored as |
| --- | --- |
| `int8`, `int7`, `int6`, `int5`, `int3` | int8, one a byte (`int3` leaves 5 of the 8 bits unused) |
| `int4`, `nf4` | uint8, two a byte |
| `int2` | uint8, four a byte |
| `fp8_e4m3`, `fp8_e5m2`, `fp4_e2m1` | the float dtype itself, one a byte in JAX's own count |

Codes are packed along the contraction axis (-2), consecutive rows in a byte, the first in the lowest bits. If that
axis does not divide, codes stay one a byte.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num, PRNGKeyArray

from steelyard.formats import base
from steelyard.quant import affine, calibration
from steelyard_kernels import quant_matmul

PACKED_FORMATS = ("int4", "int2", "nf4")

pack = quant_matmul.pack
unpack = quant_matmul.unpack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Quantized(base.Weight):
    """A weight as codes and scales: `dense() = (codes - zero_point) * scale`, with the outliers put in.

    Make one with `from_dense` or `from_codes`. What then holds, for `q`:

        q.codes.dtype == (uint8 if q.packed else affine.get_format(q.format).dtype)
        q.scale.ndim == len(q.shape) and every q.shape[i] % q.scale.shape[i] == 0
        q.zero_point is None or q.zero_point.shape == q.scale.shape
        (q.outliers is None) == (q.index is None)

    Attributes:
      codes: see the table of the module.
      scale: a scale for each block: per output channel `(1, N)`, groups of g rows `(K / g, N)`, per tensor `(1, 1)`.
        A stack `(L, K, N)` that will be scanned needs a leading L here too (`block=(1, -1, 1)`).
      zero_point: int8 code of zero, shaped like `scale`, or `None`.
      outliers: `(nnz,)` entries that are stored beside, or `None`; the codes there hold the zero point.
      index: `(nnz,)` int32 flat indices of the outliers in the dense array, or `None`. In a stack of weights both have
        the leading axes of the stack, and the indices count inside one weight.
      format: name of the grid.
      dtype: of `dense()`.
      packed: whether several codes share a byte.
    """

    codes: Num[Array, "..."]
    scale: Float[Array, "..."]
    zero_point: Int[Array, "..."] | None = None
    outliers: Float[Array, "... nnz"] | None = None
    index: Int[Array, "... nnz"] | None = None
    format: str = dataclasses.field(default="int8", metadata={"static": True})
    dtype: np.dtype = dataclasses.field(default="float32", metadata={"static": True})
    packed: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self):
        # A name is allowed; what callers compare and promote with is a dtype.
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))

    @classmethod
    def from_dense(
        cls,
        w: Float[Array, "..."],
        format: str,
        *,
        block: tuple[int, ...] | None = None,
        symmetric: bool = True,
        method: str = "range",
        bound: str = "edge",
        rounding: str = "nearest",
        rng: PRNGKeyArray | None = None,
        scale_dtype=jnp.float32,
        **options,
    ) -> "Quantized":
        """Calibrates, encodes and packs.

        Args:
          w: the weight; its dtype is that of `dense()`.
          format: name of the grid.
          block: elements that share a scale, for each axis; `None` is per output channel.
          symmetric: see `quant.calibrate`, as for `method`, `bound` and `options`.
          method: how the range is chosen.
          bound: what a symmetric integer scale divides by.
          rounding: see `quant.encode`.
          rng: key for stochastic rounding.
          scale_dtype: dtype in which the scale is stored; the codes are those of the stored scale.
          **options: of `quant.calibrate`.

        Raises:
          ValueError: as `quant.calibrate` and `quant.encode`.
        """
        w = jnp.asarray(w)
        settings = {"block": block, "symmetric": symmetric, "method": method, "bound": bound, **options}
        scale, zero_point = calibration.calibrate(w, format, **settings)
        return encode_and_pack(w, format, scale, zero_point, rng, w.dtype, rounding, scale_dtype)

    @classmethod
    def from_codes(
        cls,
        codes: Num[Array, "..."],
        scale: Float[Array, "..."],
        zero_point: Int[Array, "..."] | None,
        format: str,
        dtype=jnp.float32,
        *,
        outliers: Float[Array, "nnz"] | None = None,
        index: Int[Array, "nnz"] | None = None,
    ) -> "Quantized":
        """Packs codes that some other method chose.

        Args:
          codes: unpacked, of the dense shape, in the grid's dtype (any integer dtype for an integer grid).
          scale: a scale for each block.
          zero_point: shaped like `scale`, or `None`.
          format: name of the grid.
          dtype: of `dense()`.
          outliers: values stored beside.
          index: where, as flat indices.

        Raises:
          ValueError: an unknown format, or shapes that do not fit.
        """
        grid = affine.get_format(format)
        codes = jnp.asarray(codes).astype(grid.dtype)
        packed = format in PACKED_FORMATS and codes.ndim > 1 and codes.shape[-2] % (8 // grid.bits) == 0
        if packed:
            codes = pack(codes, grid.bits)
        zero_point = None if zero_point is None else jnp.asarray(zero_point).astype(jnp.int8)
        index = None if index is None else jnp.asarray(index).astype(jnp.int32)
        node = cls(codes, jnp.asarray(scale), zero_point, outliers, index, format, dtype, packed)
        validate(node)
        return node

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array, from that of the codes."""
        shape = tuple(self.codes.shape)
        return (*shape[:-2], shape[-2] * self._per_byte, shape[-1]) if self.packed else shape

    @property
    def _per_byte(self) -> int:
        return 8 // affine.get_format(self.format).bits if self.packed else 1

    def unpacked(self) -> Num[Array, "..."]:
        """Codes of the dense shape, one an element."""
        if not self.packed:
            return self.codes
        return unpack(self.codes, affine.get_format(self.format).bits, signed=self.format != "nf4")

    @jax.jit
    def dense(self) -> Float[Array, "..."]:
        """Decodes, then puts the outliers in."""
        compute = jnp.promote_types(self.dtype, jnp.float32)
        # Codes of a float grid are of a float dtype, but do not train any more than the integers do.
        codes = jax.lax.stop_gradient(self.unpacked())
        values = affine.decode(codes, self.format, self.scale, self.zero_point, dtype=compute)
        if self.outliers is not None:
            values = _put(values, self.index, self.outliers.astype(compute))
        return values.astype(self.dtype)

    def matmul(self, x: Float[Array, "*rows K"]) -> Float[Array, "*rows N"]:
        """`x @ dense()` accumulated in float32, with the dtype that x and `dtype` promote to.

        Two-dimensional integer weights without outliers are multiplied as they are stored; the others are expanded.
        Differentiable in x, in `scale` and in `outliers`.

        Raises:
          ValueError: the contracted axes differ.
        """
        if not self._has_kernel:
            return super().matmul(x)
        self.check_contraction(x)
        dtype = jnp.result_type(x, self.dtype)
        y = quant_matmul.quant_matmul(x.astype(dtype), self.codes, self.scale, self.zero_point, bits=self._kernel_bits)
        return y.astype(dtype)

    @jax.jit
    def take(self, indices: Int[Array, "..."]) -> Float[Array, "... N"]:
        """`jnp.take(dense(), indices, axis=0)`, decoding only the rows that are asked for."""
        if self.ndim != 2 or self.outliers is not None:
            return base.Weight.take(self, indices)
        rows = self.shape[0]
        flat = jnp.ravel(indices)
        row = jnp.clip(jnp.where(flat < 0, flat + rows, flat), 0, rows - 1)
        codes = self.codes[row // self._per_byte]
        if self.packed:
            grid = affine.get_format(self.format)
            # One byte a row is unpacked to all its codes, of which the row is one.
            codes = unpack(codes[:, None], grid.bits, signed=grid.kind == "integer")
            codes = jnp.take_along_axis(codes, (row % self._per_byte)[:, None, None], axis=1)[:, 0]
        group = row // (rows // self.scale.shape[0])
        zero_point = None if self.zero_point is None else self.zero_point[group]
        values = affine.decode(codes, self.format, self.scale[group], zero_point, dtype=self.dtype)
        # As jnp.take: an index outside the table gives nan.
        values = jnp.where(((flat >= -rows) & (flat < rows))[:, None], values, jnp.nan)
        return values.reshape(*jnp.shape(indices), -1)

    @property
    def _has_kernel(self) -> bool:
        return self.ndim == 2 and self.outliers is None and affine.get_format(self.format).kind == "integer"

    @property
    def _kernel_bits(self) -> int:
        return affine.get_format(self.format).bits if self.packed else 8

    def describe(self) -> str:
        """How `matmul` multiplies, and why so."""
        if self._has_kernel:
            return f"{self.format}, quant_matmul with {self._kernel_bits}-bit codes"
        if self.outliers is not None:
            reason = "outliers are stored beside"
        elif self.ndim != 2:
            reason = f"it has {self.ndim} axes"
        else:
            reason = "it is not an integer grid"
        return f"{self.format}, {super().describe()}, because {reason}"


@functools.partial(jax.jit, static_argnums=(1, 5, 6, 7))
def encode_and_pack(values, format, scale, zero_point, rng, dtype, rounding, scale_dtype) -> Quantized:
    """A node of `dtype` whose codes are those of the scale as it is stored."""
    scale = calibration.cast_scale(jnp.asarray(scale), scale_dtype)
    codes = affine.encode(values, format, scale, zero_point, rounding=rounding, rng=rng)
    return Quantized.from_codes(codes, scale, zero_point, format, dtype)


def _put(values, index, outliers):
    """Sets entries by their flat index; leading axes of `index` are those of a stack."""
    if index.ndim > 1:
        return jax.vmap(_put)(values, index, outliers)
    return values.reshape(math.prod(values.shape)).at[index].set(outliers).reshape(values.shape)


def validate(q: Quantized) -> None:
    """Checks the invariants of `Quantized`.

    Raises:
      ValueError: one does not hold.
    """
    expected = np.dtype("uint8") if q.packed else affine.get_format(q.format).dtype
    if q.codes.dtype != expected:
        raise ValueError(f"codes of format {q.format!r}, packed={q.packed}, must be {expected}, not {q.codes.dtype}")
    shape, counts = q.shape, q.scale.shape
    divides = len(shape) == len(counts) and all(
        size == count or (count and size % count == 0) for size, count in zip(shape, counts, strict=True)
    )
    if not divides:
        raise ValueError(f"scale of shape {counts} does not divide a weight of shape {shape}")
    if q.zero_point is not None and q.zero_point.shape != counts:
        raise ValueError(f"zero_point of shape {q.zero_point.shape} must have the shape of scale, {counts}")
    if (q.outliers is None) != (q.index is None) or (q.index is not None and q.index.shape != q.outliers.shape):
        shapes = [None if a is None else a.shape for a in (q.outliers, q.index)]
        raise ValueError(
            f"outliers and index belong together and have one shape; they have {shapes[0]} and {shapes[1]}"
        )
