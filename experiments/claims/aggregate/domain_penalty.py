"""Domain penalisation: digits from angles that were not trained on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.ndimage

from experiments.claims import harness, training
from steelyard import aggregate

SEEDS = 10
STEPS = 400
PER_DOMAIN = 32
WIDTHS = (64, 64, 10)
ANGLES, SIZES = (0, 30, 60), (800, 300, 100)
UNSEEN = 90
STEPS_PER_EPOCH = sum(SIZES) // (len(SIZES) * PER_DOMAIN)
MARGIN = -1.0
WHY = (
    "the mean effects are a quarter of a point and less, but the accuracy on the unseen angle varies by 4 points from "
    "seed to seed, and 10 seeds do not settle a margin of 1 point"
)
SIX_RATES = (3e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)


def domain_penalty() -> tuple[harness.Outcome, ...]:
    """On digits turned further than in training, penalised domains lose nothing against ERM and GroupDRO.

    Direction: accuracy on the unseen domain not lower than that of ERM, and of GroupDRO, by more than 1 point; little
    or no effect is expected.
    Metric: accuracy on the test digits turned by 90 degrees, after the last step.
    Budget: 800 training digits as they are, 300 others turned by 30 degrees and 100 others by 60, drawn by the seed;
    perceptron with a hidden layer of 64, Adam, 400 steps of 96 examples: 32 of each domain, for ERM any of the 1200;
    epochs of 12 steps. Rates 3e-4 to 1.6e-2, and 1e-3, 4e-3, 1.6e-2 times weight steps 0.01, 0.1 for GroupDRO: 6
    configurations each, chosen by the mean accuracy on the test digits turned by 0, 30 and 60 degrees; 10 seeds.
    """
    task = training.load("digits")
    x, x_test = (_turned(images, ANGLES) for images in (task.x, task.x_test))
    unseen = _turned(task.x_test, (UNSEEN,))[0]

    def measure(params):
        seen = [training.accuracy(training.mlp(params, images), task.y_test) for images in x_test]
        return {
            "seen": jnp.mean(jnp.stack(seen)),
            "unseen": training.accuracy(training.mlp(params, unseen), task.y_test),
        }

    def tune(grid, make_rule, *, balanced=True):
        def run(config, key):
            batches = _batches(key, len(task.y), balanced)
            return measure(_train(x, task.y, make_rule(config), config["rate"], key, *batches))

        return harness.tune(run, grid, seeds=SEEDS, metric="seen", better="more")

    count = len(ANGLES)
    penalty = tune({"rate": SIX_RATES}, lambda config: aggregate.domain_penalty(count, steps_per_epoch=STEPS_PER_EPOCH))
    erm = tune({"rate": SIX_RATES}, lambda config: aggregate.mean(), balanced=False)
    dro = tune(
        {"rate": (1e-3, 4e-3, 1.6e-2), "step_size": (0.01, 0.1)},
        lambda config: aggregate.group_dro(count, step_size=config["step_size"]),
    )
    compare = functools.partial(
        harness.compare, metric="unseen", better="more", factor=100, unit="points of accuracy", margin=MARGIN, why=WHY
    )
    return (
        compare(penalty, erm, labels=("penalty", "ERM"), part="ERM"),
        compare(penalty, dro, labels=("penalty", "GroupDRO"), part="GroupDRO"),
    )


def _turned(x, angles):
    """Flat images turned by each angle, [angles, n, 64]; what comes in from outside is dark."""
    images = np.asarray(x).reshape(-1, 8, 8)
    turned = [scipy.ndimage.rotate(images, angle, axes=(2, 1), reshape=False, order=1) for angle in angles]
    return jnp.asarray(np.stack(turned)).reshape(len(angles), len(images), -1)


def _batches(key, num_images, balanced):
    """Domain and image of the examples of each step, [steps, rows, examples]: a row is a loss."""
    order = jax.random.permutation(jax.random.fold_in(key, 1), num_images)
    starts = np.cumsum((0, *SIZES))
    if balanced:
        parts = [
            start + training.minibatches(jax.random.fold_in(key, start), size, PER_DOMAIN, STEPS)
            for start, size in zip(starts, SIZES, strict=False)
        ]
        places = jnp.stack(parts, axis=1)
    else:
        places = training.minibatches(key, sum(SIZES), len(SIZES) * PER_DOMAIN, STEPS)[:, None]
    return jnp.searchsorted(starts[1:], places, side="right"), order[places]


def _train(x, y, rule, rate, key, domains, rows):
    def losses_fn(params, domains, rows):
        logits = training.mlp(params, x[domains, rows])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]), axis=-1)

    value_and_grad, tx = aggregate.value_and_grad(losses_fn, rule), optax.adam(rate)

    def step(carry, batch):
        params, weights, state = carry
        _, grads, weights = value_and_grad(params, weights, *batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), weights, state), None

    params = training.mlp_init(key, WIDTHS)
    start = (params, rule.init(params), tx.init(params))
    return jax.lax.scan(step, start, (domains, rows))[0][0]
