"""Channels that are gated example by example: which of them fire, and a loss for a predictor that guesses it.

The targets are read off a layer's own output before the gate, so that no loss has to weigh accuracy against cost.
`models.GatedConv` is the layer.

Source: Fire Together Wire Together: A Dynamic Pruning Approach with Self-Supervised Mask Prediction (2022, Elkerdawy et
al.).
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from steelyard import choices, precision, selection
from steelyard.sparsity import masks

__all__ = ["channel_saliency", "mass_mask", "predictor_loss", "top_mask"]

# Of the mass, and of a saliency: below it a channel counts as silent, and rounding of the cumulative sum is forgiven.
_SILENT = 1e-5


def channel_saliency(x: Float[Array, "batch *space channels"]) -> Float[Array, "batch channels"]:
    """How strongly each channel of each example fires: the largest |x| over its pixels.

    Args:
      x: the output of a layer after norm and activation, channels last.

    Returns:
      Saliencies, in the dtype of `x`; without axes between the first and the last, |x| itself.

    Raises:
      ValueError: `x` has fewer than two axes.
    """
    if jnp.ndim(x) < 2:
        raise ValueError(f"x has shape {jnp.shape(x)}; it must be [batch, ..., channels]")
    return jnp.max(jnp.abs(x), axis=tuple(range(1, jnp.ndim(x) - 1)))


def mass_mask(
    saliency: Float[Array, "*batch channels"], mass: float | Float[Array, ""], *, min_kept: int = 0
) -> Bool[Array, "*batch channels"]:
    """Keeps the strongest channels of each example, as many as stay within a share of its total saliency.

        q = saliency / sum(saliency), in descending order;  channel c stays while q_1 + ... + q_c <= mass + 1e-5

    The channel that crosses the threshold is off, so that an example may lose all of them (`min_kept`). With mass 1
    every channel with q > 1e-5 stays, with a negative mass all do, and so they do where nothing fires. Equal saliencies
    keep the lower index. Costs a sort over the channels.

    Args:
      saliency: non-negative, of `channel_saliency`.
      mass: the share, at most 1; may be traced.
      min_kept: channels that stay at least.

    Returns:
      True where a channel stays. No gradient flows through it.

    Raises:
      ValueError: `mass` is above 1, or `min_kept` is negative or not whole.
    """
    choices.require_within("mass", mass, "(-inf, 1]")
    min_kept = choices.require_count("min_kept", min_kept, "[0, inf)")
    saliency = jax.lax.stop_gradient(precision.wide(saliency))
    channels = saliency.shape[-1]
    total = jnp.sum(saliency, -1, keepdims=True)
    share = saliency / jnp.where(total > 0, total, 1)
    cumulative = jnp.cumsum(jnp.sort(share, -1, descending=True), -1)
    kept = jnp.where(mass == 1, share > _SILENT, cumulative - mass <= _SILENT).sum(-1, dtype=jnp.int32)
    kept = jnp.where((total[..., 0] > 0) & (jnp.asarray(mass) >= 0), jnp.clip(kept, min(min_kept, channels)), channels)
    return jnp.vectorize(selection.keep_largest, signature="(c),()->(c)")(share, kept)


def top_mask(
    saliency: Float[Array, "*batch channels"], ratio: float | Float[Array, ""]
) -> Bool[Array, "*batch channels"]:
    """Keeps the strongest channels of each example: off are the floor(ratio C) weakest, and those at 1e-5 or below.

    Equal saliencies keep the lower index.

    Args:
      saliency: non-negative, of `channel_saliency`.
      ratio: the share of the C channels that is off at least, in [0, 1]; may be traced.

    Returns:
      True where a channel stays. No gradient flows through it.

    Raises:
      ValueError: `ratio` is outside [0, 1].
    """
    choices.require_within("ratio", ratio, "[0, 1]")
    return masks.topk_mask_along(saliency, ratio, axis=-1) & (saliency > _SILENT)


def predictor_loss(logits: Float[Array, "*batch channels"], target: Bool[Array, "*batch channels"]) -> Float[Array, ""]:
    """Binary cross-entropy of a predictor with the channels that did fire, a mean over examples and channels.

    The total loss is that of the task plus the sum of this over the layers, with weight 1.

    Args:
      logits: of the predictor, one a channel.
      target: of `mass_mask` or `top_mask`; never differentiated.

    Returns:
      A scalar in nats, in float32 at least.

    Raises:
      ValueError: the shapes differ.
    """
    if jnp.shape(logits) != jnp.shape(target):
        raise ValueError(f"logits have shape {jnp.shape(logits)}, but target has shape {jnp.shape(target)}")
    logits = precision.wide(logits)
    target = jax.lax.stop_gradient(jnp.asarray(target, logits.dtype))
    return jnp.mean(optax.losses.sigmoid_binary_cross_entropy(logits, target))
