"""Scores before training: how much a loss, its gradient or the flow through the network hangs on an entry.

Sources: SNIP: Single-shot Network Pruning based on Connection Sensitivity (2019, Lee et al.); Picking Winning Tickets
before Training by Preserving Gradient Flow (2020, Wang et al.); Pruning Neural Networks without any Data by
Iteratively Conserving Synaptic Flow (2020, Tanaka et al.).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from steelyard import precision
from steelyard.sparsity.scores import leaves

PyTree = Any
Loss = Callable[[PyTree], Float[Array, ""]]


def snip(loss_fn: Loss, params: PyTree, *, normalize: bool = True) -> PyTree:
    """|w g| / sum |w g|: the share of an entry in what the loss would change by, to first order.

    Args:
      loss_fn: `params -> scalar`, over a batch.
      params: a tree of float arrays; `None` leaves pass.
      normalize: whether the sum over all leaves is divided out.

    Returns:
      A tree like `params`; all zeros where all gradients are. Cost: one backward pass.
    """
    scores = _products(params, jax.grad(loss_fn)(params), jnp.abs)
    return _rounded(_over(scores, leaves.total(scores)) if normalize else scores, params)


def grasp(loss_fn: Loss, params: PyTree, *, normalize: bool = True) -> PyTree:
    """w h / (|sum w h| + 1e-10) with h = H g: what the entry holds of the gradient's norm. The largest stay.

    To first order, removing an entry lowers |g|^2 / 2 by w h. Divide the logits in the loss by a temperature of 200,
    so that the loss is smooth where it is measured.

    Args:
      loss_fn: `params -> scalar`, over a batch; twice differentiable.
      params: a tree of float arrays; `None` leaves pass.
      normalize: whether the sum over all leaves is divided out.

    Returns:
      A tree like `params`. Cost: a backward pass, and one that is differentiated forward.
    """
    gradient = jax.grad(loss_fn)
    _, curved = jax.jvp(gradient, (params,), (gradient(params),))
    scores = _products(params, curved, lambda x: x)
    if normalize:
        scale = jnp.abs(leaves.total(scores)) + 1e-10
        scores = jax.tree.map(lambda x: x / scale.astype(x.dtype), scores)
    return _rounded(scores, params)


def synflow(apply_fn: Callable[[PyTree, PyTree], PyTree], params: PyTree, inputs: PyTree) -> PyTree:
    """|w| dR/d|w|, R = sum f(1; |w|): the flow of ones through the magnitudes of the entry's paths.

    In a network of bias-free layers and ReLU the scores of every layer have the same sum. No layer dies before the
    last one if pruning is gradual: 100 rounds, in round i to the sparsity 1 - (1 - s)^(i / 100), each with the scores
    of the masked parameters.

    Args:
      apply_fn: `(params, inputs) -> outputs`, arrays or trees of them, without randomness or batch statistics.
      params: a tree of float arrays; `None` leaves pass. Halves are widened: the flow grows with every layer.
      inputs: only shapes and dtypes matter, all entries are set to one; one example is enough.

    Returns:
      A tree like `params` in float32 at least. Cost: one backward pass.
    """
    ones = jax.tree.map(jnp.ones_like, inputs)
    magnitudes = jax.tree.map(lambda w: jnp.abs(precision.wide(w)), params)
    flow = jax.grad(lambda sizes: leaves.total(apply_fn(sizes, ones)))(magnitudes)
    return jax.tree.map(lambda w, g: jnp.abs(w * g), magnitudes, flow)


def _products(params: PyTree, others: PyTree, of: Callable[[Array], Array]) -> PyTree:
    return jax.tree.map(lambda w, x: of(precision.wide(w) * precision.wide(x)), params, others)


def _over(scores: PyTree, total: Float[Array, ""]) -> PyTree:
    """The shares of a total, which are zero where it is."""
    return jax.tree.map(lambda x: x / jnp.where(total == 0, 1, total).astype(x.dtype), scores)


def _rounded(scores: PyTree, params: PyTree) -> PyTree:
    return jax.tree.map(lambda x, w: x.astype(jnp.result_type(w)), scores, params)
