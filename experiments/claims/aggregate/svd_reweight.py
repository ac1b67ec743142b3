"""Linear tasks that share a small module: weighted by what they share, and aligned before it."""

import functools

import jax
import jax.numpy as jnp
import optax

from experiments.claims import harness, training
from steelyard import aggregate, models

SEEDS = 10
STEPS = 500
GRID = {"rate": (3e-3, 1e-2, 3e-2)}
FEATURES, TASKS, SHARED, RANK, EXAMPLES = 50, 10, 5, 2, 100
LARGE, SMALL = 500, 60


def svd_reweight() -> harness.Outcome:
    """Tasks that share a plane are learned better if all tasks are weighted by how much of them lies in the best plane.

    Direction: error down.
    Metric: mean over the five tasks in the plane of |B a_i - theta_i|^2, the excess risk for the inputs here, after the
    last step.
    Budget: 10 linear tasks of 100 Gaussian inputs in 50 dimensions and unit theta_i; five in a common random plane,
    without noise, five random with noise of deviation 1 in the labels; shared module B [50, 2] and heads a_i, mean
    squared errors, weights svd_weights(rank 2) of X_i' y_i against equal ones; 500 Adam steps on all examples; rates
    3e-3, 1e-2, 3e-2 on each side (3 configurations); 10 seeds.
    """
    arms = [
        harness.tune(functools.partial(_shared_plane, weigh), GRID, seeds=SEEDS, metric="error", better="less")
        for weigh in (_svd_weights, _equal_weights)
    ]
    labels = ("svd weights", "equal weights")
    return harness.compare(
        *arms, "error", better="less", scale="percent", unit="% more error with equal weights", labels=labels
    )


def task_alignment() -> harness.Outcome:
    """A small task whose inputs are those of a large one, rotated, is learned better with an alignment of its inputs.

    Direction: error down.
    Metric: excess risk |R_2 B a_2 - theta_2|^2 of the small task after the last step (R_2 is the identity without
    alignment).
    Budget: 500 Gaussian inputs in 50 dimensions with unit theta, and 60 others turned by a random rotation; noise of
    deviation 0.1; shared module B [50, 1] and two heads, sum of both mean squared errors; 500 Adam steps on all
    examples; rates 3e-3, 1e-2, 3e-2 on each side (3 configurations); 10 seeds.
    """
    arms = [
        harness.tune(functools.partial(_rotated, align), GRID, seeds=SEEDS, metric="error", better="less")
        for align in (True, False)
    ]
    labels = ("aligned", "not aligned")
    return harness.compare(
        *arms, "error", better="less", scale="percent", unit="% more error without alignment", labels=labels
    )


def _svd_weights(x, y):
    theta = jnp.einsum("knd,kn->kd", x, y)
    alpha = aggregate.svd_weights(theta @ theta.T, RANK)
    return alpha * len(alpha) / jnp.sum(alpha)


def _equal_weights(x, y):
    del y
    return jnp.ones(len(x))


def _shared_plane(weigh, config, key):
    keys = jax.random.split(key, 6)
    plane = jax.random.normal(keys[0], (SHARED, RANK)) @ jax.random.normal(keys[1], (RANK, FEATURES))
    theta = jnp.concatenate([plane, jax.random.normal(keys[2], (TASKS - SHARED, FEATURES))])
    theta = theta / jnp.linalg.norm(theta, axis=1, keepdims=True)
    x = jax.random.normal(keys[3], (TASKS, EXAMPLES, FEATURES))
    noise = jax.random.normal(keys[4], (TASKS, EXAMPLES)) * (jnp.arange(TASKS) >= SHARED)[:, None]
    y = jnp.einsum("knd,kd->kn", x, theta) + noise
    weights = weigh(x, y)

    def loss(params, batch):
        del batch
        errors = jnp.einsum("knd,dr,kr->kn", x, params["shared"], params["heads"]) - y
        return jnp.mean(weights * jnp.mean(errors**2, axis=1))

    start = _start(keys[5], RANK, TASKS)
    params, _, _ = training.fit(loss, start, optax.adam(config["rate"]), jnp.arange(STEPS))
    errors = (params["heads"] @ params["shared"].T - theta)[:SHARED]
    return {"error": jnp.mean(jnp.sum(errors**2, axis=1))}


def _rotated(align, config, key):
    keys = jax.random.split(key, 6)
    theta = jax.random.normal(keys[0], (FEATURES,))
    theta = theta / jnp.linalg.norm(theta)
    rotation = jax.random.orthogonal(keys[1], FEATURES)
    x = jax.random.normal(keys[2], (LARGE + SMALL, FEATURES))
    y = x @ theta + 0.1 * jax.random.normal(keys[3], (LARGE + SMALL,))
    inputs, labels = (x[:LARGE], x[LARGE:] @ rotation), (y[:LARGE], y[LARGE:])
    alignment = models.TaskAlignment(2, FEATURES)

    def predict(params, z, task):
        z = alignment.apply(params["alignment"], z, task) if align else z
        return z @ params["shared"] @ params["heads"][task]

    def loss(params, batch):
        del batch
        return sum(jnp.mean((predict(params, inputs[k], k) - labels[k]) ** 2) for k in range(2))

    start = _start(keys[4], 1, 2)
    if align:
        start["alignment"] = alignment.init(keys[5], inputs[0], 0)
    params, _, _ = training.fit(loss, start, optax.adam(config["rate"]), jnp.arange(STEPS))
    found = predict(params, jnp.eye(FEATURES), 1)
    return {"error": jnp.sum((found - rotation.T @ theta) ** 2)}


def _start(key, width, tasks):
    first, second = jax.random.split(key)
    return {
        "shared": jax.random.normal(first, (FEATURES, width)) / jnp.sqrt(FEATURES),
        "heads": jax.random.normal(second, (tasks, width)) / jnp.sqrt(width),
    }
