"""What the losses over pairs in a batch are made of.

With `axis_name`, inside a `shard_map`, a device holds some rows of the batch and these functions pair them with the
rows of all: the transpose of the gather is a reduce-scatter, so that a gradient taken outside is that of the whole
batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from steelyard import precision

PyTree = Any

# Of a table of pairs of more entries than _WHOLE, at most an eighth of the rows and at most _MOST entries are held.
_WHOLE, _MOST = 2**18, 2**24


def gather_rows(x: Array, axis_name: str | None) -> Array:
    """The rows of all devices, in the order of the devices."""
    return x if axis_name is None else jax.lax.all_gather(x, axis_name, tiled=True)


def total(x: Array, axis_name: str | None) -> Array:
    """Sum over the devices."""
    return x if axis_name is None else jax.lax.psum(x, axis_name)


def by_rows(fn: Callable[[PyTree], PyTree], rows: PyTree, pairs_per_row: int) -> PyTree:
    """`fn(rows)`, for a function that treats every row alike, without ever holding the whole table of pairs.

    Some rows at a time are paired with all columns, and again in the backward pass, which costs a third more products
    than keeping the table. Small tables are held as a whole.

    Args:
      fn: from rows to something for each row; the columns are closed over. The last row may be given
        several times.
      rows: arrays with a leading axis of rows.
      pairs_per_row: entries of the table for each row.
    """
    n = len(jax.tree.leaves(rows)[0])
    if n * pairs_per_row <= _WHOLE:
        return fn(rows)
    at_once = max(1, min(-(-n // 8), _MOST // pairs_per_row))
    parts = -(-n // at_once)

    def cut(x):
        x = jnp.pad(x, ((0, parts * at_once - n),) + ((0, 0),) * (x.ndim - 1), mode="edge")
        return x.reshape(parts, at_once, *x.shape[1:])

    results = jax.lax.map(jax.checkpoint(fn), jax.tree.map(cut, rows))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:n], results)


def row_numbers(n: int, axis_name: str | None) -> Int[Array, "n"]:
    """Where the rows of this device stand among those of all."""
    return jnp.arange(n) + (0 if axis_name is None else jax.lax.axis_index(axis_name) * n)


def valid_rows(where: Bool[Array, "n"] | None, n: int) -> Bool[Array, "n"]:
    """The rows that count; all if `where` is None.

    Raises:
      ValueError: `where` is not one truth value for each row.
    """
    if where is None:
        return jnp.ones(n, bool)
    where = jnp.asarray(where)
    if where.shape != (n,):
        raise ValueError(f"where has shape {where.shape}: it must be ({n},), one truth value for each row")
    return where.astype(bool)


def masked_logsumexp(x: Float[Array, "..."], mask: Bool[Array, "..."], axis: int = -1) -> Float[Array, "..."]:
    """`log sum exp x` over the entries in the mask; 0 where there are none, with zero gradient."""
    found = jnp.any(mask, axis)
    # An empty row is that of one zero: its logarithm is finite.
    low = jnp.where(jnp.expand_dims(found, axis), -jnp.inf, 0)
    sums = jax.nn.logsumexp(jnp.where(mask, x, low), axis=axis)
    return jnp.where(found, sums, 0)


def masked_mean(
    x: Float[Array, "..."], mask: Bool[Array, "..."], axis: int = -1
) -> tuple[Float[Array, "..."], Bool[Array, "..."]]:
    """Mean over the entries in the mask, 0 where there are none; and where there are some."""
    count = jnp.sum(mask, axis)
    mean = jnp.sum(jnp.where(mask, x, 0), axis) / jnp.maximum(count, 1)
    return mean, count > 0


def products(a: Float[Array, "... n d"], b: Float[Array, "... m d"]) -> Float[Array, "... n m"]:
    """Inner products of rows, in full precision: a small temperature would multiply the error of less."""
    return jnp.einsum("...nd,...md->...nm", precision.wide(a), precision.wide(b), precision="highest")


def pairwise_distances(
    a: Float[Array, "n d"], b: Float[Array, "m d"], squared: bool = False, eps: float = 1e-12
) -> Float[Array, "n m"]:
    """Euclidean distances `sqrt(|a_i - b_j|^2 + eps)`, or `|a_i - b_j|^2`, from inner products.

    The rows are first centred, which leaves distances alone and loses fewer digits; what remains of the cancellation is
    about 1e-7 of the squared lengths. Their gradient is finite everywhere, zero where rows coincide.
    """
    a, b = precision.wide(a), precision.wide(b)
    centre = jax.lax.stop_gradient(jnp.mean(b, axis=0))
    a, b = a - centre, b - centre
    lengths = jnp.sum(a * a, -1)[:, None] + jnp.sum(b * b, -1)
    squares = jnp.maximum(lengths - 2 * products(a, b), 0)
    return squares if squared else jnp.sqrt(squares + eps)
