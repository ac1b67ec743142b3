"""The network that claims on sparsity prune: a perceptron as a tree with paths, trained under masks."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from experiments.claims import training
from steelyard import optim

PyTree = Any

KERNELS = r".*/kernel"


def init(key: Key[Array, ""], widths: Sequence[int]) -> dict[str, dict[str, Array]]:
    """Parameters of `forward`: `dense_0/{kernel,bias}` and so on, kernels of variance 2 / in and zero biases."""
    layers = training.mlp_init(key, widths)
    return {f"dense_{i}": layer for i, layer in enumerate(layers)}


def forward(params: dict[str, dict[str, Array]], x: Float[Array, "batch d"]) -> Float[Array, "batch out"]:
    """A perceptron with ReLU between its layers."""
    return training.mlp([params[f"dense_{i}"] for i in range(len(params))], x)


def load(name: str = "digits") -> training.Task:
    """An embedded data set; digits are in [0, 1] as they are, other features are brought to mean 0 and variance 1."""
    task = training.load(name)
    if name == "digits":
        return task
    mean, std = jnp.mean(task.x, 0), jnp.std(task.x, 0)
    return task._replace(x=(task.x - mean) / std, x_test=(task.x_test - mean) / std)


def fit(
    params: PyTree,
    key: Key[Array, ""],
    task: training.Task,
    *,
    steps: int,
    masks: PyTree | None = None,
    batch: int = 64,
    learning_rate: float | Float[Array, ""] = 1e-3,
    weight_decay: float | Float[Array, ""] = 0.0,
    apply: Callable[[PyTree, Array], Array] = forward,
    loss: Callable[[Array, Array], Float[Array, ""]] = training.cross_entropy,
    tx: optax.GradientTransformation | None = None,
) -> PyTree:
    """Trains with Adam under fixed masks; what they remove is zero from the start and stays so.

    Can be jitted and vmapped over parameters, keys, masks and rates.

    Args:
      params: where to start.
      key: of the order of the examples.
      task: what to learn.
      steps: updates.
      masks: a tree like the parameters, `None` for a dense leaf; `None` trains all.
      batch: examples a step.
      learning_rate: of Adam.
      weight_decay: decoupled, of everything.
      apply: `(params, x) -> outputs`.
      loss: `(outputs, labels) -> scalar`.
      tx: another optimizer instead.
    """
    masks = jax.tree.map(lambda _: None, params) if masks is None else masks
    tx = optim.sparse(optax.adamw(learning_rate, weight_decay=weight_decay) if tx is None else tx)
    tx = optax.GradientTransformationExtraArgs(tx.init, functools.partial(_update, tx, masks))
    order = training.minibatches(key, len(task.x), batch, steps)
    start = _masked(params, masks)
    return training.fit(lambda p, b: loss(apply(p, task.x[b]), task.y[b]), start, tx, order)[0]


def _update(tx, masks, updates, state, params=None, **extra):
    return tx.update(updates, state, params, masks=masks, **extra)


def _masked(params: PyTree, masks: PyTree) -> PyTree:
    return jax.tree.map(lambda m, p: p if m is None else jnp.where(m, p, 0), masks, params, is_leaf=lambda m: m is None)


def accuracy(
    params: PyTree, task: training.Task, apply: Callable[[PyTree, Array], Array] = forward
) -> Float[Array, ""]:
    """Share of right answers on the held-out part."""
    return training.accuracy(apply(params, task.x_test), task.y_test)
