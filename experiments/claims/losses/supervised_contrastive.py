"""Supervised contrastive learning of free embeddings: classes become orthogonal with ReLU, whatever their sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims import harness, training
from steelyard import examples, losses

LABELS = np.repeat(np.arange(3), (20, 6, 2))
FEATURES = 8
STEPS = 6000
# Classes 1 and 2 never meet; half of class 0 is in either batch.
BATCHES = np.stack([np.r_[0:10, np.tile(np.r_[20:26], 2)], np.r_[10:20, np.tile(np.r_[26:28], 6)]])


def supervised_contrastive() -> tuple[harness.Outcome, ...]:
    """With ReLU, embeddings of unequal classes become orthogonal and attain the bound; without, angles are unequal.

    And where two classes never meet in a batch, binding examples make them orthogonal as well.

    Direction: the largest cosine between class means below 0.01 with ReLU; its mean loss above the bound by less than
    1e-4; the spread of the cosines without ReLU larger than with it; the largest cosine with bound batches below 0.01
    too, and lower than without binding.
    Metric: cosines between the three class means of unit embeddings; spread is the largest minus the least.
    Budget: 28 free vectors in R^8, classes of 20, 6 and 2, started at |N(0, 1)|, temperature 1; 6000 Adam steps on all
    rows, rate 0.01 with cosine decay; nothing is tuned, one seed. Batches, in turn: half of class 0 with class 1, and
    the other half with class 2 (its rows repeated to make the batches equally long).
    """
    everything = jnp.arange(len(LABELS))[None]
    bound_batches = examples.bind_batches(jnp.asarray(BATCHES), examples.binding_examples(LABELS, 3))
    relu, plain, apart, bound = (
        _train(*arm)
        for arm in (
            (losses.relu_normalize, everything),
            (losses.normalize, everything),
            (losses.relu_normalize, jnp.asarray(BATCHES)),
            (losses.relu_normalize, bound_batches),
        )
    )
    values = losses.supervised_contrastive(relu, LABELS, temperature=1.0)
    gap = float(jnp.mean(values - losses.supervised_contrastive_bound(LABELS, temperature=1.0)))
    relu, plain, apart, bound = map(_cosines, (relu, plain, apart, bound))
    cosine = functools.partial(harness.exact, better="less", unit="of cosine")
    return (
        cosine(relu.max(), 0.01, labels=("largest cosine", "limit"), part="orthogonal with ReLU"),
        harness.exact(
            gap, 1e-4, better="less", unit="nats", labels=("above the bound", "limit"), part="bound attained"
        ),
        cosine(np.ptp(relu), np.ptp(plain), labels=("spread with ReLU", "without"), part="equal angles"),
        cosine(bound.max(), 0.01, labels=("largest cosine", "limit"), part="orthogonal in bound batches"),
        cosine(bound.max(), apart.max(), labels=("bound batches", "batches apart"), part="binding"),
    )


def _train(head, batches):
    """The embeddings after training on the batches in turn."""

    def loss(vectors, rows):
        embeddings = head(vectors[rows])
        return jnp.mean(losses.supervised_contrastive(embeddings, jnp.asarray(LABELS)[rows], temperature=1.0))

    start = jnp.abs(jax.random.normal(jax.random.key(0), (len(LABELS), FEATURES)))
    tx = optax.adam(optax.cosine_decay_schedule(0.01, STEPS))
    rows = jnp.tile(batches, (STEPS // len(batches), 1))
    return head(jax.jit(lambda vectors, rows: training.fit(loss, vectors, tx, rows)[0])(start, rows))


def _cosines(embeddings):
    """Between the means of classes 0 and 1, 0 and 2, 1 and 2."""
    means = losses.normalize(losses.class_means(embeddings, jnp.asarray(LABELS), 3))
    return np.asarray(means @ means.T, np.float64)[np.triu_indices(3, 1)]
