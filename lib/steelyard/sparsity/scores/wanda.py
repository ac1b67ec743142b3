"""Wanda: weights by the size of what they multiply."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from steelyard import precision


def wanda(weight: Float[Array, "... d_in d_out"], input_norm: Float[Array, "..."]) -> Float[Array, "... d_in d_out"]:
    """|W_ij| norm_i: the size of the largest part that the entry can have in its output.

    Entries compete within an output unit, `masks.topk_mask_along(score, sparsity, axis=-2)` or `masks.nm_mask`; there
    only the relative sizes of the norms matter.

    Args:
      weight: a kernel, [in, out], or a convolution's [height, width, in, out].
      input_norm: the root mean square of each input feature, in the shape of the kernel without its last axis, as
        `calibration.input_norm` gives it, or [in].

    Returns:
      An array like `weight`. Cost: one elementwise pass.

    Raises:
      ValueError: the shapes do not fit.

    Source: A Simple and Effective Pruning Approach for Large Language Models (2024, Sun et al.).
    """
    weight, input_norm = jnp.asarray(weight), jnp.asarray(input_norm)
    if weight.ndim < 2 or input_norm.shape not in (weight.shape[:-1], weight.shape[-2:-1]):
        raise ValueError(
            f"input_norm of shape {input_norm.shape} does not fit a weight of shape {weight.shape}: it must be "
            f"{weight.shape[:-1]} or {weight.shape[-2:-1]}"
        )
    score = jnp.abs(precision.wide(weight)) * precision.wide(input_norm)[..., None]
    return score.astype(weight.dtype)
