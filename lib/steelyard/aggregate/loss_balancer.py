"""A loss balancer at the model's output: weights are fractions of the gradient (2022, Defossez et al.).

High Fidelity Neural Audio Compression, section 3.4.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from steelyard import choices, precision
from steelyard import tree as tree_lib
from steelyard.aggregate import stacked as stacked_lib

PyTree = Any


class LossBalancerState(NamedTuple):
    """State of `loss_balancer`.

    Attributes:
      total: decayed sum of the gradient norms seen so far, float32.
      fix: the same sum of ones, which makes `total / fix` an unbiased mean, float32.
    """

    total: Float[Array, "K"]
    fix: Float[Array, ""]


def loss_balancer(
    weights: Float[Array, "K"],
    *,
    rescale: bool = True,
    total_norm: float = 1.0,
    ema_decay: float = 0.999,
    per_example: bool = True,
    eps: float = 1e-12,
) -> stacked_lib.Aggregator:
    """Makes `weights[k]` the fraction of the gradient that loss k provides, whatever the scale of the loss.

    For the gradients `zbar_k = dL_k / dz` at the model's output z, with `n_k` their norm and `avg_k` its running mean
    (the current norm included), the update is `sum_k scale_k zbar_k` with

        scale_k = (weights_k / sum(weights)) total_norm / (eps + avg_k).

    Used with `steelyard.aggregate.value_and_grad_at`, which back-propagates this sum through the model once. Losses
    that do not depend on z (a codebook commitment loss, say) are added outside. Over a batch that is sharded over W
    devices the reference code averages W local gradients; here the batch is one global batch, whose gradient is W times
    larger: Adam does not notice, with SGD set `total_norm = 1 / W`.

    Costs K backward passes from the losses to z, and one through the model. Inside `jax.shard_map` its update takes the
    extra argument `axis_name`: with `per_example` the devices of that axis hold different examples, never parts of one
    (nor the flat parts of `over_workers`, which are refused); else any parts of the rows. Outside of it all norms are
    those of the global batch by themselves; `mesh` and `specs` only save all-reduces, and only without `per_example`.

    Args:
      weights: one positive number per loss.
      rescale: `False` uses `weights` themselves as scales (the norms are still tracked).
      total_norm: norm of the update if the gradients had their mean norms and pointed the same way.
      ema_decay: of the running mean, in [0, 1]; 1 is the plain mean over all steps and 0 has no memory.
      per_example: `n_k` is the mean over examples of each example's norm (leaves `[K, batch, ...]`); else the norm of
        the whole.
      eps: added to the mean norm.

    Returns:
      An aggregator with a `LossBalancerState`.

    Raises:
      ValueError: an argument out of its range; while tracing, the number of gradients is not the number of weights, or
        the leaves have no common batch axis (`per_example`), or are all flat where `axis_name` is given.
    """
    weights = np.asarray(weights, np.float32)
    _check(weights, total_norm, ema_decay, eps)

    def init(params):
        del params
        return LossBalancerState(total=jnp.zeros(weights.shape, jnp.float32), fix=jnp.zeros((), jnp.float32))

    def update(stacked, state, params=None, *, mesh=None, specs=None, axis_name=None, **extra_args):
        del params, extra_args
        if (count := stacked_lib.count_rows(stacked)) != len(weights):
            raise ValueError(f"loss_balancer has {len(weights)} weights, but there are {count} gradients")
        rows = jax.lax.stop_gradient(stacked)
        if per_example:
            norms = _example_norms(rows, axis_name)
        else:
            norms = jnp.sqrt(stacked_lib.square_norms(rows, mesh=mesh, specs=specs, axis_name=axis_name))
        total = ema_decay * state.total + norms
        fix = ema_decay * state.fix + 1
        scales = weights / weights.sum() * total_norm / (eps + total / fix) if rescale else weights
        return stacked_lib.combine(scales, stacked), LossBalancerState(total, fix)

    return stacked_lib.Aggregator(init, update)


def _check(weights: np.ndarray, total_norm: float, ema_decay: float, eps: float) -> None:
    if weights.ndim != 1 or not weights.size or not np.all(np.isfinite(weights) & (weights > 0)):
        raise ValueError(f"weights must be a vector of positive numbers, got {weights}")
    choices.require_within("total_norm", total_norm, "(0, inf)")
    choices.require_within("ema_decay", ema_decay, "[0, 1]")
    choices.require_within("eps", eps, "(0, inf)")


def _example_norms(stacked: PyTree, axis_name: stacked_lib.AxisName | None) -> Float[Array, "K"]:
    """Mean over the examples, those of the other devices along `axis_name` too, of the norm over all else."""
    (first_path, first), *_ = leaves = tree_lib.flatten(stacked)
    for path, leaf in leaves:
        if leaf.ndim < 2 or first.ndim < 2 or leaf.shape[1] != first.shape[1]:
            raise ValueError(
                "per_example needs leaves [K, batch, ...] with a common batch: "
                f"{first_path!r} has shape {first.shape}, {path!r} has shape {leaf.shape}"
            )
    if axis_name is not None and all(leaf.ndim == 2 for _, leaf in leaves):
        raise ValueError(
            f"per_example with axis_name={axis_name!r} needs leaves [K, batch, ...]; all are flat, [K, n], as parts of "
            "rows are: give per_example=False, or examples that are single numbers an axis of length 1"
        )
    norms = jnp.mean(jnp.sqrt(sum(_example_squares(leaf) for _, leaf in leaves)), axis=1)
    return norms if axis_name is None else jax.lax.pmean(norms, axis_name)


def _example_squares(leaf: Float[Array, "K batch ..."]) -> Float[Array, "K batch"]:
    return jnp.sum(jnp.square(precision.wide(leaf)), axis=tuple(range(2, leaf.ndim))).astype(jnp.float32)
