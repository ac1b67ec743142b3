"""What every operation shares: the names of the backends, how operands lie on a mesh, and the tile of a kernel.

A *backend* is one implementation of an operation: `reference` is the definition in jax.numpy, `tpu` and `gpu` are
kernels, `cpu` is an XLA path for processors, `interpret` runs the TPU kernel's code without a TPU, and `auto` chooses
when the program is lowered. A *tile* is the block of the operands that one step of a kernel holds.
"""

import difflib
from collections.abc import Sequence
from typing import NamedTuple

import jax

BACKENDS = ("auto", "tpu", "gpu", "cpu", "reference", "interpret")

AxisNames = str | tuple[str, ...] | None


class Partition(NamedTuple):
    """Where the operands of `x @ w`, x `(M, K)` and w `(K, N)`, lie on a mesh.

    Attributes:
      mesh: the mesh.
      m: mesh axes that split the rows of x; `None` if they are whole everywhere.
      k: mesh axes that split the contracted axis.
      n: mesh axes that split the output axis.
    """

    mesh: jax.sharding.Mesh
    m: AxisNames = None
    k: AxisNames = None
    n: AxisNames = None


class Tile(NamedTuple):
    """Block sizes of one kernel step.

    Attributes:
      bm: rows of x.
      bn: output columns.
      bk: contracted entries.
    """

    bm: int
    bn: int
    bk: int


def check_backend(backend: str, available: Sequence[str]) -> None:
    """Refuses a backend that does not exist, or that an operation does not have.

    A forced backend never falls back on another one.

    Args:
      backend: what the caller asked for.
      available: the backends that the operation has.

    Raises:
      ValueError: `backend` is not in `BACKENDS`, or not in `available`.
    """
    if backend not in BACKENDS:
        near = difflib.get_close_matches(str(backend), BACKENDS, n=1, cutoff=0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}{hint}")
    if backend not in available:
        raise ValueError(f"backend={backend!r} is not built for this operation; built: {', '.join(available)}")
