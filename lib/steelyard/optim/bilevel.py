"""Bilevel problems by penalty: hyperparameters of a training problem, without second derivatives.

Upper problem: choose x so that f(x, z) is small, where z trains, z = argmin g(x, .). Two copies of the trained
variables are kept: z minimizes g, and y minimizes sigma f + g, a slight pull towards the upper objective. The
difference of the two gradients of g with respect to x, divided by sigma, shows how training responds to x.

Source: On Penalty Methods for Nonconvex Bilevel Optimization and First-Order Stochastic Approximation (2024, Kwon et
al.). Of its algorithms this is the core: the proximal smoothing of y and z and the variance-reduced momentum are left
out.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from steelyard import choices, precision

PyTree = Any
Objective = Callable[[PyTree, PyTree], Float[Array, ""]]
Projection = Callable[[PyTree], PyTree]
Scalar = float | Float[Array, ""]


class BilevelState(NamedTuple):
    """Upper variables x; lower variables y, pulled towards the upper objective; and z, not pulled, a tree like y."""

    x: PyTree
    y: PyTree
    z: PyTree


def bilevel_penalty_gradient(
    upper: Objective, lower: Objective, x: PyTree, y: PyTree, z: PyTree, *, penalty: Scalar
) -> PyTree:
    """The gradient with respect to x of the penalty function psi, given its two inner minimizers.

        psi(x) = (min_y [sigma f(x, y) + g(x, y)] - min_z g(x, z)) / sigma
        grad psi = grad_x f(x, y) + (grad_x g(x, y) - grad_x g(x, z)) / sigma

    It is O(sigma) close to the true hypergradient. y and z are held constant. The difference cancels digits: in float32
    keep sigma >= 1e-3, or use float64. With sampled objectives `lower` must be the same batch for y and z, since their
    difference is divided by sigma. The cost is three gradients with respect to x.

    Args:
      upper: f, `(x, y) -> scalar`.
      lower: g, `(x, y) -> scalar`.
      x: upper variables, any tree; `None` leaves stay `None`.
      y: approximate minimizer of sigma f(x, .) + g(x, .).
      z: approximate minimizer of g(x, .), a tree like y.
      penalty: sigma, positive, a number or a (traced) scalar.

    Returns:
      A tree like x, in its dtypes; differences are taken in float32 at least.

    Raises:
      ValueError: `penalty` is not positive.

    Source: On Penalty Methods for Nonconvex Bilevel Optimization (2024, Kwon et al.), gradient of the penalty function.
    """
    choices.require_within("penalty", penalty, "(0, inf)")
    of_upper, pulled, free = (jax.grad(fn)(x, point) for fn, point in ((upper, y), (lower, y), (lower, z)))

    def leaf(f, p, q):
        difference = precision.wide(p) - precision.wide(q)
        return (precision.wide(f) + difference / jnp.asarray(penalty, difference.dtype)).astype(f.dtype)

    return jax.tree.map(leaf, of_upper, pulled, free)


def bilevel_penalty_step(
    upper: Objective,
    lower: Objective,
    state: BilevelState,
    *,
    penalty: Scalar,
    outer_lr: Scalar,
    inner_lr: Scalar,
    inner_steps: int = 10,
    project_x: Projection | None = None,
    project_y: Projection | None = None,
) -> BilevelState:
    """Warm-started steps of both lower copies, then one step of the upper variables.

        inner_steps times:  y <- P_Y(y - inner_lr (sigma grad_y f + grad_y g)(x, y))
                            z <- P_Y(z - inner_lr grad_y g(x, z))
        x <- P_X(x - outer_lr grad psi(x))

    With `inner_steps=1` this is the single-loop method; take outer_lr much smaller than inner_lr * sigma. The cost is
    that of two training runs of the lower problem, 3 `inner_steps` gradients, and no Hessian.

    Args:
      upper, lower, penalty: as in `bilevel_penalty_gradient`; for sampled objectives, closed over one batch.
      state: x, y and z; start with z = y.
      outer_lr: step size of x, at least 0.
      inner_lr: step size of y and z, at least 0.
      inner_steps: steps of y and z before that of x, at least 0.
      project_x: the projection P_X of x to its domain, tree to tree; `None` is no constraint.
      project_y: the projection P_Y, for y and z alike.

    Returns:
      The next state, in the same dtypes.

    Raises:
      ValueError: a number out of its range.

    Source: On Penalty Methods for Nonconvex Bilevel Optimization (2024, Kwon et al.), the first-order algorithms.
    """
    choices.require_within("penalty", penalty, "(0, inf)")
    for name, rate in dict(outer_lr=outer_lr, inner_lr=inner_lr, inner_steps=inner_steps).items():
        choices.require_within(name, rate, "[0, inf)")
    x, y, z = jax.tree.map(jnp.asarray, tuple(state))

    def inner(_, lower_copies):
        y, z = lower_copies
        toward_upper = jax.grad(upper, argnums=1)(x, y)
        pulled = jax.tree.map(lambda f, g: _add(g, penalty, f), toward_upper, jax.grad(lower, argnums=1)(x, y))
        free = jax.grad(lower, argnums=1)(x, z)
        return _descend(y, pulled, inner_lr, project_y), _descend(z, free, inner_lr, project_y)

    y, z = jax.lax.fori_loop(0, inner_steps, inner, (y, z))
    gradient = bilevel_penalty_gradient(upper, lower, x, y, z, penalty=penalty)
    return BilevelState(_descend(x, gradient, outer_lr, project_x), y, z)


def _descend(point: PyTree, gradient: PyTree, rate: Scalar, project: Projection | None) -> PyTree:
    moved = jax.tree.map(lambda p, g: _add(p, -rate, g).astype(p.dtype), point, gradient)
    return moved if project is None else project(moved)


def _add(a: Array, factor: Scalar, b: Array) -> Array:
    """a + factor b, in float32 at least, the factor in the dtype of the sum."""
    wide = precision.wide(a)
    return wide + jnp.asarray(factor, wide.dtype) * b
