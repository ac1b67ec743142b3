"""The affine grid: `x ~ (code - zero_point) * scale`, with one scale a block.

A *block* is the set of neighbouring entries that share a scale. It is never stored: with `scale.ndim == x.ndim`, axis
i has blocks of `x.shape[i] // scale.shape[i]` consecutive entries.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Num


def expand(scale: Num[Array, "..."], shape: tuple[int, ...]) -> Num[Array, "..."]:
    """Repeats each scale over its block, up to `shape`.

    Args:
      scale: as many axes as `shape`, each dividing its axis there; or a scalar, for all of it.
      shape: the shape to fill.

    Raises:
      ValueError: the shapes do not fit.

    >>> expand(jnp.array([[1, 2]]), (2, 4)).tolist()
    [[1, 1, 2, 2], [1, 1, 2, 2]]
    """
    if scale.ndim == 0:
        return jnp.broadcast_to(scale, shape)
    fits = scale.ndim == len(shape) and all(
        size == count or (count and size % count == 0) for count, size in zip(scale.shape, shape, strict=True)
    )
    if not fits:
        raise ValueError(f"scale of shape {scale.shape} does not divide an array of shape {tuple(shape)}")
    for axis, (count, size) in enumerate(zip(scale.shape, shape, strict=True)):
        if count not in (1, size):
            scale = jnp.repeat(scale, size // count, axis=axis)
    return jnp.broadcast_to(scale, shape)


def divide(x: Float[Array, "..."], by: Num[Array, "..."] | float) -> Float[Array, "..."]:
    """`x / by`, rounded once, in whatever program it is compiled.

    XLA turns a division by a broadcast value into a product with its reciprocal, which rounds twice, and does so only
    where it sees the broadcast: the same entry could then fall on one grid point under jit and on its neighbour
    without. A divisor that depends on each entry of x cannot be rewritten.
    """
    return x / jnp.where(jnp.isnan(x), jnp.nan, jnp.asarray(by, x.dtype))


def decode(
    codes: Num[Array, "..."],
    scale: Num[Array, "..."],
    zero_point: Num[Array, "..."] | None = None,
    *,
    dtype=jnp.float32,
) -> Float[Array, "..."]:
    """`(codes - zero_point) * scale`, computed in `dtype` (float32 at least is meant).

    Args:
      codes: unpacked codes, integers or small floats.
      scale: see `expand`.
      zero_point: codes of zero, shaped like `scale`; `None` for a symmetric grid.
      dtype: of the arithmetic and the result.
    """
    values = codes.astype(dtype)
    if zero_point is not None:
        values = values - expand(zero_point.astype(dtype), codes.shape)
    return values * expand(scale.astype(dtype), codes.shape)
