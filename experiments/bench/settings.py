"""What benchmarks of train steps train: a task, the parameters of a model, and a batch."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments import tasks
from steelyard import data, models

PyTree = Any


class Setting(NamedTuple):
    """A task, initial parameters, and a batch of it."""

    task: tasks.Task
    params: PyTree
    batch: PyTree


def vit() -> Setting:
    """The quickstart's model."""
    model = models.ViT(10, patch=4, width=64, depth=2, heads=4, stem=(32,))
    return of(tasks.classify(model), model, _digits())


def perceptron() -> Setting:
    """0.3 million parameters."""
    model = models.MLP((512, 512, 10), flatten=True)
    return of(tasks.classify(model), model, _digits())


def transformer(*, width: int = 128, depth: int = 2, mlp_width: int = 344, batch: int = 32) -> Setting:
    """By default that of `configs/language.py`; rows have 128 bytes."""
    model = models.Transformer(256, width=width, depth=depth, heads=width // 32, mlp_width=mlp_width)
    rows = next(data.batches(data.load("python_source", length=128), batch=batch, seed=0))[1]
    return of(tasks.predict_next(model), model, rows)


def of(task: tasks.Task, model, batch: PyTree) -> Setting:
    """With parameters initialised for the batch."""
    batch = jax.tree.map(jnp.asarray, batch)
    params = jax.jit(lambda: model.init(jax.random.key(0), task.inputs(batch), train=False))()["params"]
    return Setting(task, params, batch)


def _digits() -> PyTree:
    return next(data.batches(data.load("digits"), batch=128, seed=0))[1]
