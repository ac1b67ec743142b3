"""From a function with K losses and an aggregator to an update: the drivers that the train step uses.

One rule, three ways to run it:

| mode | backward work | gradient memory | for |
| --- | --- | --- | --- |
| "weights" | one pass back, of `sum_k w_k L_k` | 1 gradient | rules on losses |
| "stacked" | K passes back, vectorised | K gradients, sharded like the parameters | every rule |
| "lean" | K passes back and K forward, one by one, then 1 back | 1 gradient | rules on the Gram matrix |

"lean" runs the forward pass anew for each of these passes, so that its memory is that of a single loss whatever K is;
the others run it once. All are meant to be compiled: outside `jax.jit`, parts whose result nobody uses are computed
all the same.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from steelyard import choices
from steelyard.aggregate import stacked as stacked_lib

PyTree = Any
_MODES = ("auto", "weights", "stacked", "lean")
_HEAD_WEIGHTS = ("ones", "weights")


class Report(NamedTuple):
    """What an aggregation saw, at no extra backward pass.

    Attributes:
      weights: the weight of each gradient; `None` for a rule that is not written in weights.
      gram: inner products of the gradients; `None` if they were not needed.
    """

    weights: Float[Array, "K"] | None
    gram: Float[Array, "K K"] | None


def weighted_gradient(losses_fn: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., tuple[Any, PyTree]]:
    """The gradient of `sum_k weights_k L_k(params)`, by one forward and one backward pass.

    Args:
      losses_fn: `(params, *args) -> losses [K]`, or `(losses, aux)` with `has_aux`.
      has_aux: whether `losses_fn` returns auxiliary data.

    Returns:
      `fn(params, weights, *args) -> (losses, grads)`, or `((losses, aux), grads)`. `weights` is `[K]`, or a function
      `losses -> [K]` that is called on the losses under stop-gradient. Under `jax.vmap` over `weights` the forward pass
      is not repeated. With functions that see the parameters twice, like SAM, weights that are a function follow the
      losses of each pass.
    """

    def fn(params, weights, *args):
        losses, pullback, *aux = jax.vjp(lambda p: losses_fn(p, *args), params, has_aux=has_aux)
        _check_losses(losses)
        weights = weights(jax.lax.stop_gradient(losses)) if callable(weights) else weights
        (grads,) = pullback(_cotangent(weights, losses))
        return ((losses, *aux) if has_aux else losses), grads

    return fn


def value_and_grad(
    losses_fn: Callable[..., Any],
    aggregator: optax.GradientTransformationExtraArgs,
    *,
    mode: str = "auto",
    has_aux: bool = False,
    gradient: Callable[..., tuple[Any, PyTree]] | None = None,
    report: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    specs: PyTree = None,
) -> Callable[..., tuple]:
    """Like `jax.value_and_grad` for a vector of K losses whose gradients `aggregator` makes into one.

    Args:
      losses_fn: `(params, *args) -> losses [K]`, or `(losses, aux)` with `has_aux`.
      aggregator: its `init` takes the parameters.
      mode: "weights", "stacked" or "lean", as in the table above; "auto" is "weights" if the rule needs losses alone,
        else "stacked". "lean" takes forward derivatives, in the dtype of the model: parts with a `jax.custom_vjp` have
        none, and half-precision parameters give a Gram matrix of that precision.
      has_aux: whether `losses_fn` returns auxiliary data.
      gradient: replaces `weighted_gradient(losses_fn)`; the same signature, so that it may accumulate over microbatches
        or take the gradient elsewhere (SAM). Not for "lean".
      report: whether to return a `Report` too.
      mesh: the mesh over which the parameters are sharded, given together with `specs`. Then "stacked" lays the K
        gradients out like the parameters, and the Gram matrix costs one all-reduce of K x K numbers.
      specs: a tree of `PartitionSpec` like the parameters.

    Returns:
      `f(params, state, *args) -> (losses, update, state)`, or `((losses, aux), update, state)`; with `report`, a
      `Report` comes fourth. `state` is the aggregator's.

    Raises:
      ValueError: `mode` is unknown or the rule does not have it, `gradient` is given with "lean", or `mesh` without
        `specs`; while tracing, the losses are not a vector.
    """
    mode = _choose_mode(mode, aggregator)
    where = _places(mesh, specs)
    if mode == "lean" and gradient is not None:
        raise ValueError('mode="lean" takes its own gradients: gradient must be None; use mode="stacked" with it')
    if mode == "lean":
        run = _lean(losses_fn, aggregator, has_aux)
    else:
        gradient = gradient or weighted_gradient(losses_fn, has_aux=has_aux)
        if mode == "weights":
            run = _weights(aggregator, has_aux, gradient)
        else:
            run = _stacked(losses_fn, aggregator, has_aux, gradient, where)

    def f(params, state, *args):
        *result, seen = run(params, state, *args)
        return (*result, seen) if report else tuple(result)

    return f


def _choose_mode(mode: str, aggregator: optax.GradientTransformationExtraArgs) -> str:
    choices.require("mode", mode, _MODES)
    has = {
        "weights": getattr(aggregator, "weights", None) is not None,
        "stacked": True,
        "lean": getattr(aggregator, "gram_weights", None) is not None,
    }
    if mode == "auto":
        return "weights" if has["weights"] else "stacked"
    if not has[mode]:
        modes = ", ".join(repr(name) for name, there in has.items() if there)
        raise ValueError(f"mode={mode!r} is not possible with this aggregator; its modes are {modes}")
    return mode


def _places(mesh: jax.sharding.Mesh | None, specs: PyTree) -> dict[str, Any]:
    """The extra arguments by which an aggregator learns where the rows are, given where one row is."""
    if (mesh is None) != (specs is None):
        raise ValueError(f"mesh and specs must be given together; mesh={mesh}, specs={specs}")
    if mesh is None:
        return {}
    spec = jax.sharding.PartitionSpec
    specs = jax.tree.map(lambda s: spec(None, *s), specs, is_leaf=lambda x: isinstance(x, spec))
    return {"mesh": mesh, "specs": specs}


def _weights(aggregator, has_aux, gradient):
    def run(params, state, *args):
        value, update = gradient(params, lambda losses: aggregator.weights(losses, state)[0], *args)
        losses = jax.lax.stop_gradient(value[0] if has_aux else value)
        weights, new_state = aggregator.weights(losses, state)
        return value, update, new_state, Report(weights, None)

    return run


def _stacked(losses_fn, aggregator, has_aux, gradient, where):
    def run(params, state, *args):
        units = _unit_vectors(losses_fn, has_aux, params, args)
        values, rows = jax.vmap(lambda weights: gradient(params, weights, *args))(units)
        # The value does not depend on the weights; any row of it will do.
        value = jax.tree.map(lambda x: x[0], values)
        losses = jax.lax.stop_gradient(value[0] if has_aux else value)
        update, state, seen = _aggregate(aggregator, rows, losses, state, params, where)
        return value, update, state, seen

    return run


def _lean(losses_fn, aggregator, has_aux):
    """With J the Jacobian of the losses, column k of `G = J J^T` is `J (J^T e_k)`: one gradient at a time.

    One loop whose last turn pulls the weights back instead of a unit vector. The forward pass is in it: kept outside,
    its residuals would have to be in memory all at once in the form that both directions read, which costs more than a
    gradient for each of several tasks.
    """

    def run(params, state, *args):
        def with_aux(params):
            return losses_fn(params, *args) if has_aux else (losses_fn(params, *args), ())

        shapes, aux_shapes = jax.eval_shape(with_aux, params)
        _check_losses(shapes)
        count = shapes.shape[0]

        def turn(k, carry):
            gram, state, _, (losses, *_) = carry
            cotangent, state = jax.lax.cond(
                k < count, lambda: (_unit(k, count), state), lambda: _weigh(aggregator, gram, losses, state)
            )
            # Without the barrier the forward pass would be taken out of the loop again.
            at, pulled = jax.lax.optimization_barrier((params, _cotangent(cotangent, shapes)))
            losses, pullback, aux = jax.vjp(with_aux, at, has_aux=True)
            (row,) = pullback(pulled)
            column = jax.lax.cond(
                k < count,
                lambda: jax.jvp(lambda p: with_aux(p)[0], (at,), (row,))[1].astype(jnp.float32),
                lambda: jnp.zeros((count,), jnp.float32),
            )
            return gram.at[:, k].set(column, mode="drop"), state, (cotangent, row), (losses, aux)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (params, shapes, aux_shapes))
        start = (jnp.zeros((count, count), jnp.float32), state, (_unit(0, count), zeros[0]), zeros[1:])
        gram, state, (weights, update), (losses, aux) = jax.lax.fori_loop(0, count + 1, turn, start)
        seen = Report(weights, (gram + gram.T) / 2)
        return ((losses, aux) if has_aux else losses), update, state, seen

    return run


def _unit(k: Array, count: int) -> Float[Array, "K"]:
    return (jnp.arange(count) == k).astype(jnp.float32)


def _weigh(aggregator, gram, losses, state) -> tuple[Float[Array, "K"], PyTree]:
    weights, state = aggregator.gram_weights((gram + gram.T) / 2, losses, state)
    return jnp.asarray(weights, jnp.float32), state


def value_and_grad_at(
    trunk: Callable[..., Any],
    heads: Callable[..., Float[Array, "K"]],
    aggregator: optax.GradientTransformationExtraArgs,
    *,
    head_weights: str = "ones",
    has_aux: bool = False,
    report: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    specs: PyTree = None,
) -> Callable[..., tuple]:
    """Balances K losses at an intermediate value z, so that the trunk is back-propagated once.

    The rows are `zbar_k = dL_k / dz` by K backward passes through the heads; the aggregator makes them one cotangent of
    z, and the gradient is that cotangent pulled back through the trunk plus `sum_k h_k dL_k / dparams` at fixed z.
    Parameters that trunk and heads share get both parts.

    Args:
      trunk: `(params, *args) -> z`, a tree of floating-point arrays, or `(z, aux)` with `has_aux`.
      heads: `(params, z, *args) -> losses [K]`.
      aggregator: its `init` takes z, not the parameters.
      head_weights: `h`: "ones" trains each head by its own loss plainly, "weights" uses the rule's weights.
      has_aux: whether `trunk` returns auxiliary data.
      report: whether to return a `Report` too.
      mesh: the mesh over which z is sharded, given together with `specs`, as for `value_and_grad`.
      specs: a tree of `PartitionSpec` like z.

    Returns:
      `f(params, state, *args) -> ((losses, z), grads, state)`, or `((losses, z, aux), grads, state)`; with `report`, a
      `Report` comes fourth.

    Raises:
      ValueError: `head_weights` is unknown, or is "weights" for a rule without weights, or `mesh` without `specs`;
        while tracing, the losses are not a vector.
    """
    where = _places(mesh, specs)
    choices.require("head_weights", head_weights, _HEAD_WEIGHTS)
    if head_weights == "weights" and not _has_weights(aggregator):
        raise ValueError('head_weights="weights" needs a rule with gram_weights or weights; use "ones" with this one')

    def f(params, state, *args):
        z, trunk_pullback, *aux = jax.vjp(lambda p: trunk(p, *args), params, has_aux=has_aux)
        losses, heads_pullback = jax.vjp(lambda p, z: heads(p, z, *args), params, z)
        _check_losses(losses)
        rows = jax.vmap(lambda unit: heads_pullback(unit)[1])(jnp.eye(losses.shape[0], dtype=losses.dtype))
        cotangent, state, seen = _aggregate(aggregator, rows, losses, state, z, where)
        head = jnp.ones_like(losses) if head_weights == "ones" else _cotangent(seen.weights, losses)
        grads = jax.tree.map(jnp.add, trunk_pullback(cotangent)[0], heads_pullback(head)[0])
        return ((losses, z, *aux), grads, state, seen) if report else ((losses, z, *aux), grads, state)

    return f


def _aggregate(aggregator, rows, losses, state, params, where) -> tuple[PyTree, PyTree, Report]:
    """The aggregator's update, with the weights and the Gram matrix that it used if it has such."""
    losses = jax.lax.stop_gradient(losses)
    if not _has_weights(aggregator):
        update, state = aggregator.update(rows, state, params, losses=losses, **where)
        return update, state, Report(None, None)
    gram = None
    if aggregator.gram_weights is not None:
        gram = stacked_lib.gram(rows, **where)
        weights, state = aggregator.gram_weights(gram, losses, state)
    else:
        weights, state = aggregator.weights(losses, state)
    return stacked_lib.combine(weights, rows), state, Report(weights, gram)


def _has_weights(aggregator: optax.GradientTransformationExtraArgs) -> bool:
    return any(getattr(aggregator, name, None) is not None for name in ("weights", "gram_weights"))


def _unit_vectors(losses_fn, has_aux, params, args) -> Float[Array, "K K"]:
    shapes = jax.eval_shape(lambda: losses_fn(params, *args))
    losses = shapes[0] if has_aux else shapes
    _check_losses(losses)
    return jnp.eye(losses.shape[0], dtype=losses.dtype)


def _cotangent(weights: Float[Array, "K"], losses: Float[Array, "K"]) -> Float[Array, "K"]:
    if jnp.shape(weights) != losses.shape:
        raise ValueError(f"weights have shape {jnp.shape(weights)}, but the losses have shape {losses.shape}")
    return jax.lax.stop_gradient(jnp.asarray(weights, losses.dtype))


def _check_losses(losses: Float[Array, "K"]) -> None:
    if not hasattr(losses, "shape") or len(losses.shape) != 1 or losses.shape[0] == 0:
        found = jax.tree.map(lambda x: x.shape, losses)
        raise ValueError(f"losses must be one array of shape [K], one entry per task and at least one, got {found}")
