"""Multi-head self-attention with separate query, key, value and out kernels, and rotary position embedding."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from steelyard.models import layers


def rotary(
    x: Float[Array, "*batch t heads d"], positions: Int[Array, "*#batch t"], *, base: float = 10000.0
) -> Float[Array, "*batch t heads d"]:
    """Rotates pairs of features by angles proportional to the position.

        (x_i, x_{i + d/2}) -> (x_i cos a - x_{i + d/2} sin a, x_i sin a + x_{i + d/2} cos a),  a = position base^(-2i/d)

    The inner product of a rotated query and a rotated key then depends on their positions through the difference only.
    Angles are computed in float32; the result has the dtype of `x`.

    Args:
      x: queries or keys, an even number d of features a head.
      positions: position of each token, in tokens.
      base: longest wavelength, over 2 pi, in tokens.

    Returns:
      Rotated features, in the shape and dtype of `x`.

    Raises:
      ValueError: d is odd, or `positions` does not end with the number of tokens.

    Source: RoFormer: Enhanced Transformer with Rotary Position Embedding (Su et al., 2021), section 3.2.2; the pairs
    are (i, i + d/2) instead of neighbours, which permutes the features and changes nothing else.
    """
    if x.shape[-1] % 2:
        raise ValueError(f"rotary position embedding needs an even number of features a head, x has shape {x.shape}.")
    if positions.shape[-1] != x.shape[-3]:
        raise ValueError(f"positions of shape {positions.shape} do not fit x of shape {x.shape}: axis -3 is tokens.")
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1).astype(x.dtype)


def check_heads(
    heads: int | Sequence[int], head_dim: int | None, width: int, depth: int, *, even: bool = False
) -> None:
    """Refuses heads that do not fit the blocks of a model or, without `head_dim`, do not divide its width.

    Args:
      heads: one number for all blocks, or one for each, which needs `head_dim`.
      head_dim: features of a head.
      width: features of a token.
      depth: number of blocks.
      even: whether a head must have an even number of features.

    Raises:
      ValueError: a number below 1, not one number a block, or no whole (or even) number of features a head.
    """
    layers.per_layer("heads", heads, depth)
    if head_dim is not None:
        layers.require_positive(head_dim=head_dim)
        if even and head_dim % 2:
            raise ValueError(f"head_dim must be even, got {head_dim}.")
    elif isinstance(heads, Sequence):
        raise ValueError(f"heads={heads!r} are numbers for each block, which need a head_dim.")
    elif even and width % (2 * heads):
        raise ValueError(f"width must be a multiple of 2 * heads = {2 * heads}, got width={width}; or give head_dim.")
    elif width % heads:
        raise ValueError(f"heads must divide width={width}, got heads={heads}; or give head_dim.")


class SelfAttention(nn.Module):
    """softmax(q k^T / sqrt(d)) v for each head, between four dense layers; the softmax is taken in float32.

    Parameters, with width d and e = heads * head_dim: `query/kernel`, `key/kernel`, `value/kernel`, each [d, e],
    `out/kernel` [e, d]; a bias beside each if `use_bias`. Head h owns the features h head_dim ... (h + 1) head_dim - 1
    of query, key and value.

    Attributes:
      heads: number of heads.
      causal: whether a token sees only itself and the tokens before it.
      rotary_base: `base` of `rotary` on queries and keys; `None` rotates nothing.
      use_bias: whether the dense layers have biases.
      dtype: dtype of the computation; `None` takes the result type of input and parameters.
      param_dtype: dtype of new parameters.
      head_dim: features of a head; `None`: d / heads, which must be whole.
    """

    heads: int
    causal: bool = False
    rotary_base: float | None = None
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    head_dim: int | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch t d"],
        *,
        positions: Int[Array, "*#batch t"] | None = None,
        mask: Bool[Array, "#batch #heads t t"] | None = None,
    ) -> Float[Array, "batch t d"]:
        """Maps tokens [B, T, d] to [B, T, d].

        Args:
          x: the tokens.
          positions: position of each token for `rotary_base`; `None` counts from 0.
          mask: True where a query (third axis) may see a key (last axis); `None` is everywhere.
        """
        batch, length, width = x.shape
        if self.head_dim is None and width % self.heads:
            raise ValueError(f"heads={self.heads} does not divide the width of x, shape {x.shape}.")
        split = (batch, length, self.heads, width // self.heads if self.head_dim is None else self.head_dim)
        inner = split[-2] * split[-1]
        query, key, value = (self._dense(name, inner)(x).reshape(split) for name in ("query", "key", "value"))
        if self.rotary_base is not None:
            positions = jnp.arange(length) if positions is None else positions
            query, key = (rotary(head, positions, base=self.rotary_base) for head in (query, key))
        y = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=self.causal)
        return self._dense("out", width)(y.reshape(batch, length, inner))

    def _dense(self, name: str, features: int) -> layers.Dense:
        return layers.Dense(features, self.use_bias, self.dtype, self.param_dtype, name=name)
