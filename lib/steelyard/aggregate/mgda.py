"""MGDA: the shortest convex combination of the gradients (2012, Desideri; 2018, Sener and Koltun)."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from steelyard import choices
from steelyard.aggregate import simplex
from steelyard.aggregate import stacked as stacked_lib

_NORMALIZE = ("none", "l2", "loss", "loss+")


def mgda(*, normalize: str = "none", iterations: int = 250) -> stacked_lib.Aggregator:
    """The point of least norm among the convex combinations of the gradients, which is a descent direction for all.

        a = argmin |sum_k a_k g_k / c_k|^2,  a >= 0,  sum_k a_k = 1;     update = sum_k a_k g_k / c_k

    with `c_k` = 1 for "none", `|g_k|` for "l2", `|L_k|` for "loss" and `|L_k| |g_k|` for "loss+"; a `c_k` of 0 counts
    as 1. Every task improves at first order by at least the squared length of the update: `<update, g_k / c_k> >=
    |update|^2`. The update is zero exactly where no direction improves all tasks (Pareto stationary points), as where
    one gradient is zero; a gradient that is longer than its part in the solution has weight zero.

    The combination is found from face to face (`steelyard.aggregate.simplex`), exactly but for rounding: |update|^2
    exceeds the least one by a few `K eps (sum_k a_k |g_k| / c_k)^2`, eps of float32, which is what the rounding of the
    Gram matrix amounts to. Where the least norm is zero, what is left of the update can be sqrt(K eps) times as long as
    the gradients.

    Costs K backward passes ("lean" is possible) and about as many K x K Cholesky decompositions as tasks have weight.

    Args:
      normalize: the scales `c_k` as above; "loss" and "loss+" need the losses.
      iterations: the greatest number of faces to look at, at least 1.

    Returns:
      An aggregator without state. For one gradient, and `c_k` = 1, the update is that gradient.

    Raises:
      ValueError: `normalize` is unknown or `iterations` below 1; in the update, losses are needed and not given.

    Source: Multiple-gradient descent algorithm (MGDA) for multiobjective optimization (2012, Desideri), section 2;
    Multi-Task Learning as Multi-Objective Optimization (2018, Sener and Koltun), equation 3. "loss" and "loss+" are the
    normalisations of the latter's published experiments.
    """
    choices.require("normalize", normalize, _NORMALIZE)
    choices.require_within("iterations", iterations, "[1, inf)")

    def rule(gram, losses, state):
        if losses is None and normalize.startswith("loss"):
            raise ValueError(f"mgda(normalize={normalize!r}) needs the losses: update(stacked, state, losses=...)")
        cosines, norms, _ = simplex.unit_gram(gram)
        scales = _scales(normalize, norms, losses)
        shares = _shortest(cosines, norms / scales, iterations)
        return shares / scales, state

    return stacked_lib.from_gram(rule)


def _scales(normalize: str, norms: Float[Array, "K"], losses: Float[Array, "K"] | None) -> Float[Array, "K"]:
    scales = jnp.ones_like(norms)
    if normalize in ("l2", "loss+"):
        scales = scales * norms
    if normalize in ("loss", "loss+"):
        scales = scales * jnp.abs(losses).astype(norms.dtype)
    return jnp.where(scales == 0, 1, scales)


def _shortest(cosines: Float[Array, "K K"], norms: Float[Array, "K"], iterations: int) -> Float[Array, "K"]:
    """The weights `a` of the shortest convex combination; all weight is on a zero gradient, if there is one."""
    normal = simplex.normal_of(norms)
    # |y|^2 plus the constant <normal, y>^2 = 1 has the same minimum, and a matrix that is never near singular along it.
    matrix = cosines + normal[:, None] * normal
    shares = normal * simplex.minimize(matrix, jnp.zeros_like(norms), normal, iterations=iterations)
    total = jnp.sum(shares)
    shares = shares / jnp.where(total == 0, 1, total)
    zero = jnp.argmax(norms == 0)
    return jnp.where(jnp.any(norms == 0), jnp.arange(len(norms)) == zero, shares)
