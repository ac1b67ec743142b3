"""CAGrad: near the mean gradient, the direction that serves the worst task best (2021, Liu et al.)."""

import jax.numpy as jnp

from steelyard import choices
from steelyard.aggregate import simplex
from steelyard.aggregate import stacked as stacked_lib


def cagrad(*, c: float = 0.5, rescale: int = 1, iterations: int = 250) -> stacked_lib.Aggregator:
    """The d within `c |g_0|` of the mean gradient `g_0` whose least improvement `min_k <d, g_k>` is greatest.

    With `phi = c |g_0|`, and w over the convex combinations,

        d = g_0 + phi g_w / |g_w|,    w = argmin <g_w, g_0> + phi |g_w|,    g_w = sum_k w_k g_k

    and the update is d for `rescale` 0, `d / (1 + c^2)` for 1, `d / (1 + c)` for 2. For c = 0 it is the mean, for large
    c its direction is that of `mgda`. From c = 1 on it may stop at points that are Pareto stationary and are no minima
    of the mean. A zero gradient counts in the mean, and is left out of the minimum.

    Found from face to face (`steelyard.aggregate.simplex`), exactly but for rounding, in units in which the lengths of
    the gradients do not matter. `|g_w|^2` is taken with `K eps sum_k (w_k |g_k|)^2` added, eps of float32: by as much
    as the Gram matrix may be rounded, it keeps d continuous where `g_w = 0`.

    Costs K backward passes ("lean" is possible) and about as many K x K Cholesky decompositions as tasks have weight.

    Args:
      c: how far from the mean, relative to its length.
      rescale: 0, 1 or 2, as above.
      iterations: the greatest number of faces to look at, at least 1.

    Returns:
      An aggregator without state.

    Raises:
      ValueError: `c` is negative, `rescale` is not 0, 1 or 2, or `iterations` is below 1.

    Source: Conflict-Averse Gradient Descent for Multi-task Learning (2021, Liu et al.), equation 3 and algorithm 1; the
    rescaling is that of its published code.
    """
    choices.require_within("c", c, "[0, inf)")
    if rescale not in (0, 1, 2):
        raise ValueError(f"rescale={rescale!r} must be 0, 1 or 2")
    choices.require_within("iterations", iterations, "[1, inf)")

    def rule(gram, losses, state):
        del losses
        cosines, norms, units = simplex.unit_gram(gram)
        means = jnp.mean(gram, axis=1)
        length = jnp.sqrt(jnp.maximum(jnp.mean(means), 0))
        # Divided by phi |g_k|, the linear part is the cosine of g_k and g_0 over c.
        toward = means * units / jnp.where(length == 0, 1, length * jnp.maximum(c, 1e-6))
        unit = simplex.minimize(cosines, toward, simplex.normal_of(norms), iterations=iterations)
        worst = c * length * units * unit
        return (1 / len(norms) + worst) / (1, 1 + c**2, 1 + c)[rescale], state

    return stacked_lib.from_gram(rule)
