"""Arguments that are one of a few names."""

from collections.abc import Iterable
from typing import Any

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
