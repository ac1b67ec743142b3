"""Inverse image frequency: logits multiplied by weights that grow with the rarity of the class."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from steelyard import choices
from steelyard.losses import checks, logit_adjustment

Variant = Literal["raw", "smooth", "rel", "normit", "gombit", "base2", "base10"]

_WEIGHTS = {
    "raw": lambda n, total: jnp.log(total / n),
    "smooth": lambda n, total: jnp.log((total + 1) / (n + 1)) + 1,
    "rel": lambda n, total: jnp.log((total - n) / n),
    "normit": lambda n, total: -jax.scipy.special.ndtri(n / total),
    "gombit": lambda n, total: -jnp.log(-jnp.log1p(-n / total)),
    "base2": lambda n, total: jnp.log2(total / n),
    "base10": lambda n, total: jnp.log10(total / n),
}


def inverse_image_frequency(
    counts: Float[Array, "classes"], *, variant: Variant = "raw", norm: float | None = None
) -> Float[Array, "classes"]:
    """Weights of the classes' logits, of N examples in all with n_c in class c and `p_c = n_c / N`.

        raw:     log(N / n)                     base2, base10: likewise, to these bases
        smooth:  log((N + 1) / (n + 1)) + 1
        rel:     log((N - n) / n)
        normit:  -ndtri(p), the normal quantile
        gombit:  -log(-log(1 - p))

    A class with all examples has the raw weight 0. The weights rel and normit are 0 at p = 1/2 and negative above,
    gombit at p = 1 - 1/e; where p = 1 these three are -inf.

    Args:
      counts: n, training examples of each class; zero is refused unless traced, and then gives infinite weights.
      variant: see above.
      norm: the weights are divided by their vector norm of this order (1, 2, ..., inf), if that is not 0; None: they
        are not.

    Returns:
      Float32 at least.

    Raises:
      ValueError: an unknown variant, an order below 1, or counts that are not one positive number for each class.

    Source: Inverse Image Frequency for Long-tailed Image Recognition (2022, Alexandridis et al.), section 3.
    """
    choices.require("variant", variant, _WEIGHTS)
    counts = checks.class_sizes(counts)
    weights = _WEIGHTS[variant](counts, jnp.sum(counts))
    if norm is None:
        return weights
    choices.require_within("norm", norm, "[1, inf]")
    length = jnp.linalg.norm(weights, norm)
    return weights / jnp.where(length > 0, length, 1)


def iif_loss(
    logits: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"],
    *,
    counts: Float[Array, "classes"],
    variant: Variant = "raw",
    norm: float | None = None,
) -> Float[Array, "*batch"]:
    """Cross-entropy of logits multiplied by `inverse_image_frequency`, at the cost of cross-entropy.

    Predictions are made from the multiplied logits as well:
    `adjust_logits(logits, scale=inverse_image_frequency(counts))`. Training can undo the factors where the lengths of
    the last layer's weights are free.

    Args:
      logits: the classes are the last axis.
      labels: their classes.
      counts: training examples of each class.
      variant: see `inverse_image_frequency`.
      norm: likewise.

    Returns:
      One number for each example, in nats.

    Raises:
      ValueError: as there; shapes that do not match, a label out of range (unless traced).

    Source: Inverse Image Frequency for Long-tailed Image Recognition (2022, Alexandridis et al.), section 3.
    """
    scale = inverse_image_frequency(counts, variant=variant, norm=norm)
    return logit_adjustment.adjusted_cross_entropy(logits, labels, scale=scale)
