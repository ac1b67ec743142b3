"""What a model costs: a table of its parameters (path, shape, storage, count and bytes), and its operations."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from steelyard import formats
from steelyard import tree as tree_lib

HEADER = ("path", "shape", "storage", "count", "bytes")


def table(params: Any) -> str:
    """One line for each parameter and one for the total, in aligned columns.

    A packed weight has its logical shape and the name of its format; its count and bytes are those of the arrays
    that it stores.

    Args:
      params: a tree of arrays, weight nodes or `jax.ShapeDtypeStruct`; `None` leaves are left out.

    Returns:
      The table; no newline at its end.

    >>> print(table({"dense": {"bias": np.zeros(3, np.float32), "kernel": np.zeros((2, 3), np.float32)}}))
    path          shape   storage  count  bytes
    dense/bias    (3,)    float32      3     12
    dense/kernel  (2, 3)  float32      6     24
    total                              9     36
    """
    rows = [_row(path, value) for path, value in tree_lib.flatten(params, is_leaf=formats.is_weight)]
    total = ("total", "", "", f"{tree_lib.size(params):,}", f"{tree_lib.nbytes(params):,}")
    return _align([HEADER, *rows, total])


def _row(path: str, value: Any) -> tuple[str, ...]:
    storage = type(value).__name__ if formats.is_weight(value) else str(np.dtype(value.dtype))
    return path, str(tuple(value.shape)), storage, f"{tree_lib.size(value):,}", f"{tree_lib.nbytes(value):,}"


def _align(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
    sides = (str.ljust, str.ljust, str.ljust, str.rjust, str.rjust)
    return "\n".join(
        "  ".join(side(cell, width) for side, cell, width in zip(sides, row, widths, strict=True)) for row in rows
    )


def flops(apply_fn: Callable[..., Any], *args: Any) -> float:
    """Floating-point operations of a function, a multiply-add being two, as the compiler counts them.

    The function is compiled for the default device and not run. What it does per example is this over the batch size.
    Operations of kernels that the compiler does not look into (Pallas, library calls) are not counted.

    Args:
      apply_fn: a function of arrays, such as `model.apply`.
      *args: its arguments, arrays or shapes.
    """
    return float(jax.jit(apply_fn).lower(*args).compile().cost_analysis().get("flops", 0.0))
