"""Weights of which n in every m consecutive entries are stored (N:M sparsity).

Groups are m consecutive entries along the contraction axis (-2); the last may be shorter and is then padded, virtually,
with entries that are never kept. Row `g n + s` of `values` is the s-th stored entry of group g, in ascending position.
The positions, 0 to m - 1, take 0, 1, 2, 4 or 8 bits each (the fewest that suffice) and are packed along the same
axis, the first in the lowest bits.

Sources: Accelerating Sparse Deep Neural Networks (2021, Mishra et al.); Learning N:M Fine-grained Structured Sparse
Neural Networks From Scratch (2021, Zhou et al.).
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from steelyard.formats import base, quantized
from steelyard.quant import calibration
from steelyard.sparsity import masks, patterns
from steelyard_kernels import quant_matmul


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NMSparse(base.Weight):
    """A weight `(..., k, N)` with n stored entries in every m along axis -2.

    Make one with `from_dense`. With G = ceil(k / m), what then holds for `s`:

        s.values.shape == (..., G * n, N) and s.index() of the same shape holds distinct, ascending positions in a group
        s.nbytes == s.values.nbytes + s.indices.size

    A group with fewer than n kept entries stores zeros at the lowest positions that are not kept.

    Attributes:
      values: the stored entries: an array, or a `Quantized` node (see `quantize`).
      indices: uint8, packed positions, `(..., ceil(G n bits / 8), N)`.
      n: stored entries in a group.
      m: entries in a group.
      k: length of the contraction axis.
    """

    values: Float[Array, "... rows N"] | quantized.Quantized
    indices: UInt8[Array, "... bytes N"]
    n: int = dataclasses.field(metadata={"static": True})
    m: int = dataclasses.field(metadata={"static": True})
    k: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_dense(
        cls, w: Float[Array, "... K N"], *, n: int, m: int, mask: Bool[Array, "... K N"] | None = None
    ) -> "NMSparse":
        """Stores the entries that a mask keeps.

        Args:
          w: the weight.
          n: stored entries in a group.
          m: entries in a group, at most 256.
          mask: True where an entry is kept, at most n in a group; it must be concrete (not traced). `None` keeps the n
            largest |w| of each group.

        Raises:
          ValueError: n or m out of range, a weight with one axis, or a mask that is traced, of another shape or keeps
            more than n in a group.
        """
        _check_pattern(n, m)
        w = jnp.asarray(w)
        if w.ndim < 2:
            raise ValueError(f"w of shape {w.shape} has no contraction axis: N:M storage needs two axes or more")
        keep = None if mask is None else _checked_mask(mask, w.shape, n, m)
        return cls(*_store(w, keep, n, m), n, m, w.shape[-2])

    def quantize(
        self,
        format: str,
        *,
        scale: Float[Array, "..."] | None = None,
        zero_point: Int[Array, "..."] | None = None,
        block: tuple[int, ...] | None = None,
        rounding: str = "nearest",
        rng: PRNGKeyArray | None = None,
        scale_dtype=jnp.float32,
        **options,
    ) -> "NMSparse":
        """The same weight with its stored entries in few bits.

        Range and block are those of the *dense* weight, so that `dense()` of the result is what fake quantization of
        the masked weight with the same scale gives, to the last bit (nearest rounding). The scale of `range` is the
        same in whatever program it is computed; one that contains a sum (`rms`) may differ in its last bit.

        Args:
          format: name of the grid.
          scale: a scale for each block of the dense weight; `None` calibrates one.
          zero_point: shaped like `scale`, or `None`.
          block: elements of the dense weight that share a scale; along axis -2 everything or a multiple of m that
            divides k.
          rounding: see `quant.encode`.
          rng: key for stochastic rounding.
          scale_dtype: dtype in which the scale is stored.
          **options: of `quant.calibrate` (`symmetric`, `method`, `bound`, ...).

        Raises:
          ValueError: blocks that cut a group of m, settings for a calibration beside a given scale, or as
            `quant.calibrate` and `quant.encode`.
        """
        settings = options if block is None else {"block": block, **options}
        if scale is None:
            scale, zero_point = calibration.calibrate(self.dense(), format, **settings)
        elif settings:
            raise ValueError(f"a given scale leaves nothing to calibrate, but {', '.join(settings)} came with it")
        _check_blocks(self, np.shape(scale))
        values = base.dense(self.values)
        node = quantized.encode_and_pack(values, format, scale, zero_point, rng, self.dtype, rounding, scale_dtype)
        return dataclasses.replace(self, values=node)

    @property
    def dtype(self) -> np.dtype:
        """Of the stored values and of `dense()`."""
        return self.values.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        rows = self.values.shape
        return (*rows[:-2], self.k, rows[-1])

    @jax.jit
    def index(self) -> Int[Array, "... rows N"]:
        """Position of each stored entry in its group, int32."""
        shape = self.values.shape
        if _position_bits(self.m) == 0:
            return jnp.zeros(shape, jnp.int32)
        positions = quant_matmul.unpack(self.indices, _position_bits(self.m), signed=False)
        return positions[..., : shape[-2], :].astype(jnp.int32)

    @jax.jit
    def dense(self) -> Float[Array, "... K N"]:
        """The dense array, with zeros where nothing is stored."""
        return self._spread(base.dense(self.values))

    @jax.jit
    def mask(self) -> Bool[Array, "... K N"]:
        """True where an entry is stored (a stored zero too)."""
        return self._spread(jnp.ones(self.values.shape, bool))

    def _spread(self, values: Array) -> Array:
        """Puts stored entries at their positions."""
        *lead, _, columns = values.shape
        groups = -(-self.k // self.m)
        slots = (*lead, groups, self.n, columns)
        values, positions = values.reshape(slots), self.index().reshape(slots)
        places = jnp.arange(self.m)[:, None]
        spread = jnp.zeros((*lead, groups, self.m, columns), values.dtype)
        # Selects rather than a scatter or a sum: no gather unit is needed, and a stored value is kept bit for bit.
        for slot in range(self.n):
            here = slice(slot, slot + 1)
            spread = jnp.where(positions[..., here, :] == places, values[..., here, :], spread)
        return spread.reshape(*lead, groups * self.m, columns)[..., : self.k, :]

    def describe(self) -> str:
        """How `matmul` multiplies."""
        stored = f"{self.values.format} values" if isinstance(self.values, quantized.Quantized) else "values"
        return f"{self.n}:{self.m} {stored} {super().describe()}"


def _check_blocks(s: NMSparse, scale_shape: tuple[int, ...]) -> None:
    count = (1, *scale_shape)[-2]
    if count != 1 and s.k % (count * s.m):
        raise ValueError(
            f"scale of shape {scale_shape} cuts {s.k} rows into {count} blocks, which are not whole groups of "
            f"m={s.m}: an {s.n}:{s.m} weight needs blocks of a multiple of m that divides k"
        )


def _position_bits(m: int) -> int:
    return next(bits for bits in (0, 1, 2, 4, 8) if 2**bits >= m)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _store(w, keep, n, m):
    """Values and packed positions of the entries to store."""
    keep = masks.nm_mask(jnp.abs(w), n, m) if keep is None else keep
    positions = _stored_positions(_to_groups(keep, m), n)
    values = jnp.take_along_axis(_to_groups(jnp.where(keep, w, 0), m), positions, axis=-2)
    rows = (*w.shape[:-2], positions.shape[-3] * n, w.shape[-1])
    return values.reshape(rows), _pack_positions(positions.reshape(rows), m)


def _to_groups(x: Array, m: int) -> Array:
    """`(..., K, N)` to `(..., G, m, N)`, padded at the end of K with zeros."""
    *lead, k, columns = x.shape
    groups = -(-k // m)
    padded = jnp.pad(x, [(0, 0)] * len(lead) + [(0, groups * m - k), (0, 0)])
    return padded.reshape(*lead, groups, m, columns)


def _stored_positions(keep: Bool[Array, "... G m N"], n: int) -> Int[Array, "... G n N"]:
    """Positions of the n entries to store: those kept, and the lowest others until there are n, in ascending order."""
    missing = n - jnp.sum(keep, axis=-2, keepdims=True)
    filler = ~keep & (jnp.cumsum(~keep, axis=-2) <= missing)
    return jnp.argsort(~(keep | filler), axis=-2, stable=True)[..., :n, :]


def _pack_positions(positions: Int[Array, "... rows N"], m: int) -> UInt8[Array, "... bytes N"]:
    *lead, rows, columns = positions.shape
    bits = _position_bits(m)
    if bits == 0:
        return jnp.zeros((*lead, 0, columns), jnp.uint8)
    padding = [(0, 0)] * len(lead) + [(0, -rows % (8 // bits)), (0, 0)]
    return quant_matmul.pack(jnp.pad(positions, padding), bits)


def _check_pattern(n: int, m: int) -> None:
    patterns.check_nm(n, m)
    if m > 256:
        raise ValueError(f"m={m} must be at most 256: a position is stored in a byte")


def _checked_mask(mask, shape, n, m):
    if isinstance(mask, jax.core.Tracer):
        raise ValueError("mask= is traced, so that its count in each group cannot be checked: under jit pass mask=None")
    # NumPy, because in a traced function jax.numpy would trace the count of a concrete mask too.
    mask = np.asarray(mask, bool)
    if mask.shape != shape:
        raise ValueError(f"mask of shape {mask.shape} does not fit a weight of shape {shape}")
    counts = np.add.reduceat(mask, np.arange(0, shape[-2], m), axis=-2, dtype=np.int64) if mask.size else np.zeros(1)
    if counts.max() > n:
        raise ValueError(f"mask keeps {counts.max()} entries of a group of {m}, but {n}:{m} storage has room for {n}")
    return mask
