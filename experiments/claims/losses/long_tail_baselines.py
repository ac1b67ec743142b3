"""Corrections for long-tailed classes that need nothing but the class counts, each against cross-entropy."""

import functools
from collections.abc import Callable

import optax
from jaxtyping import Array

from experiments.claims import harness, long_tail, training
from steelyard import losses

SEEDS = 5
STEPS = 600
COUNTS = long_tail.counts()
CROSS_ENTROPY = {"decay": (1e-4, 1e-3, 1e-2)}
WHY = {
    "LDAM-DRW": "the training images are fitted long before the weights change, and then there is little left to weigh",
    "focal": "it favours examples that are hard, not classes that are small, and here few of either are left to fit",
}

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def long_tail_baselines() -> tuple[harness.Outcome, ...]:
    """On long-tailed digits each of six corrections by class counts is better than cross-entropy, in the tail too.

    Direction: balanced accuracy up, and accuracy of the three smallest classes up; for each of logit adjustment in
    training, logit adjustment after training, class-balanced weights, vector scaling, LDAM with deferred re-weighting
    and a cosine head, and focal loss.
    Metric: accuracies after the last step on every second test image.
    Budget: digits with 120 to 4 training images a class, perceptron 64-64-10, AdamW of rate 3e-3 and decay 1e-3, 600
    steps of 64; 3 configurations each, chosen by the balanced accuracy on the other test images: decays 1e-4, 1e-3,
    1e-2 for cross-entropy; tau 0.5, 1, 1.5 for logit adjustment, either way; beta 0.99, 0.999, 0.9999 for the weights;
    gamma 0.1, 0.2, 0.3 for vector scaling; greatest margin 0.3, 0.5, 0.8 for LDAM, re-weighted from step 480; gamma
    0.5, 1, 2 for focal loss; 5 seeds, which draw data, initialisation and batches.
    """
    baseline = tune(lambda config, key: run(cross_entropy, key, decay=config["decay"]), CROSS_ENTROPY)
    return tuple(
        harness.compare(
            arm,
            baseline,
            metric,
            better="more",
            factor=100,
            unit="points of accuracy",
            labels=(label, "cross-entropy"),
            part=f"{label}, {metric}",
            why=WHY.get(label, ""),
        )
        for label, arm in _arms().items()
        for metric in ("balanced", "tail")
    )


tune = functools.partial(harness.tune, seeds=SEEDS, metric="validation", better="more")


def run(
    loss: Callable[..., Array],
    key: Array,
    *,
    decay: float | Array = 1e-3,
    predict: Callable[[Array], Array] = lambda logits: logits,
    apply: Callable[..., Array] = training.mlp,
) -> dict[str, Array]:
    """Trains on long-tailed digits; balanced accuracy on one half of the test images, all accuracies on the other."""
    task = long_tail.load(key)
    params = long_tail.fit(loss, key, task, steps=STEPS, weight_decay=decay, apply=apply)
    logits = predict(apply(params, task.x_test))
    validation = long_tail.measure(logits[::2], task.y_test[::2])["balanced"]
    return {"validation": validation, **long_tail.measure(logits[1::2], task.y_test[1::2])}


def _arms() -> dict[str, harness.Arm]:
    taus = {"tau": (0.5, 1.0, 1.5)}

    def adjusted(config, key):
        return run(functools.partial(losses.logit_adjusted_cross_entropy, counts=COUNTS, tau=config["tau"]), key)

    def post_hoc(config, key):
        predict = functools.partial(losses.posthoc_logit_adjustment, counts=COUNTS, tau=config["tau"])
        return run(cross_entropy, key, predict=predict)

    def weighted(config, key):
        weights = losses.class_weights(COUNTS, beta=config["beta"])
        return run(lambda logits, labels: weights[labels] * cross_entropy(logits, labels), key)

    def scaled(config, key):
        return run(functools.partial(losses.vector_scaling_loss, counts=COUNTS, gamma=config["gamma"]), key)

    def margins(config, key):
        loss = long_tail.ldam_drw(COUNTS, steps=STEPS, max_margin=config["max_margin"])
        return run(loss, key, apply=long_tail.cosines)

    def focal(config, key):
        return run(functools.partial(losses.softmax_focal_loss, gamma=config["gamma"]), key)

    return {
        "adjusted in training": tune(adjusted, taus),
        "adjusted after training": tune(post_hoc, taus),
        "class-balanced weights": tune(weighted, {"beta": (0.99, 0.999, 0.9999)}),
        "vector scaling": tune(scaled, {"gamma": (0.1, 0.2, 0.3)}),
        "LDAM-DRW": tune(margins, {"max_margin": (0.3, 0.5, 0.8)}),
        "focal": tune(focal, {"gamma": (0.5, 1.0, 2.0)}),
    }
