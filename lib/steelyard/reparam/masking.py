"""What masked reparameterizations share: what is seen of a removed entry, and what of the gradient reaches it.

The mask itself is never differentiated.

Sources: Learning N:M fine-grained structured sparse neural networks from scratch (2021) for SR-STE; Progressive
gradient flow for robust N:M sparsity training in transformers (2024) for the soft mask.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from steelyard import choices, formats
from steelyard.sparsity import masks as masks_lib

PyTree = Any
Backward = Literal["straight_through", "chain"]

BACKWARDS = ("straight_through", "chain")


class MaskedState(NamedTuple):
    """masks: like the stored tree, bool arrays of the leaf's shape (so that they are sharded alike) or `None`."""

    masks: PyTree


def straight_through(w: Float[Array, "..."], mask: Bool[Array, "..."]) -> Float[Array, "..."]:
    """w * mask, with the gradient g for every entry.

    Removed entries are +0, whatever `w` is there.

    Args:
      w: a parameter.
      mask: of the same shape, True where the entry is kept.

    Raises:
      ValueError: the shapes differ.
    """
    _check_shapes(w, mask)
    return _straight_through(w, mask)


def sr_ste(
    w: Float[Array, "..."], mask: Bool[Array, "..."], decay: float | Float[Array, ""] = 2e-4
) -> Float[Array, "..."]:
    """w * mask, with the gradient g + decay * (1 - mask) * w: removed entries are pulled to zero.

    Args:
      w: a parameter.
      mask: of the same shape, True where the entry is kept.
      decay: strength of the pull; it acts on the gradient, before the optimizer.

    Raises:
      ValueError: the shapes differ.
    """
    _check_shapes(w, mask)
    return _sr_ste(w, mask, decay)


def soft_masked(
    w: Float[Array, "..."],
    mask: Bool[Array, "..."],
    flow: float | Float[Array, ""],
    *,
    backward: Backward = "straight_through",
) -> Float[Array, "..."]:
    """w * c with c = mask + flow * (1 - mask): removed entries are seen faded.

    The gradient is g ("straight_through") or g * c ("chain"). Products are rounded once to the dtype of `w`.

    Args:
      w: a parameter.
      mask: of the same shape, True where the entry is kept.
      flow: what is seen of a removed entry, in [0, 1]; may be traced, and gets no gradient.
      backward: "straight_through" or "chain".

    Raises:
      ValueError: the shapes differ, or `backward` is unknown.
    """
    _check_shapes(w, mask)
    choices.require("backward", backward, BACKWARDS)
    return faded(w, mask, flow, flow if backward == "chain" else 1.0)


@jax.custom_vjp
def _straight_through(w, mask):
    return masks_lib.apply(w, mask)


_straight_through.defvjp(lambda w, mask: (masks_lib.apply(w, mask), None), lambda _, g: (g, None))


@jax.custom_vjp
def _sr_ste(w, mask, decay):
    del decay
    return masks_lib.apply(w, mask)


def _sr_ste_backward(residuals, g):
    w, mask, decay = residuals
    wide = jnp.promote_types(w.dtype, jnp.float32)
    pull = jnp.where(mask, 0, jnp.asarray(decay, wide) * w.astype(wide))
    return (g.astype(wide) + pull).astype(g.dtype), None, None


_sr_ste.defvjp(lambda w, mask, decay: (masks_lib.apply(w, mask), (w, mask, decay)), _sr_ste_backward)


@jax.custom_vjp
def faded(w, mask, seen, passed):
    """Removed entries are multiplied by `seen` on the way forward, and by `passed` on the way back."""
    del passed
    return _fade(w, mask, seen)


def _fade(x, mask, factor):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.where(mask, x, (x.astype(wide) * jnp.asarray(factor, wide)).astype(x.dtype))


def _faded_backward(residuals, g):
    mask, passed = residuals
    return _fade(g, mask, passed), None, None, None


faded.defvjp(lambda w, mask, seen, passed: (_fade(w, mask, seen), (mask, passed)), _faded_backward)


def map_masked(fn: Callable[[Any, Any], Any], stored: PyTree, others: PyTree) -> PyTree:
    """`fn` of each leaf and what stands in its place in the other tree; a leaf with `None` there is left alone."""
    return jax.tree.map(lambda w, x: w if x is None else fn(w, x), stored, others, is_leaf=formats.is_weight)


def _check_shapes(w, mask):
    if jnp.shape(w) != jnp.shape(mask):
        raise ValueError(f"w has shape {jnp.shape(w)}, but its mask has shape {jnp.shape(mask)}")


def check_array(path, w):
    if formats.is_weight(w):
        raise ValueError(
            f"{path} is already stored as {type(w).__name__}: a mask is applied to arrays. Put it before the link "
            f"that makes weight nodes."
        )
