"""Long-tailed digits with logits multiplied by class: a last layer that can undo it, and one that cannot."""

import functools

from experiments.claims import harness, long_tail, training
from experiments.claims.losses import long_tail_baselines as bed
from steelyard import losses

GRID = {"decay": (1e-4, 1e-3, 1e-2)}
SCALE = 16.0
WHY = (
    "training and prediction use the same factors, and a network that fits all of its training images can undo them; "
    "an offset that is left out in prediction it cannot"
)


def inverse_image_frequency() -> tuple[harness.Outcome, ...]:
    """On long-tailed digits inverse image frequency is better than cross-entropy, and than logit adjustment.

    Direction: balanced accuracy up, and accuracy of the three smallest classes up; against cross-entropy with a free
    last layer and with a cosine head of scale 16, and against logit adjustment with a free last layer.
    Metric: accuracies after the last step on every second test image; predictions are made from multiplied logits.
    Budget: the raw weights; digits with 120 to 4 training images a class, perceptron 64-64-10, AdamW of rate 3e-3, 600
    steps of 64; 3 configurations each, decays 1e-4, 1e-3, 1e-2, chosen by the balanced accuracy on the other test
    images; tau 1 for logit adjustment; 5 seeds, which draw data, initialisation and batches.
    """
    weighted = functools.partial(losses.iif_loss, counts=bed.COUNTS)
    predict = functools.partial(losses.adjust_logits, scale=losses.inverse_image_frequency(bed.COUNTS))
    adjusted = functools.partial(losses.logit_adjusted_cross_entropy, counts=bed.COUNTS)
    plain_free, plain_cosine = (_tune(bed.cross_entropy, apply=apply) for apply in (training.mlp, _scaled_cosines))
    iif_free, iif_cosine = (_tune(weighted, apply=apply, predict=predict) for apply in (training.mlp, _scaled_cosines))
    pairs = {
        "free head": (iif_free, plain_free, "cross-entropy"),
        "cosine head": (iif_cosine, plain_cosine, "cross-entropy"),
        "against logit adjustment": (iif_free, _tune(adjusted), "logit adjustment"),
    }
    return tuple(
        harness.compare(
            method,
            baseline,
            metric,
            better="more",
            factor=100,
            unit="points of accuracy",
            labels=("inverse image frequency", label),
            part=f"{part}, {metric}",
            why=WHY,
        )
        for part, (method, baseline, label) in pairs.items()
        for metric in ("balanced", "tail")
    )


def _tune(loss, **options):
    return bed.tune(lambda config, key: bed.run(loss, key, decay=config["decay"], **options), GRID)


def _scaled_cosines(params, x):
    return SCALE * long_tail.cosines(params, x)
