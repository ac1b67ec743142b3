"""A residual network for small images: three stages of basic blocks, each stage at half the resolution.

Deep Residual Learning for Image Recognition (He et al., 2016), section 4.2.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from steelyard.models import layers

NUM_STAGES = 3


class ResNet(nn.Module):
    """Images to logits by 6 n + 2 layers: a convolution, three stages of n blocks, the mean over pixels, a dense layer.

    `model.apply(variables, images [B, H, W, C], train=False)` gives logits [B, num_classes]. In training the batch
    statistics change: `model.apply(variables, images, train=True, mutable=["batch_stats"])` gives the logits and the
    new collection. Any image size will do; 8x8, 28x28 and 32x32 are the usual ones.

    Parameters, for stage s in 0..2 and block b in 0..num_blocks-1:
      `stem/kernel` [3, 3, C, width of stage 0], `stem_norm/{scale,bias}`;
      `stage_s_block_b/conv_0/kernel`, `.../norm_0/{scale,bias}`, `.../conv_1/kernel`, `.../norm_1/{scale,bias}`, and
      in the first block of stages 1 and 2 `.../shortcut/kernel` [1, 1, in, out], `.../shortcut_norm/{scale,bias}`;
      `logits/kernel` [width of stage 2, num_classes], `logits/bias`.
    Collection `batch_stats`: `mean` and `var` beside every norm.

    Attributes:
      num_classes: number of logits.
      num_blocks: blocks in each stage, n.
      width: channels of the first stage, the others having 2 and 4 times as many; or those of each stage.
      momentum: decay of the running batch statistics, per step.
      dtype: dtype of the computation; `None` takes the result type of input and parameters.
      param_dtype: dtype of new parameters.
      inner_width: channels between the two convolutions of a block: one number for all blocks, one for each in order,
        or `None` for those of its stage.
    """

    num_classes: int
    num_blocks: int = 3
    width: int | Sequence[int] = 16
    momentum: float = 0.9
    dtype: Any = None
    param_dtype: Any = jnp.float32
    inner_width: int | Sequence[int] | None = None

    def __post_init__(self):
        layers.require_positive(num_classes=self.num_classes, num_blocks=self.num_blocks)
        _inner_widths(self.inner_width, stage_widths(self.width), self.num_blocks)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Float[Array, "batch h w c"], *, train: bool = False) -> Float[Array, "batch classes"]:
        """Maps images [B, H, W, C] to logits [B, num_classes] (float32 at least)."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = functools.partial(layers.Conv, use_bias=False, kernel_init=nn.initializers.he_normal(), **types)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=self.momentum, **types)
        widths = stage_widths(self.width)
        inner = iter(_inner_widths(self.inner_width, widths, self.num_blocks))
        x = nn.relu(norm(name="stem_norm")(conv(widths[0], name="stem")(images)))
        for stage in range(NUM_STAGES):
            for block in range(self.num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                x = _Block(next(inner), widths[stage], stride, conv, norm, name=f"stage_{stage}_block_{block}")(x)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        return layers.Dense(self.num_classes, param_dtype=self.param_dtype, name="logits")(x)


def stage_widths(width: int | Sequence[int]) -> tuple[int, ...]:
    """Channels of each stage: `width`, twice and four times as many; or the given ones."""
    widths = width if isinstance(width, Sequence) else tuple(width * 2**stage for stage in range(NUM_STAGES))
    return layers.per_layer("width", widths, NUM_STAGES)


def _inner_widths(inner: int | Sequence[int] | None, widths: Sequence[int], num_blocks: int) -> tuple[int, ...]:
    """Channels between the two convolutions of each block, in order."""
    stages = tuple(width for width in widths for _ in range(num_blocks))
    return layers.per_layer("inner_width", stages if inner is None else inner, len(stages))


class _Block(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))), with a 1x1 convolution as shortcut where it strides."""

    inner: int
    features: int
    stride: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        strides = (self.stride, self.stride)
        y = nn.relu(self.norm(name="norm_0")(self.conv(self.inner, strides=strides, name="conv_0")(x)))
        y = self.norm(name="norm_1")(self.conv(self.features, name="conv_1")(y))
        if self.stride > 1:
            x = self.conv(self.features, (1, 1), strides=strides, name="shortcut")(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)
