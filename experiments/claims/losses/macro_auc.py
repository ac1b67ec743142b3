"""Surrogates of macro-AUC: thirty labels, from even to one in a hundred, and a linear model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

from experiments.claims import harness, training
from steelyard import losses

SEEDS = 10
TRAIN, VALIDATION, TEST = 500, 2000, 5000
FEATURES, LABELS, NOISE = 20, 30, 0.5
STEPS, BATCH = 200, 100
GRID = {"rate": (0.01, 0.03, 0.1)}
WHY = (
    "the labels are noisy halfspaces, which univariate logistic regression with a bias ranks about as well as can be, "
    "and the other two rest on the one positive that a batch has of the rarest labels"
)
RATES = np.geomspace(0.5, 0.01, LABELS)


def macro_auc() -> tuple[harness.Outcome, ...]:
    """With labels of very different sizes, pairs and reweighting give a higher macro-AUC than a mean over examples.

    Direction: macro-AUC of the pairwise and of the reweighted surrogate above that of the univariate one; and each gain
    larger on the ten rarest labels than on the ten most frequent.
    Metric: AUC on 5000 test examples, mean over the 30 labels; and its mean over the ten rarest less that over the ten
    most frequent.
    Budget: 20 normal features, label k positive where a random direction plus half as much noise exceeds the threshold
    that makes it positive at a rate from 0.5 to 0.01, in equal ratios; 500 training examples; a linear model with bias,
    200 Adam steps of 100 examples from zero, logistic surrogates; rates 0.01, 0.03, 0.1 (3 configurations each), chosen
    by the macro-AUC of 2000 validation examples; 10 seeds, which draw everything.
    """
    sides = (
        losses.macro_auc_pairwise,
        functools.partial(losses.macro_auc_univariate, reweight=True),
        losses.macro_auc_univariate,
    )
    pairwise, reweighted, plain = (
        harness.tune(functools.partial(_run, fn), GRID, seeds=SEEDS, metric="validation", better="more") for fn in sides
    )
    outcomes = []
    for name, arm in {"pairwise": pairwise, "reweighted": reweighted}.items():
        compare = functools.partial(
            harness.compare,
            arm,
            plain,
            better="more",
            factor=100,
            unit="points of AUC",
            labels=(name, "univariate"),
            why=WHY,
        )
        outcomes += [
            compare("test", part=f"{name}, all labels"),
            compare("tail", part=f"{name}, more so on the rarest"),
        ]
    return tuple(outcomes)


def _run(loss, config, key):
    splits = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
    directions = jax.random.normal(jax.random.fold_in(key, 1), (FEATURES, LABELS))
    directions /= jnp.linalg.norm(directions, axis=0)
    thresholds = np.sqrt(1 + NOISE**2) * scipy.stats.norm.isf(RATES)
    data = {}
    for i, (name, size) in enumerate(splits.items()):
        keys = jax.random.split(jax.random.fold_in(key, 2 + i))
        x = jax.random.normal(keys[0], (size, FEATURES))
        noise = NOISE * jax.random.normal(keys[1], (size, LABELS))
        data[name] = x, jnp.float32(x @ directions + noise > thresholds)
    x, y = data["train"]
    params, *_ = training.fit(
        lambda params, rows: jnp.mean(loss(training.mlp(params, x[rows]), y[rows])),
        [{"kernel": jnp.zeros((FEATURES, LABELS)), "bias": jnp.zeros(LABELS)}],
        optax.adam(config["rate"]),
        training.minibatches(key, TRAIN, BATCH, STEPS),
    )
    validation, test = (_auc(training.mlp(params, data[name][0]), data[name][1]) for name in ("validation", "test"))
    return {
        "validation": jnp.mean(validation),
        "test": jnp.mean(test),
        "tail": jnp.mean(test[-10:]) - jnp.mean(test[:10]),
    }


def _auc(scores, targets):
    """Label by label, from the positives' ranks."""
    ranks = 1 + jnp.argsort(jnp.argsort(scores, axis=0), axis=0)
    positives = jnp.sum(targets, axis=0)
    pairs = positives * (len(targets) - positives)
    wins = jnp.sum(ranks * targets, axis=0) - positives * (positives + 1) / 2
    return wins / jnp.maximum(pairs, 1)
