"""A decoder-only transformer: RMSNorm before each branch, rotary positions, SwiGLU.

LLaMA: Open and Efficient Foundation Language Models (Touvron et al., 2023), section 2.2; GLU Variants Improve
Transformer (Shazeer, 2020) for SwiGLU.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from steelyard.models import attention, layers, norms


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases.

    Parameters, with width d: `gate/kernel` and `up/kernel` [d, hidden], `down/kernel` [hidden, d].

    Attributes:
      hidden: width of gate and up.
      dtype: dtype of the computation; `None` takes the result type of input and parameters.
      param_dtype: dtype of new parameters.

    Source: GLU Variants Improve Transformer (Shazeer, 2020), equation 6.
    """

    hidden: int
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch d"]:
        """Maps [..., d] to [..., d]."""
        types = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.param_dtype}
        gate = layers.Dense(self.hidden, name="gate", **types)(x)
        up = layers.Dense(self.hidden, name="up", **types)(x)
        return layers.Dense(x.shape[-1], name="down", **types)(nn.silu(gate) * up)


class Transformer(nn.Module):
    """Tokens to the logits of the next token.

    `model.apply(variables, tokens [B, T], train=bool, rngs={"dropout": key})` gives logits [B, T, vocab_size] in
    float32, those at t computed from the tokens up to t. Rows that hold several documents one after another come with
    `positions` (restarting with each document) and `segments` (equal inside a document), both [B, T]: no token then
    sees another document. The key is needed only for `train=True` and `dropout > 0`.

    Parameters, with width d, block b in 0..depth-1:
      `embed/embedding` [vocab_size, d];
      `block_b/attention_norm/scale`, `block_b/attention/{query,key,value,out}/kernel` of `SelfAttention`;
      `block_b/mlp_norm/scale`, `block_b/mlp/{gate,up}/kernel` [d, mlp_width], `block_b/mlp/down/kernel`;
      `norm/scale`, and unless `tied` `logits/kernel` [d, vocab_size].

    Attributes:
      vocab_size: number of tokens.
      width: features of a token.
      depth: number of blocks.
      heads: attention heads, one number for all blocks or one for each.
      mlp_width: hidden width of SwiGLU, one number for all blocks or one for each; about 8/3 of the width costs as much
        as a plain perceptron of 4 times it.
      tied: whether the output layer is the embedding's transpose.
      rotary_base: see `rotary`.
      dropout: share of features of each branch set to zero in training, in [0, 1).
      dtype: dtype of the computation; `None` takes that of the parameters. The output layer is always float32.
      param_dtype: dtype of new parameters.
      head_dim: features of a head, even; `None`: width / heads, with one number of heads that divides the width.
    """

    vocab_size: int
    width: int = 128
    depth: int = 4
    heads: int | Sequence[int] = 4
    mlp_width: int | Sequence[int] = 344
    tied: bool = False
    rotary_base: float = 10000.0
    dropout: float = 0.0
    dtype: Any = None
    param_dtype: Any = jnp.float32
    head_dim: int | None = None

    def __post_init__(self):
        layers.require_positive(**{name: getattr(self, name) for name in ("vocab_size", "width", "depth")})
        layers.require_fraction(dropout=self.dropout)
        layers.per_layer("mlp_width", self.mlp_width, self.depth)
        attention.check_heads(self.heads, self.head_dim, self.width, self.depth, even=True)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "batch t"],
        *,
        train: bool = False,
        positions: Int[Array, "#batch t"] | None = None,
        segments: Int[Array, "batch t"] | None = None,
    ) -> Float[Array, "batch t v"]:
        """Maps tokens [B, T] to logits [B, T, vocab_size]."""
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embed = layers.Embed(self.vocab_size, self.width, name="embed", **types)
        mask = None if segments is None else (segments[:, :, None] == segments[:, None, :])[:, None]
        x = embed(tokens)
        heads = layers.per_layer("heads", self.heads, self.depth)
        hidden = layers.per_layer("mlp_width", self.mlp_width, self.depth)
        for i in range(self.depth):
            name, sizes = f"block_{i}", (heads[i], self.head_dim, hidden[i])
            x = _Block(*sizes, self.rotary_base, self.dropout, name=name, **types)(x, positions, mask, train=train)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        x = norms.RMSNorm(name="norm", dtype=wide, param_dtype=self.param_dtype)(x)
        if self.tied:
            return embed.attend(x)
        return layers.Dense(self.vocab_size, False, wide, self.param_dtype, name="logits")(x)


class _Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    heads: int
    head_dim: int | None
    mlp_width: int
    rotary_base: float
    dropout: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x, positions, mask, *, train):
        types = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        drop = nn.Dropout(self.dropout, deterministic=not train)
        options = {"head_dim": self.head_dim, "name": "attention", **types}
        attend = attention.SelfAttention(self.heads, True, self.rotary_base, False, **options)
        x = x + drop(attend(norms.RMSNorm(name="attention_norm", **types)(x), positions=positions, mask=mask))
        y = norms.RMSNorm(name="mlp_norm", **types)(x)
        return x + drop(SwiGLU(self.mlp_width, name="mlp", **types)(y))
