"""Scale-invariant weights under momentum, with and without the radial part of the update."""

import functools

import jax
import jax.numpy as jnp
import optax

from experiments.claims import harness, training
from steelyard import optim

SEEDS = 5
_TOY_STEPS, _GOAL = 300, 1e-3
_STEPS, _BATCH = 400, 128
_WIDTHS = (64, 128, 128, 10)


def sgdp() -> tuple[harness.Outcome, ...]:
    """On a loss of the direction alone, SGDP needs fewer steps than SGD with momentum, and the weight grows less.

    Direction: steps down; final length down.
    Metric: steps until 1 - w'Aw / |w|^2 < 1e-3, A = diag(0.1 .. 1) of 20 entries (300 if never); |w| after 300 steps,
    each at the side's best rate.
    Budget: w [20, 1] starts as a random unit vector; momentum 0.9, no decay; rates 0.1, 0.5, 2 on each side
    (3 configurations), 5 seeds.
    """
    diagonal = jnp.linspace(0.1, 1.0, 20)

    def loss(w, batch):
        del batch
        return 1 - jnp.vdot(w, diagonal[:, None] * w) / jnp.vdot(w, w)

    def run(config, key, rule):
        w = jax.random.normal(key, (20, 1))
        w, losses, _ = training.fit(loss, w / jnp.linalg.norm(w), rule(config["rate"]), jnp.arange(_TOY_STEPS))
        is_there = losses < _GOAL
        steps = jnp.where(jnp.any(is_there), jnp.argmax(is_there), _TOY_STEPS)
        return {"steps": steps, "length": jnp.linalg.norm(w)}

    arms = [
        harness.tune(
            functools.partial(run, rule=rule), {"rate": (0.1, 0.5, 2.0)}, seeds=SEEDS, metric="steps", better="less"
        )
        for rule in (lambda rate: optim.sgdp(rate, 0.9), lambda rate: optax.sgd(rate, 0.9))
    ]
    labels = ("SGDP", "SGD")
    return (
        harness.compare(
            *arms, "steps", better="less", scale="percent", unit="% more steps without", labels=labels, part="steps"
        ),
        harness.compare(
            *arms, "length", better="less", scale="percent", unit="% longer without", labels=labels, part="length"
        ),
    )


def adamp() -> tuple[harness.Outcome, ...]:
    """With batch normalization, AdamP keeps the normalized kernels shorter than Adam does, and is more accurate.

    Direction: growth of the kernels down; accuracy up.
    Metric: test accuracy after the last step; geometric mean over the two normalized kernels of final by initial
    length. Each at the side's most accurate rate.
    Budget: digits, perceptron 64-128-128-10 with batch normalization, 400 steps of 128 examples, no decay; rates 1e-3,
    3e-3, 1e-2, 3e-2 on each side (4 configurations), 5 seeds.
    """
    task = training.load("digits")
    network = functools.partial(training.mlp, norm="batch")

    def loss(params, rows):
        return training.cross_entropy(network(params, task.x[rows]), task.y[rows])

    def run(config, key, rule):
        start = training.mlp_init(key, _WIDTHS, norm=True)
        batches = training.minibatches(key, len(task.x), _BATCH, _STEPS)
        params, _, _ = training.fit(loss, start, rule(config["rate"]), batches)
        lengths = [
            [jnp.linalg.norm(layer["kernel"]) for layer in layers if "scale" in layer] for layers in (params, start)
        ]
        growth = jnp.exp(jnp.mean(jnp.log(jnp.stack(lengths[0]) / jnp.stack(lengths[1]))))
        return {"accuracy": training.accuracy(network(params, task.x_test), task.y_test), "growth": growth}

    grid = {"rate": (1e-3, 3e-3, 1e-2, 3e-2)}
    arms = [
        harness.tune(functools.partial(run, rule=rule), grid, seeds=SEEDS, metric="accuracy", better="more")
        for rule in (optim.adamp, optax.adam)
    ]
    labels = ("AdamP", "Adam")
    why = "98% is near the ceiling of this data, and five seeds tell half a point apart at best"
    return (
        harness.compare(
            *arms, "growth", better="less", scale="percent", unit="% more growth without", labels=labels, part="length"
        ),
        harness.compare(
            *arms, "accuracy", better="more", unit="points", factor=100, labels=labels, part="accuracy", why=why
        ),
    )
