"""Surrogates in the space of a model's outputs: one gradient of an expensive loss, several parameter steps.

The gradient of the loss with respect to the *outputs* is paid for once. With it, a quadratic upper bound of the loss in
the outputs is built, and the parameters descend on that bound, which costs model evaluations only.

Source: Target-based Surrogates for Stochastic Optimization (2023, Lavington et al.). The authors' code minimizes a
multiple of the bound, mean(<G, z> / eta + |z - a|^2): its eta is 1 / (2 step_size) here.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from steelyard import choices, precision

PyTree = Any


def target_surrogate(
    outputs: PyTree, anchor: PyTree, anchor_grads: PyTree, *, step_size: float | Float[Array, ""]
) -> Float[Array, ""]:
    """The quadratic bound of the mean loss around the anchor, without its constant.

        S = mean_i [<G_i, z_i - a_i> + |z_i - a_i|^2 / (2 step_size)]

    If every loss_i is L-smooth in its output and step_size <= 1/L, mean_i loss_i(a) + S is an upper bound of the mean
    loss: L = 1 for softmax cross entropy and for |z - y|^2 / 2. Computed in float32 at least. No gradient flows to the
    anchor.

    Args:
      outputs: z, an array or a tree of arrays [B, ...], example by example.
      anchor: a, the outputs at which the loss was differentiated; same structure and shapes.
      anchor_grads: G, the gradient of the *sum* of the losses at the anchor; same structure and shapes.
      step_size: positive, a number or a (traced) scalar; about 1/sqrt(t) for stochastic batches.

    Raises:
      ValueError: `step_size` is not positive, or the shapes differ.

    Source: Target-based Surrogates for Stochastic Optimization (2023, Lavington et al.), section 3.

    >>> z, a, g = jnp.asarray([[1.0], [3.0]]), jnp.asarray([[1.0], [1.0]]), jnp.asarray([[5.0], [-2.0]])
    >>> target_surrogate(z, a, g, step_size=1.0).item()
    -1.0
    """
    choices.require_within("step_size", step_size, "(0, inf)")
    terms = jax.tree.map(lambda z, a, g: _summed(z, a, g, step_size), outputs, anchor, anchor_grads)
    return sum(jax.tree.leaves(terms), start=jnp.float32(0)) / _batch_size(outputs)


def target_surrogate_step(
    predict: Callable[[PyTree], PyTree],
    loss: Callable[[PyTree], Float[Array, "B"]],
    params: PyTree,
    *,
    step_size: float | Float[Array, ""],
    inner_steps: int,
    inner: optax.GradientTransformation,
) -> PyTree:
    """One outer step: `inner_steps` updates of the parameters on the surrogate at their present outputs.

    At the first of these updates the surrogate's gradient is that of the mean loss, so one update by `optax.sgd` is a
    step of SGD. The cost is one loss gradient, and `inner_steps` + 1 evaluations and `inner_steps` gradients of the
    model. It pays where the loss (a simulator, a labeller) costs more than the model.

    Args:
      predict: `params -> outputs` [B, ...] of one batch, floating; the same function throughout the step, so dropout
        with the same key.
      loss: `outputs -> losses [B]`, one for each example.
      params: the model's parameters; `None` leaves stay `None`.
      step_size: as in `target_surrogate`.
      inner_steps: updates on the surrogate, at least 0; 0 returns the parameters as they are.
      inner: the rule of these updates, with a fresh state. It gets the extra arguments `value`, `grad` and `value_fn`
        of the surrogate, as line searches need.

    Returns:
      The new parameters, in their own dtypes.

    Raises:
      ValueError: a number out of its range, outputs that are not floating, or losses that are not one an example.

    Source: Target-based Surrogates for Stochastic Optimization (2023, Lavington et al.), the surrogate loop (SSO).
    """
    choices.require_within("step_size", step_size, "(0, inf)")
    choices.require_within("inner_steps", inner_steps, "[0, inf)")
    inner = optax.with_extra_args_support(inner)
    params = jax.tree.map(jnp.asarray, params)
    anchor = predict(params)
    _check_outputs(anchor)
    anchor_grads = jax.grad(lambda z: jnp.sum(_losses(loss, z)))(anchor)

    def surrogate(params):
        return target_surrogate(predict(params), anchor, anchor_grads, step_size=step_size)

    def step(carry, _):
        params, state = carry
        value, grad = jax.value_and_grad(surrogate)(params)
        updates, state = inner.update(grad, state, params, value=value, grad=grad, value_fn=surrogate)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, inner.init(params)), length=inner_steps)
    return params


def _summed(z, a, g, step_size) -> Float[Array, ""]:
    if not jnp.shape(z) == jnp.shape(a) == jnp.shape(g):
        raise ValueError(f"outputs {jnp.shape(z)}, anchor {jnp.shape(a)} and its gradient {jnp.shape(g)} must agree")
    z, a, g = (precision.wide(x) for x in (z, a, g))
    moved = z - jax.lax.stop_gradient(a)
    square = jnp.sum(jnp.square(moved)) / (2 * jnp.asarray(step_size, z.dtype))
    return jnp.sum(jax.lax.stop_gradient(g) * moved) + square


def _batch_size(outputs: PyTree) -> int:
    """The common length of the leading axes; 1 for a tree without leaves, whose sum is 0."""
    leaves = jax.tree.leaves(outputs)
    shapes = [jnp.shape(leaf) for leaf in leaves]
    if any(shape[:1] != shapes[0][:1] or not shape for shape in shapes):
        raise ValueError(f"outputs have the shapes {shapes}; all must be [B, ...] with the same B")
    return shapes[0][0] if shapes else 1


def _check_outputs(outputs: PyTree) -> None:
    for leaf in jax.tree.leaves(outputs):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise ValueError(f"predict gives outputs of dtype {jnp.result_type(leaf)}; they must be floating")


def _losses(loss: Callable[[PyTree], Array], outputs: PyTree) -> Float[Array, "B"]:
    losses = loss(outputs)
    expected = (_batch_size(outputs),)
    if jnp.shape(losses) != expected:
        raise ValueError(f"loss gives shape {jnp.shape(losses)}; it must be {expected}, one loss an example")
    return precision.wide(losses)
