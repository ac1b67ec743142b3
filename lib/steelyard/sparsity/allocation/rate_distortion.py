"""Sparsities that move the output least: a curve for each layer, and the best sum of them under a budget.

Source: Efficient joint optimization of layer-adaptive weight pruning in deep neural networks (2023, Xu et al.).
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from steelyard import choices, precision, selection
from steelyard import tree as tree_lib
from steelyard.sparsity import prunable

PyTree = Any
Reduce = Literal["mean", "max"]

REDUCTIONS = ("mean", "max")


def distortion_curves(
    apply_fn: Callable[[PyTree, PyTree], Float[Array, "samples *outputs"]],
    params: PyTree,
    batch: PyTree,
    amounts: Float[np.ndarray, " A"],
    *,
    reduce: Reduce = "mean",
    where: tree_lib.Where | None = None,
) -> Float[Array, "L A"]:
    """How far the output moves when one layer alone is pruned by magnitude, at each of some amounts.

        D[l, j] = mean over samples and outputs of (f(x; W) - f(x; W with layer l pruned to amounts_j))^2,

    floor(amounts_j n_l + 1e-9) of the n_l weights being zeroed, those of least magnitude.

    Args:
      apply_fn: `(params, batch) -> outputs`, the samples along the first axis.
      params: a tree of arrays; may be traced.
      batch: what to measure on.
      amounts: shares to prune, in [0, 1]; not traced. Published: 0, 0.01, ..., 1.
      reduce: "mean", or "max": the mean over the outputs of the worst sample.
      where: which leaves are layers; float leaves with two axes and more by default.

    Returns:
      The curves, in float32 at least: a row a layer, in the order of `jax.tree.leaves`.

    Raises:
      ValueError: an unknown `reduce`, an amount outside of [0, 1], a pattern that matches nothing, or no layer.

    Cost: L A forward passes, one at a time.
    """
    choices.require("reduce", reduce, REDUCTIONS)
    choices.require_within("amounts", amounts, "[0, 1]")
    leaves, structure = jax.tree.flatten(params)
    layers = [i for i, is_layer in enumerate(jax.tree.leaves(prunable.selected(params, where))) if is_layer]
    if not layers:
        raise ValueError(f"none of the {len(leaves)} leaves is a layer to prune: where={where!r}")
    reference = precision.wide(apply_fn(params, batch))

    def pruned(i, kept):
        mask = selection.keep_largest(jnp.abs(leaves[i]), kept)
        return [*leaves[:i], jnp.where(mask, leaves[i], 0), *leaves[i + 1 :]]

    def distortion(layer, size, kept):
        seen = jax.lax.switch(layer, [functools.partial(pruned, i) for i in layers], kept)
        squares = (precision.wide(apply_fn(jax.tree.unflatten(structure, seen), batch)) - reference) ** 2
        per_sample = jnp.mean(squares.reshape(len(squares), -1), axis=1)
        moved = jnp.max(per_sample) if reduce == "max" else jnp.mean(per_sample)
        # Another program may round the same output differently.
        return jnp.where(kept == size, 0, moved)

    sizes = np.array([[leaves[i].size] for i in layers], np.int32)
    points = np.broadcast_arrays(np.arange(len(layers))[:, None], sizes, _kept(amounts, sizes))
    # A point after the other, so that the network is compiled once and its outputs are held once.
    flat = jax.lax.map(lambda point: distortion(*point), [jnp.asarray(x.ravel(), jnp.int32) for x in points])
    return flat.reshape(points[0].shape)


def rate_distortion(
    distortions: Float[np.ndarray, "L A"],
    amounts: Float[np.ndarray, " A"],
    sizes: Int[np.ndarray, " L"],
    sparsity: float,
    *,
    floor: Float[np.ndarray, " L"] | None = None,
    resolution: int = 4096,
) -> Int[np.ndarray, " L"]:
    """Chooses an amount for each layer, such that the sum of distortions is least under a budget of kept weights.

        minimise sum_l D[l, j_l]  subject to  sum_l kept[l, j_l] <= floor((1 - sparsity) sum(n) + 1e-9)

    by dynamic programming, best_l(b) = min_j D[l, j] + best_{l-1}(b - kept[l, j]), with
    kept[l, j] = n_l - floor(amounts_j n_l + 1e-9). That is exact while sum(n) <= resolution. Beyond, weights are
    counted in units of ceil(sum(n) / resolution), with what a layer keeps rounded up: never over the budget. Where no
    budget is needed, because every layer's own best choice meets it, that is the answer.

    Args:
      distortions: of `distortion_curves`; they need not be monotone. Infinity forbids a choice.
      amounts: shares to prune, in [0, 1], ascending; `amounts[result]` are the sparsities.
      sizes: weights of each layer.
      sparsity: of the whole, in [0, 1].
      floor: amounts below are not allowed, because so much was pruned before; none by default.
      resolution: budget units; at least 1.

    Returns:
      The index into `amounts` for each layer; of equal sums the last layer takes its smallest, then the one before.

    Raises:
      ValueError: shapes that do not fit, a number out of range, or no choice meets the budget.

    Cost: L A resolution additions, and L resolution indices.
    """
    choices.require_within("sparsity", sparsity, "[0, 1]")
    choices.require_within("amounts", amounts, "[0, 1]")
    choices.require_within("distortions", distortions, "[0, inf]")
    resolution = choices.require_count("resolution", resolution, "[1, inf)")
    amounts, sizes = np.asarray(amounts, np.float64), np.asarray(sizes, np.int64)
    costs = np.array(distortions, np.float64)
    if costs.shape != (len(sizes), len(amounts)):
        raise ValueError(
            f"distortions has shape {costs.shape}; {len(sizes)} sizes and {len(amounts)} amounts need "
            f"{(len(sizes), len(amounts))}"
        )
    if floor is not None:
        if np.shape(floor) != sizes.shape:
            raise ValueError(f"floor has shape {np.shape(floor)}, but there are {len(sizes)} layers")
        costs[amounts < np.reshape(floor, (-1, 1)) - 1e-9] = np.inf
    kept, budget = _kept(amounts, sizes), int(np.floor((1 - sparsity) * sizes.sum() + 1e-9))
    best = np.argmin(costs, axis=1)
    layers = np.arange(len(sizes))
    if np.isfinite(costs[layers, best]).all() and kept[layers, best].sum() <= budget:
        return best
    unit = -(-int(sizes.sum()) // resolution)
    return _cheapest(costs, -(-kept // unit), budget // unit, sparsity)


def _kept(amounts, sizes) -> Int[np.ndarray, "L A"]:
    sizes = np.reshape(sizes, (-1, 1)).astype(np.int64)
    return sizes - np.floor(np.asarray(amounts, np.float64) * sizes + 1e-9).astype(np.int64)


def _cheapest(costs, kept, budget: int, sparsity) -> Int[np.ndarray, " L"]:
    """The dynamic program; `best[b]` is the least cost of the layers so far that keep at most b."""
    best, choice = np.zeros(budget + 1), []
    for cost, keeps in zip(costs, kept, strict=True):
        sums = np.full((len(cost), budget + 1), np.inf)
        for j, k in enumerate(keeps):
            sums[j, k:] = cost[j] + best[: max(budget + 1 - k, 0)]
        choice.append(np.argmin(sums, axis=0))
        best = np.min(sums, axis=0)
    if not np.isfinite(best[budget]):
        raise ValueError(
            f"sparsity={sparsity} cannot be had with these amounts, floors and sizes; the densest choice "
            f"that is allowed keeps too much"
        )
    result = []
    for taken, keeps in zip(choice[::-1], kept[::-1], strict=True):
        result.append(taken[budget])
        budget -= keeps[result[-1]]
    return np.array(result[::-1])
