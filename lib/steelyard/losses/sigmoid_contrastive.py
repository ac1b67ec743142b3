"""Contrast of two views of each example by a yes or no for every pair, with no normalisation over the batch.

As every pair stands alone, devices need not gather the batch: a block of texts goes round a ring of them, and each
scores the block that it holds. Forward and backward pass go round once each; nothing of the blocks that have passed is
kept, so that memory does not grow with the number of devices.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from steelyard.losses import checks, declare, pairs

INITIAL_LOG_SCALE = math.log(10)
INITIAL_BIAS = -10.0


@declare.batch_dependent
def sigmoid_contrastive(
    images: Float[Array, "batch d"],
    texts: Float[Array, "batch d"],
    *,
    log_scale: float | Float[Array, ""],
    bias: float | Float[Array, ""],
    axis_name: str | None = None,
) -> Float[Array, "batch"]:
    """For each image, the binary cross-entropies of its pairs with all texts, of which its own alone is right.

        loss_i = - sum_j log sigmoid(+-z_ij),    + where i = j,    z_ij = exp(log_scale) <image_i, text_j> + bias

    A sum over texts; take the mean over images. Both scalars are learned, without weight decay; they start at
    `INITIAL_LOG_SCALE` and `INITIAL_BIAS`, where nearly all pairs are wrong ones and are taken for such. There is no
    `where`: padding would count among the negatives. Leave it out of the batch.

    Depends on the batch. Inside a `shard_map`, without `axis_name`, each device sees the pairs among its own rows only,
    a different loss. With it the loss is that of the whole batch, in the memory of one block of b x b pairs, b rows a
    device; no array grows with the number of devices D. It costs D - 1 exchanges of a block of texts between neighbours
    forward and D of a block and its gradient backward; forward-mode derivatives are not defined for it. The arithmetic
    is that of a softmax over the batch.

    Args:
      images: one embedding for each example, of length 1.
      texts: likewise, row i belongs to row i of the images. They are exchanged in the dtype that they have.
      log_scale: logarithm of the inverse temperature.
      bias: of all pairs.
      axis_name: inside a `shard_map`, the mesh axis over which the rows are split, as many on each device.

    Returns:
      Nats per image, float32 at least; for this device's images if there is an `axis_name`.

    Raises:
      ValueError: images and texts are not matrices of the same shape, or a scalar is none.

    Source: Sigmoid Loss for Language Image Pre-Training (2023, Zhai et al.), section 3.
    """
    wide_images, wide_texts = checks.alike("images", images, "texts", texts)
    if wide_images.ndim != 2:
        raise ValueError(f"images and texts have shape {wide_images.shape}: they must be [batch, d]")
    for name, value in (("log_scale", log_scale), ("bias", bias)):
        if jnp.ndim(value):
            raise ValueError(f"{name} has shape {jnp.shape(value)}: it must be one number")
    dtype = jnp.promote_types(wide_images.dtype, wide_texts.dtype)
    scaled = wide_images.astype(dtype) * jnp.exp(jnp.asarray(log_scale, dtype))
    # One bias for each image: it varies over the devices as the images do, and its gradient is summed on the way back.
    biases = jnp.zeros_like(scaled[:, 0]) + jnp.asarray(bias, dtype)
    if axis_name is None:
        return _block(scaled, wide_texts, biases, True)
    return _ring(axis_name, scaled, jnp.asarray(texts), biases)


def _block(
    images: Float[Array, "b d"], texts: Float[Array, "b d"], biases: Float[Array, "b"], is_own: bool
) -> Float[Array, "b"]:
    """Losses of the pairs with a block of texts; in the images' own block the pairs on the diagonal are right ones."""

    def of_rows(rows):
        images, biases, own = rows
        scores = pairs.products(images, texts) + biases[:, None]
        right = own[:, None] == jnp.arange(len(texts))
        return jnp.sum(jax.nn.softplus(jnp.where(right, -scores, scores)), axis=-1)

    own = jnp.where(is_own, jnp.arange(len(images)), -1)
    return pairs.by_rows(of_rows, (images, biases, own), len(texts))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(
    axis_name: str, images: Float[Array, "b d"], texts: Float[Array, "b d"], biases: Float[Array, "b"]
) -> Float[Array, "b"]:
    """Sum of `_block` over the blocks of all devices."""
    devices = jax.lax.axis_size(axis_name)

    def step(r, carry):
        losses, held = carry
        # Does not wait for the exchange, nor the exchange for it.
        return losses + _block(images, held, biases, r == 0), _pass_on(held, axis_name)

    losses, last = jax.lax.fori_loop(0, devices - 1, step, (jnp.zeros_like(biases), texts))
    return losses + _block(images, last, biases, devices == 1)


def _ring_forward(axis_name, images, texts, biases):
    return _ring(axis_name, images, texts, biases), (images, texts, biases)


def _ring_backward(axis_name, kept, cotangent):
    """Goes round again, with each block of texts the gradient that it has gathered so far; both end where they began.

    A scan would be differentiated by keeping every block that has passed, which is the whole batch.
    """
    images, texts, biases = kept

    def step(r, carry):
        d_images, d_biases, held, d_held = carry
        _, pull = jax.vjp(functools.partial(_block, is_own=r == 0), images, held.astype(images.dtype), biases)
        gradients = pull(cotangent)
        moved = _pass_on((held, d_held + gradients[1]), axis_name)
        return d_images + gradients[0], d_biases + gradients[2], *moved

    start = jnp.zeros_like(images), jnp.zeros_like(biases), texts, jnp.zeros_like(texts, images.dtype)
    d_images, d_biases, _, d_texts = jax.lax.fori_loop(0, jax.lax.axis_size(axis_name), step, start)
    return d_images, d_texts.astype(texts.dtype), d_biases


_ring.defvjp(_ring_forward, _ring_backward)


def _pass_on(blocks, axis_name: str):
    """To the next device of the ring."""
    devices = jax.lax.axis_size(axis_name)
    return jax.lax.ppermute(blocks, axis_name, [(i, (i + 1) % devices) for i in range(devices)])
