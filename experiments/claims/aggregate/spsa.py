"""One byte per gradient: a linear classifier of random features of digits, trained by forward passes."""

import functools

import jax
import jax.numpy as jnp

from experiments.claims import harness, training
from steelyard import aggregate

SEEDS = 5
ROUNDS, SAMPLES, BATCH = 300, 4, 32
FEATURES = 64


def spsa() -> tuple[harness.Outcome, ...]:
    """Machines that exchange bytes learn as well as with floats, and four learn more in as many rounds than one does.

    Direction: accuracy with bytes lower by less than 1 point; accuracy with four machines up.
    Metric: test accuracy after the last round.
    Budget: digits, linear classifier of 64 random ReLU features drawn by the seed (650 parameters), from zeros; 300
    rounds, in which a machine measures 4 slopes, each on 32 training digits drawn at random; 4 machines with bytes
    against 4 with floats and against 1 with bytes; rates 0.03, 0.1, 0.3, 1 on each side (4 configurations); 5 seeds.

    Features and rounds were cut from 128 and 500 after the first run, to save time; both parts held there too.
    """
    task = training.load("digits")

    def run(config, key, machines, use_bytes):
        projection = jax.random.normal(key, (task.x.shape[1], FEATURES)) / jnp.sqrt(task.x.shape[1] / 2)
        x, x_test = (jax.nn.relu(x @ projection) for x in (task.x, task.x_test))

        def slope(params, step, machine, sample):
            sample_key = aggregate.spsa_key(key, step, machine, sample)
            # The tag keeps the examples independent of the direction, whose leaves are numbers 0 and 1.
            rows = jax.random.randint(jax.random.fold_in(sample_key, 1000), (BATCH,), 0, len(x))
            loss = functools.partial(_loss, x=x[rows], y=task.y[rows])
            return aggregate.spsa_projected_gradient(loss, params, sample_key)

        machine, sample = (index.ravel() for index in jnp.indices((machines, SAMPLES)))

        def update(params, step):
            slopes = jax.vmap(slope, (None, None, 0, 0))(params, step, machine, sample)
            if use_bytes:
                codes = aggregate.encode_byte(slopes).reshape(machines, SAMPLES)
                return aggregate.spsa_round(params, key, step, codes, learning_rate=config["rate"]), None
            keys = jax.vmap(aggregate.spsa_key, (None, None, 0, 0))(key, step, machine, sample)
            return aggregate.spsa_apply(params, keys, slopes, learning_rate=config["rate"]), None

        start = {"kernel": jnp.zeros((FEATURES, 10)), "bias": jnp.zeros(10)}
        params, _ = jax.lax.scan(update, start, jnp.arange(ROUNDS))
        return {"accuracy": training.accuracy(_logits(params, x_test), task.y_test)}

    grid = {"rate": (0.03, 0.1, 0.3, 1.0)}
    four, floats, one = (
        harness.tune(
            functools.partial(run, machines=machines, use_bytes=use_bytes),
            grid,
            seeds=SEEDS,
            metric="accuracy",
            better="more",
        )
        for machines, use_bytes in ((4, True), (4, False), (1, True))
    )
    points = functools.partial(harness.compare, metric="accuracy", better="more", factor=100, unit="points of accuracy")
    return (
        points(four, floats, margin=-1, labels=("bytes", "floats"), part="bytes"),
        points(four, one, labels=("4 machines", "1 machine"), part="machines"),
    )


def _logits(params, x):
    return x @ params["kernel"] + params["bias"]


def _loss(params, x, y):
    return training.cross_entropy(_logits(params, x), y)
