"""Per-class gradient normalisation: what the first steps do to a class that is sixty times smaller."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims import harness, training
from steelyard import aggregate

SEEDS = 5
STEPS = 600
EARLY = 50
RATIO = 60
RECALL = 0.9
WIDTHS = (64, 32, 2)
GD_RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
NORMALIZED_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def class_normalized() -> tuple[harness.Outcome, ...]:
    """With one class 60 times the other, plain descent first raises the loss of the small one; unit gradients do not.

    Direction: rise of the small class's loss in the first 50 steps down; steps until the small class is recalled down.
    Metric: largest loss of the small class within 50 steps over its loss at the start, minus 1, in percent; first step
    at which at least 90% of the test digits of either class are recognised (600 if never).
    Budget: digit 0, of which 1/60 of the others' number is kept, drawn by the seed, against the other digits;
    perceptron with a hidden layer of 32; full batch, 600 steps of constant length; rates 0.03 to 10 for gradient
    descent on the mean loss, 0.003 to 1 for unit gradients: 6 configurations each, chosen by the steps; 5 seeds.

    The part "least rise" was added after the first run: at the rate with the fewest steps, gradient descent overshoots
    by orders of magnitude, which is not what imbalance does. There each side has the rate at which it rises least.
    """
    task = training.load("digits")
    task = task._replace(y=(task.y == 0).astype(jnp.int32), y_test=(task.y_test == 0).astype(jnp.int32))
    rules = {
        "unit gradients": (aggregate.class_normalized(), 1.0, NORMALIZED_RATES),
        "gradient descent": (aggregate.static(jnp.ones(2)), None, GD_RATES),
    }

    def tune(metric, steps):
        return [
            harness.tune(
                functools.partial(_run, task, rule, scale, steps),
                {"rate": rates},
                seeds=SEEDS,
                metric=metric,
                better="less",
            )
            for rule, scale, rates in rules.values()
        ]

    compare = functools.partial(harness.compare, better="less", labels=tuple(rules))
    rise = dict(metric="rise", factor=100, unit="% of the first loss")
    fastest, calmest = tune("steps", STEPS), tune("rise", EARLY)
    return (
        compare(*fastest, **rise, part="initial rise"),
        compare(*fastest, metric="steps", scale="percent", unit="% more steps of GD", part="steps"),
        compare(*calmest, **rise, part="least rise"),
    )


def _run(task: training.Task, rule, scale, num_steps, config, key):
    """`scale` of the summed losses; `None` makes the two of them add up to the mean over examples."""
    large, small = (np.flatnonzero(np.asarray(task.y) == c) for c in (0, 1))
    kept = jax.random.permutation(jax.random.fold_in(key, 1), small)[: round(len(large) / RATIO)]
    rows = jnp.concatenate([jnp.asarray(large), kept])
    x, y = task.x[rows], task.y[rows]
    scale = 1 / len(rows) if scale is None else scale

    def losses_fn(params):
        losses = optax.softmax_cross_entropy_with_integer_labels(training.mlp(params, x), y)
        return scale * aggregate.per_class_losses(losses, y, 2)

    value_and_grad, tx = aggregate.value_and_grad(losses_fn, rule), optax.sgd(config["rate"])

    def step(params, _):
        losses, grads, _ = value_and_grad(params, rule.init(params))
        updates, _ = tx.update(grads, tx.init(params))
        is_right = jnp.argmax(training.mlp(params, task.x_test), -1) == task.y_test
        recall = jnp.stack([jnp.mean(is_right, where=task.y_test == c) for c in (0, 1)])
        return optax.apply_updates(params, updates), (losses[1], jnp.min(recall))

    _, (losses, recall) = jax.lax.scan(step, training.mlp_init(key, WIDTHS), length=num_steps + 1)
    reached = recall >= RECALL
    steps = jnp.where(jnp.any(reached), jnp.argmax(reached), num_steps)
    return {"rise": jnp.max(losses[: EARLY + 1]) / losses[0] - 1, "steps": jnp.maximum(steps, 1).astype(jnp.float32)}
