"""What compression costs and saves: dense, compressed as trained, and packed, on the same test split."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from experiments import experiment as experiment_lib
from experiments import loop, metrics
from steelyard import formats, train
from steelyard import tree as tree_lib

PyTree = Any
Trained = Mapping[str, tuple[experiment_lib.Program, train.TrainState]]


def packed_params(program: experiment_lib.Program, state: train.TrainState) -> PyTree:
    """The parameters in their storage formats."""
    return program.reparam.finish(state.params, state.reparam_state)


def compare(experiment: experiment_lib.Experiment, trained: Trained, workdir: pathlib.Path) -> dict[str, Any]:
    """Test metrics, bytes and training time of every variant; how often packed and unpacked weights agree.

    Returns:
      A mapping with, for v in dense and compressed: `v_<metric>`, `v_bytes` (of the parameters as the optimizer keeps
      them), `v_train_seconds`; and if there is a compressed variant `packed_<metric>`, `packed_bytes` and
      `packed_agreement`, the share of test predictions in which packed and unpacked weights agree.
    """
    summary: dict[str, Any] = {"score": experiment.task.score, "steps": experiment.settings["steps"]}
    for variant, (program, state) in trained.items():
        seen = train.seen_params(program.reparam.apply, state)
        _add(summary, variant, loop.evaluate(experiment, program, state, seen), tree_lib.nbytes(seen))
        timing = metrics.read(workdir / variant / "timing.jsonl")
        summary[f"{variant}_train_seconds"] = sum(record["seconds"] for record in timing)
        summary[f"{variant}_skipped"] = int(state.skipped)
        if variant == "compressed":
            packed = packed_params(program, state)
            _add(summary, "packed", loop.evaluate(experiment, program, state, packed), formats.nbytes(packed))
            agree = loop.predictions(experiment, program, state, packed) == loop.predictions(
                experiment, program, state, seen
            )
            summary["packed_agreement"] = float(np.mean(agree))
    summary["train_seconds"] = sum(summary[f"{variant}_train_seconds"] for variant in trained)
    return summary


def _add(summary: dict[str, Any], variant: str, values: Mapping[str, float], nbytes: int) -> None:
    summary |= {f"{variant}_{key}": value for key, value in values.items()}
    summary[f"{variant}_bytes"] = int(nbytes)


ROWS = {
    "dense": "dense baseline",
    "compressed": "compressed, as trained",
    "packed": "compressed, packed",
}


def table(summary: Mapping[str, Any]) -> str:
    """The comparison as a table for the terminal."""
    score = summary["score"]
    lines = [f"{'':24}{'test ' + score.replace('_', ' '):>20}{'parameter bytes':>18}{'agreement':>12}"]
    for variant, name in ROWS.items():
        if f"{variant}_{score}" not in summary:
            continue
        agreement = f"{100 * summary['packed_agreement']:.2f} %" if variant == "packed" else ""
        value = summary[f"{variant}_{score}"]
        shown = f"{100 * value:.2f} %" if score == "accuracy" else f"{value:.4f}"
        lines.append(f"{name:24}{shown:>20}{summary[f'{variant}_bytes']:>18,}{agreement:>12}")
    lines.append(f"trained in {summary['train_seconds']:.1f} s, {summary['steps']} steps each")
    return "\n".join(lines)


def layers(params: PyTree) -> list[dict[str, Any]]:
    """Per leaf: path, shape, stored bytes, sparsity, and bits per entry of the dense shape."""
    rows = []
    for path, leaf in tree_lib.flatten(params, is_leaf=formats.is_weight):
        dense = np.asarray(jax.device_get(formats.dense(leaf)))
        stored = formats.nbytes(leaf)
        rows.append(
            {
                "path": path,
                "shape": tuple(dense.shape),
                "bytes": stored,
                "sparsity": float(np.mean(dense == 0)),
                "bits": 8.0 * stored / dense.size,
                "packed": formats.is_weight(leaf),
            }
        )
    return rows
