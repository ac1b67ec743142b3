"""The global optimum of a two-layer ReLU network, from an equivalent convex program: a yardstick for optimizers.

A hidden unit is linear wherever its *activation pattern*, the set of examples on which it is active, does not change.
For each pattern D_i (a diagonal 0/1 matrix) the program has a vector v_i of units with positive and w_i of units with
negative output weight:

    min  |sum_i D_i X (v_i - w_i) - y|^2 / 2 + beta sum_i (|v_i| + |w_i|)
    subject to (2 D_i - I) X v_i >= 0 and (2 D_i - I) X w_i >= 0

With all patterns its minimum is that of |relu(X U) a - y|^2 / 2 + (beta / 2) (|U|^2 + |a|^2) over networks that are
wide enough. With a sample of patterns it is a network's objective all the same, and so an upper bound of the minimum.

Source: Efficient Global Optimization of Two-layer ReLU Networks: Quadratic-time Algorithms and Adversarial Training
(2023, Bai et al.).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Key

from steelyard import choices, precision


class ConvexRelu(NamedTuple):
    """A point of the convex program: for each pattern, the units with positive and with negative output weight."""

    v: Float[Array, "P d"]
    w: Float[Array, "P d"]


class _Iterate(NamedTuple):
    """ADMM, all [2P, d] or [2P, n]: copies q and s of the weights u and of the signed products G u, and their duals."""

    q: Float[Array, "2P d"]
    s: Float[Array, "2P n"]
    q_dual: Float[Array, "2P d"]
    s_dual: Float[Array, "2P n"]


def convex_relu_patterns(x: Float[Array, "n d"], num_patterns: int, rng: Key[Array, ""]) -> Bool[Array, "P n"]:
    """Activation patterns 1[X h >= 0] of random hidden units h ~ N(0, I), each once.

    Runs on the host, outside jit: how many of them are different depends on their values. n examples in d dimensions
    have no more than 2 sum_{k<d} C(n-1, k) patterns.

    Args:
      x: examples; append a column of ones for a bias.
      num_patterns: how many units are drawn, at least 1.
      rng: a key.

    Returns:
      P <= `num_patterns` patterns, sorted; 1 byte for each example and pattern.

    Raises:
      ValueError: `num_patterns` is less than 1, or x is not a matrix.

    Source: Efficient Global Optimization of Two-layer ReLU Networks (2023, Bai et al.), section 2.
    """
    choices.require_within("num_patterns", num_patterns, "[1, inf)")
    _check_matrix(x)
    x = precision.wide(x)
    units = jax.random.normal(rng, (x.shape[1], num_patterns), x.dtype)
    return jnp.asarray(np.unique(np.asarray(x @ units >= 0).T, axis=0))


def convex_relu_admm(
    x: Float[Array, "n d"],
    y: Float[Array, "n"],
    patterns: Bool[Array, "P n"],
    *,
    beta: float | Float[Array, ""] = 1e-3,
    rho: float | Float[Array, ""] = 0.1,
    dual_step: float | Float[Array, ""] = 1.0,
    num_steps: int = 1000,
) -> ConvexRelu:
    """Solves the convex program by the alternating direction method of multipliers.

    With u = [v; w], F = [D_1 X .. D_P X, -D_1 X .. -D_P X], G = blockdiag((2 D_i - I) X) twice, all from 0:

        u = (I + F'F / rho + G'G)^-1 (F'y / rho + q - lam + G'(s - nu))
        q = group soft threshold of u + lam: each d-vector times max(1 - beta / (rho norm), 0)
        s = max(G u + nu, 0);  lam += dual_step (u - q);  nu += dual_step (G u - s)

    The result is q, whose groups are exactly 0 where the program says so; its constraints hold in the limit. Since
    G'G is X'X in every block, the inverse reduces to one of an n x n matrix: n^3 + P n^2 operations once, 4 P n d + n^2
    an iteration, and memory of 8 P (n + d) numbers. Computed in float32 at least; use float64 for more than about 4
    digits.

    Args:
      x: examples, with a column of ones for a bias.
      y: targets.
      patterns: from `convex_relu_patterns`.
      beta: strength of the group penalty, positive: weight decay of the network.
      rho: penalty of the splitting, positive. It changes the speed, not the solution.
      dual_step: step of the dual variables, in (0, 1.618).
      num_steps: number of iterations, at least 0.

    Raises:
      ValueError: a number out of its range, or shapes that do not agree.

    Source: Efficient Global Optimization of Two-layer ReLU Networks (2023, Bai et al.), ADMM for the squared loss.
    """
    for name, value in dict(beta=beta, rho=rho).items():
        choices.require_within(name, value, "(0, inf)")
    choices.require_within("dual_step", dual_step, "(0, 1.618)")
    choices.require_within("num_steps", num_steps, "[0, inf)")
    _check_problem(x, y, patterns)
    dtype = jnp.result_type(x)
    x, y = precision.wide(x), precision.wide(y)
    beta, rho, dual_step = (jnp.asarray(value, x.dtype) for value in (beta, rho, dual_step))
    active = jnp.asarray(patterns, x.dtype)
    signs = jnp.concatenate([2 * active - 1] * 2)
    solve = _solver(x, active, rho)
    fit = _to_weights(x, active, y) / rho

    def step(_, at):
        u = solve(fit + at.q - at.q_dual + (signs * (at.s - at.s_dual)) @ x)
        products = signs * (u @ x.T)
        q = _group_threshold(u + at.q_dual, beta / rho)
        s = jnp.maximum(products + at.s_dual, 0)
        return _Iterate(q, s, at.q_dual + dual_step * (u - q), at.s_dual + dual_step * (products - s))

    zeros = jnp.zeros((len(signs), x.shape[1]), x.dtype), jnp.zeros_like(signs)
    end = jax.lax.fori_loop(0, num_steps, step, _Iterate(*zeros, *zeros))
    return ConvexRelu(*jnp.split(end.q.astype(dtype), 2))


def convex_relu_objective(
    x: Float[Array, "n d"],
    y: Float[Array, "n"],
    patterns: Bool[Array, "P n"],
    v: Float[Array, "P d"],
    w: Float[Array, "P d"],
    *,
    beta: float | Float[Array, ""],
) -> Float[Array, ""]:
    """The objective of the convex program, its constraints not counted.

    Args:
      x, y, patterns, beta: as in `convex_relu_admm`.
      v: units with positive output weight, one for each pattern.
      w: units with negative output weight.

    Raises:
      ValueError: beta is not positive, or shapes that do not agree.

    Source: Efficient Global Optimization of Two-layer ReLU Networks (2023, Bai et al.), the convex program.
    """
    choices.require_within("beta", beta, "(0, inf)")
    _check_problem(x, y, patterns)
    if not jnp.shape(v) == jnp.shape(w) == (len(patterns), jnp.shape(x)[1]):
        raise ValueError(f"v {jnp.shape(v)} and w {jnp.shape(w)} must be {(len(patterns), jnp.shape(x)[1])}")
    x, y, v, w = (precision.wide(value) for value in (x, y, v, w))
    predicted = _predict(x, jnp.asarray(patterns, x.dtype), jnp.concatenate([v, w]))
    lengths = optax.safe_norm(v, 0, axis=-1) + optax.safe_norm(w, 0, axis=-1)
    return jnp.sum(jnp.square(predicted - y)) / 2 + jnp.asarray(beta, x.dtype) * jnp.sum(lengths)


def convex_relu_network(
    v: Float[Array, "P d"], w: Float[Array, "P d"]
) -> tuple[Float[Array, "d m"], Float[Array, "m"]]:
    """The network of a point of the convex program: f(x) = relu(x @ hidden) @ output.

        v_i != 0:  hidden v_i / sqrt|v_i|, output  sqrt|v_i|
        w_i != 0:  hidden w_i / sqrt|w_i|, output -sqrt|w_i|

    At a point that satisfies the constraints its objective is that of the program. Runs on the host, outside jit: the
    width m is the number of nonzero groups, and 0 at the zero point.

    Args:
      v: units with positive output weight.
      w: units with negative output weight.

    Returns:
      Hidden kernel and output weights, those of v first.

    Raises:
      ValueError: the shapes differ.

    Source: Efficient Global Optimization of Two-layer ReLU Networks (2023, Bai et al.), recovery of the weights.
    """
    if jnp.ndim(v) != 2 or jnp.shape(v) != jnp.shape(w):
        raise ValueError(f"v has shape {jnp.shape(v)} and w {jnp.shape(w)}; both must be [patterns, features]")
    units = jnp.concatenate([jnp.asarray(v), jnp.asarray(w)])
    lengths = jnp.linalg.norm(precision.wide(units), axis=-1)
    live = np.flatnonzero(np.asarray(lengths))
    roots = jnp.sqrt(lengths[live])
    signs = jnp.where(live < len(v), 1, -1).astype(roots.dtype)
    return (units[live] / roots[:, None]).T.astype(units.dtype), (signs * roots).astype(units.dtype)


def _solver(x: Array, active: Array, rho: Array):
    """Applies (I + F'F / rho + G'G)^-1 to [2P, d].

    All blocks of I + G'G are A = I + X'X, and F has n rows, so by Woodbury's identity the inverse is
    A^-1 - A^-1 F' (rho I + F A^-1 F')^-1 F A^-1, with F A^-1 F' = 2 sum_i D_i (X A^-1 X') D_i.
    """
    # Both matrices are well conditioned, and products with an inverse are faster than triangular solves.
    block = _inverse(jnp.eye(x.shape[1], dtype=x.dtype) + x.T @ x)
    middle = _inverse(rho * jnp.eye(len(x), dtype=x.dtype) + 2 * (x @ block @ x.T) * (active.T @ active))

    def solve(r):
        plain = r @ block
        correction = middle @ _predict(x, active, plain)
        return plain - _to_weights(x, active, correction) @ block

    return solve


def _inverse(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Of a positive definite matrix."""
    return jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(matrix), jnp.eye(len(matrix), dtype=matrix.dtype))


def _predict(x: Array, active: Array, u: Array) -> Float[Array, "n"]:
    """F u."""
    v, w = jnp.split(u, 2)
    return jnp.sum(active * ((v - w) @ x.T), axis=0)


def _to_weights(x: Array, active: Array, r: Array) -> Float[Array, "2P d"]:
    """F' r."""
    v = (active * r) @ x
    return jnp.concatenate([v, -v])


def _group_threshold(u: Float[Array, "2P d"], threshold: Array) -> Float[Array, "2P d"]:
    norm = optax.safe_norm(u, 0, axis=-1, keepdims=True)
    return u * (1 - threshold / jnp.maximum(norm, threshold))


def _check_matrix(x: Array) -> None:
    if jnp.ndim(x) != 2:
        raise ValueError(f"x has shape {jnp.shape(x)}; it must be [examples, features]")


def _check_problem(x: Array, y: Array, patterns: Array) -> None:
    _check_matrix(x)
    n = len(x)
    if jnp.shape(y) != (n,) or jnp.ndim(patterns) != 2 or jnp.shape(patterns)[1] != n:
        raise ValueError(
            f"x has shape {jnp.shape(x)}, y {jnp.shape(y)}, patterns {jnp.shape(patterns)}; they must be [n, d], [n] "
            "and [patterns, n]"
        )
