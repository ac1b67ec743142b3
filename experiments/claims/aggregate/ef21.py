"""Error feedback: weights by smoothness with the step sizes of theory, and training with compressed gradients."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims import harness, training
from steelyard import aggregate, tree

WORKERS = 10
SMOOTHNESS = np.geomspace(1.0, 100.0, WORKERS)
ROUNDS = 50_000
GOAL = 0.01
PENALTY = 0.1

SEEDS = 5
TRAIN_WORKERS, BATCH, STEPS = 8, 16, 400
SHARE = 20
WIDTHS = (64, 64, 10)
WHY = (
    "an entry of an estimate is renewed about every twenty steps, while gradients of 16 examples change in each: 400 "
    "steps later two or three more of 359 test digits are wrong"
)
RATES = (0.03, 0.1, 0.3)


class _Problem(NamedTuple):
    """Losses of the workers `(x, k) -> scalar` on x [size], with smoothness constants `SMOOTHNESS`.

    `overall` is the smoothness of their mean.
    """

    loss: Callable
    size: int
    overall: float


def ef21() -> tuple[harness.Outcome, ...]:
    """With the step sizes of theory EF21-W needs fewer rounds than EF21, where the workers' smoothness differs.

    Direction: fewer rounds, on each of three problems.
    Metric: rounds until the gradient's norm is a hundredth of the first (50000 if never).
    Budget: 10 workers with smoothness constants 1 to 100 in equal ratios; one entry a round (top-k with k = 1), first
    gradients sent whole, from 0: (a) least squares of random data [10, 30, 20] with unit noise; (b) logistic regression
    on breast cancer, standardized, split in ten, with the penalty 0.01 |x|^2 / 2; (c) the same with
    0.1 sum x^2 / (1 + x^2), which is not convex. The step sizes are `ef21_step_size` with the arithmetic mean for
    EF21-W and the quadratic mean for EF21; nothing is tuned, and nothing is random but the data of (a).
    """
    weights = SMOOTHNESS / SMOOTHNESS.sum()
    problems = {"least squares": _least_squares(), "logistic": _logistic(False), "not convex": _logistic(True)}
    return tuple(
        harness.exact(
            _rounds(problem, weights),
            _rounds(problem, None),
            better="less",
            scale="percent",
            unit="% more rounds without weights",
            labels=("EF21-W", "EF21"),
            part=name,
        )
        for name, problem in problems.items()
    )


def ef21_quickstart() -> harness.Outcome:
    """Sending a twentieth of each worker's gradient entries trains the digits as well as sending all of them.

    Direction: accuracy not lower by more than 0.8 points, one standard error of 97.5% on 359 test digits.
    Metric: test accuracy after the last step.
    Budget: digits, perceptron 64-64-10, 8 workers with 16 examples each, 400 steps of SGD with momentum 0.9; EF21 with
    top-k, k a twentieth of the parameters, from estimates of 0, or the mean in float32; rates 0.03, 0.1, 0.3 on each
    side (3 configurations), 5 seeds.
    """
    count = tree.size(training.mlp_init(jax.random.key(0), WIDTHS)) // SHARE
    rules = aggregate.ef21(TRAIN_WORKERS, aggregate.top_k(count)), aggregate.mean()
    arms = [
        harness.tune(
            lambda config, key, rule=rule: _train(rule, config, key),
            {"rate": RATES},
            seeds=SEEDS,
            metric="accuracy",
            better="more",
        )
        for rule in rules
    ]
    return harness.compare(
        *arms,
        "accuracy",
        better="more",
        factor=100,
        unit="points of accuracy",
        margin=-0.8,
        why=WHY,
        labels=(f"EF21, {count} entries", "mean"),
    )


def _rounds(problem: _Problem, weights) -> float:
    """Rounds of descent with the theory's step size until the gradient is small."""
    step_size = aggregate.ef21_step_size(
        SMOOTHNESS, alpha=1 / problem.size, overall=problem.overall, weighted=weights is not None
    )
    rule, whole = (
        aggregate.ef21(WORKERS, compressor, weights=weights)
        for compressor in (aggregate.top_k(1), lambda tree, step, worker: tree)
    )
    gradients = jax.vmap(jax.grad(problem.loss), (None, 0))

    def norm(x):
        return jnp.linalg.norm(gradients(x, jnp.arange(WORKERS)).mean(0))

    def step(carry, _):
        x, update, state = carry
        x = x - step_size * update
        rows = gradients(x, jnp.arange(WORKERS))
        update, state = rule.update(rows, state)
        return (x, update, state), jnp.linalg.norm(rows.mean(0))

    @jax.jit
    def run():
        x = jnp.zeros(problem.size)
        update, state = whole.update(gradients(x, jnp.arange(WORKERS)), rule.init(x))
        _, norms = jax.lax.scan(step, (x, update, state), length=ROUNDS)
        is_there = norms <= GOAL * norm(x)
        return jnp.where(jnp.any(is_there), 1 + jnp.argmax(is_there), ROUNDS)

    return float(run())


def _least_squares() -> _Problem:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((WORKERS, 30, 20))
    b = a @ rng.standard_normal(20) + rng.standard_normal((WORKERS, 30))
    hessians = a.swapaxes(1, 2) @ a / a.shape[1]
    scales, overall = _scaled(hessians)
    a, b, scales = (jnp.asarray(v, jnp.float32) for v in (a, b, scales))
    return _Problem(lambda x, k: scales[k] * jnp.mean((a[k] @ x - b[k]) ** 2) / 2, 20, overall)


def _logistic(is_bounded: bool) -> _Problem:
    """With a penalty of bounded size, which is not convex, or a quadratic one."""
    task = training.load("breast_cancer")
    x = np.asarray(task.x, np.float64)
    each = len(x) // WORKERS
    x = ((x - x.mean(0)) / x.std(0))[: each * WORKERS].reshape(WORKERS, each, -1)
    y = np.asarray(task.y)[: each * WORKERS].reshape(WORKERS, each)
    size = x.shape[2]
    # The second derivative of the logistic loss is at most 1/4, that of z^2 / (1 + z^2) at most 2 in size.
    curvature = 2 * PENALTY if is_bounded else PENALTY / 10
    scales, overall = _scaled(x.swapaxes(1, 2) @ x / (4 * each) + curvature * np.eye(size))
    x, y, scales = jnp.asarray(x, jnp.float32), jnp.asarray(y), jnp.asarray(scales, jnp.float32)

    def penalty(z):
        return PENALTY * jnp.sum(z**2 / (1 + z**2)) if is_bounded else PENALTY / 10 * jnp.sum(z**2) / 2

    def loss(z, k):
        return scales[k] * (jnp.mean(optax.sigmoid_binary_cross_entropy(x[k] @ z, y[k])) + penalty(z))

    return _Problem(loss, size, overall)


def _scaled(hessians: np.ndarray) -> tuple[np.ndarray, float]:
    """Factors that give the workers their smoothness constants, and the smoothness of the mean."""
    scales = SMOOTHNESS / np.linalg.eigvalsh(hessians)[:, -1]
    return scales, float(np.linalg.eigvalsh(np.mean(scales[:, None, None] * hessians, axis=0))[-1])


def _train(rule, config, key):
    task = training.load("digits")
    tx = optax.chain(rule, optax.sgd(config["rate"], momentum=0.9))

    def loss(params, rows):
        return training.cross_entropy(training.mlp(params, task.x[rows]), task.y[rows])

    def step(carry, rows):
        params, state = carry
        grads = jax.vmap(jax.grad(loss), (None, 0))(params, rows)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = training.mlp_init(key, WIDTHS)
    batches = training.minibatches(key, len(task.x), TRAIN_WORKERS * BATCH, STEPS)
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), batches.reshape(STEPS, TRAIN_WORKERS, BATCH))
    return {"accuracy": training.accuracy(training.mlp(params, task.x_test), task.y_test)}
