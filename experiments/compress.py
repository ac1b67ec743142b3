"""Compresses one trained model by several methods, and draws what each costs and keeps.

    python -m experiments.compress --config=configs/compress_digits.py --workdir=runs/compress_digits

The model is the dense one of a finished run (`--config.checkpoint=runs/quickstart`), or is trained first. Every method
prunes it, retrains it, packs it and is measured; `summary.json`, `results.csv`, `results.md` and `report.html` hold all
of them. Started again, jobs that are finished stay so, and the one that was cut off goes on from its checkpoint; a
method may be added to the config. SIGTERM saves and exits with code 75; input that cannot be run exits with code 2 and
one line that says what to write instead.
"""

import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import tqdm
from absl import logging

from experiments import command, components, loop, metrics
from experiments import experiment as experiment_lib
from experiments import workdir as workdir_lib
from experiments.compression import costs, jobs, methods, results
from experiments.compression import page as page_lib
from experiments.compression.calibration import Weights
from steelyard import formats, train
from steelyard import tree as tree_lib
from steelyard.train import checkpoint

OWN: Mapping[str, Any] = {
    "checkpoint": None,  # the folder of a run of experiments.train (or of this main); `None` trains the model first
    "defaults": {},  # settings of all methods that do not set them
    "methods": {},  # name -> settings, see experiments.compression.methods
}


def main(config: Any, workdir: pathlib.Path) -> None:
    """Checks the config, and runs it in its folder."""
    own = components.plain(dict(OWN) | {key: config[key] for key in config if key in OWN})
    experiment = experiment_lib.build({key: config[key] for key in config if key not in OWN})
    todo = methods.jobs(own["methods"], own["defaults"])
    program = experiment_lib.program(experiment._replace(links=()), dense=True)
    for job in todo:
        jobs.check(job, Weights(experiment, program.shapes.params, program.shapes.model_state))
    given = None if own["checkpoint"] is None else _restored(program, pathlib.Path(own["checkpoint"]))
    workdir_lib.claim(workdir, dict(experiment.settings) | {"checkpoint": own["checkpoint"]})
    run(experiment, program, given, todo, workdir)


def run(
    experiment: experiment_lib.Experiment,
    program: experiment_lib.Program,
    given: train.TrainState | None,
    todo: Sequence[methods.Job],
    workdir: pathlib.Path,
) -> dict[str, Any]:
    """Trains the dense model if none is given, runs all jobs, writes the results; returns the summary."""
    loop.log(f"{workdir}: {len(todo)} jobs on {loop.devices(experiment.mesh)}")

    for job in todo:
        jobs.claim(workdir / "jobs", job)

    # ---- dense ----
    with checkpoint.Preemption() as preemption:
        if given is None:
            meta = {"config": components.plain(experiment.settings), "fingerprint": experiment.fingerprint}
            given = loop.fit(experiment, program, workdir / "dense", label="dense", meta=meta, preemption=preemption)
        dense, steps = Weights(experiment, given.params, given.model_state), int(given.step)
        _report_nan(dense.params)

        # ---- the methods ----
        found = []
        runner = jobs.Runner(dense, program, workdir / "jobs", preemption)
        with tqdm.tqdm(todo, desc="jobs", unit="job", disable=not sys.stderr.isatty()) as bar:
            for job in bar:
                bar.set_postfix_str(job.name)
                found.append(runner.run(job))
                _say(found[-1], experiment.task.score)

    # ---- results ----
    first = _measured(dense, program, steps, workdir)
    table = results.rows(first, found, experiment.task.score, experiment.task.direction)
    summary = {"score": experiment.task.score, "dense": first, "jobs": found, "table": table}
    workdir_lib.write_json(workdir / "summary.json", summary)
    (workdir / "results.csv").write_text(results.as_csv(table))
    text = results.markdown(table, experiment.task.score)
    (workdir / "results.md").write_text(text + "\n")
    loop.log(text)
    page = page_lib.write(dense, found, todo, table, workdir)
    loop.log(f"{page} shows the run")
    return summary


def _restored(program: experiment_lib.Program, folder: pathlib.Path) -> train.TrainState:
    """Step, parameters and model state of the dense variant of a finished run, and nothing else of its state.

    Raises:
      ValueError, OSError: there is none, or it is one of another model.
    """
    path = folder / "dense" / "checkpoints"
    if not path.is_dir():
        holds = sorted(x.name for x in folder.iterdir() if (x / "checkpoints").is_dir()) if folder.is_dir() else []
        raise FileNotFoundError(
            f"config.checkpoint={str(folder)!r} holds no dense run (dense/checkpoints): give the workdir of "
            f"experiments.train with config.baseline=True; runs there: {', '.join(holds) or 'none'}"
        )
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)  # the checkpoint library warns that it will not write, as it was told
    try:
        with checkpoint.Checkpoints(path, read_only=True) as checkpoints:
            state, _ = checkpoints.restore(program.shapes, only=r"step|(params|model_state)/.*")
    except ValueError as error:
        raise ValueError(f"config.checkpoint={str(folder)!r} is of another model than config.model: {error}") from error
    finally:
        logging.set_verbosity(before)
    return state


def _report_nan(params: Any) -> None:
    for path, w in tree_lib.flatten(params):
        count = int(jnp.count_nonzero(jnp.isnan(w)))
        if count:
            loop.log(f"dense: {count} of {w.size} weights of {path} are NaN: they count as the smallest")


def _measured(dense: Weights, program: experiment_lib.Program, steps: int, workdir: pathlib.Path) -> dict[str, Any]:
    """The dense model as a row beside the others."""
    seen = loop.evaluate(dense.experiment, program, dense, dense.params)
    timing = metrics.read(workdir / "dense" / "timing.jsonl")
    return {
        "method": "dense",
        "point": "",
        "sparsity": 0.0,
        "after": seen,
        "packed": seen,
        "bytes": formats.nbytes(dense.params),
        "bytes_are": costs.STORED,
        "multiply_adds": costs.multiply_adds(dense.params, costs.uses(dense)),
        "steps": steps,
        "train_seconds": sum(record["seconds"] for record in timing),
    }


def _say(result: Mapping[str, Any], score: str) -> None:
    name = f"{result['method']} {result['point']}"
    loop.log(
        f"{name}: {score.replace('_', ' ')} {results.shown(result['packed'][score], score)} at "
        f"{100 * result['sparsity']:.1f} % sparsity, {result['bytes']:,} bytes {result['bytes_are']}"
    )
    for note in result["notes"]:
        loop.log(f"{name}: {note}")


if __name__ == "__main__":
    command.start(main)
