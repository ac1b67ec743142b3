"""Measures costs: `python -m experiments.bench --room=optim`."""

import importlib
import os
from collections.abc import Sequence

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

from absl import app

from experiments import machine, rooms

ROOMS = ("train", "optim", "aggregate", "losses", "sparsity", "data", "startup")


def main(argv: Sequence[str]) -> None:
    del argv
    chosen = rooms.chosen(ROOMS)
    print(machine.describe(), flush=True)
    for room in chosen:
        print(f"\n{room}", flush=True)
        importlib.import_module(f"experiments.bench.{room}").bench()


if __name__ == "__main__":
    app.run(main)
