"""Updates of weights under a mask: sparse steps, and gradients that fade from pruned weights.

A mask is a bool array of its leaf's shape, True where the weight is kept; `None` stands for a dense leaf. The train
step hands the masks of a reparameterization to the optimizer as the extra argument `masks`.

Source of `decay_gradient_flow`: Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers (2024,
Bambhaniya et al.).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from steelyard.optim.reset import is_gap, reset

PyTree = Any


class DecayGradientFlowState(NamedTuple):
    """State of `decay_gradient_flow`: the number of updates made."""

    count: Int[Array, ""]


def decay_gradient_flow(
    decay: optax.ScalarOrSchedule, *, masks: PyTree | Callable[[PyTree], PyTree] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Weakens the gradients of pruned weights by a factor that fades in time.

        u = g (mask + D(count) (1 - mask)),  count = 0, 1, ...

    After a straight-through mask this is the chain rule through w (mask + D (1 - mask)), exactly. Place it first in a
    chain, before clipping and moments.

    Args:
      decay: the factor D, a number or a schedule.
      masks: a tree of masks, a function of the parameters that gives one, or `None` to take the extra argument `masks`.

    Returns:
      A transformation with the state `DecayGradientFlowState`.

    Raises:
      ValueError: no masks, a mask whose shape is not its gradient's, or `masks` is a function and params are missing.

    Source: Progressive Gradient Flow (2024, Bambhaniya et al.), mask decay (MdGf).
    """

    def init(params):
        del params
        return DecayGradientFlowState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra_args):
        if callable(masks) and params is None:
            raise ValueError("masks is a function of params: call tx.update(grads, state, params)")
        kept = (
            masks(params) if callable(masks) else _masks("decay_gradient_flow", extra_args) if masks is None else masks
        )
        flow = decay(state.count) if callable(decay) else decay
        updates = _map_masked(lambda g, mask: jnp.where(mask, g, g * jnp.asarray(flow, g.dtype)), updates, kept)
        return updates, DecayGradientFlowState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def sparse(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Runs any rule under masks: gradient, update and the rule's own moments are zero where the mask is False.

    A weight that is grown later so starts with zero moments, whatever the rule. Entries of the inner state that are
    shaped like their parameter are masked; others (counters, factored moments) are left alone.

    Args:
      inner: the rule; it gets the extra arguments too, `masks` included.

    Returns:
      A transformation with the inner rule's state, whose `update` takes the extra argument `masks`: a tree like the
      updates, `None` for a dense leaf, or `None` where all are dense.

    Raises:
      ValueError: the extra argument is missing, or a mask's shape is not its gradient's.
    """
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra_args):
        masks = _masks("sparse", extra_args)
        updates, state = inner.update(_zero_pruned(updates, masks), state, params, **extra_args)
        if masks is not None:
            state = reset(state, jax.tree.map(jnp.logical_not, masks), tx=inner)
        return _zero_pruned(updates, masks), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _masks(name: str, extra_args: dict[str, Any]) -> PyTree | None:
    if "masks" not in extra_args:
        raise ValueError(f"{name} needs the extra argument masks: tx.update(grads, state, params, masks=masks)")
    return extra_args["masks"]


def _map_masked(fn: Callable[[Array, Array], Array], updates: PyTree, masks: PyTree | None) -> PyTree:
    def leaf(g, mask):
        if is_gap(g) or mask is None:
            return g
        if jnp.shape(g) != jnp.shape(mask):
            raise ValueError(f"mask of shape {jnp.shape(mask)} for a gradient of shape {jnp.shape(g)}")
        return fn(g, mask)

    return updates if masks is None else jax.tree.map(leaf, updates, masks, is_leaf=is_gap)


def _zero_pruned(updates: PyTree, masks: PyTree | None) -> PyTree:
    return _map_masked(lambda g, mask: jnp.where(mask, g, jnp.zeros_like(g)), updates, masks)
