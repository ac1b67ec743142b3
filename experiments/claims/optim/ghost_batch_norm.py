"""The generalization gap of large batches, ghost batch normalization, and the distance from the start."""

import flax.linen as nn
import jax
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments.claims import harness, training
from steelyard import models, train

SEEDS = 5
EPOCHS = 15
SMALL, LARGE = 32, 512
RATES = (0.03, 0.1, 0.3, 1.0)


def ghost_batch_norm() -> tuple[harness.Outcome, ...]:
    """At equal epochs batch 512 generalizes worse than 32; ghost groups of 32 close a part, equal updates all of it.

    Direction: accuracy higher with batch 32 than with 512 at equal epochs; with 512, higher with groups of 32 than with
    one group; with 512, groups of 32 and as many updates as batch 32 not more than 0.5 points below batch 32. With
    batch 32, the distance from the start follows log t more closely than t.
    Metric: test accuracy after the last step, normalized by the statistics of the training set; R^2 of least squares
    lines for the distance after each update.
    Budget: digits, perceptron with two hidden layers of 64 and batch normalization; 15 epochs (660 updates of 32, 30 of
    512), momentum 0.9, gradients clipped to 5; constant rates 0.03, 0.1, 0.3, 1 on each side (4 configurations, chosen
    by the accuracy), 5 seeds.
    """
    task = training.load("digits")
    updates = {batch: EPOCHS * (len(task.x) // batch) for batch in (SMALL, LARGE)}
    small = _tune(task, SMALL, SMALL, updates[SMALL])
    large = _tune(task, LARGE, LARGE, updates[LARGE])
    ghost = _tune(task, LARGE, SMALL, updates[LARGE])
    longer = _tune(task, LARGE, SMALL, updates[SMALL])
    points = dict(better="more", factor=100, unit="points of accuracy")
    times = np.arange(1.0, updates[SMALL] + 1)
    fits = {
        name: harness.Arm(
            small.config, {"fit": np.array([_r_squared(x, y) for y in small.metrics["distance"]])}, small.tried
        )
        for name, x in (("log t", np.log(times)), ("t", times))
    }
    return (
        harness.compare(small, large, "accuracy", labels=("batch 32", "batch 512"), part="gap", **points),
        harness.compare(
            ghost,
            large,
            "accuracy",
            labels=("groups of 32", "of 512"),
            part="ghost groups",
            why="30 updates leave both networks undertrained: this gap is one of updates, and equal updates close it.",
            **points,
        ),
        harness.compare(
            longer,
            small,
            "accuracy",
            labels=("512, groups of 32, equal updates", "batch 32"),
            part="equal updates",
            margin=-0.5,
            **points,
        ),
        harness.compare(*fits.values(), "fit", better="more", unit="of R^2", labels=tuple(fits), part="distance"),
    )


def _tune(task: training.Task, batch: int, ghost_size: int, steps: int) -> harness.Arm:
    model, whole = _Model(ghost_size), _Model(len(task.x), momentum=0.0)

    def apply(variables, x):
        return model.apply(variables, x, mutable=["batch_stats"])[0]

    def run(config, key):
        init = model.init(key, task.x[:SMALL])

        def loss(params, rows):
            return training.cross_entropy(apply({**init, "params": params}, task.x[rows]), task.y[rows])

        tx = optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(config["rate"], momentum=0.9))
        params, _, distance = training.fit(
            loss,
            init["params"],
            tx,
            training.minibatches(key, len(task.x), batch, steps),
            measure=lambda params: train.distance_from_init(params, init["params"]),
        )
        _, stats = whole.apply({**init, "params": params}, task.x, mutable=["batch_stats"])
        logits = whole.apply({"params": params, **stats}, task.x_test, evaluate=True)
        return {"accuracy": training.accuracy(logits, task.y_test), "distance": distance}

    return harness.tune(run, {"rate": RATES}, seeds=SEEDS, metric="accuracy", better="more")


def _r_squared(x: Float[np.ndarray, "n"], y: Float[np.ndarray, "n"]) -> float:
    return float(np.corrcoef(x, y)[0, 1] ** 2)


class _Model(nn.Module):
    """Two hidden layers of 64 with ghost batch normalization; one group as large as the batch is the usual kind."""

    ghost_size: int
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: Float[Array, "batch d"], evaluate: bool = False) -> Float[Array, "batch classes"]:
        for _ in range(2):
            norm = models.GhostBatchNorm(self.ghost_size, self.momentum)
            x = jax.nn.relu(norm(models.Dense(64, use_bias=False)(x), evaluate))
        return models.Dense(10)(x)
