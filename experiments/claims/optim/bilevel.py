"""Bilevel problems by penalty: weights of corrupt examples, and a ridge penalty."""

import jax
import jax.numpy as jnp
import optax

from experiments.claims import harness, training
from steelyard import optim

SEEDS = 5
TRAIN = 400
CLEAN = 100
CORRUPT = 0.4
OUTER_STEPS = 300
INNER_STEPS = 5
RATE = 0.1
RIDGE_STEPS = 2000
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def bilevel() -> tuple[harness.Outcome, ...]:
    """Weights learned on a few clean examples find corrupt labels, and raise the accuracy.

    Direction: mean weight of corrupt examples below that of clean ones; test accuracy above uniform weights, and above
    training on the clean examples alone.
    Metric: difference of mean weights; accuracy on the held-out 20% of the digits after the last step.
    Budget: linear classifier on digits, 400 training examples of which 40% have a random other label, 100 clean ones
    for the upper loss. Full-batch descent at rate 0.1, 300 x 5 steps on all sides, sigma 0.1, weights start at 1/2. 4
    configurations a side: outer rate 10, 100 times ridge 1e-3, 1e-2; for the others ridge 1e-4, 1e-3, 1e-2, 1e-1. 5
    seeds.
    """
    task = training.load("digits")
    grid = {"outer": (10.0, 100.0), "ridge": (1e-3, 1e-2)}
    weighted = _tune(lambda config, key: _weighted(task, config, key), grid)
    uniform, clean = (
        _tune(lambda config, key, only=only: _uniform(task, config, key, only), {"ridge": RIDGES[:4]})
        for only in (False, True)
    )
    points = dict(better="more", unit="points of accuracy", factor=100.0)
    gap = dict(better="more", unit="weight", labels=("clean", "corrupt"))
    kept, corrupt = (harness.Arm({}, {"weight": weighted.metrics[name]}, 1) for name in ("kept", "corrupt"))
    return (
        harness.compare(kept, corrupt, "weight", **gap, part="weights"),
        harness.compare(weighted, uniform, "accuracy", **points, labels=("learned", "uniform"), part="against uniform"),
        harness.compare(
            weighted, clean, "accuracy", **points, labels=("learned", "clean alone"), part="against clean alone"
        ),
    )


def bilevel_ridge() -> harness.Outcome:
    """A ridge penalty found by the first-order method is as good as that of a grid search.

    Direction: not worse by more than 1%.
    Metric: validation loss of the exact ridge solution at the penalty found, in percent.
    Budget: diabetes, 254 training and 100 validation examples, split by the seed. One configuration: sigma 0.01, 2000
    outer steps of rate 1 for the logarithm of the penalty from 0, 5 inner steps of rate 0.2. Grid search: the best of
    1e-4, 1e-3, 1e-2, 1e-1, 1, each solved exactly. 5 seeds.
    """
    task = training.load("diabetes")
    y = (task.y - task.y.mean()) / task.y.std()
    found = harness.tune(lambda _, key: _ridge(task.x, y, key), {}, seeds=SEEDS, metric="bilevel", better="less")
    arms = [harness.Arm({}, {"loss": found.metrics[name]}, 1) for name in ("bilevel", "grid")]
    return harness.compare(
        *arms,
        "loss",
        better="less",
        scale="percent",
        unit="% higher validation loss of the baseline",
        margin=-1.0,
        labels=("bilevel", "grid search"),
    )


def _tune(run, grid) -> harness.Arm:
    return harness.tune(run, grid, seeds=SEEDS, metric="accuracy", better="more")


def _split(task: training.Task, key):
    """Rows of the training and of the clean examples, labels of the former, and which of them are corrupt."""
    k1, k2, k3 = jax.random.split(key, 3)
    rows = jax.random.permutation(k1, len(task.x))[: TRAIN + CLEAN]
    is_corrupt = jax.random.bernoulli(k2, CORRUPT, (TRAIN,))
    shift = jnp.where(is_corrupt, jax.random.randint(k3, (TRAIN,), 1, 10), 0)
    return rows[:TRAIN], rows[TRAIN:], (task.y[rows[:TRAIN]] + shift) % 10, is_corrupt


def _losses(params, x, labels):
    return optax.softmax_cross_entropy_with_integer_labels(x @ params["kernel"] + params["bias"], labels)


def _init(task: training.Task):
    return {"kernel": jnp.zeros((task.x.shape[1], 10)), "bias": jnp.zeros(10)}


def _penalty(params, ridge):
    return ridge / 2 * jnp.sum(params["kernel"] ** 2)


def _accuracy(task: training.Task, params):
    return training.accuracy(task.x_test @ params["kernel"] + params["bias"], task.y_test)


def _weighted(task: training.Task, config, key):
    rows, clean, labels, is_corrupt = _split(task, key)

    def upper(logits, params):
        del logits
        return jnp.mean(_losses(params, task.x[clean], task.y[clean]))

    def lower(logits, params):
        losses = jax.nn.sigmoid(logits) * _losses(params, task.x[rows], labels)
        return jnp.mean(losses) + _penalty(params, config["ridge"])

    def step(state, _):
        rates = dict(penalty=0.1, outer_lr=config["outer"], inner_lr=RATE, inner_steps=INNER_STEPS)
        return optim.bilevel_penalty_step(upper, lower, state, **rates), None

    start = optim.BilevelState(jnp.zeros(TRAIN), _init(task), _init(task))
    state, _ = jax.lax.scan(step, start, length=OUTER_STEPS)
    weights = jax.nn.sigmoid(state.x)
    return {
        "accuracy": _accuracy(task, state.z),
        "kept": jnp.mean(weights, where=~is_corrupt),
        "corrupt": jnp.mean(weights, where=is_corrupt),
    }


def _uniform(task: training.Task, config, key, clean_only: bool):
    rows, clean, labels, _ = _split(task, key)
    x, y = (task.x[clean], task.y[clean]) if clean_only else (task.x[rows], labels)

    def loss(params, _):
        return jnp.mean(_losses(params, x, y)) + _penalty(params, config["ridge"])

    params, _, _ = training.fit(loss, _init(task), optax.sgd(RATE), jnp.arange(OUTER_STEPS * INNER_STEPS))
    return {"accuracy": _accuracy(task, params)}


def _ridge(x, y, key):
    rows = jax.random.permutation(key, len(x))
    (x, y), (x_val, y_val) = ((x[r], y[r]) for r in (rows[CLEAN:], rows[:CLEAN]))

    def upper(log_ridge, w):
        del log_ridge
        return jnp.mean((x_val @ w - y_val) ** 2) / 2

    def lower(log_ridge, w):
        return jnp.mean((x @ w - y) ** 2) / 2 + jnp.exp(log_ridge) / 2 * jnp.sum(w**2)

    def step(state, _):
        rates = dict(penalty=0.01, outer_lr=1.0, inner_lr=0.2, inner_steps=5)
        return optim.bilevel_penalty_step(upper, lower, state, **rates), None

    def exact(ridge):
        w = jnp.linalg.solve(x.T @ x / len(x) + ridge * jnp.eye(x.shape[1]), x.T @ y / len(x))
        return upper(None, w)

    zero = jnp.zeros(x.shape[1])
    state, _ = jax.lax.scan(step, optim.BilevelState(jnp.zeros(()), zero, zero), length=RIDGE_STEPS)
    return {"bilevel": exact(jnp.exp(state.x)), "grid": jnp.min(jax.vmap(exact)(jnp.asarray(RIDGES)))}
