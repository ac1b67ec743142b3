"""Whole channels: what of a model hangs together is inferred, scored and cut out, and a smaller model is left."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import components
from experiments import experiment as experiment_lib
from experiments.compression import cut, methods
from experiments.compression.calibration import Calibration, Weights
from steelyard import models
from steelyard import tree as tree_lib
from steelyard.sparsity import channels as channels_lib

PyTree = Any
Group = channels_lib.ChannelGroup


class Cut(NamedTuple):
    """What one round leaves.

    Attributes:
      weights: the smaller model.
      places: of its weights in the dense model, see `places`.
      kept: for each group the channels that stayed.
      notes: lines for the reader.
    """

    weights: Weights
    places: PyTree
    kept: dict[Group, np.ndarray]
    notes: list[str]


def groups(job: methods.Job, weights: Weights, where: str) -> list[Group]:
    """The groups of channels that the job prunes.

    Raises:
      ConfigError: there are none; the text says which operation stopped them, or which names there are.
    """
    experiment = weights.experiment
    inputs = jax.eval_shape(experiment.task.inputs, experiment_lib.batch_shapes(experiment))

    def apply(variables, x):
        return experiment.model.apply(variables, x, train=False)

    try:
        found = channels_lib.infer(apply, weights.variables, inputs, protect=tuple(job.settings["protect"]))
    except ValueError as error:
        raise components.ConfigError(f"{where}: {error}") from error
    pattern = job.settings["groups"]
    if pattern is None:
        # A norm over the channels sees fewer of them afterwards: only on demand.
        return [group for group in found if not group.normalized] or found
    flags = tree_lib.select({group.name: group for group in found}, pattern, name=f"{where}.groups", is_leaf=_is_group)
    return [group for group in found if flags[group.name]]


def check(job: methods.Job, weights: Weights, where: str) -> None:
    """Refuses what cannot be run; of the weights only the shapes are looked at.

    Raises:
      ConfigError, ValueError: the text says what to write instead.
    """
    leaves = _members(groups(job, weights, where))
    cut.check_score(job.settings["score"], weights, "|".join(map(re.escape, leaves)), where)
    channels_lib.select({}, job.sparsity, **job.option("scope", "round_to", "min_kept"))


def _members(found: list[Group]) -> list[str]:
    """Paths of the parameters with channels of these groups."""
    paths = dict.fromkeys(member.path for group in found for member in group.members)
    return [path.removeprefix("params/") for path in paths if path.startswith("params/")]


def _is_group(x: Any) -> bool:
    return isinstance(x, Group)


def shrink(job: methods.Job, calibration: Calibration, places: PyTree, where: str) -> Cut:
    """One round.

    Args:
      job: its sparsity is the share of each group's channels that is gone after all rounds.
      calibration: of what is left of the dense model.
      places: of these weights in the dense model, see `places`.
      where: the method's place in the config.
    """
    weights, settings = calibration.weights, job.settings
    found = groups(job, weights, where)
    members = set(_members(found))
    params = tree_lib.map_with_path(lambda path, w: w if path in members and w.ndim >= 2 else None, weights.params)
    elementwise = jax.tree.map(jnp.abs, cut.score(settings["score"], params, calibration, f"{where}.score"))
    scores = {
        group: channels_lib.score(elementwise, group, under="params", **job.option("combine", "normalize"))
        for group in found
    }
    amount = 1 - (1 - job.sparsity) ** (1 / job.rounds)
    kept = channels_lib.select(scores, amount, **job.option("scope", "round_to", "min_kept"))
    small = channels_lib.shrink(weights.variables, kept)
    params, model_state = small.pop("params"), small or None
    experiment = experiment_lib.with_model(weights.experiment, models.resize(weights.experiment.model, params))
    alone = channels_lib.select(scores, amount, **job.option("scope"))  # without minimum and rounding
    notes = [
        f"{group.name} is down to the minimum: {len(index)} of {group.size} channels are kept"
        for group, index in kept.items()
        if len(alone[group]) <= 1 < group.size
    ]
    smaller = Weights(experiment, params, model_state)
    return Cut(smaller, channels_lib.shrink(places, kept, under="params"), kept, notes)


def said(kept: dict[Group, np.ndarray]) -> str:
    """How many channels of each group stay, in a line."""
    return ", ".join(f"{group.name} {len(index)} of {group.size}" for group, index in kept.items())


def places(params: PyTree) -> PyTree:
    """For each entry its number in its leaf: what is left of these tells which entries are."""
    return jax.tree.map(lambda w: np.arange(w.size).reshape(w.shape), params)


def masks(params: PyTree, left: PyTree) -> dict[str, np.ndarray]:
    """Path -> which entries are left, of the dense model's leaves with two axes or more that have lost some."""
    flat = zip(tree_lib.flatten(params), jax.tree.leaves(left), strict=True)
    return {
        path: np.isin(np.arange(w.size), index).reshape(w.shape)
        for (path, w), index in flat
        if w.ndim >= 2 and index.size < w.size
    }
