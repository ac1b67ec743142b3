"""Root mean square normalization, in full or estimated from the first features, and ghost batch normalization.

Root Mean Square Layer Normalization (Zhang and Sennrich, 2019); Train longer, generalize better: closing the
generalization gap in large batch training of neural networks (Hoffer et al., 2017). For layer and batch normalization
use Flax's own.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from steelyard import choices, precision
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
    choices.require_within("fraction", fraction, "(0, 1]")
    _check_affine(x, scale=scale, bias=bias)
    wide = precision.wide(x)
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
        choices.require_within("fraction", self.fraction, "(0, 1]")
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


class GhostBatchNorm(nn.Module):
    """Batch normalization within small groups of a large batch, whose noise helps to generalize.

        group l = examples l g ... (l + 1) g - 1:   y = (x - mean_l) / sqrt(var_l + epsilon) * scale + bias
        running statistics, group after group:      r <- momentum r + (1 - momentum) stat_l

    mean_l and var_l (biased) are taken over the examples and positions of a group, in float32 (float64 for float64
    inputs). Over m groups the running statistics become r momentum^m + (1 - momentum) sum_l momentum^(m-l) stat_l.
    In evaluation all examples are normalized by them. `init` leaves them at mean 0 and variance 1.

    A batch smaller than `ghost_size` is one group. If each device holds whole groups, normalizing needs no
    communication; only the running statistics are summed over devices. Costs the same as batch normalization.

    Parameters: `scale` [d], `bias` [d]. Collection `batch_stats`: `mean` [d], `var` [d].

    Attributes:
      ghost_size: examples in a group; it divides the batch.
      momentum: decay of the running statistics per group, in [0, 1].
      epsilon: added to the variance.
      use_scale: whether there is a learned factor for each feature.
      use_bias: whether there is a learned summand for each feature.
      dtype: dtype of the result; `None` keeps that of the input.
      param_dtype: dtype of new parameters.

    Source: Train longer, generalize better (Hoffer et al., 2017), algorithm 1. Its exponents of the running average
    are inconsistent as printed; the formula above is batch normalization applied to the groups in order.
    """

    ghost_size: int = 128
    momentum: float = 0.9
    epsilon: float = 1e-5
    use_scale: bool = True
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        choices.require_within("ghost_size", self.ghost_size, "[1, inf)")
        choices.require_within("momentum", self.momentum, "[0, 1]")
        choices.require_within("epsilon", self.epsilon, "[0, inf)")
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *spatial d"], use_running_average: bool = False
    ) -> Float[Array, "batch *spatial d"]:
        """Normalizes [N, ..., d] over the examples and positions of each group.

        Args:
          x: features along the last axis.
          use_running_average: evaluation: normalize by the running statistics, and leave them alone.

        Raises:
          ValueError: `ghost_size` does not divide N > `ghost_size`, a group has a single value for a feature, or `x`
            has no axis of examples.
        """
        shape = x.shape[-1:]
        running = {
            name: self.variable("batch_stats", name, fill, shape, jnp.float32)
            for name, fill in (("mean", jnp.zeros), ("var", jnp.ones))
        }
        wide = precision.wide(x)
        if use_running_average:
            y = _standardize(wide, running["mean"].value, running["var"].value, self.epsilon)
        else:
            groups = wide.reshape(-1, self._group_size(x.shape), *x.shape[1:])
            axes = tuple(range(1, groups.ndim - 1))
            mean, var = (statistic(groups, axes, keepdims=True) for statistic in (jnp.mean, jnp.var))
            y = _standardize(groups, mean, var, self.epsilon).reshape(x.shape)
            if not self.is_initializing():
                for name, value in (("mean", mean), ("var", var)):
                    running[name].value = self._follow(running[name].value, value.reshape(-1, *shape))
        if self.use_scale:
            y = y * layers.weight(self, "scale", nn.initializers.ones, shape, self.param_dtype)
        if self.use_bias:
            y = y + layers.weight(self, "bias", nn.initializers.zeros, shape, self.param_dtype)
        return y.astype(x.dtype if self.dtype is None else self.dtype)

    def _group_size(self, shape: tuple[int, ...]) -> int:
        if len(shape) < 2:
            raise ValueError(f"x has shape {shape}; it must be [N, ..., d]: examples first, features last")
        size = max(1, min(self.ghost_size, shape[0]))
        if shape[0] % size:
            raise ValueError(
                f"ghost_size={self.ghost_size} does not divide the batch of {shape[0]} examples, x of shape {shape}"
            )
        # A model may be initialized with one example: nothing is read off the result.
        if size * math.prod(shape[1:-1]) == 1 and (self.ghost_size == 1 or not self.is_initializing()):
            raise ValueError(
                f"ghost_size={self.ghost_size} leaves one value for a feature in each group of x of shape {shape}: "
                "its variance is zero. Take groups of at least 2 examples."
            )
        return size

    def _follow(self, running: Float[Array, "d"], groups: Float[Array, "m d"]) -> Float[Array, "d"]:
        """The running statistic after all groups, in order."""
        count = len(groups)
        weights = (1 - self.momentum) * self.momentum ** np.arange(count - 1.0, -1, -1)
        added = jnp.sum(jnp.asarray(weights, groups.dtype)[:, None] * groups, axis=0)
        return (self.momentum**count * running + added).astype(running.dtype)


def _standardize(x: Array, mean: Array, var: Array, epsilon: float) -> Array:
    return (x - mean) * jax.lax.rsqrt(var + epsilon)
