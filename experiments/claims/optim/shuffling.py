"""One shuffle for all epochs against a new one for each, with batch normalization and without."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims import harness, training
from steelyard import data

SEEDS = 10
EPOCHS = 20
BATCH = 16
RATES = (0.3, 1.0, 3.0)
RATES_WITHOUT = (0.03, 0.1, 0.3)


def shuffling() -> tuple[harness.Outcome, ...]:
    """With batch normalization a single shuffle trains less stably than reshuffling; without it they are alike.

    Direction: loss on the full training set higher with a single shuffle, and further from its median over the seeds;
    without batch normalization the single shuffle's is at most 10% higher.
    Metric: cross entropy on all training examples, normalized by their own statistics, after the last epoch; its
    distance from the median over the seeds, in the logarithm.
    Budget: digits (the first 1424, so that every batch is full), perceptron with two hidden layers of 64 units, SGD,
    batch 16, 20 epochs, 3 learning rates on each side (0.3, 1, 3; without normalization 0.03, 0.1, 0.3), 10 seeds.
    """
    task = training.load("digits")
    single, reshuffled = (_tune(task, mode, "batch", RATES) for mode in ("single", "reshuffle"))
    plain_single, plain = (_tune(task, mode, None, RATES_WITHOUT) for mode in ("single", "reshuffle"))
    labels = ("reshuffled", "single")
    return (
        harness.compare(
            reshuffled,
            single,
            "loss",
            better="less",
            scale="percent",
            unit="% more loss if single",
            labels=labels,
            part="loss",
        ),
        harness.compare(
            _spread(reshuffled),
            _spread(single),
            "spread",
            better="less",
            unit="nats",
            labels=labels,
            part="spread",
            why="at the best rates no run diverges; the spread grows with the loss, and is the same relative to it.",
        ),
        harness.compare(
            plain_single,
            plain,
            "loss",
            better="less",
            scale="percent",
            margin=-10.0,
            unit="% more loss if reshuffled",
            labels=("single", "reshuffled"),
            part="without normalization",
            why="at losses near 0.001 a new order in each epoch is the faster optimizer, whatever the network.",
        ),
    )


def _tune(task: training.Task, mode: str, norm, rates) -> harness.Arm:
    n = len(task.x) // BATCH * BATCH

    def loss(params, rows):
        return training.cross_entropy(training.mlp(params, task.x[rows], norm=norm), task.y[rows])

    def run(config, key):
        params = training.mlp_init(key, (task.x.shape[1], 64, 64, 10), norm=norm is not None)
        orders = jax.vmap(lambda epoch: data.epoch_order(n, epoch, key, mode=mode))(jnp.arange(EPOCHS))
        params, _, _ = training.fit(loss, params, optax.sgd(config["rate"]), orders.reshape(-1, BATCH))
        return {"loss": loss(params, jnp.arange(n))}

    return harness.tune(run, {"rate": rates}, seeds=SEEDS, metric="loss", better="less")


def _spread(arm: harness.Arm) -> harness.Arm:
    logs = np.log(arm.metrics["loss"])
    return harness.Arm(arm.config, {"spread": np.abs(logs - np.median(logs))}, arm.tried)
