"""Scores of frozen weights from the gradients of their low-rank adapters.

Source: LoRAPrune: Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning (2023, Zhang et al.).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from steelyard import choices, precision


def lora(
    weight: Float[Array, "... d_in d_out"],
    a: Float[Array, "... d_in rank"],
    b: Float[Array, "... rank d_out"],
    grad_a: Float[Array, "... d_in rank"],
    grad_b: Float[Array, "... rank d_out"],
    *,
    scale: float = 1.0,
    power: float = 1,
) -> Float[Array, "... d_in d_out"]:
    """|g (W + scale a b)|^power, g = a grad_b + grad_a b - grad_a grad_b.

    g is the change, up to its sign, of the product a b in one unit step of descent on the factors; it stands in for
    the gradient of W, which is never made.

    Args:
      weight: the frozen W; dequantize it for this if it is stored in few bits.
      a, b: the adapter's factors.
      grad_a, grad_b: their gradients.
      scale: of the adapter in the weight that the model sees, alpha / rank.
      power: 1, or 2 as in the paper.

    Returns:
      An array like `weight`. Cost: two products of low-rank factors, of ranks 2 rank and rank, fused with what follows.

    Raises:
      ValueError: the shapes do not fit, or `power` is not positive.
    """
    choices.require_within("power", power, "(0, inf)")
    _check_factors(weight, a, b, grad_a, grad_b)
    wide_weight, a, b, grad_a, grad_b = map(precision.wide, (weight, a, b, grad_a, grad_b))
    # One product of twice the rank, rather than three arrays of the weight's size.
    step = jnp.concatenate([a, grad_a], axis=-1) @ jnp.concatenate([grad_b, b - grad_b], axis=-2)
    score = jnp.abs(step * (wide_weight + scale * (a @ b)))
    return (score if power == 1 else score**power).astype(jnp.result_type(weight))


def _check_factors(weight, a, b, grad_a, grad_b):
    (*lead, d_in, d_out), rank = jnp.shape(weight), jnp.shape(a)[-1]
    needed = {"a": (*lead, d_in, rank), "b": (*lead, rank, d_out)}
    needed |= {"grad_a": needed["a"], "grad_b": needed["b"]}
    for (name, shape), x in zip(needed.items(), (a, b, grad_a, grad_b), strict=True):
        if jnp.shape(x) != shape:
            raise ValueError(
                f"{name} has shape {jnp.shape(x)}, but with a of shape {jnp.shape(a)} a weight of shape "
                f"{jnp.shape(weight)} needs {shape}"
            )
