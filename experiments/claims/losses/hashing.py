"""Digits found by codes of 16 bits: one loss on cosines to fixed codes, against cross-entropy."""

import functools

import jax
import jax.numpy as jnp
import optax

from experiments.claims import harness, training
from steelyard import losses

SEEDS = 5
STEPS, BATCH = 600, 128
BITS, CLASSES = 16, 10
GRID = {"rate": (1e-3, 3e-3, 1e-2)}


def hashing() -> tuple[harness.Outcome, ...]:
    """Signs trained by one cosine loss find digits better than thresholded units of a classifier, and lose less.

    Direction: mean average precision up; quantisation error down.
    Metric: of every second test digit as a query, in the training digits ranked by Hamming distance, ties in the order
    of the data; mean over the queries of 1 - cos(h, sign h), h the embedding of which signs are taken.
    Budget: perceptron 64-64-16 and batch normalisation without scale and shift, by the training data's statistics after
    training; the loss with its defaults and Hadamard codes, against cross-entropy of a linear layer 16-10 on top, whose
    16 inputs are thresholded at their medians over the training data; 600 Adam steps of 128; rates 1e-3, 3e-3, 1e-2 (3
    configurations each), chosen by the mean average precision of the other test digits; 5 seeds.
    """
    arms = [
        harness.tune(functools.partial(_run, loss, centre), GRID, seeds=SEEDS, metric="validation", better="more")
        for loss, centre in ((_hashed, _zero), (_classified, _median))
    ]
    parts = (
        ("precision", "more", "points of mean average precision"),
        ("quantisation", "less", "points of quantisation error"),
    )
    return tuple(
        harness.compare(
            *arms,
            metric,
            better=better,
            factor=100,
            unit=unit,
            labels=("one cosine loss", "thresholded units"),
            part=metric,
        )
        for metric, better, unit in parts
    )


def _zero(database):
    return jnp.zeros_like(database[0])


def _median(database):
    return jnp.median(database, axis=0)


def _hashed(params, embeddings, labels):
    del params
    return losses.orthohash_loss(embeddings, labels, losses.binary_target_codes(CLASSES, BITS))


def _classified(params, embeddings, labels):
    return optax.softmax_cross_entropy_with_integer_labels(training.mlp(params["head"], embeddings), labels)


def _run(loss, centre, config, key):
    task = training.load("digits")

    def mean_loss(params, rows):
        z = training.mlp(params["trunk"], task.x[rows])
        return jnp.mean(loss(params, jax.nn.standardize(z, axis=0, epsilon=1e-5), task.y[rows]))

    params = {
        "trunk": training.mlp_init(key, (64, 64, BITS)),
        "head": training.mlp_init(jax.random.fold_in(key, 1), (BITS, CLASSES), gain=1.0),
    }
    rows = training.minibatches(key, len(task.x), BATCH, STEPS)
    params, *_ = training.fit(mean_loss, params, optax.adam(config["rate"]), rows)
    return _measure(task, centre, *(training.mlp(params["trunk"], x) for x in (task.x, task.x_test)))


def _measure(task, centre, database, queries):
    mean, spread = jnp.mean(database, axis=0), jnp.sqrt(jnp.var(database, axis=0) + 1e-5)
    database, queries = ((z - mean) / spread for z in (database, queries))
    middle = centre(database)
    database, queries = database - middle, queries - middle
    precisions = _average_precisions(jnp.sign(queries), task.y_test, jnp.sign(database), task.y)
    cosines = optax.cosine_similarity(queries, jnp.sign(queries))
    return {
        "validation": jnp.mean(precisions[::2]),
        "precision": jnp.mean(precisions[1::2]),
        "quantisation": jnp.mean(1 - cosines[1::2]),
    }


def _average_precisions(queries, query_labels, database, labels):
    """Of each query: mean over the database's examples of its class of the precision up to their rank."""
    order = jnp.argsort(-(queries @ database.T), axis=1, stable=True)
    relevant = labels[order] == query_labels[:, None]
    precision = jnp.cumsum(relevant, axis=1) / (1 + jnp.arange(len(labels)))
    return jnp.sum(precision * relevant, axis=1) / jnp.sum(relevant, axis=1)
