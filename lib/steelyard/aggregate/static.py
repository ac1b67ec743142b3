"""Weights that never change: the mean of the gradients, and a fixed weighted sum."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from steelyard.aggregate import stacked as stacked_lib


def mean() -> stacked_lib.Aggregator:
    """The mean of the gradients, `w_k = 1 / K`.

    The same rule as `optax.experimental.aggregating.average_per_element_updates`, with the attributes that let
    `steelyard.aggregate.value_and_grad` run it with a single backward pass.
    """

    def uniform(count):
        return jnp.full((count,), 1.0 / count, jnp.float32)

    def update(stacked, state, params=None, **extra_args):
        del params, extra_args
        return stacked_lib.combine(uniform(stacked_lib.count_rows(stacked)), stacked), state

    return stacked_lib.Aggregator(
        optax.init_empty_state,
        update,
        weights=lambda losses, state: (uniform(losses.shape[0]), state),
        gram_weights=lambda gram, losses, state: (uniform(gram.shape[0]), state),
    )


def static(weights: Float[Array, "K"]) -> stacked_lib.Aggregator:
    """A fixed weighted sum of the gradients, `w_k = weights[k]`, not normalised.

    Args:
      weights: one number per gradient. A negative one makes its loss rise (gradient ascent on that task).

    Raises:
      ValueError: `weights` is not a vector of finite numbers; while tracing, its length is not K.
    """
    if np.ndim(weights) != 1:
        raise ValueError(f"weights must be a vector with one number per gradient, got shape {np.shape(weights)}")
    if not isinstance(weights, jax.core.Tracer) and not np.all(np.isfinite(weights)):
        raise ValueError(f"weights must be finite, got {weights}")

    def fixed(count):
        if len(weights) != count:
            raise ValueError(f"static has {len(weights)} weights, but there are {count} gradients")
        return jax.lax.stop_gradient(jnp.asarray(weights, jnp.float32))

    def update(stacked, state, params=None, **extra_args):
        del params, extra_args
        return stacked_lib.combine(fixed(stacked_lib.count_rows(stacked)), stacked), state

    return stacked_lib.Aggregator(
        optax.init_empty_state, update, weights=lambda losses, state: (fixed(losses.shape[0]), state)
    )
