"""Digits with classes of very different sizes, and a perceptron that learns them: what most claims on losses train."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from experiments.claims import training
from steelyard import data

PyTree = Any

CLASSES, TEST = 10, 40
HEAD, TAIL = slice(0, 3), slice(7, 10)
WIDTHS = (64, 64, 10)


def counts(rho: float = 30.0, largest: int = 120) -> Int[np.ndarray, "classes"]:
    """Training images of each class: `round(largest rho^(-c / 9))`, so that class 0 has rho times those of class 9."""
    return np.round(largest * rho ** (-np.arange(CLASSES) / (CLASSES - 1))).astype(int)


def load(key: Key[Array, ""], *, rho: float = 30.0) -> training.Task:
    """Long-tailed training images and 40 test images of each class, drawn anew for each key; pixels in [0, 1]."""
    return _split(key, np.concatenate([np.full(CLASSES, TEST), counts(rho)]).reshape(2, CLASSES))


def small(key: Key[Array, ""], num_train: int = 300) -> training.Task:
    """`num_train` training images, equally many of each class, and all others for the test."""
    _, y = _digits()
    sizes = np.bincount(y)
    chosen = np.full(CLASSES, num_train // CLASSES)
    return _split(key, np.stack([sizes - chosen, chosen]))


def fit(
    loss: Callable[..., Float[Array, "batch"]],
    key: Key[Array, ""],
    task: training.Task,
    *,
    steps: int = 600,
    batch: int = 64,
    learning_rate: float = 3e-3,
    weight_decay: float = 1e-3,
    init: Callable[[Key[Array, ""]], PyTree] | None = None,
    apply: Callable[[PyTree, Array], Array] = training.mlp,
) -> PyTree:
    """Trains by AdamW on the mean of a loss; a whole run can be jitted and vmapped over keys.

    Args:
      loss: `(outputs, labels) -> losses [batch]`. If it has arguments named `params` and `step`, it gets these too.
      key: of initialisation and batches.
      task: what is learned; batches are drawn from its training part.
      steps, batch, learning_rate, weight_decay: the last two may be traced.
      init: `key -> params`; a perceptron 64-64-10.
      apply: `(params, x) -> outputs`.
    """
    wanted = inspect.signature(loss).parameters.keys() & {"params", "step"}

    def mean_loss(params, step_and_rows):
        step, rows = step_and_rows
        more = {"params": params, "step": step}
        return jnp.mean(loss(apply(params, task.x[rows]), task.y[rows], **{name: more[name] for name in wanted}))

    params = training.mlp_init(key, WIDTHS) if init is None else init(key)
    rows = training.minibatches(key, len(task.x), batch, steps)
    tx = optax.adamw(learning_rate, weight_decay=weight_decay)
    return training.fit(mean_loss, params, tx, (jnp.arange(steps), rows))[0]


def measure(logits: Float[Array, "batch classes"], labels: Int[Array, "batch"]) -> dict[str, Array]:
    """Accuracies in [0, 1]: `classes` one by one, `balanced` their mean, `head` of classes 0-2, `tail` of 7-9."""
    of_class = jax.nn.one_hot(labels, CLASSES)
    right = jnp.argmax(logits, -1) == labels
    classes = (right @ of_class) / jnp.maximum(jnp.sum(of_class, 0), 1)
    return {
        "balanced": jnp.mean(classes),
        "tail": jnp.mean(classes[TAIL]),
        "head": jnp.mean(classes[HEAD]),
        "classes": classes,
    }


def _digits() -> tuple[Float[np.ndarray, "n 64"], Int[np.ndarray, "n"]]:
    parts = [data.load("digits", split=split).columns for split in ("train", "test")]
    x, y = (np.concatenate([part[name] for part in parts]) for name in ("image", "label"))
    x = x.reshape(len(x), -1)
    order = np.argsort(y, kind="stable")
    return x[order], y[order]


def _split(key: Key[Array, ""], sizes: Int[np.ndarray, "2 classes"]) -> training.Task:
    """Of the images of each class in random order, the first `sizes[0]` for the test, the next `sizes[1]` to train."""
    x, y = _digits()
    order = jnp.lexsort((jax.random.uniform(key, y.shape), y))
    starts = np.cumsum(np.bincount(y)) - np.bincount(y)
    test, train = (
        np.concatenate([first + np.arange(size) for first, size in zip(firsts, row, strict=True)])
        for firsts, row in ((starts, sizes[0]), (starts + sizes[0], sizes[1]))
    )
    x = jnp.asarray(x)
    return training.Task(x[order[train]], jnp.asarray(y[train]), x[order[test]], jnp.asarray(y[test]))
