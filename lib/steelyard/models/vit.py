"""A small vision transformer with a convolutional stem and named heads.

An Image is Worth 16x16 Words (Dosovitskiy et al., 2021); Early Convolutions Help Transformers See Better (Xiao et al.,
2021) for the stem; masked-image reconstruction from every token as in SimMIM (Xie et al., 2022).
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from steelyard.models import attention, layers

# Of the order of a patch's embedding. The customary 0.02 leaves the tokens of a small model, trained for a few hundred
# steps, without a sense of place for much of that time.
POSITION_STDDEV = 0.5


class ViT(nn.Module):
    """Images to logits and, if wanted, to a reconstruction of every pixel.

    `model.apply(variables, images [B, H, W, C], train=bool, rngs={"dropout": key})` gives a dict:
      `logits` [B, num_classes], from the mean over the tokens;
      `reconstruction` [B, H, W, C], if `reconstruct`: each token predicts the pixels of its patch. Which pixels of the
      input are masked is the caller's choice; the model sees the images as they come.
    The key is needed only for `train=True` and `dropout > 0`.

    Parameters, with width d, T = (H / patch) (W / patch) tokens, block b in 0..depth-1:
      `stem_0/{kernel,bias}` [3, 3, C, stem[0]], `stem_1/...`;
      `patch/{kernel,bias}` [patch patch stem[-1], d], `position` [1, T, d];
      `block_b/attention_norm/{scale,bias}`, `block_b/attention/...` of `SelfAttention`;
      `block_b/mlp_norm/{scale,bias}`, `block_b/mlp/up/{kernel,bias}` [d, mlp_width], `block_b/mlp/down/...`;
      `norm/{scale,bias}`, `logits/{kernel,bias}`, `reconstruction/{kernel,bias}` [d, patch patch C].

    Attributes:
      num_classes: number of logits.
      patch: side of a token's square patch, in pixels.
      width: features of a token.
      depth: number of blocks.
      heads: attention heads, one number for all blocks or one for each.
      mlp_width: hidden width of a block's perceptron, one number for all blocks or one for each.
      stem: channels of the 3x3 convolutions before the patches are cut, at full resolution; empty for none.
      reconstruct: whether there is a reconstruction head.
      dropout: share of features of each branch set to zero in training, in [0, 1).
      dtype: dtype of the computation; `None` takes the result type of input and parameters.
      param_dtype: dtype of new parameters.
      head_dim: features of a head; `None`: width / heads, with one number of heads that divides the width.
    """

    num_classes: int
    patch: int = 2
    width: int = 64
    depth: int = 4
    heads: int | Sequence[int] = 4
    mlp_width: int | Sequence[int] = 128
    stem: Sequence[int] = (16, 32)
    reconstruct: bool = False
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32
    head_dim: int | None = None

    def __post_init__(self):
        layers.require_positive(**{name: getattr(self, name) for name in ("num_classes", "patch", "width", "depth")})
        layers.require_fraction(dropout=self.dropout)
        layers.per_layer("mlp_width", self.mlp_width, self.depth)
        attention.check_heads(self.heads, self.head_dim, self.width, self.depth)
        super().__post_init__()

    @nn.compact
    def __call__(self, images: Float[Array, "batch h w c"], *, train: bool = False) -> dict[str, Float[Array, "..."]]:
        """Maps images [B, H, W, C] to the named heads (float32 at least)."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = images
        for i, channels in enumerate(self.stem):
            x = nn.gelu(layers.Conv(channels, name=f"stem_{i}", **types)(x))
        x = layers.Dense(self.width, name="patch", **types)(patchify(x, self.patch))
        position = layers.weight(
            self, "position", nn.initializers.normal(POSITION_STDDEV), (1, *x.shape[1:]), self.param_dtype
        )
        x = x + position.astype(x.dtype)
        heads = layers.per_layer("heads", self.heads, self.depth)
        hidden = layers.per_layer("mlp_width", self.mlp_width, self.depth)
        for i in range(self.depth):
            block = _Block(heads[i], self.head_dim, hidden[i], self.dropout, name=f"block_{i}", **types)
            x = block(x, train=train)
        x = nn.LayerNorm(name="norm", dtype=jnp.promote_types(x.dtype, jnp.float32))(x)
        return self._heads(x, images.shape)

    def _heads(self, tokens: Array, shape: tuple[int, ...]) -> dict[str, Array]:
        dense = {"param_dtype": self.param_dtype}
        outputs = {"logits": layers.Dense(self.num_classes, name="logits", **dense)(jnp.mean(tokens, axis=1))}
        if self.reconstruct:
            pixels = layers.Dense(self.patch**2 * shape[-1], name="reconstruction", **dense)(tokens)
            outputs["reconstruction"] = unpatchify(pixels, self.patch, shape[1], shape[2])
        return outputs


class _Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    heads: int
    head_dim: int | None
    mlp_width: int
    dropout: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x, *, train):
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        drop = nn.Dropout(self.dropout, deterministic=not train)
        y = nn.LayerNorm(name="attention_norm", **types)(x)
        x = x + drop(attention.SelfAttention(self.heads, head_dim=self.head_dim, name="attention", **types)(y))
        y = nn.LayerNorm(name="mlp_norm", **types)(x)
        return x + drop(_FeedForward(self.mlp_width, name="mlp", **types)(y))


class _FeedForward(nn.Module):
    """down(gelu(up(x)))."""

    hidden: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x):
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        y = nn.gelu(layers.Dense(self.hidden, name="up", **types)(x))
        return layers.Dense(x.shape[-1], name="down", **types)(y)


def patchify(images: Float[Array, "batch h w c"], patch: int) -> Float[Array, "batch t p"]:
    """Cuts images into square patches, row by row; a patch is a row of patch * patch * C numbers.

    Raises:
      ValueError: `patch` does not divide the height and the width.
    """
    batch, height, width, channels = images.shape
    if height % patch or width % patch:
        raise ValueError(f"patch={patch} does not divide the height and width of images of shape {images.shape}.")
    x = images.reshape(batch, height // patch, patch, width // patch, patch, channels)
    return x.swapaxes(2, 3).reshape(batch, -1, patch * patch * channels)


def unpatchify(patches: Float[Array, "batch t p"], patch: int, height: int, width: int) -> Float[Array, "batch h w c"]:
    """Undoes `patchify` for images of the given height and width in pixels."""
    channels = patches.shape[-1] // patch**2
    x = patches.reshape(patches.shape[0], height // patch, width // patch, patch, patch, channels)
    return x.swapaxes(2, 3).reshape(patches.shape[0], height, width, channels)
