"""Smooth random displacements, which make a pair of images with a known flow out of one image.

A displacement u is in pixels along each axis of the image, and says where a displaced image looks: at pixel x it shows
what the original has at x + u(x). So u is the flow that registers the original onto the displaced image.
"""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from jaxtyping import Array, Float, Key

from steelyard import choices, precision


def random_displacement(
    key: Key[Array, ""], shape: tuple[int, ...], *, max_displacement: float, smoothing: float
) -> Float[Array, "*shape ndim"]:
    """Uniform noise, smoothed by a Gaussian and scaled.

        u = max_displacement  v / max_x |v(x)|,    v = gaussian * noise,    noise ~ Uniform(-1, 1) a pixel and axis

    The image is continued by reflection at its edges, so that displacements are as long there as inside.

    Args:
      key: of the noise.
      shape: of the image, one number per axis.
      max_displacement: length of the longest displacement, in pixels.
      smoothing: standard deviation of the Gaussian, in pixels; 0 leaves the noise as it is.

    Returns:
      u, float32 [*shape, len(shape)].

    Raises:
      ValueError: a negative number, or a shape without axes or pixels.

    Source: Learning deep abdominal CT registration through adaptive loss weighting and synthetic data generation (2023,
    Perez de Frutos et al.), synthetic data generation.
    """
    if not shape or min(shape) < 1:
        raise ValueError(f"shape={shape} must be of an image: at least one axis, and at least one pixel along each")
    choices.require_within("max_displacement", max_displacement, "[0, inf)")
    choices.require_within("smoothing", smoothing, "[0, inf)")
    field = jax.random.uniform(key, (*shape, len(shape)), jnp.float32, -1.0, 1.0)
    for axis, length in enumerate(shape):
        blur = jnp.asarray(_blur(length, smoothing), jnp.float32)
        blurred = jnp.tensordot(blur, field, (1, axis), precision=jax.lax.Precision.HIGHEST)
        field = jnp.moveaxis(blurred, 0, axis)
    return field * (max_displacement / jnp.max(jnp.linalg.norm(field, axis=-1)))


def displace(image: Float[Array, "*shape"], displacement: Float[Array, "*shape ndim"]) -> Float[Array, "*shape"]:
    """The image seen through a displacement, `image(x + displacement(x))`.

    Values between pixels are interpolated linearly, in float32 at least; beyond its edges the image goes on as its
    last pixel. Differentiable with respect to both.

    Args:
      image: without batch and channel axes (`jax.vmap` over these).
      displacement: in pixels along each axis.

    Returns:
      The displaced image, in the dtype of `image`.

    Raises:
      ValueError: the shapes do not fit each other.
    """
    if displacement.shape != (*image.shape, image.ndim):
        raise ValueError(
            f"displacement must have shape {(*image.shape, image.ndim)} for an image of shape {image.shape}, "
            f"got {displacement.shape}"
        )
    grid = jnp.stack(jnp.meshgrid(*map(jnp.arange, image.shape), indexing="ij"))
    places = grid + jnp.moveaxis(precision.wide(displacement), -1, 0)
    moved = jax.scipy.ndimage.map_coordinates(precision.wide(image), list(places), order=1, mode="nearest")
    return moved.astype(image.dtype)


def _blur(length: int, smoothing: float) -> Float[np.ndarray, "length length"]:
    """The Gaussian filter along an axis, as a matrix."""
    return scipy.ndimage.gaussian_filter1d(np.eye(length), smoothing, axis=0) if smoothing else np.eye(length)
