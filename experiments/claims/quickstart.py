"""The quickstart's model, 2:4 sparse and int8, against the same model dense."""

import pathlib
import tempfile

import numpy as np

from configs import quickstart
from experiments import experiment as experiment_lib
from experiments import train
from experiments.claims import harness

__all__ = ["quickstart_compressed"]

SEEDS = 5


def quickstart_compressed() -> tuple[harness.Outcome, ...]:
    """2:4 sparse int8 weights cost the quickstart's model at most one point of accuracy.

    Direction: packed not worse than dense by more than 1.0 point; every compressed model reaches 97 %; packed and
    unpacked agree on every prediction.
    Metric: accuracy on the held-out 20 % of the digits, paired by seed (same initialisation, batches, number of steps).
    Budget: the quickstart's config as it is, one configuration a side, 5 seeds.
    """
    rows = np.array([_measure(seed) for seed in range(SEEDS)])
    dense, compressed, packed, agreement = (harness.Arm({}, {"value": column}, 1) for column in rows.T)
    full = harness.Arm({}, {"value": np.ones(SEEDS)}, 1)
    unit = "points"
    return (
        harness.compare(
            packed, dense, "value", better="more", unit=unit, factor=100, margin=-1.0, labels=("packed", "dense")
        ),
        harness.exact(
            compressed.metrics["value"].min(),
            0.97,
            better="more",
            unit=unit,
            factor=100,
            labels=("lowest compressed", "asked for"),
            part="every seed",
        ),
        harness.compare(
            agreement,
            full,
            "value",
            better="more",
            unit=unit,
            factor=100,
            margin=-1e-6,
            labels=("packed", "unpacked"),
            part="agreement",
        ),
    )


def _measure(seed: int) -> tuple[float, ...]:
    config = quickstart.get_config()
    config.seed = seed
    config.eval_every = 0
    with tempfile.TemporaryDirectory() as folder:
        experiment = experiment_lib.build(config)
        summary = train.run(experiment, experiment_lib.programs(experiment), pathlib.Path(folder))
    keys = ("dense_accuracy", "compressed_accuracy", "packed_accuracy", "packed_agreement")
    return tuple(summary[key] for key in keys)
