"""Claim: 2:4 sparse int8 weights cost the quickstart's model at most one point of accuracy.

Stated before it was measured. Metric: test accuracy on the held-out 20 % of the digits, packed minus dense, paired by
seed (same initialisation, same batches, same number of steps). Budget: the quickstart's config as it is, 5 seeds. It
holds if the mean difference is at least -1.0 point, every compressed model reaches 97 %, and packed and unpacked
weights agree on every prediction.
"""

import pathlib
import tempfile

import numpy as np

from configs import quickstart
from experiments import experiment as experiment_lib
from experiments import train

SEEDS = range(5)


def main() -> bool:
    """Prints a row for each seed, then mean, spread and verdict."""
    print(f"{'seed':>6}{'dense':>10}{'compressed':>12}{'packed':>10}{'difference':>12}{'agreement':>12}{'seconds':>10}")
    rows = []
    for seed in SEEDS:
        row = _measure(seed)
        rows.append(row)
        dense, compressed, packed, agreement, seconds = row
        print(
            f"{seed:>6}{100 * dense:>10.2f}{100 * compressed:>12.2f}{100 * packed:>10.2f}"
            f"{100 * (packed - dense):>+12.2f}{100 * agreement:>12.2f}{seconds:>10.1f}",
            flush=True,
        )
    dense, compressed, packed, agreement, _ = np.array(rows).T
    difference = 100 * (packed - dense)
    print(
        f"dense {100 * dense.mean():.2f} +- {100 * dense.std(ddof=1):.2f}, packed {100 * packed.mean():.2f} +- "
        f"{100 * packed.std(ddof=1):.2f}, difference {difference.mean():+.2f} +- {difference.std(ddof=1):.2f} points "
        "(mean and standard deviation over seeds)"
    )
    holds = difference.mean() >= -1.0 and compressed.min() >= 0.97 and agreement.min() == 1.0
    print("verdict: " + ("holds" if holds else "does not hold"))
    return bool(holds)


def _measure(seed: int) -> tuple[float, ...]:
    config = quickstart.get_config()
    config.seed = seed
    config.eval_every = 0
    with tempfile.TemporaryDirectory() as folder:
        experiment = experiment_lib.build(config)
        summary = train.run(experiment, experiment_lib.programs(experiment), pathlib.Path(folder))
    keys = ("dense_accuracy", "compressed_accuracy", "packed_accuracy", "packed_agreement", "train_seconds")
    return tuple(summary[key] for key in keys)
