"""Weight compander: the model sees squashed weights, and trains what is squashed.

Large weights are bounded and change slowly; where the curve is steeper than 1 small ones move faster than plain ones.

Source: Weight Compander: A Simple Weight Reparameterization for Regularization (2023, Cakaj et al.).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from steelyard import choices, formats, precision
from steelyard import tree as tree_lib
from steelyard.reparam import base

PyTree = Any
Scalar = float | Float[Array, ""]

# How close to its bound a weight is inverted: beyond, the tangent would be at the mercy of rounding.
_INSIDE = 1 - 1e-6


class Curve(NamedTuple):
    """Learned parameters of the curve of one weight: log a and log b, so that both stay positive; float32 at least."""

    log_a: Float[Array, ""]
    log_b: Float[Array, ""]


def compand(v: Float[Array, "..."], *, a: Scalar = 1.0, b: Scalar = 1.0) -> Float[Array, "..."]:
    """Squashes weights.

        w = a arctan(v / b),  dw/dv = a b / (b^2 + v^2),  |w| < a pi / 2

    Args:
      v: stored weights.
      a: height of the curve, positive.
      b: width of the curve, positive; the slope at 0 is a / b.

    Returns:
      Of the shape and dtype of `v`; computed in float32 at least.

    Raises:
      ValueError: a or b is not positive.

    Source: Weight Compander (2023, Cakaj et al.).
    """
    _check(a, b)
    return _compand(jnp.asarray(v), a, b)


def expand(w: Float[Array, "..."], *, a: Scalar = 1.0, b: Scalar = 1.0) -> Float[Array, "..."]:
    """Undoes `compand`.

        v = b tan(w / a)

    A weight that `compand` cannot reach is first clipped to (1 - 1e-6) a pi / 2.

    Args:
      w: weights.
      a, b: as in `compand`.

    Returns:
      Of the shape and dtype of `w`; computed in float32 at least.

    Raises:
      ValueError: a or b is not positive.
    """
    _check(a, b)
    w = jnp.asarray(w)
    bound = _INSIDE * math.pi / 2
    return (b * jnp.tan(jnp.clip(precision.wide(w) / a, -bound, bound))).astype(w.dtype)


def weight_compander(
    *, a: float = 1.0, b: float = 1.0, learn: bool = False, preserve_init: bool = True
) -> base.Reparam:
    """The model sees a arctan(v / b), and v is stored and trained (see `compand`).

    It applies to every array of floating numbers with two axes or more; `reparam.only` restricts that. With `learn`
    each leaf has an a and a b of its own; stored is then `{"base": v, "weight_compander": curves}` with a `Curve` in
    the place of each leaf that has one, `None` elsewhere, so that the ends of other paths stay as they were. Weight
    decay acts on v, and should not reach the curves (`base/.*` selects all but them).

    `finish` gives plain weights: what evaluation shows, op by op, to the last bit; where an arctangent is compiled
    together with other operations its last bit may differ. An N:M weight, from a link before this one, keeps its
    zeros, which the curve maps to zero. Quantizers belong behind: `chain(weight_compander(), fake_quant())`.

    One arctan per weight per step.

    Args:
      a: height of the curve, where it starts if it is learned; weights stay below a pi / 2.
      b: width of the curve, likewise; weights that are small against b move a / b times as fast.
      learn: train a and b.
      preserve_init: store `expand` of the initial weights, so that the model first sees these (weights beyond the
        bound excepted); otherwise it first sees them companded.

    Raises:
      ValueError: a or b is not positive; at `finish`, a selected leaf is a weight node whose values are quantized.

    Source: Weight Compander (2023, Cakaj et al.).
    """
    _check(a, b)

    def companded(fn, stored):
        """`fn` of path, weight, a and b for each weight that has a curve; the others as they are."""
        if not learn:
            return tree_lib.map_with_path(
                lambda path, v: fn(path, v, a, b) if _has_curve(v) else v, stored, is_leaf=formats.is_weight
            )

        def leaf(path, v, curve):
            return v if curve is None else fn(path, v, jnp.exp(curve.log_a), jnp.exp(curve.log_b))

        return tree_lib.map_with_path(leaf, stored["base"], stored["weight_compander"], is_leaf=formats.is_weight)

    def init(params, rng):
        del rng
        stored = jax.tree.map(lambda w: expand(w, a=a, b=b) if preserve_init and _has_curve(w) else w, params)
        if not learn:
            return stored, ()
        return {"base": stored, "weight_compander": jax.tree.map(lambda w: _first_curve(w, a, b), params)}, ()

    def apply(stored, state, *, step, rng, train):
        del state, step, rng, train
        return companded(lambda path, v, a, b: _compand(v, a, b), stored)

    def finish(stored, state):
        del state
        return companded(_store, stored)

    return base.Reparam(init, apply, None, None, finish)


def _first_curve(w, a: float, b: float) -> Curve | None:
    if not _has_curve(w):
        return None
    dtype = jnp.promote_types(w.dtype, jnp.float32)
    return Curve(jnp.asarray(math.log(a), dtype), jnp.asarray(math.log(b), dtype))


def _has_curve(w) -> bool:
    return np.ndim(w) >= 2 and jnp.issubdtype(w.dtype, jnp.floating)


@jax.jit
def _compand(v: Array, a: Scalar, b: Scalar) -> Array:
    wide = precision.wide(v)
    # The barriers keep constants and exponentials from being folded into the product and the quotient.
    a, b = jax.lax.optimization_barrier((jnp.asarray(a, wide.dtype), jnp.asarray(b, wide.dtype)))
    return (a * jnp.arctan(wide / b)).astype(v.dtype)


def _store(path: str, v: Any, a: Scalar, b: Scalar) -> Any:
    if not formats.is_weight(v):
        return _compand(v, a, b)
    if not isinstance(v, formats.NMSparse) or formats.is_weight(v.values):
        raise ValueError(
            f"{path} is stored as {type(v).__name__}, whose grid weight_compander would bend. Put weight_compander "
            "before the link that quantizes: chain(weight_compander(), ...)"
        )
    # Not the values alone: an arctangent may differ in its last bit between arrays of different sizes.
    return formats.NMSparse.from_dense(_compand(v.dense(), a, b), n=v.n, m=v.m, mask=v.mask())


def _check(a: Scalar, b: Scalar) -> None:
    choices.require_within("a", a, "(0, inf)")
    choices.require_within("b", b, "(0, inf)")
