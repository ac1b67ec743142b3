"""How fast the loss surface around a trained network settles as examples are added."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from experiments.claims import harness, training
from steelyard import train

SEEDS = 5
STEPS = 300
DEPTHS, WIDTHS = (1, 2, 3, 4), (16, 64, 256)
POINTS, RADIUS = 20, 1.0
FIRST = 10  # examples before the line is fitted: the first few differences depend on single examples.


def landscape() -> tuple[harness.Outcome, ...]:
    """The loss surface around a trained network settles like 1 / k^2 in the number of examples, slower when deeper.

    Direction: the slope of log difference on log k lies within -2 +- 0.2; the level is higher with 4 hidden layers than
    with 1.
    Metric: largest distance of the slope from -2 over the networks (least squares over all k from 10 on), against 0.2;
    the mean of k^2 times the difference, as the geometric mean over widths.
    Budget: digits, perceptrons with 1 to 4 hidden layers of 16, 64 and 256, Adam at 3e-3 for 300 steps of 64 examples;
    20 points at distance 1 in random directions; one configuration on each side; 5 seeds, each with its own start,
    permutation of the examples and directions.
    """
    task = training.load("digits")
    measured = {(depth, width): _measure(task, depth, width) for depth in DEPTHS for width in WIDTHS}
    deviation = np.max([np.abs(_slopes(difference) + 2) for difference in measured.values()], axis=0)
    level = {d: np.exp(np.mean([np.log(_levels(measured[d, width])) for width in WIDTHS], axis=0)) for d in DEPTHS}
    return (
        harness.compare(
            _arm(deviation),
            _arm(np.full(SEEDS, 0.2)),
            "value",
            better="less",
            unit="in the slope",
            labels=("largest distance from -2", "allowed"),
            part="slope",
            why="The slopes average -2, but after training 1% of the examples carry most of the squared loss, so that "
            "the slope of a single permutation is off by up to 0.5.",
        ),
        harness.compare(
            _arm(level[DEPTHS[-1]]),
            _arm(level[DEPTHS[0]]),
            "value",
            better="more",
            scale="percent",
            unit="% higher level",
            labels=("4 hidden layers", "1"),
            part="depth",
            why="In the same number of steps deeper networks fit the digits more closely, and the level is that of the "
            "losses which are left, not of the curvature.",
        ),
    )


def _measure(task: training.Task, depth: int, width: int) -> np.ndarray:
    """The landscape difference of each seed, [seeds, n - 1]."""

    def loss(params, rows):
        return training.cross_entropy(training.mlp(params, task.x[rows]), task.y[rows])

    def run(key):
        keys = jax.random.split(key, 4)
        params = training.mlp_init(keys[0], (task.x.shape[1], *(width,) * depth, 10))
        batches = training.minibatches(keys[1], len(task.x), 64, STEPS)
        params, _, _ = training.fit(loss, params, optax.adam(3e-3), batches)
        flat, unravel = ravel_pytree(params)
        directions = jax.random.normal(keys[2], (POINTS, flat.size))
        directions /= jnp.linalg.norm(directions, axis=1, keepdims=True)

        def losses_at(direction):
            logits = training.mlp(unravel(flat + RADIUS * direction), task.x)
            return optax.softmax_cross_entropy_with_integer_labels(logits, task.y)

        losses = jax.lax.map(losses_at, directions).T
        return train.landscape_difference(losses[jax.random.permutation(keys[3], len(task.x))])

    keys = jax.vmap(jax.random.key)(jnp.arange(SEEDS))
    # One seed after the other: the products of the wide networks are then plain matrix products, which are faster.
    return np.asarray(jax.jit(lambda keys: jax.lax.map(run, keys))(keys), np.float64)


def _slopes(difference: np.ndarray) -> np.ndarray:
    log_k = np.log(np.arange(1, difference.shape[1] + 1))[FIRST - 1 :]
    return np.array([np.polyfit(log_k, np.log(row[FIRST - 1 :]), 1)[0] for row in difference])


def _levels(difference: np.ndarray) -> np.ndarray:
    return np.mean(np.arange(1, difference.shape[1] + 1) ** 2 * difference, axis=1)


def _arm(values: np.ndarray) -> harness.Arm:
    return harness.Arm({}, {"value": values}, 1)
