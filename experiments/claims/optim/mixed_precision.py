"""Training in float16: what the loss scale and the master weights are for."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.claims import harness, training
from steelyard import optim, reparam, train

SEEDS = 3
STEPS = 300
RATES = (0.03, 0.1, 0.3)
SMALL_STEPS = 1000
SMALL_RATES = (1e-4, 3e-4, 1e-3)
SHRINK = 2.0**-14
WIDTHS = (64, 64, 64, 10)
_BATCH = 128


def mixed_precision() -> tuple[harness.Outcome, ...]:
    """With a loss scale and master weights float16 trains like float32; without either it stalls.

    Direction: (a) test accuracy at most 1 point below float32; (b) training loss with a loss scale below that without;
    (c) training loss with float32 master weights below that with weights in float16.
    Metric: after the last step; the training loss on the whole set, before it is shrunk.
    Budget: digits, perceptron with two hidden layers of 64, batches of 128, gradient descent. The loss is multiplied by
    2^-14, so that gradients underflow in float16, and the rate by 2^14. (a), (b) 300 steps; rates 0.03, 0.1, 0.3.
    (c) Steps that are small against the weights: 1000 steps; rates 1e-4, 3e-4, 1e-3, with a loss scale. The same rates
    for all sides; 3 seeds.
    """
    grids = {"large": ({"rate": RATES}, STEPS), "small": ({"rate": SMALL_RATES}, SMALL_STEPS)}

    def tune(steps, **options):
        grid, count = grids[steps]
        return harness.tune(
            functools.partial(_run, steps=count, **options), grid, seeds=SEEDS, metric="loss", better="less"
        )

    plain = tune("large", stored=jnp.float32, seen=jnp.float32, is_scaled=False)
    unscaled = tune("large", stored=jnp.float32, seen=jnp.float16, is_scaled=False)
    scaled = tune("large", stored=jnp.float32, seen=jnp.float16, is_scaled=True)
    master = tune("small", stored=jnp.float32, seen=jnp.float16, is_scaled=True)
    alone = tune("small", stored=jnp.float16, seen=jnp.float16, is_scaled=True)
    more_loss = dict(better="less", scale="percent", unit="% more loss without")
    return (
        harness.compare(
            scaled, plain, "accuracy", better="more", factor=100, margin=-1.0, unit="points of accuracy",
            labels=("float16, scaled", "float32"), part="against float32",
        ),
        harness.compare(scaled, unscaled, "loss", labels=("scaled", "unscaled"), part="loss scale", **more_loss),
        harness.compare(master, alone, "loss", labels=("float32", "float16"), part="master weights", **more_loss),
    )  # fmt: skip


def _run(config, key, *, steps: int, stored: Any, seen: Any, is_scaled: bool):
    task = training.load("digits")

    def forward(params, batch, *, rng, train):
        del rng, train
        return training.mlp(params, task.x[batch].astype(seen)).astype(jnp.float32)

    def losses(logits, batch):
        return {"class": SHRINK * optax.softmax_cross_entropy_with_integer_labels(logits, task.y[batch])}

    tx = optax.sgd(config["rate"] / SHRINK)
    tx = optim.dynamic_loss_scale(tx) if is_scaled else tx
    link = reparam.cast(seen)
    step = train.make_step(
        forward, losses, tx, reparam=link, loss_scale=optim.current_loss_scale if is_scaled else None
    )
    params = jax.tree.map(lambda x: x.astype(stored), training.mlp_init(key, WIDTHS))
    state = train.init_state(params, tx, rng=key, reparam=link)
    state, _ = jax.lax.scan(step, state, training.minibatches(key, len(task.x), _BATCH, steps))

    params = jax.tree.map(lambda x: x.astype(jnp.float32), train.seen_params(link.apply, state))
    return {
        "loss": training.cross_entropy(training.mlp(params, task.x), task.y),
        "accuracy": training.accuracy(training.mlp(params, task.x_test), task.y_test),
    }
