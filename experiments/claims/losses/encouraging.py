"""The encouraging loss on long-tailed digits: margins of what is learned, and what they are worth."""

import functools

import jax.numpy as jnp

from experiments.claims import harness, long_tail, training
from steelyard import losses

SEEDS = 10


def encouraging() -> tuple[harness.Outcome, ...]:
    """After equally many steps the encouraging loss has larger margins than cross-entropy, and rare classes gain by it.

    Direction: mean margin of the training images up; balanced accuracy and accuracy in the tail up.
    Metric: margin: the label's logit less the greatest other one; accuracies on 40 images of each class, the tail being
    the three rarest.
    Budget: long-tailed digits with rho 30, perceptron 64-64-10, AdamW with rate 3e-3 and decay 1e-3, 600 steps of 64;
    `log_end` 0.75, one configuration a side; 10 seeds, which draw images, network and batches.
    """
    method, baseline = (
        harness.tune(functools.partial(_run, fn), {}, seeds=SEEDS, metric="balanced", better="more")
        for fn in (losses.encouraging_loss, losses.softmax_cross_entropy_with_integer_labels)
    )
    compare = functools.partial(
        harness.compare, method, baseline, better="more", labels=("encouraging", "cross-entropy")
    )
    points = {"factor": 100, "unit": "points of accuracy"}
    return (
        compare("margin", unit="of the logits", part="margin"),
        compare("balanced", part="balanced accuracy", **points),
        compare("tail", part="accuracy in the tail", **points),
    )


def _run(fn, config, key):
    del config
    task = long_tail.load(key)
    params = long_tail.fit(fn, key, task)
    measured = long_tail.measure(training.mlp(params, task.x_test), task.y_test)
    logits = training.mlp(params, task.x)
    is_label = task.y[:, None] == jnp.arange(long_tail.CLASSES)
    own, other = (jnp.max(jnp.where(mask, logits, -jnp.inf), -1) for mask in (is_label, ~is_label))
    return {"margin": jnp.mean(own - other), "balanced": measured["balanced"], "tail": measured["tail"]}
