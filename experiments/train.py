"""Trains what a config names, packs it, and reports.

    python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart --config.steps=500

Started again, a run goes on where it was. SIGTERM saves and exits with code 75; an input that cannot be run exits with
code 2 and one line that says what to write instead.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from experiments import command, components, loop, packing, report
from experiments import experiment as experiment_lib
from experiments import workdir as workdir_lib
from steelyard.train import checkpoint


def main(config: Any, workdir: pathlib.Path) -> None:
    """Checks the config, and runs it in its folder."""
    experiment = experiment_lib.build(config)
    programs = experiment_lib.programs(experiment)
    workdir_lib.claim(workdir, experiment.settings)
    run(experiment, programs, workdir)


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
    workdir_lib.write_json(workdir / "summary.json", summary)
    page = report.write(experiment, trained, workdir, summary)
    loop.log(f"{page} shows the run")
    return summary


if __name__ == "__main__":
    command.start(main)
