"""What scores need to know beside the weights, measured on a few training batches: gradients, inputs, curvatures.

Everything is computed when it is first asked for, so that a method that looks at weights alone costs no pass; and in
one pass over the batches, of which only sums are kept.
"""

import functools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments import experiment as experiment_lib
from experiments import loop
from steelyard import models, sparsity
from steelyard import tree as tree_lib

PyTree = Any


class Weights(NamedTuple):
    """A model with its weights.

    Attributes:
      experiment: the model, its task and data.
      params: as the model sees them.
      model_state: what belongs to them (batch statistics), or `None`.
    """

    experiment: experiment_lib.Experiment
    params: PyTree
    model_state: PyTree

    @property
    def variables(self) -> dict[str, PyTree]:
        """What the Flax module is applied to."""
        return {"params": self.params, **(self.model_state or {})}


class Calibration:
    """Measurements of some weights on the first training batches.

    Args:
      weights: what is measured.
      count: how many batches.
    """

    def __init__(self, weights: Weights, count: int):
        self.weights = weights
        self.params = weights.params
        self._count = count

    def stream(self) -> Iterator[dict[str, Array]]:
        """The batches, on the devices one after the other."""
        experiment = self.weights.experiment
        return (loop.to_devices(experiment, batch) for _, batch in loop.batches(experiment, 0, self._count))

    @property
    def rng(self) -> Array:
        """The key of random scores and probes: the same at every start of a run."""
        return jax.random.key(self.weights.experiment.settings["seed"])

    def loss(self, params: PyTree, batch: PyTree) -> Array:
        """The sum over the tasks of the mean loss, in evaluation mode."""
        task, model_state = self.weights.experiment.task, self.weights.model_state
        losses = task.losses(self.forward(params, batch, model_state), batch)
        return sum(jnp.mean(value) for value in losses.values())

    def forward(self, params: PyTree, batch: PyTree, model_state: PyTree) -> PyTree:
        """Outputs of the task in evaluation mode."""
        extra = {} if model_state is None else {"model_state": model_state}
        outputs = self.weights.experiment.task.forward(params, batch, rng=None, train=False, **extra)
        return outputs if model_state is None else outputs[0]

    @functools.cached_property
    def loss_fn(self) -> Callable[[PyTree], Array]:
        """Parameters -> the mean loss over all batches, one after the other, also in its derivatives."""
        batches = jax.tree.map(lambda *xs: jnp.stack(xs), *self.stream())

        def mean(params):
            return jnp.mean(jax.lax.map(jax.checkpoint(lambda batch: self.loss(params, batch)), batches))

        return jax.jit(mean)

    @functools.cached_property
    def _gradient_sums(self) -> tuple[PyTree, PyTree]:
        """Of the gradient and of its square, over the batches."""

        @functools.partial(jax.jit, donate_argnums=0)
        def add(sums, params, batch):
            gradient = jax.grad(self.loss)(params, batch)
            return jax.tree.map(lambda g, s: (s[0] + g, s[1] + jnp.square(g)), gradient, sums)

        sums = jax.tree.map(lambda w: (jnp.zeros_like(w), jnp.zeros_like(w)), self.params)
        for batch in self.stream():
            sums = add(sums, self.params, batch)
        return jax.tree.transpose(jax.tree.structure(self.params), jax.tree.structure((0, 0)), sums)

    @functools.cached_property
    def grads(self) -> PyTree:
        """The gradient of the mean loss."""
        return jax.tree.map(lambda g: g / self._count, self._gradient_sums[0])

    @functools.cached_property
    def second_moment(self) -> PyTree:
        """The mean over batches of the squared gradient."""
        return jax.tree.map(lambda g: g / self._count, self._gradient_sums[1])

    @functools.cached_property
    def input_norm(self) -> PyTree:
        """The root mean square of each input feature of each kernel."""
        return sparsity.calibration.input_norm(self._statistics(hessian=False))

    @functools.cached_property
    def hessian(self) -> PyTree:
        """Of each kernel that of its outputs' squared error."""
        return sparsity.calibration.hessian(self._statistics(hessian=True))

    def _statistics(self, *, hessian: bool) -> sparsity.calibration.Statistics:
        known = kernels(self.weights)
        return sparsity.calibration.collect(
            functools.partial(_inputs, self.weights),
            self.params,
            self.stream(),
            windows=_windows(self.weights),
            where=lambda path, w: path in known,
            hessian=hessian,
        )


def kernels(weights: Weights) -> set[str]:
    """Paths of the kernels whose inputs can be measured; of the weights only shapes matter."""
    batch = experiment_lib.batch_shapes(weights.experiment)
    found = jax.eval_shape(functools.partial(_inputs, weights), weights.params, batch)
    return {path.removesuffix("inputs/0") + "kernel" for path in tree_lib.paths(found) if path.endswith("inputs/0")}


def _inputs(weights: Weights, params: PyTree, batch: PyTree) -> PyTree:
    """What each kernel multiplies, as its layer sows it."""
    inputs = weights.experiment.task.inputs(batch)
    variables = weights.variables | {"params": params}
    return weights.experiment.model.apply(variables, inputs, train=False, mutable=["intermediates"])[1]["intermediates"]


def _windows(weights: Weights) -> dict[str, sparsity.calibration.Window]:
    """How each convolution moves, by its path."""
    found = {}

    def note(function, args, kwargs, context):
        if isinstance(context.module, models.Conv):
            window = sparsity.calibration.Window(context.module.strides, context.module.padding)
            found[re.escape("/".join((*context.module.path, "kernel")))] = window
        return function(*args, **kwargs)

    with nn.intercept_methods(note):
        batch = experiment_lib.batch_shapes(weights.experiment)
        jax.eval_shape(functools.partial(_inputs, weights), weights.params, batch)
    return found
