"""A residual network for small images: three stages of basic blocks, each stage at half the resolution.

Deep Residual Learning for Image Recognition (He et al., 2016), section 4.2.
"""

import functools
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
      `stem/kernel` [3, 3, C, width], `stem_norm/{scale,bias}`;
      `stage_s_block_b/conv_0/kernel`, `.../norm_0/{scale,bias}`, `.../conv_1/kernel`, `.../norm_1/{scale,bias}`, and
      where the shape changes `.../shortcut/kernel` [1, 1, in, out], `.../shortcut_norm/{scale,bias}`;
      `logits/kernel` [4 width, num_classes], `logits/bias`.
    Collection `batch_stats`: `mean` and `var` beside every norm.

    Attributes:
      num_classes: number of logits.
      num_blocks: blocks in each stage, n.
      width: channels of the first stage; the others have 2 and 4 times as many.
      momentum: decay of the running batch statistics, per step.
      dtype: dtype of the computation; `None` takes the result type of input and parameters.
      param_dtype: dtype of new parameters.
    """

    num_classes: int
    num_blocks: int = 3
    width: int = 16
    momentum: float = 0.9
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self):
        layers.require_positive(num_classes=self.num_classes, num_blocks=self.num_blocks, width=self.width)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Float[Array, "batch h w c"], *, train: bool = False) -> Float[Array, "batch classes"]:
        """Maps images [B, H, W, C] to logits [B, num_classes] (float32 at least)."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        conv = functools.partial(layers.Conv, use_bias=False, kernel_init=nn.initializers.he_normal(), **types)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=self.momentum, **types)
        x = nn.relu(norm(name="stem_norm")(conv(self.width, name="stem")(images)))
        for stage in range(NUM_STAGES):
            for block in range(self.num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                features = self.width * 2**stage
                x = _Block(features, stride, conv, norm, name=f"stage_{stage}_block_{block}")(x)
        x = jnp.mean(x, axis=(1, 2), dtype=jnp.promote_types(x.dtype, jnp.float32))
        return layers.Dense(self.num_classes, param_dtype=self.param_dtype, name="logits")(x)


class _Block(nn.Module):
    """relu(shortcut(x) + norm(conv(relu(norm(conv(x)))))), with a 1x1 convolution as shortcut where shapes differ."""

    features: int
    stride: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        strides = (self.stride, self.stride)
        y = nn.relu(self.norm(name="norm_0")(self.conv(self.features, strides=strides, name="conv_0")(x)))
        y = self.norm(name="norm_1")(self.conv(self.features, name="conv_1")(y))
        if x.shape != y.shape:
            x = self.conv(self.features, (1, 1), strides=strides, name="shortcut")(x)
            x = self.norm(name="shortcut_norm")(x)
        return nn.relu(x + y)
