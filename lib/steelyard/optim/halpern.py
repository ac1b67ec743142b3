"""Halpern iteration: a zero of a monotone operator, with a bound on the residual of the last iterate.

Every step is pulled back towards the start, less and less: an average of the start and an ordinary step. Games and
convex-concave training have such operators (the gradient in one player, minus the gradient in the other). F is
1/L-*cocoercive* if <F(u) - F(v), u - v> >= |F(u) - F(v)|^2 / L: gradients of L-smooth convex functions are.

A bilinear game is monotone and Lipschitz but not cocoercive, and `halpern` on its F diverges. There, run it on the
*resolvent* J(u), the solution z of z + eta F(z) = u, by whatever inner solver: with `operator = u - J(u)` and
`lipschitz=2` the step is u_0 / (k+2) + (1 - 1/(k+2)) J(u_k).

Source: Variance Reduced Halpern Iteration for Finite-Sum Monotone Inclusions (2024, Cai et al.).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from steelyard import choices, precision

PyTree = Any


class HalpernResult(NamedTuple):
    """The last iterate, in the structure and dtypes of the start, and a residual norm for every iterate."""

    solution: PyTree
    residuals: Float[Array, "num_steps+1"]


def halpern(
    operator: Callable[[PyTree], PyTree],
    init: PyTree,
    *,
    lipschitz: float | Float[Array, ""],
    num_steps: int,
) -> HalpernResult:
    """Finds a zero u* of a cocoercive operator.

        u_{k+1} = u_0 / (k+2) + (1 - 1/(k+2)) (u_k - (2/L) F(u_k)),  k = 0, ..., num_steps - 1
        |F(u_k)| <= L |u_0 - u*| / (k+1)

    `num_steps + 1` evaluations of F and one tree beside the iterate. Iterates and norms are kept in float32 at least;
    F is evaluated in the dtypes of `init`.

    Args:
      operator: F, from a tree to a tree of the same structure, 1/`lipschitz`-cocoercive.
      init: u_0; `None` leaves stay `None`.
      lipschitz: L, positive, a number or a (traced) scalar.
      num_steps: number of steps, at least 0.

    Returns:
      u_{num_steps}, and |F(u_k)| for k = 0, ..., num_steps.

    Raises:
      ValueError: `lipschitz` is not positive, or `num_steps` is negative.

    Source: the iteration is Halpern's (1967), the bound from On the Convergence Rate of the Halpern-Iteration (2021,
    Lieder).
    """
    choices.require_within("lipschitz", lipschitz, "(0, inf)")
    choices.require_within("num_steps", num_steps, "[0, inf)")
    evaluate, start = _in_dtypes_of(init, operator), _wide(init)

    def step(u, k):
        value = evaluate(u)
        return _pulled_back(start, u, value, 1 / (k + 2), 2 / lipschitz), _norm(value)

    u, residuals = jax.lax.scan(step, start, jnp.arange(num_steps))
    return HalpernResult(_like(init, u), jnp.append(residuals, _norm(evaluate(u))))


def variance_reduced_halpern(
    component_operator: Callable[[PyTree, Int[Array, "b"]], PyTree],
    init: PyTree,
    *,
    num_components: int,
    lipschitz: float | Float[Array, ""],
    num_steps: int,
    rng: Key[Array, ""],
    batch_size: int | None = None,
) -> HalpernResult:
    """Finds a zero of a mean of n cocoercive operators, from a recursive estimate E of that mean.

        u_{k+1} = l_k u_0 + (1 - l_k) (u_k - E_k / (4L)),  l_k = 2 / (k+4),  E_0 = F(u_0)
        with probability p_{k+1}:  E_{k+1} = F(u_{k+1})
        otherwise:                 E_{k+1} = E_k + F_B(u_{k+1}) - F_B(u_k)
        p_k = 4 / (k+5) for k <= sqrt(n), then 4 / (sqrt(n) + 5)

    B are fresh indices, drawn with replacement, the same at both points. With one component every E is exact. A step
    costs p n + 2 (1 - p) b evaluations of components in the mean, n + O(sqrt(n)) L / accuracy in all. With a step 8
    times smaller and twice the pull, it takes some 16 times the steps of `halpern`, each about 6 / sqrt(n) of its cost:
    it pays from n of about 10,000. Under `jax.vmap` both branches are computed. Dtypes as in `halpern`; E too is
    float32 at least.

    Args:
      component_operator: `(u, indices) -> mean of F_i(u) over the indices`, a tree like u.
      init: u_0; `None` leaves stay `None`.
      num_components: n, at least 1.
      lipschitz: L, positive: of the components, in the mean square.
      num_steps: number of steps, at least 0.
      rng: a key; step k draws from `fold_in(rng, k)`, so that a longer run begins like a shorter one.
      batch_size: b, at least 1; by default the root of n, rounded up.

    Returns:
      u_{num_steps}, and |E_k| for k = 0, ..., num_steps: norms of the estimate, not of F. Evaluate F at the solution to
      be sure of it.

    Raises:
      ValueError: a number out of its range.

    Source: Variance Reduced Halpern Iteration (2024, Cai et al.), the method for finite-sum cocoercive operators.
    """
    choices.require_within("num_components", num_components, "[1, inf)")
    choices.require_within("lipschitz", lipschitz, "(0, inf)")
    choices.require_within("num_steps", num_steps, "[0, inf)")
    batch_size = math.ceil(math.sqrt(num_components)) if batch_size is None else batch_size
    choices.require_within("batch_size", batch_size, "[1, inf)")
    evaluate, start = _in_dtypes_of(init, component_operator), _wide(init)

    def full(u):
        return evaluate(u, jnp.arange(num_components))

    def step(carry, k):
        u, estimate = carry
        new = _pulled_back(start, u, estimate, 2 / (k + 4), 1 / (4 * lipschitz))
        coin, draw = jax.random.split(jax.random.fold_in(rng, k))

        def correct():
            batch = jax.random.randint(draw, (batch_size,), 0, num_components)
            return jax.tree.map(lambda e, a, b: e + a - b, estimate, evaluate(new, batch), evaluate(u, batch))

        is_full = jax.random.bernoulli(coin, _probability(k + 1, num_components))
        new_estimate = jax.lax.cond(is_full, lambda: full(new), correct)
        return (new, new_estimate), _norm(new_estimate)

    first = full(start)
    (u, _), residuals = jax.lax.scan(step, (start, first), jnp.arange(num_steps))
    return HalpernResult(_like(init, u), jnp.concatenate([_norm(first)[None], residuals]))


def _pulled_back(start: PyTree, u: PyTree, value: PyTree, weight: Array, step: Array | float) -> PyTree:
    """The average of the start, with the weight, and of a step from u."""

    def leaf(s, u, f):
        # Both numbers in the leaf's dtype: with x64 they would widen a float32 leaf.
        part, size = jnp.asarray(weight, u.dtype), jnp.asarray(step, u.dtype)
        return part * s + (1 - part) * (u - size * f)

    return jax.tree.map(leaf, start, u, value)


def _probability(k: Int[Array, ""], num_components: int) -> Array | float:
    if num_components == 1:
        return 1.0
    return 4 / (jnp.minimum(k, math.sqrt(num_components)) + 5)


def _in_dtypes_of(init: PyTree, operator: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """The operator on wide trees, evaluated in the dtypes of `init`."""

    def evaluate(u, *args):
        value = operator(_like(init, u), *args)
        return jax.tree.map(lambda f, x: jnp.asarray(f).astype(x.dtype), value, u)

    return evaluate


def _wide(tree: PyTree) -> PyTree:
    return jax.tree.map(precision.wide, tree)


def _like(init: PyTree, tree: PyTree) -> PyTree:
    return jax.tree.map(lambda x, y: y.astype(jnp.result_type(x)), init, tree)


def _norm(tree: PyTree) -> Float[Array, ""]:
    return jnp.asarray(optax.tree.norm(tree), jnp.float32 if not jax.tree.leaves(tree) else None)
