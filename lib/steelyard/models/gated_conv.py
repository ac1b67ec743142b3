"""A convolution that guesses from its input which output channels will fire, and gates the others off.

Source: Fire Together Wire Together: A Dynamic Pruning Approach with Self-Supervised Mask Prediction (2022, Elkerdawy et
al.).
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from steelyard import choices
from steelyard.models import layers
from steelyard.sparsity import gating


class GatedConv(nn.Module):
    """h * gate with h = activation(norm(conv(x))), where a small predictor sets the gate for each example.

        logits = dense(mean of x over its pixels),  gate = [sigmoid(logits) > 1/2]

    The gate acts in training and in evaluation; its gradient is that of the sigmoid (straight-through). What the
    predictor should have said is read off h: `gating.mass_mask` or `gating.top_mask` of its saliencies. Each layer sows
    `logits`, `target` and `gate` [B, features] in the collection `intermediates`, so that a network of named layers has
    the loss

        outputs, collected = model.apply(variables, x, mutable=["intermediates"])
        seen = [layer for layer in collected["intermediates"].values() if "target" in layer]
        loss = task_loss(outputs) + sum(gating.predictor_loss(*layer["logits"], *layer["target"]) for layer in seen)

    Parameters: `conv/kernel` [height, width, in, features], `conv/bias`, those of `norm`, `predictor/kernel`
    [in, features], `predictor/bias`. They are in * features more than those of the convolution.

    All channels are computed and then multiplied by the gate: the share of gates that are off, times that of the layer
    before, is what a kernel that skips them would save, and no time is saved here.

    Attributes:
      features: number of output channels.
      mass: share of the saliency that the target keeps, at most 1; give this or `ratio`.
      ratio: share of the channels that the target switches off at least, in [0, 1].
      min_kept: channels that a target by `mass` keeps at least.
      kernel_size, strides, padding: as in `Conv`.
      norm: called as `norm(name="norm")`, makes the module between convolution and activation, such as
        `functools.partial(nn.BatchNorm, use_running_average=False)`; `None` for none, and the convolution has a bias.
      activation: function after the norm.
      softmax: whether the predictor sees the softmax over the channels of the pooled input.
      decoupled: whether the gradient stops between the predictor and the layer's input.
      dtype, param_dtype: as in `Conv`.

    Raises:
      ValueError: both or none of `mass` and `ratio`, or a number out of range.
    """

    features: int
    mass: float | None = None
    ratio: float | None = None
    min_kept: int = 0
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: str | Sequence[tuple[int, int]] = "SAME"
    norm: Callable[..., Callable[[Array], Array]] | None = None
    activation: Callable[[Array], Array] = nn.relu
    softmax: bool = False
    decoupled: bool = True
    dtype: layers.DType | None = None
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        layers.require_positive(features=self.features)
        if (self.mass is None) == (self.ratio is None):
            raise ValueError(f"GatedConv needs mass or ratio, and not both: mass={self.mass}, ratio={self.ratio}")
        if self.mass is not None:
            choices.require_within("mass", self.mass, "(-inf, 1]")
        else:
            choices.require_within("ratio", self.ratio, "[0, 1]")
        choices.require_count("min_kept", self.min_kept, "[0, inf)")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array, "batch h_in w_in c_in"]) -> Float[Array, "batch h_out w_out c_out"]:
        """Maps images [B, H, W, in] to [B, H', W', features]."""
        logits = self._logits(x)
        window = (self.features, self.kernel_size, self.strides, self.padding)
        h = layers.Conv(*window, self.norm is None, self.dtype, self.param_dtype, name="conv")(x)
        h = self.activation(h if self.norm is None else self.norm(name="norm")(h))
        gate = _gate(logits)
        self.sow("intermediates", "logits", logits)
        self.sow("intermediates", "target", self._target(h))
        self.sow("intermediates", "gate", gate)
        return h * gate[:, None, None, :].astype(h.dtype)

    def _logits(self, x):
        pooled = jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        pooled = jax.lax.stop_gradient(pooled) if self.decoupled else pooled
        pooled = jax.nn.softmax(pooled) if self.softmax else pooled
        return layers.Dense(self.features, param_dtype=self.param_dtype, name="predictor")(pooled)

    def _target(self, h) -> Bool[Array, "batch c_out"]:
        saliency = gating.channel_saliency(jax.lax.stop_gradient(h))
        if self.mass is None:
            return gating.top_mask(saliency, self.ratio)
        return gating.mass_mask(saliency, self.mass, min_kept=self.min_kept)


@jax.custom_jvp
def _gate(logits: Float[Array, "batch c"]) -> Float[Array, "batch c"]:
    """1 where the sigmoid is above 1/2, else 0; differentiated as the sigmoid."""
    return (logits > 0).astype(logits.dtype)


@_gate.defjvp
def _gate_jvp(primals, tangents):
    (logits,), (tangent,) = primals, tangents
    probability = jax.nn.sigmoid(logits)
    return _gate(logits), probability * (1 - probability) * tangent
