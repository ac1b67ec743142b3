"""The loop: steps, metrics, evaluation, checkpoints; stops and goes on exactly where it was."""

import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import tqdm

from experiments import experiment as experiment_lib
from experiments import metrics as metrics_lib
from steelyard import data, train
from steelyard.train import checkpoint, sharding

PyTree = Any
PREEMPTED = 75


class Preempted(Exception):
    """The process was told to stop; everything is saved."""


def log(text: str) -> None:
    """A line for people. Only the first process speaks."""
    if jax.process_index() == 0:
        tqdm.tqdm.write(text, file=sys.stderr)
        sys.stderr.flush()


def devices(mesh: jax.sharding.Mesh) -> str:
    """What a run runs on, in words."""
    sizes = {axis: size for axis, size in mesh.shape.items() if size > 1}
    kind = mesh.devices.flat[0].device_kind
    return f"{mesh.size} {kind} device{'s' if mesh.size > 1 else ''}" + (f", mesh {sizes}" if sizes else "")


def fit(
    experiment: experiment_lib.Experiment,
    program: experiment_lib.Program,
    folder: pathlib.Path,
    *,
    label: str,
    meta: dict[str, Any],
    preemption: checkpoint.Preemption,
) -> train.TrainState:
    """Trains to the last step, from the newest checkpoint in `folder` if there is one.

    Raises:
      Preempted: SIGTERM came; the state is saved.
    """
    settings = experiment.settings
    steps = settings["steps"]
    checkpoints = checkpoint.Checkpoints(
        folder / "checkpoints", keep=settings["keep"], every=settings["checkpoint_every"] or steps
    )
    with checkpoints:
        state = _restore_or_init(program, checkpoints, meta, label)
        start = int(state.step)
        # Metrics are the same in every process; only those of the first are read.
        process = jax.process_index()
        writer = metrics_lib.Writer(folder / f"process_{process}" if process else folder, start_step=start)
        stream = batches(experiment, start, steps)
        recorder = _Recorder(writer, label, steps, start, settings["log_every"])
        # Several CPU devices share one pool of threads: collectives of many steps in flight could wait for each other.
        fake_devices = experiment.mesh.size > 1 and experiment.mesh.devices.flat[0].platform == "cpu"
        for step, batch in recorder.progress(stream):
            state, values = program.step(state, to_devices(experiment, batch))
            if fake_devices:
                jax.block_until_ready(state)
            recorder.record(step, values)
            done = step + 1
            if done == steps:
                continue  # the stream ends here, and what follows the loop evaluates and saves
            if settings["eval_every"] and done % settings["eval_every"] == 0:
                recorder.evaluated(step, evaluate(experiment, program, state))
            due = settings["checkpoint_every"] and done % settings["checkpoint_every"] == 0
            if due or preemption.requested:
                recorder.flush()
                _save(checkpoints, done, state, meta, must=preemption.requested)
            if preemption.requested:
                raise Preempted(f"{label}: stopped at step {done} of {steps}; the same command goes on from here")
        if start < steps:
            recorder.evaluated(steps - 1, evaluate(experiment, program, state))
            recorder.flush()
            _save(checkpoints, steps, state, meta, must=True)
        writer.close()
    return state


def _save(checkpoints: checkpoint.Checkpoints, step: int, state, meta: dict[str, Any], *, must: bool) -> None:
    """Saves in the background; with `must`, waits. Otherwise a disk that is full does not end the run."""
    try:
        checkpoints.save(step, state, meta=meta, force=must)
        if must:
            checkpoints.wait()
    except OSError as error:
        if must:
            raise
        log(f"no checkpoint of step {step}: {error}")


def _restore_or_init(program, checkpoints, meta, label) -> train.TrainState:
    if checkpoints.latest() is None:
        return program.init()
    state, saved = checkpoints.restore(program.shapes)
    if saved["fingerprint"] != meta["fingerprint"]:
        raise ValueError(
            f"{label}: the checkpoint was trained on other batches (fingerprint {saved['fingerprint']}, now "
            f"{meta['fingerprint']}): the data set has changed. Use another workdir."
        )
    log(f"{label}: restored step {int(state.step)}")
    return state


def batches(
    experiment: experiment_lib.Experiment, start: int, stop: int
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """The training batches of the steps from `start` to before `stop`, the rows of this process."""
    return data.batches(
        experiment.train_data,
        batch=experiment.settings["batch"],
        seed=experiment.settings["seed"],
        start_step=start,
        num_steps=max(stop - start, 0),
        host=jax.process_index(),
        hosts=jax.process_count(),
    )


def to_devices(experiment: experiment_lib.Experiment, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """The global batch, from the rows that this process has read."""
    rows = sharding.batch_sharding(experiment.mesh)
    return {key: jax.make_array_from_process_local_data(rows, value) for key, value in batch.items()}


def evaluate(experiment, program, state: train.TrainState, params: PyTree | None = None) -> dict[str, float]:
    """Means over the test split, with the parameters that the model sees in evaluation mode, or with `params`.

    With `params`, all that `state` has to have is the model state; so for `predictions`.
    """
    params = train.seen_params(program.reparam.apply, state) if params is None else params
    return train.means([program.evaluate(params, state.model_state, batch) for batch in _test_batches(experiment)])


def predictions(experiment, program, state: train.TrainState, params: PyTree) -> np.ndarray:
    """Predictions for every example of the test split, in its order."""
    parts = []
    for batch in _test_batches(experiment):
        keep = np.asarray(batch["mask"])
        parts.append(np.asarray(program.predict(params, state.model_state, batch))[keep])
    return np.concatenate(parts)


def _test_batches(experiment):
    found = data.evaluation(
        experiment.test_data,
        batch=experiment.settings["eval_batch"],
        host=jax.process_index(),
        hosts=jax.process_count(),
    )
    return (to_devices(experiment, batch) for batch in found)


class _Recorder:
    """Shows progress and writes metrics, each one record late, so that the host never waits for the device."""

    def __init__(self, writer: metrics_lib.Writer, label: str, steps: int, start: int, every: int):
        self._writer = writer
        self._label = label
        self._steps = steps
        self._start = start
        self._every = every
        self._pending: tuple[int, dict] | None = None
        self._bar: tqdm.tqdm | None = None
        self._clock = time.perf_counter()
        self._waited = 0.0
        self._last_line = 0.0
        self._skipped = 0

    def progress(self, stream):
        """The stream, with a bar on a terminal; the time spent waiting for data is counted."""
        on_terminal = sys.stderr.isatty() and jax.process_index() == 0
        self._bar = tqdm.tqdm(
            total=self._steps, initial=self._start, desc=self._label, unit="step", disable=not on_terminal, leave=True
        )
        self._clock = time.perf_counter()
        while True:
            before = time.perf_counter()
            item = next(stream, None)
            self._waited += time.perf_counter() - before
            if item is None:
                break
            yield item
            self._bar.update()
        self.flush()
        self._bar.close()

    def record(self, step: int, values: dict[str, jax.Array]) -> None:
        if step % self._every == 0 or step + 1 == self._steps:
            self.flush()
            self._pending = (step, values)

    def evaluated(self, step: int, values: dict[str, float]) -> None:
        self.flush()
        self._writer.metrics(step, {f"test/{key}": value for key, value in values.items()})
        log(f"{self._label}: step {step + 1}/{self._steps}  " + _text({f"test {k}": v for k, v in values.items()}))

    def flush(self) -> None:
        if self._pending is None:
            return
        step, values = self._pending
        self._pending = None
        values = {key: float(value) for key, value in jax.device_get(values).items()}
        self._writer.metrics(step, values)
        now = time.perf_counter()
        self._writer.timing(step, {"seconds": now - self._clock, "data_seconds": self._waited})
        self._clock, self._waited = now, 0.0
        self._writer.flush()
        self._show(step, values, now)

    def _show(self, step: int, values: dict[str, float], now: float) -> None:
        if values["skipped"] > self._skipped:
            self._skipped = int(values["skipped"])
            log(f"{self._label}: {self._skipped} steps skipped so far: a gradient was not finite")
        short = {key: value for key, value in values.items() if key == "loss" or ("/" not in key and key != "skipped")}
        if not self._bar.disable:
            self._bar.set_postfix_str(_text(short))
        elif now - self._last_line > 5.0 or step + 1 == self._steps:
            self._last_line = now
            log(f"{self._label}: step {step + 1}/{self._steps}  {_text(short)}")


def _text(values: dict[str, float]) -> str:
    return "  ".join(f"{key} {value:.4g}" for key, value in values.items())
