"""From a forward pass and per-example losses to the vector of task losses, whole or in microbatches.

The vector has one entry for each task, in the order in which `losses` names them; then come the tasks that only
`penalties` names. Each entry is `sum(weights * per_example) / size`: a mean over the whole batch, whatever the number
of microbatches.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

PyTree = Any
Losses = Callable[[PyTree, PyTree], Mapping[str, Float[Array, "batch *rest"]]]


class Context(NamedTuple):
    """What one evaluation of the task losses reads besides the stored parameters.

    `batch` leaves carry a leading axis of microbatches if there are several.
    """

    batch: PyTree
    references: dict[str, PyTree]
    reparam_state: PyTree
    model_state: PyTree
    example_state: PyTree
    step: Array
    rng: Key[Array, ""]


class Aux(NamedTuple):
    """What an evaluation gives besides the losses."""

    model_state: PyTree
    example_state: PyTree
    sums: PyTree  # `outputs["aux"]`, summed over microbatches
    measures: dict[str, Float[Array, ""]]  # means over the batch of what `measure` gives


class Objective(NamedTuple):
    """The functions that define the task losses; every method is pure."""

    forward: Callable[..., Any]
    losses: Losses
    see: Callable[..., PyTree]  # `Reparam.apply`
    penalties: Callable[[PyTree, PyTree], Mapping[str, Array]] | None
    weigh: Callable[..., Any] | None
    measure: Callable[[PyTree, PyTree], Mapping[str, Array]] | None
    microbatches: int

    def params(self, stored: PyTree, context: Context, *, train: bool = True) -> PyTree:
        """The parameters that the model sees."""
        rng = jax.random.fold_in(context.rng, 0)
        return self.see(stored, context.reparam_state, step=context.step, rng=rng, train=train)

    def run(self, params: PyTree, batch: PyTree, model_state: PyTree, rng) -> tuple[PyTree, PyTree]:
        """Outputs and new model state of one (micro)batch."""
        if model_state is None:
            return self.forward(params, batch, rng=rng, train=True), None
        return self.forward(params, batch, rng=rng, train=True, model_state=model_state)

    def reduce(self, outputs, batch, example_state) -> tuple[dict[str, Array], PyTree, dict[str, Array]]:
        """Mean loss of each task, new example state, and mean measures, of one (micro)batch."""
        per_example, example_state = self._per_example(outputs, batch, example_state)
        if self.weigh is None:
            means = {task: jnp.mean(loss, dtype=_wide(loss.dtype)) for task, loss in per_example.items()}
        else:
            weights, example_state = self._weights(per_example, batch, example_state)
            means = {task: _weighted_mean(loss, weights[task]) for task, loss in per_example.items()}
        measured = {} if self.measure is None else dict(self.measure(outputs, batch))
        return means, example_state, {k: jnp.mean(jax.lax.stop_gradient(v)) for k, v in measured.items()}

    def _per_example(self, outputs, batch, example_state) -> tuple[dict[str, Array], PyTree]:
        if not getattr(self.losses, "with_example_state", False):
            return dict(self.losses(outputs, batch)), example_state
        if example_state is None:
            raise ValueError(
                "losses reads the example state (losses.with_example_state), which is None: give init_state a table "
                "with a row for each training example, example_state="
            )
        per_example, example_state = self.losses(outputs, batch, example_state)
        return dict(per_example), jax.lax.stop_gradient(example_state)

    def _weights(self, per_example, batch, example_state):
        stopped = jax.lax.stop_gradient(per_example)
        indices = batch.get("index") if isinstance(batch, Mapping) else None
        result = self.weigh(example_state, indices, stopped)
        weights, example_state = (result, None) if example_state is None else result
        if not isinstance(weights, Mapping):
            weights = dict.fromkeys(per_example, weights)
        return jax.lax.stop_gradient({task: weights.get(task, 1.0) for task in per_example}), example_state

    def penalty(self, stored: PyTree, context: Context) -> dict[str, Array]:
        """Penalty of each task that has one, from the parameters that the model sees."""
        if self.penalties is None:
            return {}
        return dict(self.penalties(self.params(stored, context), context.references))

    def tasks(self, stored: PyTree, context: Context) -> tuple[str, ...]:
        """Names of the entries of the loss vector; nothing is computed."""
        names: list[str] = []

        def trace(stored, context):
            batch, rng = _first(context) if self.microbatches > 1 else (context.batch, context.rng)
            outputs, _ = self.run(self.params(stored, context), batch, context.model_state, rng)
            names.extend(self._per_example(outputs, batch, context.example_state)[0])
            names.extend(name for name in self.penalty(stored, context) if name not in names)

        jax.eval_shape(trace, stored, context)
        if not names:
            raise ValueError("losses gave no task: it must return a mapping from task name to per-example loss")
        return tuple(names)

    def data_losses(self, stored, context: Context, batch, rng, carried) -> tuple[dict[str, Array], Aux]:
        """Mean losses of one (micro)batch; `carried` is the model state and the example state before it."""
        model_state, example_state = carried
        outputs, model_state = self.run(self.params(stored, context), batch, model_state, rng)
        means, example_state, measures = self.reduce(outputs, batch, example_state)
        return means, Aux(model_state, example_state, aux_of(outputs), measures)

    def vector(self, stored: PyTree, context: Context, *, tasks: tuple[str, ...]) -> tuple[Float[Array, "K"], Aux]:
        """The loss vector of the whole batch: in one pass, or scanned with each microbatch's residuals recomputed."""
        penalty = self.penalty(stored, context)
        if self.microbatches == 1:
            means, aux = self.data_losses(
                stored, context, context.batch, forward_rng(context), (context.model_state, context.example_state)
            )
            return stack(means, penalty, tasks), aux
        # Gradients of the scan are accumulated in float32, whatever the dtype of the parameters.
        wide, narrow = _widen(stored)

        @jax.checkpoint
        def body(carried, slice_):
            batch, rng = slice_
            means, aux = self.data_losses(narrow(wide), context, batch, rng, carried)
            return (aux.model_state, aux.example_state), (means, aux.sums, aux.measures)

        carried, (means, sums, measures) = jax.lax.scan(
            body, (context.model_state, context.example_state), _slices(context, self.microbatches)
        )
        means, measures = jax.tree.map(lambda x: jnp.mean(x, 0), (means, measures))
        return stack(means, penalty, tasks), Aux(*carried, jax.tree.map(lambda x: jnp.sum(x, 0), sums), measures)

    def outputs(self, stored: PyTree, context: Context) -> tuple[PyTree, tuple[PyTree, PyTree]]:
        """`(outputs, (model state, sums))` of the whole batch, microbatches laid one after another."""
        if self.microbatches == 1:
            outputs, model_state = self.run(
                self.params(stored, context), context.batch, context.model_state, forward_rng(context)
            )
            return without_aux(outputs), (model_state, aux_of(outputs))
        wide, narrow = _widen(stored)

        @jax.checkpoint
        def body(model_state, slice_):
            outputs, model_state = self.run(self.params(narrow(wide), context), slice_[0], model_state, slice_[1])
            return model_state, (without_aux(outputs), aux_of(outputs))

        model_state, (outputs, sums) = jax.lax.scan(body, context.model_state, _slices(context, self.microbatches))
        return merge(outputs), (model_state, jax.tree.map(lambda x: jnp.sum(x, 0), sums))

    def gradient(self, stored: PyTree, weights: Float[Array, "K"], context: Context, *, tasks: tuple[str, ...]):
        """`((losses, aux), grads)` of `sum_k weights_k L_k`, accumulated over microbatches in float32 sums."""

        def pull(fn, *args):
            losses, vjp, aux = jax.vjp(lambda s: fn(s, *args), stored, has_aux=True)
            (grads,) = vjp(jnp.asarray(weights, losses.dtype))
            return losses, aux, jax.tree.map(lambda g: g.astype(_wide(g.dtype)), grads)

        def data(stored, batch, rng, carried):
            means, aux = self.data_losses(stored, context, batch, rng, carried)
            return stack(means, {}, tasks) / self.microbatches, aux

        def body(carry, slice_):
            carried, total = carry
            batch, rng = slice_
            losses, aux, grads = pull(data, batch, rng, carried)
            added = jax.tree.map(jnp.add, total, (losses, grads))
            return ((aux.model_state, aux.example_state), added), (aux.sums, aux.measures)

        losses, _, grads = pull(lambda s: (stack({}, self.penalty(s, context), tasks), None))
        start = ((context.model_state, context.example_state), (losses, grads))
        (carried, (losses, grads)), (sums, measures) = jax.lax.scan(body, start, _slices(context, self.microbatches))
        sums = jax.tree.map(lambda x: jnp.sum(x, 0), sums)
        aux = Aux(*carried, sums, jax.tree.map(lambda x: jnp.mean(x, 0), measures))
        return (losses, aux), jax.tree.map(lambda g, p: g.astype(p.dtype), grads, stored)


def forward_rng(context: Context):
    """The key of the forward pass (key 0 of the step belongs to the reparameterization)."""
    return jax.random.fold_in(context.rng, 1)


def aux_of(outputs: PyTree) -> PyTree:
    """What the model counts over its examples, under the key `aux` of its outputs."""
    return jax.lax.stop_gradient(outputs.get("aux", {})) if isinstance(outputs, Mapping) else {}


def without_aux(outputs: PyTree) -> PyTree:
    """The outputs proper."""
    return {k: v for k, v in outputs.items() if k != "aux"} if isinstance(outputs, Mapping) else outputs


def stack(means: Mapping[str, Array], penalty: Mapping[str, Array], tasks: tuple[str, ...]) -> Float[Array, "K"]:
    """The loss vector; a penalty under the name of a task adds to that task."""
    zero = jnp.zeros((), jnp.float32)
    return jnp.stack([means.get(t, zero) + penalty.get(t, zero) for t in tasks]).astype(jnp.float32)


def split(batch: PyTree, microbatches: int) -> PyTree:
    """Gives every leaf a leading axis of microbatches.

    Microbatch `i` holds rows `i, i + M, i + 2M, ...`, so that a batch sharded over devices is cut inside each device.
    """

    def leaf(x):
        rows = x.shape[0] // microbatches
        if rows * microbatches != x.shape[0]:
            raise ValueError(f"microbatches={microbatches} does not divide the batch of {x.shape[0]} examples")
        return jnp.moveaxis(x.reshape(rows, microbatches, *x.shape[1:]), 1, 0)

    return jax.tree.map(leaf, batch)


def merge(batch: PyTree) -> PyTree:
    """Lays microbatches one after another: leaves lose their leading axis."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)


def _first(context: Context):
    return jax.tree.map(lambda x: x[0], context.batch), context.rng


def _slices(context: Context, microbatches: int):
    rngs = jax.vmap(lambda i: jax.random.fold_in(forward_rng(context), i))(jnp.arange(microbatches))
    return context.batch, rngs


def _weighted_mean(loss: Float[Array, "batch *rest"], weights: Array) -> Float[Array, ""]:
    """`sum(weights * loss) / size`: divided by the number of terms, not by the sum of weights."""
    weights = jnp.asarray(weights)
    weights = weights.reshape(weights.shape + (1,) * (loss.ndim - weights.ndim))
    return jnp.mean(weights * loss, dtype=_wide(loss.dtype))


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def _widen(stored: PyTree):
    narrow_dtypes = jax.tree.map(lambda p: p.dtype, stored)
    wide = jax.tree.map(lambda p: p.astype(_wide(p.dtype)), stored)
    return wide, lambda tree: jax.tree.map(lambda p, dtype: p.astype(dtype), tree, narrow_dtypes)
