"""Compressors of gradients that keep a few of their entries, for error feedback.

A *compressor* is a function `(tree, step, worker) -> tree` of the same structure: integers say which step it is and
which worker sends, so that random ones draw afresh.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, Key

from steelyard import choices
from steelyard import tree as tree_lib

PyTree = Any
Compressor = Callable[[PyTree, Int[ArrayLike, ""], Int[ArrayLike, ""]], PyTree]


@dataclasses.dataclass(frozen=True)
class Sparsifier:
    """A compressor that keeps a few entries of a tree, laid out flat, and sets the others to zero.

    Called with `(tree, step=0, worker=0)` it gives a tree like it.

    Attributes:
      count: how many entries are kept; all of a smaller tree.
      choose: `(flat, count, step, worker) -> indices [count]` of the entries that are kept, each once.
    """

    count: int
    choose: Callable[..., Int[Array, "count"]]

    def __call__(self, tree: PyTree, step: Int[ArrayLike, ""] = 0, worker: Int[ArrayLike, ""] = 0) -> PyTree:
        if self.count >= tree_lib.size(tree):
            return tree
        flat, unravel = jax.flatten_util.ravel_pytree(tree)
        _, indices = self.sparse(flat, step, worker)
        kept = unravel(jnp.zeros_like(flat).at[indices].set(1, unique_indices=True))
        # A choice, not a scatter of the values: it stays where the leaf is.
        return jax.tree.map(lambda x, is_kept: jnp.where(is_kept == 1, x, jnp.zeros((), x.dtype)), tree, kept)

    def sparse(
        self, flat: Float[Array, "size"], step: Int[ArrayLike, ""], worker: Int[ArrayLike, ""]
    ) -> tuple[Float[Array, "count"], Int[Array, "count"]]:
        """The values that are kept, and where they are."""
        indices = self.choose(flat, min(self.count, flat.shape[0]), step, worker)
        return flat[indices], indices


def top_k(k: int) -> Sparsifier:
    """Keeps the k entries of largest magnitude of the whole tree; of equal ones the first.

    The order is that of the raveled tree: leaves as `jax.tree.leaves` has them, each row by row. A contraction of
    `alpha = k / P`, P the number of entries. NaN counts as largest, so that it stays visible. Cost: a partial sort of
    all P entries, on one device (a sharded tree is gathered).

    Args:
      k: how many entries; P or more changes nothing.

    Returns:
      A compressor.

    Raises:
      ValueError: `k` is not a whole number of at least 1.
    """
    choices.require_count("k", k, "[1, inf)")

    def choose(flat, count, step, worker):
        del step, worker
        return jax.lax.top_k(jnp.abs(flat), count)[1]

    return Sparsifier(int(k), choose)


def random_k(k: int, key: Key[Array, ""]) -> Sparsifier:
    """Keeps k random entries of the whole tree, others in each step and for each worker, not rescaled.

    A contraction of `alpha = k / P` in expectation.

    Args:
      k: how many entries; P or more changes nothing.
      key: the step and the worker's number are folded into it.

    Returns:
      A compressor.

    Raises:
      ValueError: `k` is not a whole number of at least 1.
    """
    choices.require_count("k", k, "[1, inf)")

    def choose(flat, count, step, worker):
        drawn = jax.random.fold_in(jax.random.fold_in(key, step), worker)
        return jax.random.choice(drawn, flat.shape[0], (count,), replace=False)

    return Sparsifier(int(k), choose)
