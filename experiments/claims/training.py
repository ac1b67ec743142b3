"""What claims train: embedded data as arrays, small networks as pure functions, and a loop that vmaps."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from steelyard import data

PyTree = Any


class Task(NamedTuple):
    """A supervised data set in memory: features [n, d], labels [n] (classes or targets), and the held-out part."""

    x: Float[Array, "n d"]
    y: Array
    x_test: Float[Array, "m d"]
    y_test: Array


def load(name: str) -> Task:
    """An embedded data set with flattened features: "digits", "breast_cancer", "wine", "diabetes"."""
    parts = []
    for split in ("train", "test"):
        source = data.load(name, split=split)
        x, y = source.columns[source.info.input], source.columns[source.info.label]
        parts += [jnp.asarray(x.reshape(len(x), -1)), jnp.asarray(y)]
    return Task(*parts)


def minibatches(key: Key[Array, ""], num_examples: int, batch: int, steps: int) -> Int[Array, "steps batch"]:
    """Indices of the examples of each step: every epoch another permutation, its last partial batch dropped."""
    per_epoch = num_examples // batch
    epochs = -(-steps // per_epoch)
    orders = jax.vmap(lambda epoch: data.epoch_order(num_examples, epoch, key))(jnp.arange(epochs))
    return orders[:, : per_epoch * batch].reshape(-1, batch)[:steps]


def fit(
    loss: Callable[[PyTree, PyTree], Float[Array, ""]],
    params: PyTree,
    tx: optax.GradientTransformation,
    batches: PyTree,
    *,
    measure: Callable[[PyTree], PyTree] | None = None,
    wrap: Callable[[Callable], Callable] = lambda fn: fn,
) -> tuple[PyTree, Float[Array, "steps"], PyTree]:
    """Trains by one `lax.scan`, so that a whole run can be jitted and vmapped over seeds.

    Args:
      loss: `(params, batch) -> scalar`.
      params: where to start.
      tx: the optimizer; its hyperparameters may be traced.
      batches: a tree whose leaves have a leading axis of steps, such as `minibatches`.
      measure: `params -> tree of arrays`, after every step.
      wrap: of the function `(params, batch) -> (value, grads)`, such as `optim.sam_value_and_grad`.

    Returns:
      The last parameters, the loss of each step before its update, and what was measured, stacked over steps.
    """
    tx = optax.with_extra_args_support(tx)
    value_and_grad = wrap(jax.value_and_grad(loss))

    def step(carry, batch):
        params, state = carry
        value, grads = value_and_grad(params, batch)
        updates, state = tx.update(grads, state, params, value=value)
        params = optax.apply_updates(params, updates)
        return (params, state), (value, None if measure is None else measure(params))

    (params, _), (losses, measured) = jax.lax.scan(step, (params, tx.init(params)), batches)
    return params, losses, measured


def mlp_init(
    key: Key[Array, ""], widths: Sequence[int], *, gain: float = 2.0, norm: bool = False
) -> list[dict[str, Array]]:
    """Parameters of `mlp`: kernels [in, out] of variance gain / in, zero biases, and unit scales if there is a norm."""
    layers = []
    for i, (d_in, d_out) in enumerate(itertools.pairwise(widths)):
        kernel = jnp.sqrt(gain / d_in) * jax.random.normal(jax.random.fold_in(key, i), (d_in, d_out))
        layer = {"kernel": kernel, "bias": jnp.zeros(d_out)}
        if norm and i < len(widths) - 2:
            layer["scale"] = jnp.ones(d_out)
        layers.append(layer)
    return layers


def mlp(
    params: list[dict[str, Array]],
    x: Float[Array, "batch d"],
    *,
    norm: Literal["batch", "layer"] | None = None,
    activation: Callable[[Array], Array] = jax.nn.relu,
) -> Float[Array, "batch out"]:
    """A perceptron; "batch" normalises hidden pre-activations by the statistics of the given batch, always."""
    for layer in params[:-1]:
        x = x @ layer["kernel"]
        if norm is not None:
            axis = 0 if norm == "batch" else -1
            x = jax.nn.standardize(x, axis=axis, epsilon=1e-5) * layer["scale"]
        x = activation(x + layer["bias"])
    return x @ params[-1]["kernel"] + params[-1]["bias"]


def cross_entropy(logits: Float[Array, "batch classes"], labels: Int[Array, "batch"]) -> Float[Array, ""]:
    """Mean over the batch, in nats."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def accuracy(logits: Float[Array, "batch classes"], labels: Int[Array, "batch"]) -> Float[Array, ""]:
    """Share of right answers."""
    return jnp.mean(jnp.argmax(logits, -1) == labels)
