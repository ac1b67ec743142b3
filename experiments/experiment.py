"""From a config to everything that a run needs, checked before anything is written or compiled."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import components, tasks
from steelyard import aggregate, data, models, optim, reparam, train
from steelyard.train import rules, sharding

PyTree = Any

REQUIRED = ("dataset", "task", "model", "optimizer", "steps", "batch")
DEFAULTS: Mapping[str, Any] = {
    "seed": 0,
    "aggregator": None,  # without one, the losses of the tasks are summed
    "mode": "auto",  # how the aggregator is run, see train.make_step
    "reparam": (),  # in the order in which they act; none trains dense weights only
    "baseline": True,  # with a reparameterization: train dense weights first, for comparison
    "mesh": {"data": -1},  # sizes of mesh axes
    "sharding": "replicate",  # a preset of train.rules
    "optimizer_fill": None,  # mesh axes over which optimizer state is laid
    "min_size": sharding.MIN_SIZE,  # smaller arrays are sharded only where a rule says so
    "microbatches": 1,
    "eval_batch": 256,
    "log_every": 10,
    "eval_every": 0,  # 0 evaluates at the end only
    "checkpoint_every": 0,  # 0 saves at the end (and when told to stop) only
    "keep": 2,  # checkpoints
}


class Experiment(NamedTuple):
    """What a config names.

    Attributes:
      settings: the config with all defaults filled in.
      task: functions of the task.
      model: the Flax module.
      train_data, test_data: the two splits.
      tx, aggregator: how gradients become updates.
      links: reparameterizations, in the order in which they act.
      mesh, rules: where arrays lie.
      fingerprint: identifies the stream of batches.
    """

    settings: Mapping[str, Any]
    task: tasks.Task
    model: Any
    train_data: data.Arrays | data.Records
    test_data: data.Arrays | data.Records
    tx: optax.GradientTransformation
    aggregator: aggregate.Aggregator | None
    links: tuple[reparam.Reparam, ...]
    mesh: jax.sharding.Mesh
    rules: rules.RuleSet
    fingerprint: str


class Program(NamedTuple):
    """The compiled functions of one variant of an experiment (dense or compressed).

    Attributes:
      init: `() -> TrainState`, laid out over the mesh; or from the arguments that `compiled` was given.
      step: the jitted, donated train step.
      evaluate: `(params, model_state, batch) -> sums and counts`.
      predict: `(params, model_state, batch) -> predictions`.
      reparam: what stands between stored and seen parameters.
      shapes: shapes and shardings of the state, for restoring.
    """

    init: Callable[..., train.TrainState]
    step: train.Step
    evaluate: Callable[..., dict]
    predict: Callable[..., jax.Array]
    reparam: reparam.Reparam
    shapes: train.TrainState


def build(config: Any) -> Experiment:
    """Resolves every name of a config and checks that its parts fit together.

    Raises:
      ConfigError, ValueError, FileNotFoundError: something cannot be run; the text says what to write instead.
    """
    components.check_keys(config, [*REQUIRED, *DEFAULTS], "config")
    missing = [key for key in REQUIRED if key not in config]
    if missing:
        raise components.ConfigError(f"config needs the key {', '.join(missing)}")
    settings = dict(DEFAULTS) | {key: config[key] for key in config}
    for key in ("steps", "batch", "log_every", "eval_batch", "microbatches", "keep"):
        _require_positive(settings, key)
    make = functools.partial(_make, settings)
    mesh = sharding.make_mesh(dict(settings["mesh"]))
    for key in ("batch", "eval_batch"):
        sharding.check_batch(settings[key], mesh)
    train_data, test_data = (_load(settings, split) for split in ("train", "test"))
    classes = train_data.info.num_classes
    model = make("model", models, optional={} if classes is None else {"num_classes": classes})
    for source in (train_data, test_data):
        data.check(source, num_classes=getattr(model, "num_classes", None))
    return Experiment(
        settings=settings,
        task=_task(settings, model, train_data),
        model=model,
        train_data=train_data,
        test_data=test_data,
        tx=optimizer(settings["optimizer"], "config.optimizer"),
        aggregator=make("aggregator", aggregate) if settings["aggregator"] else None,
        links=tuple(components.make_all(settings["reparam"], [reparam], "config.reparam")),
        mesh=mesh,
        rules=rules.preset(settings["sharding"]),
        fingerprint=data.fingerprint(train_data, seed=settings["seed"], batch=settings["batch"]),
    )


def optimizer(specs: Any, where: str) -> optax.GradientTransformation:
    """The chain of the components that a config names at `where`."""
    return optax.chain(*components.make_all(specs, [optim, optax], where))


def with_model(experiment: Experiment, model: Any) -> Experiment:
    """The same experiment with a model of another shape."""
    return experiment._replace(model=model, task=_task(experiment.settings, model, experiment.train_data))


def _task(settings: Mapping[str, Any], model: Any, train_data) -> tasks.Task:
    return components.make(settings["task"], [tasks], "config.task", model, optional=_class_counts(train_data))


def _make(settings, key: str, module, **kwargs):
    return components.make(settings[key], [module], f"config.{key}", **kwargs)


def _require_positive(settings: Mapping[str, Any], key: str) -> None:
    if not isinstance(settings[key], int) or settings[key] < 1:
        raise components.ConfigError(f"config.{key}={settings[key]!r} must be a whole number of at least 1")


def _class_counts(source) -> dict[str, Any]:
    """How many examples each class has, where the labels are in memory."""
    if source.info.num_classes is None or not isinstance(source, data.Arrays):
        return {}
    return {"counts": np.bincount(source.columns[source.info.label].ravel(), minlength=source.info.num_classes)}


def _load(settings: Mapping[str, Any], split: str):
    spec = dict(settings["dataset"])
    if "name" not in spec:
        raise components.ConfigError("config.dataset has no key 'name' that says which dataset to load")
    splits = spec.pop("splits", {"train": "train", "test": "test"})
    return data.load(spec.pop("name"), split=splits[split], **spec)


def programs(experiment: Experiment) -> dict[str, Program]:
    """The variants to train, in order: dense weights as the baseline, then compressed ones if the config has such.

    Shapes are inferred here, so that what does not fit fails before anything is trained.
    """
    variants = ["compressed"] if experiment.links else ["dense"]
    if experiment.links and experiment.settings["baseline"]:
        variants.insert(0, "dense")
    return {variant: program(experiment, dense=variant == "dense") for variant in variants}


def program(experiment: Experiment, *, dense: bool) -> Program:
    """Shards and jits one variant: with `dense`, without the reparameterizations."""
    link = reparam.chain(*experiment.links) if experiment.links and not dense else reparam.identity()
    shapes = batch_shapes(experiment)

    def init():
        """The state before the first step, from the seed alone."""
        model_rng, rng = jax.random.split(jax.random.key(experiment.settings["seed"]))
        variables = dict(experiment.model.init(model_rng, experiment.task.inputs(_zeros(shapes)), train=False))
        params = variables.pop("params")
        variables.pop("intermediates", None)
        return first_state(experiment, link, params, variables or None, rng)

    return compiled(experiment, link, init)


def compiled(
    experiment: Experiment, link: reparam.Reparam, init: Callable[..., train.TrainState], *args: Any
) -> Program:
    """Shards and jits the functions of a run that starts from `init(*args)`, whose link is `link`."""
    settings, task, mesh = experiment.settings, experiment.task, experiment.mesh
    shapes = jax.eval_shape(init, *args)
    shardings = sharding.state_shardings(
        shapes,
        experiment.rules,
        mesh,
        experiment.tx,
        optimizer_fill=settings["optimizer_fill"],
        min_size=settings["min_size"],
    )
    step = train.make_step(
        task.forward,
        task.losses,
        experiment.tx,
        aggregator=experiment.aggregator,
        mode=settings["mode"],
        reparam=link,
        prepare=task.prepare,
        measure=task.measure,
        shardings=shardings,
        microbatches=settings["microbatches"],
    )
    rows = sharding.batch_sharding(mesh)
    return Program(
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(step, in_shardings=(shardings, rows), out_shardings=(shardings, None), donate_argnums=0),
        evaluate=jax.jit(train.make_evaluate(task.forward, task.measure), in_shardings=(None, None, rows)),
        predict=jax.jit(functools.partial(_predict, task), in_shardings=(None, None, rows)),
        reparam=link,
        shapes=sharding.with_shardings(shapes, shardings),
    )


def batch_shapes(experiment: Experiment) -> PyTree:
    _, first = next(data.batches(experiment.train_data, batch=experiment.settings["batch"], seed=0, num_steps=1))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), first)


def _zeros(shapes: PyTree) -> PyTree:
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)


def first_state(
    experiment: Experiment, link: reparam.Reparam, params: PyTree, model_state: PyTree, rng: jax.Array
) -> train.TrainState:
    """The state before the first step of a run that starts with these parameters."""
    outputs = None
    if experiment.settings["mode"] == "outputs":
        batch = _zeros(batch_shapes(experiment))
        extra = {} if model_state is None else {"model_state": model_state}
        result = experiment.task.forward(params, batch, rng=None, train=False, **extra)
        outputs = result if model_state is None else result[0]
    make_table = experiment.task.example_state
    return train.init_state(
        params,
        experiment.tx,
        rng=rng,
        reparam=link,
        aggregator=experiment.aggregator,
        outputs=outputs,
        model_state=model_state,
        example_state=None if make_table is None else make_table(len(experiment.train_data)),
    )


def _predict(task: tasks.Task, params: PyTree, model_state: PyTree, batch: PyTree) -> jax.Array:
    extra = {} if model_state is None else {"model_state": model_state}
    outputs = task.forward(params, batch, rng=None, train=False, **extra)
    return task.predict(outputs if model_state is None else outputs[0])
