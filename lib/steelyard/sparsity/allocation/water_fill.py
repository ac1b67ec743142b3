"""Shares in proportion to weights, each between two bounds: what nearly every allocation comes down to."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Num

from steelyard import choices

_SLACK = 1e-9  # relative: what a sum of float64 numbers may be off


def water_fill(
    weights: Num[np.ndarray, " L"],
    upper: Num[np.ndarray, " L"],
    total: float,
    lower: Num[np.ndarray, " L"] | None = None,
) -> Float[np.ndarray, " L"]:
    """Shares a total in proportion to weights; what has enough keeps its bound, and the others share the rest.

        y_l = clip(lower_l + c weights_l, lower_l, upper_l),  c >= 0 such that sum(y) = total.

    "Share in proportion, cut what is too much, share the rest again" comes to rest at this point. Every entry whose
    breakpoint (upper_l - lower_l) / weights_l is not beyond c is full; the rest of the total gives c.

    Args:
      weights: at least 0; an entry of weight 0 stays at its lower bound.
      upper: at least `lower`.
      total: to be shared.
      lower: 0 by default.

    Returns:
      The shares: float64 in NumPy; an array of JAX, in float32 at least, where an argument is traced.

    Raises:
      ValueError: weights below 0, crossing bounds, shapes that differ, or a total that the bounds do not admit, where
        entries of weight 0 have no room. Of traced arguments only the shapes are looked at: a total out of reach is
        then filled as far as it goes.

    Cost: L^2 numbers, no iteration.

    >>> water_fill(np.array([1, 1, 2]), np.array([1, 9, 9]), 7).tolist()
    [1.0, 2.0, 4.0]
    """
    lower = np.zeros(np.shape(upper)) if lower is None else lower
    _check_shapes(weights=weights, upper=upper, lower=lower)
    if is_traced(weights, upper, total, lower):
        dtype = jnp.promote_types(jnp.result_type(weights, upper), jnp.float32)
        return _fill(jnp, *(jnp.asarray(x, dtype) for x in (weights, upper, total, lower)))
    weights, upper, total, lower = (np.asarray(x, np.float64) for x in (weights, upper, total, lower))
    _check_values(weights, upper, total, lower)
    return _fill(np, weights, upper, total, lower)


def is_traced(*values: Any) -> bool:
    """Whether one of the values is known only when the program runs."""
    return any(isinstance(x, jax.core.Tracer) for x in values)


def _fill(xp, weights, upper, total, lower):
    """The same lines for NumPy and JAX. Weights and rooms are divided by their largest, so that nothing overflows."""
    weights = weights / _positive(xp, xp.max(weights, initial=0))
    has_share = weights > np.finfo(weights.dtype).tiny
    room = xp.where(has_share, upper - lower, 0)
    scale = _positive(xp, xp.max(room, initial=0))
    room = room / scale
    target = xp.clip((total - xp.sum(lower)) / scale, 0, xp.sum(room))
    breakpoints = room / xp.where(has_share, weights, 1)
    filled = xp.sum(xp.minimum(breakpoints[:, None] * weights, room), axis=-1)
    is_full = filled <= target
    rest = target - xp.sum(xp.where(is_full, room, 0))
    c = rest / _positive(xp, xp.sum(xp.where(is_full, 0, weights)))
    shares = xp.clip(lower + scale * c * weights, lower, upper)
    return xp.where(is_full, xp.where(has_share, upper, lower), shares)


def _positive(xp, x):
    """For a division whose result is not used where the divisor is 0."""
    return xp.where(x > 0, x, 1)


def _check_shapes(**arrays):
    shapes = {name: np.shape(x) for name, x in arrays.items()}
    if len(set(shapes.values())) > 1 or len(shapes["upper"]) != 1:
        raise ValueError(f"one vector length is needed, got {', '.join(f'{k} {v}' for k, v in shapes.items())}")


def _check_values(weights, upper, total, lower):
    choices.require_within("weights", weights, "[0, inf)")
    choices.require_within("upper - lower", upper - lower, "[0, inf)")
    least, most = lower.sum(), np.where(weights > 0, upper, lower).sum()
    slack = _SLACK * max(abs(least), abs(most))
    if not least - slack <= total <= most + slack:
        raise ValueError(f"total={total:g} cannot be shared: the bounds and weights admit {least:g} to {most:g}")
