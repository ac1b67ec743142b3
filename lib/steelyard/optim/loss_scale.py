"""Dynamic loss scaling: small gradients survive a 16-bit backward pass.

The caller multiplies the loss by `current_loss_scale(opt_state)`; the transformation divides the gradients by it
again in float32, skips steps whose gradients overflowed, and adapts the scale. float16 needs it; bfloat16, whose
exponent is as wide as that of float32, does not.

Source: Mixed Precision Training (2018, Micikevicius et al.), section 3.2.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from steelyard import choices, precision

PyTree = Any


class DynamicLossScaleState(NamedTuple):
    """State of `dynamic_loss_scale`: float32 scale, finite steps since it last changed, steps skipped in all."""

    scale: Float[Array, ""]
    count: Int[Array, ""]
    skipped: Int[Array, ""]
    inner_state: optax.OptState


def dynamic_loss_scale(
    inner: optax.GradientTransformation,
    *,
    initial_scale: float = 2.0**15,
    growth_interval: int = 2000,
    growth_factor: float = 2.0,
    backoff_factor: float = 0.5,
    min_scale: float = 1.0,
    max_scale: float = 2.0**24,
) -> optax.GradientTransformationExtraArgs:
    """Runs the inner rule on unscaled gradients, and skips the steps whose gradients are not finite.

        g = float32(scaled gradient) / scale
        all finite:  inner step; the growth_interval-th such step in a row:  scale <- min(scale growth_factor, max)
        otherwise:   zero update, inner state as it was;  scale <- max(scale backoff_factor, min)

    With powers of two for scale and factors (the defaults) scaling is exact. The updates are float32 (float64
    gradients stay float64), for master weights in float32, and so is the inner state, whatever the parameters are.

    Args:
      inner: the rule that gets the unscaled gradients; extra arguments are passed on.
      initial_scale: factor of the loss in the first step.
      growth_interval: number of finite steps in a row after which the scale grows.
      growth_factor: more than 1.
      backoff_factor: between 0 and 1.
      min_scale: the scale never falls below.
      max_scale: the scale never grows above.

    Returns:
      A transformation with the state `DynamicLossScaleState`.

    Raises:
      ValueError: a factor or a scale out of its range.

    Source: Mixed Precision Training (2018, Micikevicius et al.), section 3.2.
    """
    _check(initial_scale, growth_interval, growth_factor, backoff_factor, min_scale, max_scale)
    inner = optax.with_extra_args_support(inner)

    def init(params):
        counts = (jnp.zeros((), jnp.int32) for _ in range(2))
        # The inner rule gets float32 gradients, so its moments are float32 from the start.
        inner_state = inner.init(jax.tree.map(lambda p: _wide(jnp.asarray(p)), params))
        return DynamicLossScaleState(jnp.asarray(initial_scale, jnp.float32), *counts, inner_state)

    def update(updates, state, params=None, **extra_args):
        grads = jax.tree.map(lambda g: _unscale(g, state.scale), updates)
        is_finite = all_finite(grads)
        new_updates, inner_state = inner.update(grads, state.inner_state, params, **extra_args)
        new_updates = jax.tree.map(lambda u: jnp.where(is_finite, u, jnp.zeros_like(u)), new_updates)
        inner_state = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), inner_state, state.inner_state)

        count = jnp.where(is_finite, state.count + 1, 0)
        is_due = count >= growth_interval
        grown = jnp.where(is_due, jnp.minimum(state.scale * growth_factor, max_scale), state.scale)
        scale = jnp.where(is_finite, grown, jnp.maximum(state.scale * backoff_factor, min_scale))
        skipped = state.skipped + jnp.where(is_finite, 0, 1)
        return new_updates, DynamicLossScaleState(scale, jnp.where(is_due, 0, count), skipped, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def current_loss_scale(opt_state: optax.OptState) -> Float[Array, ""]:
    """The scale by which to multiply the loss, found anywhere inside an optimizer state.

    Raises:
      ValueError: the state holds no loss scale, or several.
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=_is_loss_scale)
    found = [leaf for leaf in leaves if _is_loss_scale(leaf)]
    if len(found) != 1:
        raise ValueError(
            f"opt_state holds {len(found)} states of dynamic_loss_scale; it must hold one: "
            "wrap the optimizer once, tx = dynamic_loss_scale(tx)"
        )
    return found[0].scale


def all_finite(tree: PyTree) -> Bool[Array, ""]:
    """Whether no entry of any floating leaf is infinite or NaN; `None` and integer leaves are ignored.

    >>> bool(all_finite({"a": jnp.ones(3), "b": None, "c": jnp.arange(2)})), bool(all_finite([jnp.inf]))
    (True, False)
    """
    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree) if _is_inexact(leaf)]
    return functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(leaf)) for leaf in leaves], jnp.asarray(True))


def _unscale(grad, scale):
    return _wide(grad) / scale if _is_inexact(grad) else grad


def _wide(x):
    return precision.wide(x) if _is_inexact(x) else x


def _is_inexact(leaf) -> bool:
    return jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact)


def _is_loss_scale(x) -> bool:
    return isinstance(x, DynamicLossScaleState)


def _check(initial_scale, growth_interval, growth_factor, backoff_factor, min_scale, max_scale) -> None:
    choices.require_within("growth_interval", growth_interval, "[1, inf)")
    choices.require_within("growth_factor", growth_factor, "(1, inf)")
    choices.require_within("backoff_factor", backoff_factor, "(0, 1)")
    if not 0 < min_scale <= initial_scale <= max_scale:
        raise ValueError(
            f"min_scale={min_scale}, initial_scale={initial_scale}, max_scale={max_scale} "
            "must be positive and in this order"
        )
