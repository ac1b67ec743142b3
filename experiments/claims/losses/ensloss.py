"""Random calibrated losses against fixed ones, where a wide network can learn wrong labels by heart."""

import functools

import jax
import jax.numpy as jnp
import optax

from experiments.claims import harness, training
from steelyard import losses

SEEDS = 10
WIDTHS = (30, 256, 256, 1)
TRAIN, BATCH = 200, 100
PER_EPOCH = TRAIN // BATCH
EPOCHS, EVERY, REDRAWN = 300, 5, 10
NOISE = 0.2
RATE = 1e-3
WHY = "its best epoch is the better one too, and the way down from there is as long"


def ensloss() -> tuple[harness.Outcome, ...]:
    """A random calibrated loss in each step overfits wrong labels less than cross-entropy or hinge loss.

    Direction: test accuracy at the end up; its fall from the best epoch down; against either.
    Metric: accuracy with right labels on the 369 images that do not train, measured every 5 epochs; "the end" is the
    mean of the last 4 measurements.
    Budget: breast_cancer, 200 training examples, each label wrong with probability 0.2; perceptron 30-256-256-1; 300
    epochs of 2 steps of Adam with rate 1e-3, no decay; the Box-Cox parameter is redrawn every 10 epochs; one
    configuration a side; 10 seeds, which draw examples, labels, network and batches.
    """
    random, logistic, hinge = (
        harness.tune(functools.partial(_run, fn), {}, seeds=SEEDS, metric="accuracy", better="more")
        for fn in (_random, _logistic, _hinge)
    )
    points = {"factor": 100, "unit": "points of accuracy"}
    outcomes = []
    for baseline, name, why in ((logistic, "cross-entropy", WHY), (hinge, "hinge loss", "")):
        compare = functools.partial(harness.compare, random, baseline, labels=("random losses", name), **points)
        outcomes += [
            compare("accuracy", better="more", part=f"accuracy, against {name}"),
            compare("fall", better="less", part=f"fall from the best epoch, against {name}", why=why),
        ]
    return tuple(outcomes)


def _random(margins, key, step):
    of_parameters, of_draws = jax.random.split(key)
    box_cox = losses.box_cox_parameter(jax.random.fold_in(of_parameters, step // (REDRAWN * PER_EPOCH)))
    return losses.ensemble_calibrated_loss(margins, jax.random.fold_in(of_draws, step), box_cox=box_cox)


def _logistic(margins, key, step):
    del key, step
    return jax.nn.softplus(-margins)


def _hinge(margins, key, step):
    del key, step
    return jax.nn.relu(1 - margins)


def _run(fn, config, key):
    """`fn(margins, key, step) -> losses`."""
    del config
    x, signs, x_test, signs_test = _split(key)
    adam = optax.adam(RATE)

    def train(carry, step_and_rows):
        (params, state), (step, rows) = carry, step_and_rows
        grads = jax.grad(lambda p: jnp.mean(fn(signs[rows] * training.mlp(p, x[rows])[:, 0], key, step)))(params)
        updates, state = adam.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    def measured(carry, steps_and_rows):
        carry, _ = jax.lax.scan(train, carry, steps_and_rows)
        return carry, jnp.mean(signs_test * training.mlp(carry[0], x_test)[:, 0] > 0)

    steps = jnp.arange(EPOCHS * PER_EPOCH).reshape(-1, EVERY * PER_EPOCH)
    rows = training.minibatches(key, TRAIN, BATCH, steps.size).reshape(*steps.shape, BATCH)
    params = training.mlp_init(key, WIDTHS)
    _, accuracies = jax.lax.scan(measured, (params, adam.init(params)), (steps, rows))
    end = jnp.mean(accuracies[-4:])
    return {"accuracy": end, "fall": jnp.max(accuracies) - end}


def _split(key):
    """Features and labels of -1 and +1, some of those to train on turned."""
    task = training.load("breast_cancer")
    x, y = jnp.concatenate([task.x, task.x_test]), jnp.concatenate([task.y, task.y_test])
    order = jax.random.permutation(jax.random.fold_in(key, 1), len(y))
    x, signs = x[order], 2.0 * y[order] - 1
    turned = jax.random.bernoulli(jax.random.fold_in(key, 2), NOISE, (TRAIN,))
    return x[:TRAIN], jnp.where(turned, -1, 1) * signs[:TRAIN], x[TRAIN:], signs[TRAIN:]
