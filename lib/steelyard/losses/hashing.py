"""Deep hashing by one loss: cosines to fixed binary codes of the classes (2021, Hoe et al.).

One Loss for All: Deep Hashing with a Single Cosine Similarity based Learning Objective. The signs of the embedding are
the hash; a batch normalisation without scale and shift, the network's last layer, keeps its bits balanced.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from steelyard import choices, precision
from steelyard.losses import checks, margins

# Where arcs are measured: at 1 the derivative of the arc cosine is infinite.
_STEEPEST = 0.99999


def binary_target_codes(
    num_classes: int,
    bits: int,
    *,
    key: Key[Array, ""] | None = None,
    kind: Literal["hadamard", "bernoulli"] = "hadamard",
) -> Float[Array, "classes bits"]:
    """A code of +1 and -1 for each class.

        hadamard:   the first rows of [H; -H], H the Hadamard matrix of order `bits`; with a key, in random order
        bernoulli:  random signs

    Codes of the first kind are orthogonal or opposite to one another; without a key, and up to `bits` classes, they are
    orthogonal. Those of the second are so on average, and of short codes two may be equal.

    Args:
      num_classes: how many; at most 2 bits for "hadamard".
      bits: length of a code; a power of two for "hadamard".
      key: of the random choice; "bernoulli" needs one.
      kind: see above.

    Returns:
      Float32 signs.

    Raises:
      ValueError: an unknown kind, a number that is not as above, or no key where one is needed.

    Source: One Loss for All (2021, Hoe et al.), section 4.
    """
    choices.require("kind", kind, ("hadamard", "bernoulli"))
    num_classes = choices.require_count("num_classes", num_classes, "[1, inf)")
    bits = choices.require_count("bits", bits, "[1, inf)")
    if kind == "bernoulli":
        if key is None:
            raise ValueError("kind='bernoulli' draws the codes and needs a key, got key=None")
        return jax.random.rademacher(key, (num_classes, bits), jnp.float32)
    if bits & (bits - 1):
        raise ValueError(f"bits={bits} must be a power of two for kind='hadamard'; kind='bernoulli' takes any")
    if num_classes > 2 * bits:
        raise ValueError(f"num_classes={num_classes} must be at most 2 bits = {2 * bits} for kind='hadamard'")
    half = jax.scipy.linalg.hadamard(bits, dtype=jnp.float32)
    rows = jnp.concatenate([half, -half])
    return (rows if key is None else jax.random.permutation(key, rows))[:num_classes]


def orthohash_loss(
    embeddings: Float[Array, "*batch bits"],
    labels_or_targets: Int[Array, "*batch"] | Float[Array, "*batch classes"],
    codes: Float[Array, "classes bits"],
    *,
    scale: float = 8.0,
    margin: float = 0.2,
    margin_kind: Literal["cos", "arc"] = "cos",
) -> Float[Array, "*batch"]:
    """Cross-entropy of the cosines of an embedding to the codes, with a margin on the right ones.

        cos_c = h . code_c / (|h| |code_c|)
        a_c   = cos_c - margin t_c                        margin_kind "cos"
                cos(arccos(cos_c) + margin t_c)           margin_kind "arc"
        loss  = -sum_c (t_c / sum t) log softmax(scale a)_c

    Costs a product of the batch with the codes beside the cross-entropy.

    Args:
      embeddings: h; a zero one has cosine 0 to all codes.
      labels_or_targets: integers, the classes; or numbers t >= 0 for each class, of several labels: an example without
        any has loss 0.
      codes: such as `binary_target_codes`.
      scale: positive.
      margin: at least 0, of a cosine, or an angle in radians.
      margin_kind: see above.

    Returns:
      One number for each example, in nats.

    Raises:
      ValueError: an unknown margin kind, a number out of its range, shapes that do not match, a label or target out of
        range (unless traced).

    Source: One Loss for All (2021, Hoe et al.), section 3.
    """
    choices.require("margin_kind", margin_kind, ("cos", "arc"))
    choices.require_within("scale", scale, "(0, inf)")
    choices.require_within("margin", margin, "[0, inf)")
    cosines = _cosines(embeddings, codes)
    targets = _targets(cosines, labels_or_targets)
    if margin_kind == "cos":
        adjusted = cosines - margin * targets
    else:
        cosines = jnp.clip(cosines, -_STEEPEST, _STEEPEST)
        angles = margin * targets
        # cos(arccos x + angle), without the arc.
        adjusted = cosines * jnp.cos(angles) - jnp.sqrt(1 - cosines**2) * jnp.sin(angles)
    totals = jnp.sum(targets, axis=-1)
    losses = -jnp.sum(targets * jax.nn.log_softmax(scale * adjusted), axis=-1)
    return losses / jnp.where(totals > 0, totals, 1)


def _cosines(
    embeddings: Float[Array, "*batch bits"], codes: Float[Array, "classes bits"]
) -> Float[Array, "*b classes"]:
    embeddings, codes = precision.wide(embeddings), precision.wide(codes)
    if codes.ndim != 2 or not embeddings.ndim or embeddings.shape[-1] != codes.shape[1]:
        raise ValueError(
            f"embeddings has shape {embeddings.shape} and codes {codes.shape}: "
            "codes must be (classes, bits), with bits the last axis of embeddings"
        )
    codes = codes.astype(embeddings.dtype)
    # A large scale would multiply the error of less precision.
    return jnp.matmul(margins.normalize(embeddings), margins.normalize(codes).T, precision="highest")


def _targets(
    cosines: Float[Array, "*batch classes"], labels_or_targets: Int[Array, "*batch"] | Float[Array, "*batch classes"]
) -> Float[Array, "*batch classes"]:
    """One for the class of a label; targets as they are."""
    given = jnp.asarray(labels_or_targets)
    if jnp.issubdtype(given.dtype, jnp.integer):
        checks.labelled(cosines, given, name="the table of cosines")
        return margins.label_mask(given, cosines.shape[-1]).astype(cosines.dtype)
    choices.require_within("targets", given, "[0, inf)")
    _, targets = checks.alike("the table of cosines", cosines, "targets", given)
    return targets.astype(cosines.dtype)
