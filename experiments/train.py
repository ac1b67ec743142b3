"""Trains what a config names, packs it, and reports.

    python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart --config.steps=500

Started again, a run goes on where it was. SIGTERM saves and exits with code 75; an input that cannot be run exits with
code 2 and one line that says what to write instead.
"""

import json
import os
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

import steelyard
from experiments import components, loop, packing, report
from experiments import experiment as experiment_lib
from steelyard.train import checkpoint

BAD_INPUT = 2
# New keys are let through: a component may take arguments that the config leaves out, and `build` knows them all.
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The experiment: a file of configs/.", lock_config=False, accept_new_attributes=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept; runs/<name of the config> by default.")
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def main(argv: Sequence[str]) -> None:
    """Reads the flags, runs, and turns what the user can mend into one line and an exit code."""
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # the checkpoint library narrates every file at the level of `app.run`
    if len(argv) > 1:
        _refuse(f"unexpected arguments {' '.join(argv[1:])}; flags look like --config.steps=100")
    try:
        config, workdir = _config_and_workdir()
        experiment = experiment_lib.build(config)
        programs = experiment_lib.programs(experiment)
        claim_workdir(workdir, experiment.settings)
        run(experiment, programs, workdir)
    except loop.Preempted as preempted:
        loop.log(str(preempted))
        sys.exit(loop.PREEMPTED)
    except (ValueError, OSError) as error:
        logging.debug("where it was raised (--verbosity=1 shows this)", exc_info=True)
        _refuse(str(error))


def run(
    experiment: experiment_lib.Experiment, programs: Mapping[str, experiment_lib.Program], workdir: pathlib.Path
) -> dict[str, Any]:
    """Trains the variants, packs the last, writes `summary.json` and `report.html`; returns the summary."""
    meta = {"config": components.plain(experiment.settings), "fingerprint": experiment.fingerprint}
    loop.log(f"{workdir}: {' and '.join(programs)} on {loop.devices(experiment.mesh)}")

    # ---- train ----
    trained = {}
    with checkpoint.Preemption() as preemption:
        for variant, program in programs.items():
            state = loop.fit(experiment, program, workdir / variant, label=variant, meta=meta, preemption=preemption)
            trained[variant] = (program, state)

    # ---- pack, and compare on the test split ----
    summary = packing.compare(experiment, trained, workdir)
    loop.log(packing.table(summary))

    # ---- report ----
    write_json(workdir / "summary.json", summary)
    page = report.write(experiment, trained, workdir, summary)
    loop.log(f"{page} shows the run")
    return summary


def claim_workdir(workdir: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder of the run, or checks that what it holds is a run of the same config.

    Raises:
      ValueError, OSError: it is a file, cannot be written to, or holds another run; nothing is changed then.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir {workdir} is a file: give a folder")
    record = {"config": components.plain(settings), "versions": _versions()}
    path = workdir / "config.json"
    if path.exists():
        known = json.loads(path.read_text())["config"]
        differing = _differing(known, record["config"])
        if differing:
            raise ValueError(
                f"workdir {workdir} holds a run of another config: {'; '.join(differing[:3])}. Give another --workdir, "
                "or the config of that run to go on with it."
            )
        return
    if workdir.exists() and any(workdir.iterdir()):
        raise ValueError(f"workdir {workdir} is not empty and holds no run (no config.json): give another --workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"workdir {workdir}: a part of this path is a file: {error}") from error
    if not os.access(workdir, os.W_OK):
        raise ValueError(f"workdir {workdir} is not writable")
    write_json(path, record)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes by renaming, so that a reader never sees half a file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    temporary.replace(path)


def parse(argv: Sequence[str]) -> list[str]:
    """`absl`'s parser, whose complaints about flags and configs are one line and exit code 2."""
    for argument in argv:
        path = pathlib.Path(argument.partition("--config=")[2].partition(":")[0])
        if argument.startswith("--config=") and not path.is_file():
            _refuse(f"--config={path} is not a file; {_known_configs()}")
    try:
        return flags.FLAGS(list(argv))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        _refuse(_one_line(error))


def _config_and_workdir() -> tuple[Any, pathlib.Path]:
    if _CONFIG.value is None:
        raise ValueError(f"--config is missing; {_known_configs()}")
    name = pathlib.Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    return _CONFIG.value, pathlib.Path(_WORKDIR.value or f"runs/{name}")


def _known_configs() -> str:
    return "configs here: " + ", ".join(sorted(str(path) for path in pathlib.Path("configs").glob("[a-z]*.py")))


def _versions() -> dict[str, str]:
    own = {"python": sys.version.split()[0], "steelyard": steelyard.__version__}
    return own | {name: metadata.version(name) for name in _PACKAGES}


def _differing(known: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for key in sorted({*known, *given}):
        a, b = known.get(key), given.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += _differing(a, b, f"{prefix}{key}.")
        elif json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True):
            lines.append(f"{prefix}{key} is {a!r} there and {b!r} here")
    return lines


def _one_line(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(error.args[0] if error.args else error)).strip().strip("'\"")
    return text.replace("\\n", " ").replace("\\'", "'")


def _refuse(text: str) -> NoReturn:
    print(f"error: {text}", file=sys.stderr)
    sys.exit(BAD_INPUT)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
