"""Shapes of the learning rate, by the training loss of the last iterate."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims import harness, training
from steelyard import optim

SEEDS = 5
STEPS = 1000
BATCH = 16
PEAKS = tuple(float(peak) for peak in np.geomspace(0.01, 10, 7))
NETWORKS = {"logistic": (), "perceptron": (32,)}
DATA = ("breast_cancer", "digits", "wine")
SHAPES = {
    "constant": np.ones(STEPS),
    "cosine": (1 + np.cos(np.pi * np.arange(STEPS) / STEPS)) / 2,
    "linear": 1 - np.arange(STEPS) / STEPS,
}


def refined_schedule() -> tuple[harness.Outcome, ...]:
    """The last iterate is best with a refined schedule, then linear decay, then cosine, then a constant rate.

    Direction: training loss with linear decay not above that with cosine decay, cosine not above constant (logistic
    regression on breast_cancer and digits); refined below linear (six tasks: logistic regression and a perceptron of
    32 hidden units on breast_cancer, digits and wine).
    Metric: loss on the whole training set after the last step, geometric mean over the tasks.
    Budget: SGD, batch 16, 1000 steps, 7 peak rates from 0.01 to 10 for every schedule and task, 5 seeds. The norms
    that are refined are the l2 norms of one more run with linear decay at its best peak, with a sixth seed.
    """
    tasks = {(name, net): (training.load(name), NETWORKS[net]) for name in DATA for net in NETWORKS}
    arms = {(*task, "linear"): _tune(*tasks[task], SHAPES["linear"]) for task in tasks}
    for task in tasks:
        refined = optim.refined_schedule_values(_norms(*tasks[task], arms[*task, "linear"].config["peak"]))
        arms[*task, "refined"] = _tune(*tasks[task], refined)
    convex = [task for task in tasks if task[0] != "wine" and task[1] == "logistic"]
    for task in convex:
        arms |= {(*task, shape): _tune(*tasks[task], SHAPES[shape]) for shape in ("constant", "cosine")}

    def together(shape, chosen):
        losses = [arms[*task, shape].metrics["loss"] for task in chosen]
        return harness.Arm({}, {"loss": np.exp(np.mean(np.log(losses), 0))}, len(PEAKS))

    def outcome(better, worse, chosen):
        sides = together(better, chosen), together(worse, chosen)
        words = dict(unit=f"% more loss if {worse}", labels=(better, worse), part=f"{better} against {worse}")
        return harness.compare(*sides, "loss", better="less", scale="percent", **words)

    return (
        outcome("linear", "cosine", convex),
        outcome("cosine", "constant", convex),
        outcome("refined", "linear", tasks),
    )


def _tune(task: training.Task, hidden: tuple[int, ...], shape: np.ndarray) -> harness.Arm:
    run = _run(task, hidden, shape)
    return harness.tune(run, {"peak": PEAKS}, seeds=SEEDS, metric="loss", better="less")


def _norms(task: training.Task, hidden: tuple[int, ...], peak: float) -> np.ndarray:
    run = jax.jit(_run(task, hidden, SHAPES["linear"]))
    return np.asarray(run({"peak": peak}, jax.random.key(SEEDS))["norms"], np.float64)


def _run(task: training.Task, hidden: tuple[int, ...], shape: np.ndarray) -> Callable:
    classes = int(task.y.max()) + 1

    def loss(params, batch):
        return training.cross_entropy(training.mlp(params, task.x[batch]), task.y[batch])

    def norm_as_value(value_and_grad):
        def fn(params, batch):
            _, grads = value_and_grad(params, batch)
            return optax.tree.norm(grads), grads

        return fn

    def run(config, key):
        params = training.mlp_init(key, (task.x.shape[1], *hidden, classes))
        batches = training.minibatches(key, len(task.x), BATCH, STEPS)
        tx = optax.sgd(lambda count: config["peak"] * jnp.asarray(shape, jnp.float32)[count])
        params, norms, _ = training.fit(loss, params, tx, batches, wrap=norm_as_value)
        return {"loss": loss(params, jnp.arange(len(task.x))), "norms": norms}

    return run
