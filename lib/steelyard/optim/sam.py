"""The sharpness-aware gradient: the gradient at the worst point near the parameters.

With a loss whose rare classes are weighted up, and a large radius, it also leads away from the saddle points in
which rare classes get stuck.

Sources: Sharpness-Aware Minimization for Efficiently Improving Generalization (2021, Foret et al.); adaptive form:
ASAM (2021, Kwon et al.); for rare classes: Escaping Saddle Points for Effective Generalization on Class-Imbalanced
Data (2022, Rangwani et al.).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from steelyard import choices, precision

PyTree = Any


def sam_value_and_grad(
    value_and_grad_fn: Callable[..., tuple[Any, PyTree]],
    *,
    rho: float | Float[Array, ""] = 0.05,
    adaptive: bool = False,
    eps: float = 1e-12,
) -> Callable[..., tuple[Any, PyTree]]:
    """Wraps a `jax.value_and_grad` so that its gradient is taken at an adversarially moved point.

        plain:     e = rho g / (|g| + eps)
        adaptive:  e = rho p^2 g / (| |p| g | + eps)
        result:    value at p, gradient at p + e

    The norm is over the whole tree, in float32. No gradient flows through e. Weights of classes or examples must
    enter the loss of both points, so give them as arguments of the function. Costs two gradients.

    Args:
      value_and_grad_fn: `(params, *args, **kwargs) -> (value, grads)`; with `has_aux` the value is `(value, aux)`.
      rho: radius of the neighbourhood, a number or a (traced) scalar; 0 gives the ordinary gradient.
      adaptive: scale the neighbourhood by the size of each parameter.
      eps: added to the norm, so that a zero gradient moves nothing.

    Returns:
      `(params, *args, **kwargs) -> (value, grads)`: value (and aux, such as batch statistics) of the unmoved
      parameters. Arguments, and so the batch and the random key, are the same at both points.

    Raises:
      ValueError: rho is negative, or eps is not positive.

    Source: Sharpness-Aware Minimization (2021, Foret et al.), equation 2 and algorithm 1.
    """
    choices.require_within("rho", rho, "[0, inf)")
    choices.require_within("eps", eps, "(0, inf)")

    def fn(params, *args, **kwargs):
        value, grads = value_and_grad_fn(params, *args, **kwargs)
        moved = jax.lax.stop_gradient(_ascend(params, grads, rho, adaptive, eps))
        _, grads = value_and_grad_fn(moved, *args, **kwargs)
        return value, grads

    return fn


def _ascend(params: PyTree, grads: PyTree, rho, adaptive: bool, eps) -> PyTree:
    wide_params, wide_grads = jax.tree.map(precision.wide, params), jax.tree.map(precision.wide, grads)
    if adaptive:
        direction = jax.tree.map(lambda p, g: jnp.abs(p) * g, wide_params, wide_grads)
        step = jax.tree.map(lambda p, d: jnp.abs(p) * d, wide_params, direction)
    else:
        direction = step = wide_grads
    scale = rho / (optax.tree.norm(direction) + eps)
    return jax.tree.map(lambda p, w, s: (w + scale * s).astype(p.dtype), params, wide_params, step)
