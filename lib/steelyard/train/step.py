"""Contract 5: the train step, a pure function `(state, batch) -> (state, metrics)`.

The step knows no method by name. Everything that a method may want to change is an argument of `make_step`; what a
method wants to keep between steps is a field of `TrainState`.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from steelyard import aggregate, choices, optim
from steelyard import reparam as reparam_lib
from steelyard.train import objective as objective_lib
from steelyard.train.state import TrainState

PyTree = Any
Metrics = dict[str, Float[Array, ""]]
Step = Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]

MODES = ("auto", "weights", "stacked", "lean", "outputs")


def make_step(
    forward: Callable[..., Any],
    losses: objective_lib.Losses,
    tx: optax.GradientTransformation,
    *,
    aggregator: aggregate.Aggregator | None = None,
    mode: str = "auto",
    reparam: reparam_lib.Reparam | None = None,
    prepare: Callable[..., PyTree] | None = None,
    penalties: Callable[[PyTree, PyTree], Mapping[str, Array]] | None = None,
    weigh: Callable[..., Any] | None = None,
    value_and_grad: Callable[[Callable], Callable] | None = None,
    after: Callable[[PyTree, PyTree], PyTree] | None = None,
    track: Callable[..., dict[str, PyTree]] | None = None,
    measure: Callable[[PyTree, PyTree], Mapping[str, Array]] | None = None,
    loss_scale: Callable[[PyTree], Array] | None = None,
    shardings: TrainState | None = None,
    microbatches: int = 1,
    skip_nonfinite: bool = True,
) -> Step:
    """Builds a train step.

    One rule holds for every hook that reads a part of the state: if that part is `None`, the hook neither gets nor
    returns it; otherwise it gets its value and returns the new one.

    Args:
      forward: `(params, batch, *, rng, train) -> outputs`. With a model state: `(params, batch, *, rng, train,
        model_state) -> (outputs, model_state)`. Sums over the examples (counts of tokens, of expert loads) may stand
        under the key `aux` of the outputs: they are summed over microbatches and handed to `after`.
      losses: `(outputs, batch) -> {task: per-example loss}`, without reduction. A loss that is not a mean over
        examples is declared by `losses.batch_dependent`; its batch is then never split. One that keeps a value for
        each training example is declared by `losses.with_example_state`: `(outputs, batch, example_state) -> (losses,
        example_state)`, before `weigh`.
      tx: an optax transform on the stored parameters. It gets the extra arguments `value` (sum of the losses),
        `losses` (the vector), `step`, `rng` and, if the reparameterization has them, `masks`.
      aggregator: combines the gradients of the tasks; without one the losses are summed.
      mode: how the aggregator is run: "weights", "stacked", "lean" (see `aggregate.value_and_grad`), "auto", or
        "outputs": at the model's outputs, with one backward pass through the model (`aggregate.value_and_grad_at`);
        penalties are then added outside of the balance.
      reparam: stands between the stored parameters and those that `forward` gets.
      prepare: `(params, batch, references, rng) -> batch`, outside the gradient, with the parameters of evaluation
        mode: adversarial examples, mixing, a teacher's outputs. It gets `model_state=` if there is one, read-only.
      penalties: `(params, references) -> {task: scalar}`, never split over microbatches. A name that `losses` has too
        adds to that task; another is a task of its own.
      weigh: `(example_state, indices, losses) -> weights`, between forward and gradient: an array for all tasks or a
        mapping from task to array; `indices` is `batch["index"]`. The mean divides by the number of examples, not by
        the sum of weights. With an example state it returns `(weights, example_state)`.
      value_and_grad: wraps the gradient function `fn(params, *args) -> (value, grads)` in one of the same form:
        `functools.partial(optim.sam_value_and_grad, rho=0.05)`.
      after: `(model_state, aux) -> model_state`, once per optimizer step.
      track: `(references, params, *, step) -> references`, after the update, on the stored parameters: averages.
      measure: `(outputs, batch) -> {name: per-example value}`, averaged into the metrics.
      loss_scale: `opt_state -> scale`, for instance `optim.current_loss_scale`: the losses are multiplied by it, and
        `tx` must divide by it and skip what is not finite.
      shardings: of the state (`sharding.state_shardings`): the task gradients are then laid out like the parameters,
        and their Gram matrix costs one all-reduce. Mode "outputs" has no use for it.
      microbatches: number of parts into which the batch is cut; gradients are accumulated in float32.
      skip_nonfinite: keep the state (but for `step` and `skipped`) when a gradient is not finite.

    Returns:
      A pure function to be jitted (see `jit_step`). Metrics are scalars: `loss`, `loss/<task>`, `grad_norm`,
      `skipped` (so far), what `measure` gives, and with an aggregator `weight/<task>`, `norm/<task>` and
      `cosine/<task>/<task>` where the rule has the Gramian.

    Raises:
      ValueError: an unknown mode; options that exclude each other.
    """
    _check(mode, aggregator, microbatches, losses, loss_scale, value_and_grad)
    reparam = reparam or reparam_lib.identity()
    tx = optax.with_extra_args_support(tx)
    objective = objective_lib.Objective(forward, losses, reparam.apply, penalties, weigh, measure, microbatches)
    where = {} if shardings is None else _places(shardings.params)
    gradient = functools.partial(_gradient, objective, aggregator, mode, where, value_and_grad or (lambda fn: fn))

    def step(state: TrainState, batch: PyTree) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(state.rng, state.step)
        batch = _prepare(prepare, objective, state, batch, rng)
        context = objective_lib.Context(
            batch, state.references, state.reparam_state, state.model_state, state.example_state, state.step, rng
        )
        scale = None if loss_scale is None else loss_scale(state.opt_state)
        tasks = objective.tasks(state.params, context)
        (values, aux), grads, aggregator_state, report = gradient(state, context, tasks, scale)

        update_rng = jax.random.fold_in(rng, 2)
        extra = {"value": jnp.sum(values), "losses": values, "step": state.step, "rng": update_rng}
        masks = reparam.masks(state.params, state.reparam_state, step=state.step)
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, **extra, **({} if masks is None else {"masks": masks})
        )
        params = reparam.project(optax.apply_updates(state.params, updates), state.reparam_state)
        new = state._replace(
            params=params,
            references=state.references if track is None else track(state.references, params, step=state.step),
            reparam_state=reparam.update(state.reparam_state, params, grads, step=state.step, rng=update_rng),
            opt_state=opt_state,
            aggregator_state=aggregator_state,
            model_state=aux.model_state if after is None else after(aux.model_state, aux.sums),
            example_state=aux.example_state,
        )
        finite = optim.all_finite(grads)
        if skip_nonfinite:
            new = _keep_if(finite, new, state)
            if scale is not None:  # the transform has seen the overflow and lowered its scale
                new = new._replace(opt_state=opt_state)
        new = new._replace(step=state.step + 1, skipped=state.skipped + jnp.where(finite, 0, 1))
        return new, _metrics(tasks, values, aux, grads, 1.0 if scale is None else scale, new.skipped, report)

    return step


def _check(mode, aggregator, microbatches, losses, loss_scale, value_and_grad) -> None:
    choices.require("mode", mode, MODES)
    if aggregator is None and mode != "auto":
        raise ValueError(f"mode={mode!r} needs an aggregator: without one the losses are summed")
    if microbatches < 1:
        raise ValueError(f"microbatches={microbatches} must be at least 1")
    if microbatches > 1 and getattr(losses, "batch_dependent", False):
        raise ValueError(
            f"microbatches={microbatches}: the losses depend on the whole batch (losses.batch_dependent), "
            "which may not be split; use microbatches=1 or a loss that is a mean over examples"
        )
    if mode == "lean" and value_and_grad is not None:
        raise ValueError('mode="lean" has no gradient function to wrap: use mode="stacked" with value_and_grad')
    if mode in ("lean", "outputs") and loss_scale is not None:
        raise ValueError(f'mode={mode!r} does not take a loss_scale: use mode="stacked" or bfloat16')


def _prepare(prepare, objective: objective_lib.Objective, state: TrainState, batch: PyTree, rng) -> PyTree:
    """The batch that the losses see: cut into microbatches, each changed by `prepare`."""
    if objective.microbatches > 1:
        batch = objective_lib.split(batch, objective.microbatches)
    if prepare is None:
        return batch
    params = seen_params(objective.see, state)
    has_model_state = {} if state.model_state is None else {"model_state": state.model_state}

    def one(batch, rng):
        return jax.lax.stop_gradient(prepare(params, batch, state.references, rng, **has_model_state))

    rng = jax.random.fold_in(rng, 3)
    if objective.microbatches == 1:
        return one(batch, rng)
    rngs = jax.vmap(lambda i: jax.random.fold_in(rng, i))(jnp.arange(objective.microbatches))
    return jax.lax.map(lambda args: one(*args), (batch, rngs))


def seen_params(see: Callable[..., PyTree], state: TrainState) -> PyTree:
    """The parameters that the model sees in evaluation mode; `see` is `Reparam.apply`."""
    return see(state.params, state.reparam_state, step=state.step, rng=None, train=False)


def _places(shardings: PyTree) -> dict[str, Any]:
    """The mesh and the specs of a tree of `NamedSharding`, as `aggregate.value_and_grad` takes them."""
    leaves = jax.tree.leaves(shardings)
    return {"mesh": leaves[0].mesh, "specs": jax.tree.map(lambda s: s.spec, shardings)} if leaves else {}


def _gradient(objective, aggregator, mode, where, wrap, state: TrainState, context, tasks, scale):
    """`(losses, aux), update, aggregator state, report` by the driver that `mode` names."""
    vector = functools.partial(objective.vector, tasks=tasks)
    whole = aggregate.weighted_gradient(vector, has_aux=True)

    def base(params, weights, context):
        if callable(weights):
            chosen = weights if scale is None else (lambda values: scale * weights(values))
            return whole(params, chosen, context)
        scaled = weights if scale is None else scale * weights
        if objective.microbatches == 1:
            return whole(params, scaled, context)
        return objective.gradient(params, scaled, context, tasks=tasks)

    if aggregator is None:
        (values, aux), grads = wrap(base)(state.params, jnp.ones(len(tasks)), context)
        return (values, aux), grads, state.aggregator_state, None
    if mode == "outputs":
        return _outputs_gradient(objective, aggregator, wrap, state, context, tasks)
    drive = aggregate.value_and_grad(
        vector,
        aggregator,
        mode=mode,
        has_aux=True,
        gradient=None if mode == "lean" else wrap(base),
        report=True,
        **where,
    )
    return drive(state.params, state.aggregator_state, context)


def _outputs_gradient(objective, aggregator, wrap, state: TrainState, context, tasks):
    """Balances the data losses at the model's outputs; penalties are added with weight one."""

    def heads(params, outputs, context):
        del params
        batch = context.batch if objective.microbatches == 1 else objective_lib.merge(context.batch)
        means, _, _ = objective.reduce(outputs, batch, context.example_state)
        return jnp.stack(list(means.values()))

    drive = aggregate.value_and_grad_at(objective.outputs, heads, aggregator, has_aux=True, report=True)

    def balanced(params, context):
        value, grads, aggregator_state, report = drive(params, state.aggregator_state, context)
        return (value, aggregator_state, report), grads

    def penalized(params, context):
        value, grads = balanced(params, context)
        if objective.penalties is None:
            return (value, {}), grads
        penalty, pull = jax.vjp(lambda p: objective.penalty(p, context), params)
        (extra,) = pull(jax.tree.map(jnp.ones_like, penalty))
        return (value, penalty), jax.tree.map(jnp.add, grads, extra)

    (((_, outputs, (model_state, sums)), aggregator_state, report), penalty), grads = wrap(penalized)(
        state.params, context
    )
    batch = context.batch if objective.microbatches == 1 else objective_lib.merge(context.batch)
    means, example_state, measures = objective.reduce(outputs, batch, context.example_state)
    aux = objective_lib.Aux(model_state, example_state, sums, measures)
    return (objective_lib.stack(means, penalty, tasks), aux), grads, aggregator_state, report


def _keep_if(finite: Array, new: TrainState, old: TrainState) -> TrainState:
    """`new` where the gradients are finite, else `old`; leaves that did not change cost nothing."""
    return jax.tree.map(lambda n, o: n if n is o else jnp.where(finite, n, o), new, old)


def _metrics(tasks, values, aux, grads, scale, skipped, report) -> Metrics:
    metrics = {
        "loss": jnp.sum(values),
        **{f"loss/{task}": value for task, value in zip(tasks, values, strict=True)},
        "grad_norm": optax.tree.norm(grads) / scale,
        "skipped": skipped,
        **aux.measures,
    }
    return metrics if report is None else metrics | _conflict_metrics(tasks, report, scale)


def _conflict_metrics(tasks, report: aggregate.Report, scale) -> Metrics:
    """Weights, norms and cosines of the task gradients, from the Gramian that the rule has anyway."""
    metrics: Metrics = {}
    if report.weights is not None:
        metrics |= {f"weight/{task}": w for task, w in zip(tasks, report.weights, strict=False)}
    if report.gram is not None:
        norms = jnp.sqrt(jnp.maximum(jnp.diagonal(report.gram), 0.0))
        cosines = report.gram / jnp.maximum(norms[:, None] * norms[None, :], jnp.finfo(jnp.float32).tiny)
        metrics |= {f"norm/{task}": n / scale for task, n in zip(tasks, norms, strict=False)}
        for i, a in enumerate(tasks[: norms.size]):
            metrics |= {f"cosine/{a}/{b}": cosines[i, j] for j, b in enumerate(tasks[: norms.size]) if j > i}
    return metrics
