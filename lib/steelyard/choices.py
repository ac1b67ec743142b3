"""Arguments that are one of a few names, or a number in an interval."""

from collections.abc import Iterable
from typing import Any

import jax

from steelyard import tree


def require(name: str, value: Any, allowed: Iterable[str]) -> None:
    """Refuses a value that is not one of the allowed names, and offers the nearest right one.

    Args:
      name: what the caller calls the argument.
      value: what was given.
      allowed: what may be given.

    Raises:
      ValueError: `value` is not allowed.
    """
    allowed = list(allowed)
    if value in allowed:
        return
    near = tree.nearest(str(value), allowed, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{name}={value!r} is not one of {', '.join(allowed)}{hint}")


def require_within(name: str, value: Any, interval: str) -> None:
    """Refuses a number outside of an interval; NaN is outside of all.

    A value that JAX traces cannot be looked at and is let through, so that a hyperparameter may be an argument of a
    jitted function.

    Args:
      name: what the caller calls the argument.
      value: what was given.
      interval: in the usual notation, a round bracket excluding its end: "[0, 1)", "(0, inf)".

    Raises:
      ValueError: `value` is outside, or a function where a number must stand.

    >>> require_within("b1", 0.9, "[0, 1)")
    >>> require_within("b1", 1.0, "[0, 1)")
    Traceback (most recent call last):
    ValueError: b1=1.0 must lie in [0, 1)
    """
    if callable(value):
        raise ValueError(
            f"{name} is a function; it must be a number in {interval}. Schedules: optax.inject_hyperparams."
        )
    if isinstance(value, jax.core.Tracer):
        return
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = value > low or (interval[0] == "[" and value == low)
    below = value < high or (interval[-1] == "]" and value == high)
    if not (above and below):
        raise ValueError(f"{name}={value} must lie in {interval}")
