"""Arguments that are one of a few names, or a number in an interval, whole or not."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

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
    """Refuses a number, or an array with one, outside of an interval; NaN is outside of all.

    A value that JAX traces cannot be looked at and is let through, so that a hyperparameter may be an argument of a
    jitted function.

    Args:
      name: what the caller calls the argument.
      value: what was given; of an array the first number that is outside is named.
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
    values = np.asarray(value)
    above = values >= low if interval[0] == "[" else values > low
    below = values <= high if interval[-1] == "]" else values < high
    wrong = ~(above & below)
    if np.any(wrong):
        raise ValueError(f"{name}={values[wrong][0] if values.ndim else value} must lie in {interval}")


def require_count(name: str, value: int, interval: str) -> int:
    """The value as an integer, if it is a whole number in an interval.

    Args:
      name: what the caller calls the argument.
      value: what was given, not traced.
      interval: as in `require_within`.

    Raises:
      ValueError: `value` is outside, not whole, or a function.

    >>> require_count("rank", 2.0, "[1, inf)")
    2
    >>> require_count("rank", 1.5, "[1, inf)")
    Traceback (most recent call last):
    ValueError: rank=1.5 must be a whole number in [1, inf)
    """
    require_within(name, value, interval)
    if int(value) != value:
        raise ValueError(f"{name}={value} must be a whole number in {interval}")
    return int(value)
