"""A multilayer perceptron."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from steelyard.models import layers


class MLP(nn.Module):
    """Dense layers with an activation between them and none after the last.

    `model.apply(variables, inputs [..., d], train=bool, rngs={"dropout": key})` gives [..., features[-1]]; with
    `flatten=True` inputs [B, ...] are taken as [B, d]. The key is needed only for `train=True` and `dropout > 0`.

    Parameters: `dense_0/kernel` [d, features[0]], `dense_0/bias` [features[0]], then `dense_1`, `dense_2`, ...

    Attributes:
      features: output width of each layer; the last is the width of the result.
      activation: function between the layers.
      use_bias: whether the layers have biases.
      flatten: whether all axes but the first are features, as for an image.
      dropout: share of hidden units set to zero in training, in [0, 1).
      dtype: dtype of the computation; `None` takes the result type of input and parameters.
      param_dtype: dtype of new parameters.
      kernel_init: initializer of all kernels.
    """

    features: Sequence[int]
    activation: Callable[[Array], Array] = nn.relu
    use_bias: bool = True
    flatten: bool = False
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32
    kernel_init: layers.Initializer = nn.initializers.lecun_normal()

    def __post_init__(self):
        if not len(self.features):
            raise ValueError(f"features must name at least the width of the result, got {self.features!r}.")
        layers.require_positive(**{f"features[{i}]": width for i, width in enumerate(self.features)})
        layers.require_fraction(dropout=self.dropout)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Float[Array, "..."], *, train: bool = False) -> Float[Array, "..."]:
        """Maps [..., d] to [..., features[-1]]."""
        x = inputs.reshape(inputs.shape[0], -1) if self.flatten else inputs
        last = len(self.features) - 1
        for i, width in enumerate(self.features):
            x = layers.Dense(width, self.use_bias, self.dtype, self.param_dtype, self.kernel_init, name=f"dense_{i}")(x)
            if i < last:
                x = nn.Dropout(self.dropout, deterministic=not train)(self.activation(x))
        return x
