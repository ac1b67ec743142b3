"""Weights of examples, learned by looking one step ahead.

The *weigher* is whatever decides how much examples count: a vector of weights, the parameters of a network that maps
features of an example to its weight, a ratio between two losses. It is judged by the loss on other examples after one
training step, so that the gradient passes through that step. `steelyard.optim.bilevel_penalty_step` solves the same
kind of problem over many steps and without second derivatives.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from steelyard import choices, precision

PyTree = Any
InnerLoss = Callable[[PyTree, PyTree, PyTree], Float[Array, ""]]
OuterLoss = Callable[[PyTree, PyTree], Float[Array, ""]]


class BilevelStepState(NamedTuple):
    """State of `bilevel_step`.

    Attributes:
      params: what trains on the weighed examples, theta.
      weigher: what weighs them, omega.
      outer: state of the weigher's optimizer, `outer_tx.init(weigher)` at first.
    """

    params: PyTree
    weigher: PyTree
    outer: PyTree


def bilevel_step(
    inner_loss: InnerLoss,
    outer_loss: OuterLoss,
    *,
    inner_rate: float | Float[Array, ""],
    outer_tx: optax.GradientTransformation,
) -> Callable[[BilevelStepState, PyTree, PyTree], tuple[BilevelStepState, tuple[Float[Array, ""], Float[Array, ""]]]]:
    """A step that improves the weigher for the training step that follows, then takes that step.

        theta'(omega) = theta - inner_rate grad_theta inner(theta, omega)
        omega <- omega + outer_tx(grad_omega outer(theta'(omega)))
        theta <- theta'(omega), with the new omega

    The gradient for omega passes through one step of plain gradient descent. A step costs about three backward passes
    more than one without a weigher; every fifth training step is often enough. What a network carries besides its
    parameters, such as batch statistics, should be under `jax.lax.stop_gradient` in both losses.

    Args:
      inner_loss: `(params, weigher, batch) -> scalar`, the weighed training loss.
      outer_loss: `(params, batch) -> scalar`, of examples that are not in the training batch.
      inner_rate: step size of theta, at least 0. It may be traced, so that a schedule can set it.
      outer_tx: optimizer of omega.

    Returns:
      `(state, inner_batch, outer_batch) -> (state, (inner value, outer value))`, both values with the old weigher: the
      first at the old parameters, the second one step on. Parameters and weigher keep their dtypes; the step is taken
      in float32 at least.

    Raises:
      ValueError: `inner_rate` is negative.

    Source: Less or More From Teacher: Exploiting Trilateral Geometry For Knowledge Distillation (2024, Hu et al.),
    bilevel optimization; Learning to Reweight Examples for Robust Deep Learning (2018, Ren et al.), section 3.2.
    """
    choices.require_within("inner_rate", inner_rate, "[0, inf)")
    outer_tx = optax.with_extra_args_support(outer_tx)

    def ahead(params, weigher, batch):
        value, grads = jax.value_and_grad(inner_loss)(params, weigher, batch)
        return jax.tree.map(lambda p, g: _descend(p, g, inner_rate), params, grads), value

    def step(state, inner_batch, outer_batch):
        def judge(weigher):
            params, inner_value = ahead(state.params, weigher, inner_batch)
            return outer_loss(params, outer_batch), inner_value

        (outer_value, inner_value), grads = jax.value_and_grad(judge, has_aux=True)(state.weigher)
        updates, outer = outer_tx.update(grads, state.outer, state.weigher, value=outer_value)
        weigher = optax.apply_updates(state.weigher, updates)
        params, _ = ahead(state.params, weigher, inner_batch)
        return BilevelStepState(params, weigher, outer), (inner_value, outer_value)

    return step


def _descend(param: Array, grad: Array, rate: float | Float[Array, ""]) -> Array:
    wide = precision.wide(param)
    return (wide - jnp.asarray(rate, wide.dtype) * grad).astype(param.dtype)
