"""Retrieval among digits of classes that were not trained on: what claims on metric learning share; no claim itself."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from experiments.claims import training
from steelyard import examples

SEEDS = 8
STEPS, CLASSES, PER_CLASS = 400, 6, 8
WIDTHS = (64, 64, 16)
TRAINED = 7  # classes 0 to 6


class Digits(NamedTuple):
    """Images and labels of the trained classes, to train and to choose by, and of the others."""

    x: Float[Array, "n 64"]
    y: Int[Array, "n"]
    x_valid: Float[Array, "v 64"]
    y_valid: Int[Array, "v"]
    x_unseen: Float[Array, "m 64"]
    y_unseen: Int[Array, "m"]


def load() -> Digits:
    """The trained classes as the data set is split; of the others, all images."""
    task = training.load("digits")
    parts = ((task.x, task.y), (task.x_test, task.y_test))
    seen = [array[y < TRAINED] for x, y in parts for array in (x, y)]
    unseen = [jnp.concatenate([pair[i][pair[1] >= TRAINED] for pair in parts]) for i in (0, 1)]
    return Digits(*seen, *unseen)


def run(
    digits: Digits, loss: Callable[[Array, Array, Array], Array], normalize: Callable[[Array], Array], config, key
) -> tuple[Callable[[Array], Array], dict[str, Array]]:
    """Trains embeddings by Adam on batches of 6 classes with 8 examples each.

    Args:
      digits: from `load`.
      loss: `(key, embeddings, labels) -> losses [batch]`.
      normalize: of what the perceptron gives.
      config: with a `rate`.
      key: of initialisation, batches and what the loss draws.

    Returns:
      `images -> embeddings`, and the share of images whose nearest neighbour is of their class, `valid` among held-out
      images of the trained classes and `recall` among those of the others.
    """

    def embed(params, x):
        return normalize(training.mlp(params, x))

    def mean_loss(params, batch_key):
        rows_key, loss_key = jax.random.split(batch_key)
        rows = examples.pk_batch(rows_key, digits.y, classes=CLASSES, per_class=PER_CLASS)
        return jnp.mean(loss(loss_key, embed(params, digits.x[rows]), digits.y[rows]))

    keys = jax.random.split(jax.random.fold_in(key, 1), STEPS)
    params = training.fit(mean_loss, training.mlp_init(key, WIDTHS), optax.adam(config["rate"]), keys)[0]
    found = {
        "valid": recall(embed(params, digits.x_valid), digits.y_valid),
        "recall": recall(embed(params, digits.x_unseen), digits.y_unseen),
    }
    return lambda x: embed(params, x), found


def recall(embeddings: Float[Array, "n d"], labels: Int[Array, "n"]) -> Float[Array, ""]:
    """How many have the same label as their nearest neighbour."""
    lengths = jnp.sum(embeddings**2, axis=-1)
    distances = lengths[:, None] + lengths - 2 * embeddings @ embeddings.T
    nearest = jnp.argmin(jnp.where(jnp.eye(len(labels), dtype=bool), jnp.inf, distances), axis=1)
    return jnp.mean(labels[nearest] == labels)
