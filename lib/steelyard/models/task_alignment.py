"""A square map for each task, between its inputs and what all tasks share (2020, Wu et al.).

Understanding and Improving Information Transfer in Multi-Task Learning, the covariance alignment method.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from steelyard import formats
from steelyard.models import layers


class TaskAlignment(nn.Module):
    """Turns the inputs z of task i into `z R_i`, so that tasks whose inputs differ by a linear map can share a module.

    `model.apply(variables, inputs [..., d], task)` gives [..., d]. The maps start as the identity and are trained
    together with the shared module and the heads, which come after.

    Parameters: `kernel` [num_tasks, d, d].

    Attributes:
      num_tasks: number of maps.
      features: d.
      dtype: dtype of the computation; `None` takes the result type of input and parameters.
      param_dtype: dtype of new parameters.
    """

    num_tasks: int
    features: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        layers.require_positive(num_tasks=self.num_tasks, features=self.features)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch d"], task: int | Int[Array, "*batch"]) -> Float[Array, "*batch d"]:
        """Maps inputs with the map of their task.

        Args:
          inputs: [..., d].
          task: one number for all inputs, or an array of numbers [...], one for each. An array costs a copy of a map
            per input: with few tasks it is cheaper to call once per task.

        Raises:
          ValueError: the last axis of `inputs` is not `features`, `task` is not in 0..num_tasks - 1 (seen only if it is
            a Python integer), or it is an array of another shape than [...].
        """
        if inputs.shape[-1] != self.features:
            raise ValueError(f"inputs must have {self.features} features, got shape {inputs.shape}")
        if isinstance(task, int) and not 0 <= task < self.num_tasks:
            raise ValueError(f"task={task} must lie in 0..{self.num_tasks - 1}")
        if jnp.ndim(task) and jnp.shape(task) != inputs.shape[:-1]:
            raise ValueError(f"task must be a number or have shape {inputs.shape[:-1]}, got {jnp.shape(task)}")
        shape = (self.num_tasks, self.features, self.features)
        kernel = formats.dense(layers.weight(self, "kernel", _identities, shape, self.param_dtype))
        inputs, kernel = layers.to_dtype(inputs, self.dtype), layers.to_dtype(kernel, self.dtype)
        return jnp.einsum("...d,...de->...e", inputs, kernel[task])


def _identities(rng: jax.Array, shape: tuple[int, int, int], dtype: Any) -> Float[Array, "num_tasks d d"]:
    del rng
    return jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape)
