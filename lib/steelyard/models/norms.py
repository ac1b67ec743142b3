"""Root mean square normalization, over all features or estimated from the first few.

Root Mean Square Layer Normalization (Zhang and Sennrich, 2019). For layer and batch normalization use Flax's own.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from steelyard.models import layers


def rms_norm(
    x: Float[Array, "*batch d"],
    scale: Float[Array, "d"] | None = None,
    bias: Float[Array, "d"] | None = None,
    *,
    fraction: float = 1.0,
    epsilon: float = 1e-8,
    where: Bool[Array, "*#batch d"] | None = None,
) -> Float[Array, "*batch d"]:
    """Divides by the root mean square over the last axis, without centring.

        k = ceil(fraction d),  y = x / sqrt(mean(x[..., :k]^2) + epsilon) * scale + bias

    All d features are divided by the same number. The arithmetic is done in float32 (float64 for float64 inputs) and
    the result has the dtype of `x`.

    Args:
      x: features along the last axis.
      scale: factor for each feature; `None` is 1.
      bias: summand for each feature; `None` is 0.
      fraction: share of the features that estimate the root mean square, in (0, 1] (the paper's partial RMSNorm).
      epsilon: added to the mean square.
      where: which features are live; the others are left out of the mean and are 0 in the result.

    Returns:
      Normalized features, in the shape and dtype of `x`.

    Raises:
      ValueError: `fraction` lies outside (0, 1], or `scale` or `bias` has not one entry a feature.

    Source: Root Mean Square Layer Normalization (Zhang and Sennrich, 2019), equation 4 and section 4.2. The authors
    round k down, which divides by nothing when fraction * d < 1; here k is rounded up.
    """
    _check_fraction(fraction)
    _check_affine(x, scale=scale, bias=bias)
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    y = wide * jax.lax.rsqrt(_mean_square(wide, fraction, where) + epsilon)
    y = y if scale is None else y * scale
    y = y if bias is None else y + bias
    y = y if where is None else jnp.where(where, y, 0)
    return y.astype(x.dtype)


def _mean_square(x: Array, fraction: float, where: Array | None) -> Array:
    # The small number keeps a product such as 0.1 * 30 = 3.0000000000000004 from counting one feature too many.
    count = max(1, math.ceil(fraction * x.shape[-1] - 1e-9))
    squares = jnp.square(x[..., :count])
    if where is None:
        return jnp.mean(squares, axis=-1, keepdims=True)
    live = where[..., :count]
    total = jnp.sum(jnp.where(live, squares, 0), axis=-1, keepdims=True)
    return total / jnp.maximum(jnp.sum(live, axis=-1, keepdims=True), 1)


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], got {fraction}.")


def _check_affine(x: Array, **affine: Array | None) -> None:
    for name, value in affine.items():
        if value is not None and jnp.shape(value) != x.shape[-1:]:
            raise ValueError(f"{name} has shape {jnp.shape(value)}, but x has shape {x.shape}: one entry a feature.")


class RMSNorm(nn.Module):
    """`rms_norm` with a learned scale and, if wanted, a learned bias.

    Parameters: `scale` [d], `bias` [d].

    Attributes:
      fraction: share of the features that estimate the root mean square, in (0, 1].
      epsilon: added to the mean square.
      use_scale: whether there is a learned factor for each feature.
      use_bias: whether there is a learned summand for each feature.
      dtype: dtype of the result; `None` keeps that of the input.
      param_dtype: dtype of new parameters.
    """

    fraction: float = 1.0
    epsilon: float = 1e-8
    use_scale: bool = True
    use_bias: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        _check_fraction(self.fraction)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch d"], *, where: Bool[Array, "*#batch d"] | None = None
    ) -> Float[Array, "*batch d"]:
        """Normalizes [..., d] over its last axis; `where` as in `rms_norm`."""
        shape = x.shape[-1:]
        scale = layers.weight(self, "scale", nn.initializers.ones, shape, self.param_dtype) if self.use_scale else None
        bias = layers.weight(self, "bias", nn.initializers.zeros, shape, self.param_dtype) if self.use_bias else None
        # A wider result is cast before the arithmetic, so that nothing is rounded to the input's dtype on the way.
        wide = x if self.dtype is None else x.astype(jnp.promote_types(x.dtype, self.dtype))
        y = rms_norm(wide, scale, bias, fraction=self.fraction, epsilon=self.epsilon, where=where)
        return layers.to_dtype(y, self.dtype)
