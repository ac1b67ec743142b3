"""PCGrad: gradients projected off those that they conflict with (2020, Yu et al.)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from steelyard import choices
from steelyard.aggregate import stacked as stacked_lib


class PCGradState(NamedTuple):
    """State of `pcgrad` with `shuffle`.

    Attributes:
      key: from which the next step's orders are drawn.
    """

    key: Key[Array, ""]


def pcgrad(*, shuffle: bool = True, seed: int = 0, eps: float = 1e-8) -> stacked_lib.Aggregator:
    """The sum of the gradients, each first projected off the others that it conflicts with.

    For each i, `h = g_i`; for the j != i in some order,

        if <h, g_j> < 0:  h <- h - <h, g_j> / (|g_j|^2 + eps) g_j

    and the update is `sum_i h_i`. The projections are on the original `g_j`, so the order matters from three gradients
    on. Without conflicts it is the plain sum, not the mean. Where squared norms are not well above `eps`,
    projections are partial.

    Costs K backward passes ("lean" is possible) and K steps of K x K numbers.

    Args:
      shuffle: whether each i gets a fresh random order at each step; if not, j ascends.
      seed: of the key that the state starts with. Two runs with the same seed draw the same orders.
      eps: added to squared norms.

    Returns:
      An aggregator with a `PCGradState`, or without state if not `shuffle`. For one gradient the update is that
      gradient.

    Raises:
      ValueError: `eps` is negative.

    Source: Gradient Surgery for Multi-Task Learning (2020, Yu et al.), algorithm 1.
    """
    choices.require_within("eps", eps, "[0, inf)")

    def rule(gram, losses, state):
        del losses
        count = gram.shape[0]
        orders = jnp.broadcast_to(jnp.arange(count), (count, count))
        if shuffle:
            key, subkey = jax.random.split(state.key)
            orders = jax.random.permutation(subkey, orders, axis=1, independent=True)
            state = PCGradState(key)
        return jnp.sum(_projected(gram, orders, eps), axis=0), state

    return stacked_lib.from_gram(rule, (lambda: PCGradState(jax.random.key(seed))) if shuffle else optax.EmptyState)


def _projected(gram: Float[Array, "K K"], orders: Int[Array, "K K"], eps: float) -> Float[Array, "K K"]:
    """Row i: the coefficients of h_i, the projections taken in the order `orders[i]`."""
    count = gram.shape[0]
    rows = jnp.arange(count)

    def step(position, coefficients):
        others = orders[:, position]
        inner = jnp.sum(coefficients * gram[others], axis=1)
        squares = gram[others, others] + eps
        shift = inner / jnp.where(squares == 0, 1, squares)
        shift = jnp.where((inner >= 0) | (others == rows), 0, shift)
        return coefficients.at[rows, others].add(-shift)

    return jax.lax.fori_loop(0, count, step, jnp.eye(count, dtype=gram.dtype))
