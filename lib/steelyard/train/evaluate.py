"""Means over a data set, in batches of one shape."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from steelyard import precision

PyTree = Any


def make_evaluate(
    forward: Callable[..., Any], measure: Callable[[PyTree, PyTree], Mapping[str, Array]]
) -> Callable[..., dict[str, tuple[Array, Array]]]:
    """Builds `(params, model_state, batch) -> {name: (sum, count)}`, to be jitted.

    Args:
      forward: as in `make_step`; called with `train=False` and `rng=None`, its new model state is dropped.
      measure: `(outputs, batch) -> {name: per-example value}`.

    Returns:
      A pure function. Rows whose `batch["mask"]` is false (padding) count nothing.
    """

    def evaluate(params: PyTree, model_state: PyTree, batch: PyTree):
        if model_state is None:
            outputs = forward(params, batch, rng=None, train=False)
        else:
            outputs, _ = forward(params, batch, rng=None, train=False, model_state=model_state)
        return {name: _sum_and_count(value, batch.get("mask")) for name, value in measure(outputs, batch).items()}

    return evaluate


def _sum_and_count(value: Float[Array, "batch *rest"], mask: Array | None) -> tuple[Array, Array]:
    value = precision.wide(value)
    if mask is None:
        return jnp.sum(value), jnp.asarray(value.size, value.dtype)
    keep = jnp.broadcast_to(mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim)), value.shape)
    return jnp.sum(jnp.where(keep, value, 0.0)), jnp.sum(keep).astype(value.dtype)


def means(parts: Iterable[Mapping[str, tuple[Array, Array]]]) -> dict[str, float]:
    """Means from the sums and counts of all batches."""
    totals = jax.tree.map(lambda *xs: float(sum(xs)), *parts)
    return {name: total / max(count, 1.0) for name, (total, count) in totals.items()}
