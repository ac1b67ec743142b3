"""Nash-MTL: the update that the tasks would bargain for (2022, Navon et al.)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from steelyard import choices
from steelyard.aggregate import simplex
from steelyard.aggregate import stacked as stacked_lib


def nash(*, max_norm: float | None = 1.0, normalize: bool = True, iterations: int = 50) -> stacked_lib.Aggregator:
    """The Nash bargaining solution: every task gains the same share, `alpha_k <g_k, update> = const`.

    The update is `sum_k alpha_k g_k`, made no longer than `max_norm`, with `alpha > 0` and

        H alpha = 1 / alpha,    H = G / |G|_F if `normalize`, else G.

    This is where `alpha^T H alpha / 2 - sum_k log alpha_k` is least, a convex function that damped Newton steps
    minimise, in the unknowns `alpha_k |g_k|`, so that the lengths of the gradients do not matter. Scaling one gradient
    does not change the direction. A zero gradient is left out, its alpha is 0.

    Where some convex combination of the gradients is zero there is no solution; alpha then grows as far as `iterations`
    and the rounding of H allow, and the update is what is left of nearly cancelling gradients. The equation holds to a
    few `K eps` times `alpha_k |g_k| sum_l alpha_l |g_l|` (in units of H), eps of float32, by as much as the entries of
    H are rounded.

    Costs K backward passes ("lean" is possible) and `iterations` Cholesky decompositions K x K.

    Args:
      max_norm: longest update; no limit if `None`.
      normalize: whether the length of the update (before its limit) grows with the gradients; the direction is the
        same.
      iterations: Newton steps, at least 1; nearly dependent gradients need the most, up to 40 for 16 of them.

    Returns:
      An aggregator without state. For one gradient the update is `g`, or `g / |g|` without `normalize`.

    Raises:
      ValueError: `max_norm` is not positive, or `iterations` is below 1.

    Source: Multi-Task Learning as a Bargaining Game (2022, Navon et al.), equation 2 and claim 3.1; their code solves
    it approximately, by a sequence of convex programs.
    """
    if max_norm is not None:
        choices.require_within("max_norm", max_norm, "(0, inf)")
    choices.require_within("iterations", iterations, "[1, inf)")

    def rule(gram, losses, state):
        del losses
        cosines, norms, units = simplex.unit_gram(gram)
        gains = _equal_gains(cosines, iterations)
        scale = _root_size(gram, norms) if normalize else 1.0
        gains = jnp.where(norms == 0, 0, scale * gains)
        if max_norm is not None:
            length = jnp.sqrt(jnp.maximum(jnp.vdot(gains, stacked_lib.matvec(cosines, gains)), 0))
            gains = gains * jnp.minimum(1, max_norm / jnp.where(length == 0, 1, length))
        return gains * units, state

    return stacked_lib.from_gram(rule)


def _root_size(gram: Float[Array, "K K"], norms: Float[Array, "K"]) -> Float[Array, ""]:
    """`sqrt(|G|_F)`, without squares of G that would leave float32."""
    longest = jnp.max(norms)
    inverse = jnp.where(longest == 0, 0, 1 / longest)
    return longest * jnp.sqrt(jnp.linalg.norm(gram * inverse * inverse))


def _equal_gains(cosines: Float[Array, "K K"], iterations: int) -> Float[Array, "K"]:
    """The `y > 0` with `y_k (C y)_k = 1`, by damped Newton steps on `y^T C y / 2 - sum_k log y_k` from ones.

    With Y = diag(y) the step is `Y z`, `(I + Y C Y) z = y C y - 1`; its length in the local norm is `lambda`. Below 1/4
    full steps converge quadratically, above the damped one keeps y positive: `|z_k| <= lambda`.
    """

    def step(_, y):
        residual = y * stacked_lib.matvec(cosines, y) - 1
        factor = jnp.linalg.cholesky(jnp.eye(len(y), dtype=y.dtype) + y[:, None] * cosines * y)
        z = jax.scipy.linalg.cho_solve((factor, True), residual)
        decrement = jnp.sqrt(jnp.maximum(jnp.vdot(residual, z), 0))
        moved = y * (1 - z / jnp.where(decrement < 0.25, 1, 1 + decrement))
        return jnp.where(jnp.isfinite(decrement), moved, y)

    return jax.lax.fori_loop(0, iterations, step, jnp.ones(len(cosines), cosines.dtype))
