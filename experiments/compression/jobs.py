"""A job: prune, retrain, pack, measure. Its result is one file, written when all is done.

Pruning is computed again at every start (it draws from fixed seeds); retraining goes on from its checkpoint.
"""

import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np

from experiments import components, loop, metrics
from experiments import experiment as experiment_lib
from experiments import workdir as workdir_lib
from experiments.compression import channels, cut, links, mask_files, methods
from experiments.compression.calibration import Calibration, Weights
from experiments.compression.outcome import Outcome, measure
from steelyard import data, reparam, train
from steelyard import tree as tree_lib
from steelyard.sparsity import channels as channels_lib
from steelyard.train import checkpoint

PyTree = Any


def check(job: methods.Job, dense: Weights) -> None:
    """Finds what cannot be run before anything is trained; of the weights only the shapes are looked at.

    Raises:
      ConfigError, ValueError, OSError: the text says which setting, and what to write instead.
    """
    where, settings = f"config.methods.{job.method}", job.settings
    if settings["optimizer"]:
        experiment_lib.optimizer(settings["optimizer"], f"{where}.optimizer")
    if job.kind == "channels":
        channels.check(job, dense, where)
        return
    cut.select(dense.params, settings["where"], f"{where}.where")
    if job.kind != "one_shot":
        links.gradual(job) if job.kind == "gradual" else links.recipe(job)
    elif settings["masks"] is not None:
        mask_files.read(pathlib.Path(settings["masks"]), dense.params, job.pattern, where)
    else:
        cut.check_score(settings["score"], dense, settings["where"], where)
        cut.check_allocation(settings["allocation"], job.pattern, f"{where}.allocation")


def claim(jobs: pathlib.Path, job: methods.Job) -> pathlib.Path:
    """The folder of a job below that of all jobs, made if it is not there.

    Raises:
      ValueError: it holds a job with other settings.
    """
    folder = jobs / job.folder
    path, settings = folder / "config.json", dict(job.settings)
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        workdir_lib.write_json(path, settings)
    if found := workdir_lib.differing(json.loads(path.read_text()), settings):
        raise ValueError(
            f"{job.name} was run with other settings: {'; '.join(found[:3])}. Delete {folder} to run it again, or "
            "give the method another name"
        )
    return folder


class Runner:
    """Runs jobs on one dense model, on which scores are measured once. Programs that differ in their masks alone are
    compiled once.

    Args:
      dense: the trained model.
      program: its program, whose evaluation serves the pruned ones too.
      folder: where jobs are kept.
      preemption: asked after each step.
    """

    def __init__(
        self, dense: Weights, program: experiment_lib.Program, folder: pathlib.Path, preemption: checkpoint.Preemption
    ):
        self.dense = dense
        self._program = program
        self._folder = folder
        self._preemption = preemption
        self._compiled: dict[str, experiment_lib.Program] = {}
        self._calibrations: dict[int, Calibration] = {}
        self._described: set[str] = set()

    def run(self, job: methods.Job) -> dict[str, Any]:
        """The result of a job, from its file if it is finished.

        Raises:
          ValueError: the job cannot be run, or its folder holds one with other settings.
          Preempted: SIGTERM came; what was trained is saved.
        """
        folder = claim(self._folder, job)
        path = folder / "result.json"
        if not path.exists():
            steps = {"one_shot": self._one_shot, "channels": self._channels}.get(job.kind, self._while_training)
            outcome = steps(job, folder)
            mask_files.write(folder / "masks.npz", outcome.masks)
            workdir_lib.write_json(path, measure(job, outcome, self.dense, folder))
        return json.loads(path.read_text())

    # ---- three ways to prune ----

    def _one_shot(self, job: methods.Job, folder: pathlib.Path) -> Outcome:
        """Masks from the weights, then retraining under them; perhaps in rounds."""
        weights, masks, notes = self.dense, None, []
        for number in range(job.rounds):
            target = 1 - (1 - job.sparsity) ** ((number + 1) / job.rounds)
            masks, notes = cut.masks_for(job, self._calibration(job, weights), target, masks)
            experiment = self._retraining(job, weights, number)
            program = self._masked(job, experiment, weights, masks)
            before = loop.evaluate(experiment, program, program.init())
            state, after = self._fit(job, experiment, program, folder, number)
            weights = _continued(experiment, program, state, weights)
        kept = {path: np.asarray(mask) for path, mask in tree_lib.flatten(masks)}
        return Outcome(_seen(experiment, program, state), program, state, kept, before, after or before, notes)

    def _while_training(self, job: methods.Job, folder: pathlib.Path) -> Outcome:
        """A reparameterization that prunes as it trains."""
        experiment = self._retraining(job, self.dense, 0)
        link = reparam.chain(links.gradual(job) if job.kind == "gradual" else links.recipe(job), *experiment.links)
        program = self._shared(_compile(experiment, link, self.dense))
        state, after = self._fit(job, experiment, program, folder, 0)
        weights = _seen(experiment, program, state)
        chosen = cut.select(weights.params, job.settings["where"], f"config.methods.{job.method}.where")
        masks = {path: np.asarray(w) != 0 for path, w in tree_lib.flatten(chosen)}
        return Outcome(weights, program, state, masks, None, after, [])

    def _channels(self, job: methods.Job, folder: pathlib.Path) -> Outcome:
        """A smaller model of the channels that stay, retrained; perhaps in rounds."""
        weights, notes = self.dense, []
        places = channels.places(weights.params)
        for number in range(job.rounds):
            cut_out = channels.shrink(job, self._calibration(job, weights), places, f"config.methods.{job.method}")
            weights, places, notes = cut_out.weights, cut_out.places, cut_out.notes
            text = channels_lib.describe(cut_out.kept)
            if number == 0 and text not in self._described:
                self._described.add(text)
                loop.log(f"{job.method}: {len(cut_out.kept)} groups of channels, each of which goes as one\n{text}")
            loop.log(f"{job.name}: what stays: {channels.said(cut_out.kept)}")
            experiment = self._retraining(job, weights, number)
            link = reparam.chain(*experiment.links) if experiment.links else reparam.identity()
            program = _compile(experiment, link, weights)
            before = loop.evaluate(experiment, program, program.init())
            state, after = self._fit(job, experiment, program, folder, number)
            weights = _continued(experiment, program, state, weights)
        masks = channels.masks(self.dense.params, places)
        return Outcome(_seen(experiment, program, state), program, state, masks, before, after or before, notes)

    def _calibration(self, job: methods.Job, weights: Weights) -> Calibration:
        """What scores need to know of the weights; of the dense ones it is measured for all jobs."""
        count = job.settings["calibration_batches"]
        if weights is not self.dense:
            return Calibration(weights, count)
        return self._calibrations.setdefault(count, Calibration(weights, count))

    # ---- retraining ----

    def _retraining(self, job: methods.Job, weights: Weights, number: int) -> experiment_lib.Experiment:
        """The experiment of the retraining after a pruning: other batches, perhaps another optimizer."""
        experiment = weights.experiment
        own = {"steps": max(job.settings["retrain_steps"], 1), "eval_every": job.settings["eval_every"]}
        settings = dict(experiment.settings) | own | {"seed": self.dense.experiment.settings["seed"] + 1 + number}
        spec = job.settings["optimizer"]
        return experiment._replace(
            settings=settings,
            tx=experiment_lib.optimizer(spec, f"config.methods.{job.method}.optimizer") if spec else experiment.tx,
            fingerprint=data.fingerprint(experiment.train_data, seed=settings["seed"], batch=settings["batch"]),
        )

    def _masked(self, job, experiment, weights: Weights, masks: PyTree) -> experiment_lib.Program:
        structure = jax.tree.structure(masks)
        key = json.dumps([job.settings["optimizer"], str(structure)], sort_keys=True)
        if key not in self._compiled:
            link = reparam.chain(reparam.masked(masks, backward="chain"), *experiment.links)
            self._compiled[key] = self._shared(_compile(experiment, link, weights, masks))
        program = self._compiled[key]
        stored = links.stored_as_nm(reparam.masked(masks, backward="chain"), job.pattern)
        init = functools.partial(program.init.func, weights.params, weights.model_state, _key(experiment), masks)
        return program._replace(init=init, reparam=reparam.chain(stored, *experiment.links))

    def _shared(self, program: experiment_lib.Program) -> experiment_lib.Program:
        """With the evaluation of the dense model, which is that of every model of its shape."""
        return program._replace(evaluate=self._program.evaluate, predict=self._program.predict)

    def _fit(
        self, job: methods.Job, experiment, program, folder: pathlib.Path, number: int
    ) -> tuple[train.TrainState, dict[str, float]]:
        """The retrained state, and what it is measured to be at its last step; nothing without retraining."""
        if job.settings["retrain_steps"] == 0:
            return program.init(), {}
        folder, label = (
            (folder / f"round_{number}", f"{job.name}, round {number}") if job.rounds > 1 else (folder, job.name)
        )
        meta = {"config": components.plain(job.settings), "fingerprint": experiment.fingerprint}
        state = loop.fit(experiment, program, folder, label=label, meta=meta, preemption=self._preemption)
        tested = [r for r in metrics.read(folder / "metrics.jsonl") if f"test/{experiment.task.score}" in r]
        return state, {key.removeprefix("test/"): x for key, x in tested[-1].items() if key.startswith("test/")}


def _compile(experiment, link: reparam.Reparam, weights: Weights, *masks: PyTree) -> experiment_lib.Program:
    """The program of a run that starts from these weights; under `masks`, which are then arguments of its `init`."""

    def init(params, model_state, rng, *masks):
        own = reparam.chain(reparam.masked(masks[0], backward="chain"), *experiment.links) if masks else link
        return experiment_lib.first_state(experiment, own, params, model_state, rng)

    arguments = (weights.params, weights.model_state, _key(experiment), *masks)
    program = experiment_lib.compiled(experiment, link, init, *arguments)
    return program._replace(init=functools.partial(program.init, *arguments))


def _key(experiment: experiment_lib.Experiment) -> jax.Array:
    return jax.random.key(experiment.settings["seed"])


def _continued(experiment, program, state: train.TrainState, before: Weights) -> Weights:
    """What the next round starts from: the stored weights, where they are those of the model."""
    weights = _seen(experiment, program, state)
    is_same = jax.tree.structure(state.params) == jax.tree.structure(weights.params)
    return weights._replace(experiment=before.experiment, params=state.params if is_same else weights.params)


def _seen(experiment, program: experiment_lib.Program, state: train.TrainState) -> Weights:
    return Weights(experiment, train.seen_params(program.reparam.apply, state), state.model_state)
