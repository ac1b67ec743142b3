"""The optimal brain surgeon's cost of a weight, and a gradient that respects it.

Source: Pruning as a Domain-specific LLM Extractor (2024, Zhang et al.), which joins the two: weights that matter for a
domain, and for everything else.
"""

import math
from typing import Any

import jax
import jax.custom_batching
import jax.numpy as jnp
import jax.scipy.linalg
from jaxtyping import Array, Float

from steelyard import choices, precision
from steelyard.sparsity.scores import leaves

PyTree = Any


def obs(
    weight: Float[Array, "... d_in d_out"], hessian: Float[Array, "n n"], *, damping: float = 0.01
) -> Float[Array, "... d_in d_out"]:
    """w_ij^2 / [H'^-1]_ii: by how much the layer's squared error grows when the entry is removed.

    H' = H + damping mean(diag H) I, the other weights of the output unit being free to make up for it. With H = 2/N
    X^T X the error is the mean over the N rows of the layer's input.

    Args:
      weight: a kernel, [in, out], or a convolution's [height, width, in, out]; use `jax.vmap` for a stack of them.
      hessian: symmetric, n the product of all axes of the kernel but the last, as `calibration.hessian` gives it.
      damping: relative to the mean of the diagonal. Needed where H is singular: fewer rows than inputs, inputs that
        depend on each other. An input whose diagonal is zero even so gets 1 there.

    Returns:
      An array like `weight`; an input that is always zero costs next to nothing. Cost: n^3 for the inverse.

    Raises:
      ValueError: the shapes do not fit, or `damping` is negative.
    """
    choices.require_within("damping", damping, "[0, inf)")
    weight, hessian = jnp.asarray(weight), precision.wide(hessian)
    size = math.prod(weight.shape[:-1])
    if weight.ndim < 2 or hessian.shape != (size, size):
        raise ValueError(
            f"hessian of shape {hessian.shape} does not fit a weight of shape {weight.shape}: it must be {(size, size)}"
        )
    diagonal = jnp.diagonal(hessian)
    added = jnp.full(size, damping * jnp.mean(diagonal), hessian.dtype)
    damped = hessian + jnp.diag(jnp.where(diagonal + added == 0, 1, added))
    score = precision.wide(weight) ** 2 / _inverse_diagonal(damped).reshape(*weight.shape[:-1], 1)
    return score.astype(weight.dtype)


def dual_gradient(
    grads: PyTree, general: PyTree, *, learning_rate: float | Float[Array, ""], strength: float = 0.1
) -> PyTree:
    """g + 2 strength learning_rate^2 general g^2: the gradient of a loss that also asks to keep what matters elsewhere.

    The loss is L + strength sum general (W' - W)^2, with W' one step of descent away from W. With it in place of the
    gradient, `taylor` scores a weight by what it does for L and by what it does elsewhere.

    Args:
      grads: g, a tree of arrays; `None` leaves pass.
      general: like `grads`, how much each entry matters elsewhere, such as `obs` of each layer.
      learning_rate: of that step; may be traced.
      strength: of the second term.

    Returns:
      A tree like `grads`. Cost: one elementwise pass.

    Raises:
      ValueError: the trees differ in leaves or shapes; `strength` or `learning_rate` is negative.
    """
    choices.require_within("learning_rate", learning_rate, "[0, inf)")
    choices.require_within("strength", strength, "[0, inf)")
    factor = 2 * strength * learning_rate**2
    return leaves.map_wide(lambda g, cost: g + factor * cost * g * g, grads=grads, general=general)


# One matrix after the other under vmap: on a CPU with few threads, jaxlib's solver of a batch waits for ever for
# threads that another batch holds.
@jax.custom_batching.sequential_vmap
def _inverse_diagonal(matrix: Float[Array, "n n"]) -> Float[Array, "n"]:
    """Of the inverse L^-T L^-1, from the columns of L^-1: sums of squares, which cannot come out negative."""
    lower = jnp.linalg.cholesky(matrix)
    inverse = jax.scipy.linalg.solve_triangular(lower, jnp.eye(len(matrix), dtype=matrix.dtype), lower=True)
    return jnp.sum(inverse**2, axis=0)
