"""Three experts on shared features of long-tailed digits: pushed apart, left alone, and one network instead."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims import harness, long_tail, training
from steelyard import losses

SEEDS = 5
STEPS = 600
COUNTS = long_tail.counts()
EXPERTS, HIDDEN = 3, 32
POSITIVE_WEIGHT, LARGEST, ROUTER_STEPS = 100.0, 5, 300
WHY = (
    "one expert alone is nearly as good as the mean of three, as what the router loses shows: on shared features that "
    "fit all training images there is little for diversity to gain"
)
DECAYS = {"decay": (1e-4, 1e-3, 1e-2)}


def ride() -> tuple[harness.Outcome, ...]:
    """On long-tailed digits three experts that are pushed apart know the tail better than one, and than three alike.

    And a router that asks more experts only where it helps loses little.

    Direction: accuracy of the three smallest classes up, for the mean of the experts against one network trained by
    cross-entropy, and against three experts without diversity; balanced accuracy of the routed mean not more than 1
    point below that of the mean, with fewer than three experts on average.
    Metric: accuracies after the last step on every second test image.
    Budget: digits with 120 to 4 training images a class; a shared layer 64-64, experts 64-32-10 on it, and one of them
    for cross-entropy; AdamW of rate 3e-3, 600 steps of 64; temperatures by class from step 480, no margins and no
    weights of classes on any side; 3 configurations each: diversity 0.1, 0.2, 0.4 with decay 1e-3, else decays 1e-4,
    1e-3, 1e-2, chosen by the balanced accuracy on the other test images, on which the router is trained too (300 Adam
    steps at 1e-2; on training images, which are fitted, it would have nothing to learn); 5 seeds, which draw data,
    initialisation and batches.
    """
    tune = functools.partial(harness.tune, seeds=SEEDS, metric="validation", better="more")
    apart = tune(lambda config, key: _run(key, EXPERTS, _apart(config["diversity"])), {"diversity": (0.1, 0.2, 0.4)})
    alike, one = (
        tune(lambda config, key, count=count: _run(key, count, _alike, config["decay"]), DECAYS)
        for count in (EXPERTS, 1)
    )
    tail = functools.partial(
        harness.compare, metric="tail", better="more", factor=100, unit="points of accuracy", why=WHY
    )
    routed = apart._replace(metrics={"balanced": apart.metrics["routed"], "used": apart.metrics["used"]})
    every = apart._replace(metrics={**apart.metrics, "used": np.full(SEEDS, float(EXPERTS))})
    return (
        tail(apart, one, labels=("experts apart", "one network"), part="tail, against one network"),
        tail(apart, alike, labels=("experts apart", "diversity 0"), part="tail, against diversity 0"),
        harness.compare(
            routed,
            every,
            "balanced",
            better="more",
            factor=100,
            margin=-1.0,
            unit="points of accuracy",
            labels=("routed", "all experts"),
            part="routed, not lower by 1 point",
            why="images on which the experts differ are so few that the router hardly ever asks a second one",
        ),
        harness.compare(
            routed, every, "used", better="less", unit="experts", labels=("routed", "all experts"), part="experts used"
        ),
    )


def _apart(diversity):
    temperatures = losses.diversity_temperatures(COUNTS)

    def loss(outputs, labels, step):
        temperature = losses.deferred(step, start=STEPS * 4 // 5, before=1.0, after=temperatures)
        return losses.ride_loss(outputs, labels, temperature=temperature, diversity=diversity)

    return loss


_alike = functools.partial(losses.ride_loss, diversity=0.0)


def _run(key, count, loss, decay=1e-3):
    task = long_tail.load(key)
    params = long_tail.fit(
        loss, key, task, steps=STEPS, weight_decay=decay, init=functools.partial(_init, count), apply=_apply
    )
    logits, features = _apply(params, task.x_test), _features(params, task.x_test)
    mean, routing = jnp.mean(logits, axis=0), _routing_logits(key, logits, features, task.y_test)
    measured, routed = (
        long_tail.measure(z[1::2], task.y_test[1::2]) for z in (mean, losses.routed_mean(logits, routing))
    )
    more = jnp.sum(jnp.cumprod(routing[:, 1::2] > 0, axis=0), axis=0)
    validation = long_tail.measure(mean[::2], task.y_test[::2])["balanced"]
    return {**measured, "validation": validation, "routed": routed["balanced"], "used": 1 + jnp.mean(more)}


def _init(count, key):
    shared, own = jax.random.split(key)
    experts = jax.vmap(lambda k: training.mlp_init(k, (64, HIDDEN, long_tail.CLASSES)))(jax.random.split(own, count))
    return {"shared": training.mlp_init(shared, (64, 64)), "experts": experts}


def _features(params, x):
    return jax.nn.relu(training.mlp(params["shared"], x))


def _apply(params, x):
    return jax.vmap(training.mlp, (0, None))(params["experts"], _features(params, x))


def _routing_logits(key, logits, features, labels):
    """For each expert but the last, from the largest logits of the mean so far and the features."""
    steps = len(logits) - 1
    so_far = jnp.cumsum(logits, axis=0)[:-1] / jnp.arange(1, steps + 1)[:, None, None]
    largest, _ = jax.lax.top_k(so_far, LARGEST)
    features = jnp.broadcast_to(losses.normalize(features), (steps, *features.shape))
    x = jnp.concatenate([largest, features], axis=-1)
    targets = losses.routing_targets(logits, labels)[:, ::2]

    def apply(params, x):
        return jax.vmap(training.mlp)(params, x)[..., 0]

    def loss(params, batch):
        del batch
        each = losses.sigmoid_binary_cross_entropy(apply(params, x[:, ::2]), targets)
        return jnp.mean(jnp.where(targets, POSITIVE_WEIGHT, 1.0) * each)

    keys = jax.random.split(jax.random.fold_in(key, 1), steps)
    params = jax.vmap(lambda k: training.mlp_init(k, (x.shape[-1], 16, 1)))(keys)
    if steps:
        params, _, _ = training.fit(loss, params, optax.adam(1e-2), jnp.arange(ROUTER_STEPS))
    return apply(params, x)
