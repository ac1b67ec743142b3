"""Block coordinate descent: which block of parameters to update, and by how much.

The largest gradient is not the largest progress. With a bound H on the curvature, an update d of block b decreases
the loss by at least -(g_b'd + d'H_b d / 2), which is largest, score^2 / 2, for d = -H_b^-1 g_b. The rules differ in
how much of H they look at: nothing (`gs`), a number a block (`gsl`), a number a coordinate (`gsd`), or the block's
matrix (`gsq`).

For an l1 penalty, apply its proximal step (soft thresholding) after the update; the set of zeros is then found after
finitely many steps.

Source: Let's Make Block Coordinate Descent Converge Faster (2022, Nutini et al.).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from steelyard import choices, precision

PyTree = Any

RULES = ("gs", "gsl", "gsd", "gsq")
LEAF_RULES = ("gs", "gsl")


def block_scores(
    grad: Float[Array, "n"],
    blocks: Int[Array, "B s"],
    *,
    rule: str = "gsl",
    lipschitz: Float[Array, "B"] | None = None,
    diagonal: Float[Array, "n"] | None = None,
    hessian: Float[Array, "n n"] | None = None,
) -> Float[Array, "B"]:
    """How much progress each block promises; update the block of the largest (`jnp.argmax`: the first on ties).

        gs:   |g_b|
        gsl:  |g_b| / sqrt(L_b)
        gsd:  sqrt(sum over i in b of g_i^2 / D_i)
        gsq:  sqrt(g_b' H_b^-1 g_b),  H_b = hessian[b, b]

    With a bound L, D or H on the curvature and its own step (`block_direction`), the loss decreases by at least
    score^2 / 2. With the true Hessian of a quadratic, `gsq` is the Newton decrement and the decrease is exact. `gs`
    promises nothing. Blocks may overlap, and one block of all coordinates is a full step. The cost is that of the full
    gradient, and s^3 a block for `gsq`. Arithmetic and result are in float32 at least.

    Args:
      grad: the full gradient.
      blocks: indices into `grad`, a row a block.
      rule: "gs", "gsl", "gsd" or "gsq".
      lipschitz: for "gsl", a bound on the largest eigenvalue of each block's Hessian, positive.
      diagonal: for "gsd", a diagonal bound on the Hessian within each block, positive: the block size times the
        coordinates' own constants always is one.
      hessian: for "gsq", a bound on the Hessian, positive definite within each block; a singular block gives NaN or
        infinity, and regularization is the caller's.

    Returns:
      A score for each block, at least 0.

    Raises:
      ValueError: an unknown rule, one without its argument, a wrong shape, or a constant that is not positive.

    Source: Let's Make Block Coordinate Descent Converge Faster (2022, Nutini et al.), greedy rules for fixed blocks.
    """
    choices.require("rule", rule, RULES)
    _check_vector("grad", grad)
    if jnp.ndim(blocks) != 2:
        raise ValueError(f"blocks has shape {jnp.shape(blocks)}; it must be [blocks, block size]")
    block_grads = precision.wide(grad)[blocks]
    if rule == "gsd":
        diagonal = _constants("diagonal", diagonal, jnp.shape(grad), rule)
        return _norms(block_grads / jnp.sqrt(diagonal)[blocks])
    if rule == "gsq":
        square = _square(hessian, grad, rule)
        return jnp.sqrt(jax.vmap(lambda b, g: g @ _solve(square, b, g))(blocks, block_grads))
    scores = _norms(block_grads)
    return (
        scores if rule == "gs" else scores / jnp.sqrt(_constants("lipschitz", lipschitz, jnp.shape(blocks)[:1], rule))
    )


def block_direction(
    grad: Float[Array, "n"],
    block: Int[Array, "s"],
    *,
    lipschitz: Float[Array, ""] | float | None = None,
    hessian: Float[Array, "n n"] | None = None,
) -> Float[Array, "n"]:
    """The update of one block, zero elsewhere: a gradient step or a matrix step.

        lipschitz:  d_b = -g_b / L_b
        hessian:    d_b = -H_b^-1 g_b

    The step of `gsd` is the matrix step with `hessian=jnp.diag(diagonal)`.

    Args:
      grad: the full gradient; only its block is read.
      block: indices into `grad`, such as `blocks[jnp.argmax(scores)]`, or the result of `greedy_block`.
      lipschitz: the block's constant, positive; give this or `hessian`.
      hessian: as in `block_scores`.

    Returns:
      The update, in the dtype of the gradient: x + d is the new point.

    Raises:
      ValueError: both or none of `lipschitz` and `hessian`, a wrong shape, or a constant that is not positive.

    Source: Let's Make Block Coordinate Descent Converge Faster (2022, Nutini et al.), gradient and matrix updates.
    """
    if (lipschitz is None) == (hessian is None):
        raise ValueError("block_direction needs lipschitz (a gradient step) or hessian (a matrix step), and not both")
    _check_vector("grad", grad)
    block_grad = precision.wide(grad)[block]
    if hessian is None:
        step = block_grad / _constants("lipschitz", lipschitz, (), None)
    else:
        step = _solve(_square(hessian, grad, None), block, block_grad)
    return jnp.zeros_like(grad).at[block].set(-step.astype(jnp.result_type(grad)))


def greedy_block(grad: Float[Array, "n"], size: int, *, diagonal: Float[Array, "n"]) -> Int[Array, "size"]:
    """The best block of a given size, of any coordinates: those with the largest |g_i| / sqrt(D_i).

    These maximize the `gsd` score over all blocks of the size. Sorted by falling score, the first coordinate on ties.

    Args:
      grad: the full gradient.
      size: number of coordinates, from 1 to n.
      diagonal: a diagonal bound on the Hessian within any block of the size, positive: size * L_i is one, where the L_i
        are the coordinates' own constants.

    Raises:
      ValueError: `size` is not in [1, n], a wrong shape, or a constant that is not positive.

    Source: Let's Make Block Coordinate Descent Converge Faster (2022, Nutini et al.), variable blocks.

    >>> greedy_block(jnp.asarray([1.0, -3.0, 2.0]), 2, diagonal=jnp.ones(3)).tolist()
    [1, 2]
    """
    _check_vector("grad", grad)
    choices.require_within("size", size, f"[1, {jnp.shape(grad)[0]}]")
    diagonal = _constants("diagonal", diagonal, jnp.shape(grad), None)
    return jax.lax.top_k(jnp.abs(precision.wide(grad)) / jnp.sqrt(diagonal), size)[1]


def block_coordinate(*, rule: str = "gsl", lipschitz: PyTree | None = None) -> optax.GradientTransformationExtraArgs:
    """Updates one leaf a step, that with the best score, whose direction is g / L; the others get zeros.

    Follow it with `optax.scale_by_learning_rate(1.0)` for the step -g / L of `block_direction`. The full gradient is
    computed at each step, so that a step is cheaper than a full one only in what it changes. Norms are in float32 at
    least and the result has the dtype of the gradient.

    Args:
      rule: "gs" (largest gradient norm) or "gsl" (norm over sqrt(L)); the first leaf, in the order of
        `jax.tree.leaves`, wins on ties.
      lipschitz: a tree like the parameters of positive numbers, a bound on the curvature of each leaf; by default 1.

    Returns:
      A transformation without state.

    Raises:
      ValueError: an unknown rule, or a constant that is not positive; at update, `lipschitz` has not one number for
        each leaf of the gradient.

    Source: Let's Make Block Coordinate Descent Converge Faster (2022, Nutini et al.), greedy rules for fixed blocks.
    """
    choices.require("rule", rule, LEAF_RULES)
    constants = [_constants("lipschitz", constant, (), rule) for constant in jax.tree.leaves(lipschitz)]

    def init(params):
        del params
        return optax.EmptyState()

    def update(updates, state, params=None, **extra_args):
        del params, extra_args
        leaves, structure = jax.tree.flatten(updates)
        bounds = [jnp.float32(1)] * len(leaves) if lipschitz is None else constants
        if len(bounds) != len(leaves):
            raise ValueError(f"lipschitz has {len(bounds)} leaves, but the gradient has {len(leaves)}")
        if not leaves:
            return updates, state
        norms = jnp.stack([_norms(jnp.ravel(precision.wide(g))) for g in leaves])
        scores = norms if rule == "gs" else norms / jnp.sqrt(jnp.stack(bounds))
        best = jnp.argmax(scores)
        chosen = [_keep_if(best == i, g, bound) for i, (g, bound) in enumerate(zip(leaves, bounds, strict=True))]
        return jax.tree.unflatten(structure, chosen), state

    return optax.GradientTransformationExtraArgs(init, update)


def _keep_if(condition, grad, bound):
    wide = precision.wide(grad)
    return jnp.where(condition, wide / bound.astype(wide.dtype), 0).astype(jnp.result_type(grad))


def _norms(x: Float[Array, "*batch s"]) -> Float[Array, "*batch"]:
    # Its gradient at zero is zero.
    return optax.safe_norm(x, 0, axis=-1)


def _solve(hessian: Float[Array, "n n"], block: Int[Array, "s"], grad: Float[Array, "s"]) -> Float[Array, "s"]:
    return jnp.linalg.solve(hessian[block][:, block].astype(grad.dtype), grad)


def _check_vector(name: str, value: Array) -> None:
    if jnp.ndim(value) != 1:
        raise ValueError(f"{name} has shape {jnp.shape(value)}; it must be a vector (jax.flatten_util.ravel_pytree)")


def _square(hessian: Array | None, grad: Array, rule: str | None) -> Array:
    if hessian is None:
        raise ValueError(f"rule={rule!r} needs hessian")
    if jnp.shape(hessian) != 2 * jnp.shape(grad):
        raise ValueError(f"hessian has shape {jnp.shape(hessian)}, but grad has shape {jnp.shape(grad)}")
    return precision.wide(hessian)


def _constants(name: str, value: Any, shape: tuple[int, ...], rule: str | None) -> Array:
    """The positive constants as an array, float32 at least."""
    if value is None:
        raise ValueError(f"rule={rule!r} needs {name}")
    if jnp.shape(value) != shape:
        raise ValueError(f"{name} has shape {jnp.shape(value)}; it must have shape {shape}")
    if not isinstance(value, jax.core.Tracer) and np.size(value):
        choices.require_within(name, np.min(value), "(0, inf)")
    return precision.wide(value)
