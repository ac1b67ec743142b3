"""Workers that send noise: the flag aggregator, Krum and the mean."""

import jax
import jax.numpy as jnp

from experiments.claims import byzantine, harness
from steelyard import aggregate

SEEDS = 5
STEPS = 300
BAD = 3
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)


def flag() -> tuple[harness.Outcome, ...]:
    """With three of ten workers sending noise, the flag aggregator is more accurate than Krum and than the mean.

    Direction: accuracy up, in both comparisons.
    Metric: test accuracy after the last step.
    Budget: digits, perceptron 64-32-10, 300 steps, 10 workers with 16 examples each, 3 of which send independent normal
    numbers (an entry has variance 1) in each step; rates 0.01, 0.03, 0.1, 0.3, 1 on each side (5 configurations), all
    else at its default; 5 seeds.
    """
    rules = {"flag": aggregate.flag(), "Krum": aggregate.krum(BAD), "mean": aggregate.mean()}
    arms = {name: _tune(rule) for name, rule in rules.items()}
    return tuple(
        harness.compare(
            arms["flag"],
            arms[name],
            "accuracy",
            better="more",
            factor=100,
            unit="points of accuracy",
            labels=("flag", name),
            part=f"against {name}",
        )
        for name in ("Krum", "mean")
    )


def _tune(rule) -> harness.Arm:
    def run(config, key):
        return {"accuracy": byzantine.accuracy(rule, _noise, config["rate"], key, steps=STEPS)}

    return harness.tune(run, {"rate": RATES}, seeds=SEEDS, metric="accuracy", better="more")


def _noise(rows, key):
    """The last rows replaced by normal numbers."""
    leaves, structure = jax.tree.flatten(rows)
    keys = jax.random.split(key, len(leaves))
    noise = [jax.random.normal(k, (BAD, *x.shape[1:])) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, [jnp.concatenate([x[:-BAD], n]) for x, n in zip(leaves, noise, strict=True)])
