"""Contract 4: a weight knows how to multiply.

A weight node is a registered pytree whose leaves are arrays as they are stored. Its shape follows from its children,
so that a stack of layers can be scanned, vmapped, sliced or donated and the node stays right; nothing is checked when
JAX rebuilds a node, because then its children may be anything (specs, shapes, `None`).
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from steelyard import tree


class Weight:
    """A stored weight of shape `(..., K, N)`: K is contracted, N is the output channel.

    A subclass is a frozen dataclass registered with `jax.tree_util.register_dataclass`. It gives `shape`, `dtype` (of
    `dense()`) and `dense`, and may replace `matmul`, `take` and `describe` by better ones.
    """

    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """Number of axes of the dense array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries of the dense array."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all children, as stored."""
        return tree.nbytes(self)

    def dense(self) -> Float[Array, "..."]:
        """The array that the node stands for."""
        raise NotImplementedError

    def matmul(self, x: Float[Array, "*rows K"]) -> Float[Array, "*rows N"]:
        """`x @ dense()`, with the dtype that both promote to.

        Raises:
          ValueError: the contracted axes differ.
        """
        self.check_contraction(x)
        return _expanded_matmul(self, x)

    def take(self, indices: Int[Array, "..."]) -> Float[Array, "... N"]:
        """`jnp.take(dense(), indices, axis=0)`: rows of a table of embeddings."""
        return jnp.take(self.dense(), indices, axis=0)

    def describe(self) -> str:
        """How `matmul` multiplies, and why so."""
        return "expanded, then jnp.matmul"

    def check_contraction(self, x: Array) -> None:
        """Raises a ValueError unless the last axis of x has as many entries as the contracted axis has here."""
        if x.ndim < 1 or x.shape[-1] != self.shape[-2:][0]:
            raise ValueError(f"x of shape {x.shape} does not fit a {type(self).__name__} of shape {self.shape}")


def dense(w: Array | Weight) -> Float[Array, "..."]:
    """The weight as an array; an array is its own."""
    return w.dense() if isinstance(w, Weight) else w


# The backward pass expands the weight again rather than keep it: in a scan over layers, kept weights would add up to
# the dense model that the storage was there to avoid.
@jax.jit
@jax.checkpoint
def _expanded_matmul(w, x):
    return jnp.matmul(x, w.dense())
