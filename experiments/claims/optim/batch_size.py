"""Steps to a validation error at batch sizes from 8 to 1024, with the learning rate tuned at each."""

import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims import harness, training
from steelyard import train

SEEDS = 3
TARGET = 0.06
STEPS = {8: 800, 32: 800, 128: 400, 512: 300, 1024: 300}
RATES = {0.0: (0.03, 0.1, 0.3, 1.0, 3.0), 0.9: (0.01, 0.03, 0.1, 0.3, 1.0)}


def batch_size() -> tuple[harness.Outcome, ...]:
    """Larger batches first save steps and then do not; with momentum they save steps for longer, and none costs error.

    Direction: log steps fall faster with log batch between the two smallest sizes than between the two largest;
    momentum's critical batch size is above that of plain SGD; the best error with batch 1024 is not more than 1 point
    above that with batch 8.
    Metric: steps to a validation error of 6% (exponent of the batch size; critical size of the fit
    steps = a (1 + critical / B)), and the lowest validation error of the run.
    Budget: digits, perceptron with 32 hidden units, batches of 8, 32, 128, 512 and 1024, at most 800, 800, 400, 300 and
    300 steps, 5 learning rates at every size for SGD (0.03 to 3) and for momentum 0.9 (0.01 to 1), 3 seeds. The rate
    is chosen by the steps to the target, and for the last part by the lowest error.
    """
    task = training.load("digits")
    steps = {m: {b: _tune(task, m, b, "steps") for b in STEPS} for m in RATES}
    counts = {m: np.array([arm.metrics["steps"] for arm in steps[m].values()]) for m in RATES}
    sizes = list(STEPS)
    critical = {m: [train.critical_batch_size(sizes, list(row)).critical for row in counts[m].T] for m in RATES}
    slopes = np.diff(np.log(counts[0.0]), axis=0) / np.diff(np.log(sizes))[:, None]
    lowest = [_tune(task, 0.0, b, "error") for b in (sizes[-1], sizes[0])]
    tried = len(RATES[0.0])
    return (
        harness.compare(
            harness.Arm({}, {"exponent": -slopes[0]}, tried),
            harness.Arm({}, {"exponent": -slopes[-1]}, tried),
            "exponent",
            better="more",
            unit="in the exponent",
            labels=("8 to 32", "512 to 1024"),
            part="regimes",
        ),
        harness.compare(
            harness.Arm({}, {"size": np.array(critical[0.9])}, tried),
            harness.Arm({}, {"size": np.array(critical[0.0])}, tried),
            "size",
            better="more",
            scale="percent",
            unit="% larger critical batch",
            labels=("momentum", "SGD"),
            part="momentum",
        ),
        harness.compare(
            *lowest,
            "error",
            better="less",
            unit="points of error",
            factor=100,
            margin=-1.0,
            labels=("batch 1024", "batch 8"),
            part="best error",
        ),
    )


def _tune(task: training.Task, momentum: float, batch: int, metric: str) -> harness.Arm:
    def loss(params, rows):
        return training.cross_entropy(training.mlp(params, task.x[rows]), task.y[rows])

    def error(params):
        return 1 - training.accuracy(training.mlp(params, task.x_test), task.y_test)

    def run(config, key):
        params = training.mlp_init(key, (task.x.shape[1], 32, 10))
        rows = training.minibatches(key, len(task.x), batch, STEPS[batch])
        tx = optax.sgd(config["rate"], momentum=momentum)
        _, _, errors = training.fit(loss, params, tx, rows, measure=error)
        reached = errors <= TARGET
        steps = jnp.where(jnp.any(reached), 1 + jnp.argmax(reached), jnp.inf)
        return {"steps": steps, "error": jnp.min(errors), "errors": errors}

    return harness.tune(run, {"rate": RATES[momentum]}, seeds=SEEDS, metric=metric, better="less")
