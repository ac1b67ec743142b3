"""ConFIG: a direction that conflicts with no gradient (2024, Liu et al.).

ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from steelyard import choices
from steelyard.aggregate import stacked as stacked_lib

# How long the update is, from the norms of the gradients. "projection" is none of these: it uses each norm by itself.
_MEANS = {
    "min": lambda norms: jnp.min(norms, where=norms != 0, initial=jnp.inf),
    "max": jnp.max,
    "harmonic": lambda norms: 1 / jnp.mean(1 / norms, where=norms != 0),
    "arithmetic": lambda norms: jnp.mean(norms, where=norms != 0),
    "geometric": lambda norms: jnp.exp(jnp.mean(jnp.log(norms), where=norms != 0)),
}
_LENGTHS = ("projection", *_MEANS)


def conflict_free(
    *, weights: Float[Array, "K"] | None = None, length: str | int = "projection"
) -> stacked_lib.Aggregator:
    """A direction of equal positive cosine to every gradient, as long as the gradients' projections on it.

    With unit rows `u_k = g_k / |g_k|` (0 for a zero gradient) stacked in `U`, the direction is the least-squares
    solution of smallest norm `d = U^+ weights`, `dhat = d / |d|`, and the update is `s dhat` with

        s = sum_k <g_k, dhat>      for "projection",
        s = t sum_k <u_k, dhat>    otherwise, t = a mean of the norms |g_k|, or one of them.

    In terms of the cosines `C = U U^T` this is `d = sum_k (C^+ weights)_k u_k`, with `<u, d> = C C^+ weights`. The
    pseudo-inverse drops eigenvalues up to `K eps` times the largest (eps of float32). A zero gradient is ignored, also
    in the means of norms. If `d = 0`, as for exactly opposite gradients, the update is zero.

    Costs K backward passes ("lean" is possible) and one K x K eigendecomposition a step.

    Args:
      weights: relative cosines of the update with the gradients, finite; equal ones if `None`.
      length: "projection", "min", "max", "harmonic", "arithmetic", "geometric", or an index k for `t = |g_k|`.

    Returns:
      An aggregator without state. Its update is the gradient itself if K is 1.

    Raises:
      ValueError: `length` is unknown or negative, or `weights` is not a vector of finite numbers; while tracing,
        `length` is not below K or `weights` does not have K entries.
    """
    _check(weights, length)

    def rule(gram, losses, state):
        del losses
        count = gram.shape[0]
        target = _target(weights, count)
        norms = jnp.sqrt(jnp.diagonal(gram))
        units = jnp.where(norms == 0, 0, 1 / norms)
        coefficients, cosines, square = _least_squares(gram * units[:, None] * units, target)
        span = norms if length == "projection" else _mean_norm(norms, length)
        # dhat = d / |d| and s is divided by |d| once more: hence the square.
        scale = jnp.where(square == 0, 0, jnp.sum(span * cosines) / jnp.where(square == 0, 1, square))
        return scale * coefficients * units, state

    return stacked_lib.from_gram(rule)


def _check(weights: Float[Array, "K"] | None, length: str | int) -> None:
    if weights is not None and np.ndim(weights) != 1:
        raise ValueError(f"weights must be a vector with one number per gradient, got shape {np.shape(weights)}")
    if weights is not None and not isinstance(weights, jax.core.Tracer) and not np.all(np.isfinite(weights)):
        raise ValueError(f"weights must be finite, got {weights}")
    if isinstance(length, str):
        choices.require("length", length, _LENGTHS)
    elif not isinstance(length, int) or isinstance(length, bool) or length < 0:
        raise ValueError(
            f"length={length!r} must be one of {', '.join(_LENGTHS)}, or the index of a gradient, 0 to K - 1"
        )


def _target(weights: Float[Array, "K"] | None, count: int) -> Float[Array, "K"]:
    if weights is None:
        return jnp.ones((count,), jnp.float32)
    if len(weights) != count:
        raise ValueError(f"conflict_free has {len(weights)} weights, but there are {count} gradients")
    return jnp.asarray(weights, jnp.float32)


def _mean_norm(norms: Float[Array, "K"], length: str | int) -> Float[Array, ""]:
    if isinstance(length, str):
        all_zero = jnp.all(norms == 0)
        return jnp.where(all_zero, 0, _MEANS[length](jnp.where(all_zero, 1, norms)))
    if length >= norms.shape[0]:
        raise ValueError(f"length={length} is not the index of one of {norms.shape[0]} gradients")
    return norms[length]


def _least_squares(
    cosine: Float[Array, "K K"], target: Float[Array, "K"]
) -> tuple[Float[Array, "K"], Float[Array, "K"], Float[Array, ""]]:
    """`(C^+ target, C C^+ target, |d|^2)`, the last exactly 0 where the target is orthogonal to the range of C.

    Comparisons are written so that NaN falls on the side of "keep": bad gradients must stay visible.
    """
    count = cosine.shape[0]
    rounding = count * jnp.finfo(jnp.float32).eps
    values, vectors = jnp.linalg.eigh(cosine)
    dropped = values <= rounding * values[-1]
    inner = jnp.where(dropped, 0, stacked_lib.matvec(vectors.T, target))
    # Without this floor a direction made of rounding errors would be blown up to the full length.
    negligible = jnp.sum(inner**2) <= (4 * rounding) ** 2 * jnp.sum(target**2)
    inner = jnp.where(negligible, 0, inner)
    solved = inner / jnp.where(dropped, 1, values)
    return stacked_lib.matvec(vectors, solved), stacked_lib.matvec(vectors, inner), jnp.sum(inner * solved)
