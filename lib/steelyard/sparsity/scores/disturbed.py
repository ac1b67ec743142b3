"""A loss that has a gradient where student and teacher are still the same.

Source: 0.1% Data Makes Segment Anything Slim (2023, Chen et al.).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from steelyard import choices, precision

PyTree = Any


def disturbed_loss(
    student_fn: Callable[[PyTree], Float[Array, "..."]],
    teacher_out: Float[Array, "..."],
    rng: Key[Array, ""],
    *,
    std: float = 0.01,
) -> Callable[[PyTree], Float[Array, ""]]:
    """mean (teacher_out + noise - student(params))^2, noise ~ N(0, std^2), as a function of the parameters.

    Before anything is pruned the student is the teacher, and every distance between them has gradient zero; to a
    target that is off by noise it has one, with a size in proportion to `std`. Needs no labels: `scores.saliency`
    with this gradient, summed over samples of other noise.

    Args:
      student_fn: `params -> outputs`; close over the inputs.
      teacher_out: what the teacher gives for the same inputs; it is not differentiated.
      rng: a key; another one for each sample.
      std: of the noise. With 0 the gradient is zero where student and teacher agree.

    Returns:
      `params -> scalar`, in float32 at least.

    Raises:
      ValueError: `std` is negative; at the call, the outputs have another shape than the teacher's.
    """
    choices.require_within("std", std, "[0, inf)")
    teacher_out = jax.lax.stop_gradient(precision.wide(teacher_out))
    target = teacher_out + std * jax.random.normal(rng, teacher_out.shape, teacher_out.dtype)

    def loss(params: PyTree) -> Float[Array, ""]:
        outputs = student_fn(params)
        if jnp.shape(outputs) != target.shape:
            raise ValueError(f"the student's outputs have shape {jnp.shape(outputs)}, the teacher's {target.shape}")
        return jnp.mean((target - precision.wide(outputs)) ** 2)

    return loss
