"""What came of a job, and its measures."""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import experiment as experiment_lib
from experiments import loop, metrics, packing
from experiments.compression import costs, methods
from experiments.compression.calibration import Weights
from steelyard import formats, train


class Outcome(NamedTuple):
    """A pruned and retrained model, before it is packed.

    Attributes:
      weights: the model as it is seen, its experiment that of the retraining.
      program, state: of the last retraining.
      masks: path -> which entries of the dense model's pruned leaves are left.
      before, after: test metrics after the last pruning, before its retraining (or `None`) and after it.
      notes: lines for the reader.
    """

    weights: Weights
    program: experiment_lib.Program
    state: train.TrainState
    masks: dict[str, np.ndarray]
    before: dict[str, float] | None
    after: dict[str, float]
    notes: list[str]


def measure(job: methods.Job, outcome: Outcome, dense: Weights, folder: pathlib.Path) -> dict[str, Any]:
    """The result of a job, as it is kept; of a smaller model also its speed beside that of the dense one."""
    weights, masks = outcome.weights, outcome.masks
    packed = packing.packed_params(outcome.program, outcome.state)
    stored, kind = costs.stored_bytes(packed, () if job.kind == "channels" else masks)
    removed = sum(int(mask.size - mask.sum()) for mask in masks.values())
    result = {
        "method": job.method,
        "point": job.point,
        "kind": job.kind,
        "sparsity": removed / max(sum(mask.size for mask in masks.values()), 1),
        "before": outcome.before,
        **_scores(outcome, packed),
        "bytes": stored,
        "bytes_are": kind,
        "multiply_adds": costs.multiply_adds(weights.params, costs.uses(weights)),
        "layers": {path: 1 - float(mask.mean()) for path, mask in masks.items()},
        "histogram": costs.histogram(weights.params, set(masks)),
        "dense_histogram": costs.histogram(dense.params, set(masks)),
        "steps": job.settings["retrain_steps"] * job.rounds,
        "train_seconds": sum(r["seconds"] for path in folder.rglob("timing.jsonl") for r in metrics.read(path)),
        "skipped": int(outcome.state.skipped),
        "notes": outcome.notes,
    }
    return result | (_speed(dense, weights) if job.kind == "channels" else {})


def _scores(outcome: Outcome, packed: Any) -> dict[str, Any]:
    """Test metrics as trained and as packed, and how often the two predict the same."""
    experiment, seen, after = outcome.weights.experiment, outcome.weights.params, outcome.after
    if not any(formats.is_weight(x) for x in jax.tree.leaves(packed, is_leaf=formats.is_weight)):
        return {"after": after, "packed": after, "agreement": 1.0}
    predict = functools.partial(loop.predictions, experiment, outcome.program, outcome.state)
    return {
        "after": after,
        "packed": loop.evaluate(experiment, outcome.program, outcome.state, packed),
        "agreement": float(np.mean(predict(packed) == predict(seen))),
    }


def _speed(dense: Weights, small: Weights) -> dict[str, float]:
    """Operations and time of a batch, beside those of the dense model in the same minute."""
    (before, dense_flops), (after, flops) = costs.forward(dense), costs.forward(small)
    times = costs.latencies({"dense_milliseconds": before, "milliseconds": after})
    return {"flops": flops, "dense_flops": dense_flops, **times}
