"""What bad workers send, for tests and experiments: each function replaces the last rows of a stacked tree.

The other rows are the *honest* ones. The attackers of `alie` and `inner_product` know them, and collude.
"""

import math
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from steelyard import choices, precision
from steelyard.aggregate import stacked as stacked_lib

PyTree = Any


def sign_flip(stacked: PyTree, num_byzantine: int, *, scale: float = 1.0) -> PyTree:
    """Bad workers send their own gradient times `-scale`.

    Args:
      stacked: leaves `[K, ...]`; `None` leaves stay `None`.
      num_byzantine: how many bad workers, less than K; 0 changes nothing.
      scale: how much longer than their own; large ones make huge rows.

    Returns:
      A tree like `stacked`.

    Raises:
      ValueError: `num_byzantine` is not a whole number in [0, K).
    """
    return _replace(stacked, num_byzantine, lambda honest, bad: -scale * bad)


def alie(stacked: PyTree, num_byzantine: int, *, z: float | None = None) -> PyTree:
    """A little is enough: bad workers send `mean - z std` of the honest rows, coordinate by coordinate.

    If `z` is `None`, it is the largest by which the bad rows still have a majority with the `s` honest ones beyond
    them: `Phi(z) = (K - f - s) / (K - f)`, `s = floor(K / 2 + 1) - f`, Phi being the normal distribution function and
    f `num_byzantine`. It is 0 or less where f is so small that half of the honest rows would be needed.

    Args:
      stacked: leaves `[K, ...]`; `None` leaves stay `None`.
      num_byzantine: how many bad workers, less than K / 2 if `z` is `None`, else less than K; 0 changes nothing.
      z: in standard deviations (of the honest rows, divided by their number).

    Returns:
      A tree like `stacked`.

    Raises:
      ValueError: `num_byzantine` is out of range or not whole.

    Source: A Little Is Enough: Circumventing Defenses For Distributed Learning (2019, Baruch et al.), algorithm 3.
    """
    count = stacked_lib.count_rows(stacked)
    z = _quantile(count, num_byzantine) if z is None else z
    return _replace(stacked, num_byzantine, lambda honest, bad: jnp.mean(honest, axis=0) - z * jnp.std(honest, axis=0))


def inner_product(stacked: PyTree, num_byzantine: int, *, epsilon: float = 0.5) -> PyTree:
    """Inner-product manipulation: bad workers send `-epsilon` times the mean of the honest rows.

    Args:
      stacked: leaves `[K, ...]`; `None` leaves stay `None`.
      num_byzantine: how many bad workers, less than K; 0 changes nothing.
      epsilon: small ones hide near zero, those above `K / f - 1` turn the mean around.

    Returns:
      A tree like `stacked`.

    Raises:
      ValueError: `num_byzantine` is not a whole number in [0, K).

    Source: Fall of Empires: Breaking Byzantine-tolerant SGD by Inner Product Manipulation (2019, Xie et al.).
    """
    return _replace(stacked, num_byzantine, lambda honest, bad: -epsilon * jnp.mean(honest, axis=0))


def non_finite(stacked: PyTree, num_byzantine: int, *, value: float = math.nan) -> PyTree:
    """Bad workers have overflowed: all their entries are `value`.

    Args:
      stacked: leaves `[K, ...]`; `None` leaves stay `None`.
      num_byzantine: how many bad workers, less than K; 0 changes nothing.
      value: NaN, inf or -inf.

    Returns:
      A tree like `stacked`.

    Raises:
      ValueError: `value` is finite, or `num_byzantine` is not a whole number in [0, K).
    """
    if math.isfinite(value):
        raise ValueError(f"value={value} must be nan, inf or -inf")
    return _replace(stacked, num_byzantine, lambda honest, bad: jnp.full_like(bad, value))


def _replace(stacked: PyTree, num_byzantine: int, send: Callable[[Array, Array], Array]) -> PyTree:
    """Puts `send(honest rows, bad workers' own rows)`, computed in float32 at least, in place of the bad rows."""
    count = stacked_lib.count_rows(stacked)
    num_byzantine = choices.require_count("num_byzantine", num_byzantine, f"[0, {count})")

    def leaf(x):
        honest, bad = x[: count - num_byzantine], x[count - num_byzantine :]
        sent = send(precision.wide(honest), precision.wide(bad))
        return jnp.concatenate([honest, jnp.broadcast_to(sent, bad.shape).astype(x.dtype)])

    return jax.tree.map(leaf, stacked)


def _quantile(count: int, num_byzantine: int) -> float:
    num_byzantine = choices.require_count("num_byzantine", num_byzantine, f"[0, {count / 2})")
    if num_byzantine == 0:
        return 0.0
    honest = count - num_byzantine
    supporters = count // 2 + 1 - num_byzantine
    return statistics.NormalDist().inv_cdf((honest - supporters) / honest)
