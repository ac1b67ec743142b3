"""Digits with classes of very different sizes, and a perceptron that learns them: what most claims on losses train."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from experiments.claims import training
from steelyard import data, losses

PyTree = Any

CLASSES, TEST = 10, 40
HEAD, TAIL = slice(0, 3), slice(7, 10)
WIDTHS = (64, 64, 10)


def counts(rho: float = 30.0, largest: int = 120) -> Int[np.ndarray, "classes"]:
    """Training images of each class: `round(largest rho^(-c / 9))`, so that class 0 has rho times those of class 9."""
    return np.round(largest * rho ** (-np.arange(CLASSES) / (CLASSES - 1))).astype(int)


def load(key: Key[Array, ""], *, rho: float = 30.0) -> training.Task:
    """Long-tailed training images and 40 test images of each class, drawn anew for each key; pixels in [0, 1]."""
    return split(key, *_digits(), np.stack([np.full(CLASSES, TEST), counts(rho)]))


def small(key: Key[Array, ""], num_train: int = 300) -> training.Task:
    """`num_train` training images, equally many of each class, and all others for the test."""
    x, y = _digits()
    sizes = np.bincount(y)
    chosen = np.full(CLASSES, num_train // CLASSES)
    return split(key, x, y, np.stack([sizes - chosen, chosen]))


def split(
    key: Key[Array, ""],
    x: Float[np.ndarray, "n d"],
    y: Int[np.ndarray, "n"],
    sizes: Int[np.ndarray, "2 classes"],
) -> training.Task:
    """Of the images of each class in random order, the first `sizes[0]` for the test, the next `sizes[1]` to train."""
    order = jnp.lexsort((jax.random.uniform(key, y.shape), y))
    starts = np.cumsum(np.bincount(y)) - np.bincount(y)
    test, train = (
        np.concatenate([first + np.arange(size) for first, size in zip(firsts, row, strict=True)])
        for firsts, row in ((starts, sizes[0]), (starts + sizes[0], sizes[1]))
    )
    x, y = jnp.asarray(x), np.sort(y)
    return training.Task(x[order[train]], jnp.asarray(y[train]), x[order[test]], jnp.asarray(y[test]))


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


def descend(
    loss: Callable[[PyTree, Int[Array, "batch"]], Float[Array, ""]],
    params: PyTree,
    decay: float | Array,
    task: training.Task,
    key: Key[Array, ""],
    steps: int,
    *last: optax.GradientTransformation,
    learning_rate: float = 0.1,
    batch: int = 64,
) -> PyTree:
    """Trains by SGD with momentum 0.9, the decay added to the gradient; `loss(params, rows)` of rows of the task."""
    tx = optax.chain(optax.add_decayed_weights(decay), optax.sgd(learning_rate, momentum=0.9), *last)
    return training.fit(loss, params, tx, training.minibatches(key, len(task.x), batch, steps))[0]


def balance_weights(
    key: Key[Array, ""],
    task: training.Task,
    params: list[dict[str, Array]],
    *,
    counts: Int[np.ndarray, "classes"],
    decay: float | Array,
    radius: float | Array,
    steps: tuple[int, int] = (600, 200),
) -> list[dict[str, Array]]:
    """Weight balancing of a perceptron: all layers by cross-entropy, then the last one by class, within a radius."""
    cross_entropy, weights = optax.softmax_cross_entropy_with_integer_labels, losses.class_weights(counts)

    def plain(params, rows):
        return jnp.mean(cross_entropy(training.mlp(params, task.x[rows]), task.y[rows]))

    def weighted(classifier, rows):
        logits = training.mlp([*params[:-1], classifier], task.x[rows])
        return jnp.mean(weights[task.y[rows]] * cross_entropy(logits, task.y[rows]))

    def shorten(updates, params):
        kernel = losses.max_norm(params["kernel"] + updates["kernel"], radius=radius)
        return {**updates, "kernel": kernel - params["kernel"]}

    params, second = descend(plain, params, decay, task, key, steps[0]), jax.random.fold_in(key, 2)
    return [*params[:-1], descend(weighted, params[-1], decay, task, second, steps[1], optax.stateless(shorten))]


def ldam_drw(
    counts: Int[np.ndarray, "classes"], *, steps: int, max_margin: float | Array = 0.5
) -> Callable[..., Float[Array, "batch"]]:
    """LDAM for `fit`, re-weighted by class in the last fifth of the steps; outputs must be `cosines`."""
    weights = functools.partial(losses.deferred, start=steps * 4 // 5, before=1.0, after=losses.class_weights(counts))

    def loss(outputs, labels, step):
        return weights(step)[labels] * losses.ldam_loss(outputs, labels, counts=counts, max_margin=max_margin)

    return loss


def cosines(params: list[dict[str, Array]], x: Float[Array, "batch d"]) -> Float[Array, "batch classes"]:
    """Of the perceptron's hidden units and the columns of its last layer, whose bias is left out."""
    hidden = jax.nn.relu(training.mlp(params[:-1], x))
    return losses.normalize(hidden) @ losses.normalize(params[-1]["kernel"], axis=0)


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
