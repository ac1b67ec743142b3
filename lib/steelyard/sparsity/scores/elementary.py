"""Scores of an entry that need only its value and a few numbers beside it.

The larger the score, the longer the entry stays. A score is a tree like the parameters; products are made in float32
at least and rounded once to the dtype to which their factors promote, so that gradients kept in float32 give scores in
float32. To accumulate over steps, add the scores (or average the gradients) in float32.

All of them: one pass over the leaves, elementwise, with whatever sharding they have.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from steelyard import precision
from steelyard import tree as tree_lib
from steelyard.sparsity.scores import leaves

PyTree = Any


def magnitude(params: PyTree) -> PyTree:
    """|w|.

    Args:
      params: a tree of arrays; `None` leaves pass.
    """
    return jax.tree.map(jnp.abs, params)


def random(params: PyTree, rng: Key[Array, ""]) -> PyTree:
    """A uniform draw in [0, 1) for each entry, in float32 at least.

    Draws in half precision would often be equal, and of equal scores the lower index is kept.

    Args:
      params: a tree of arrays; only their shapes matter. `None` leaves pass.
      rng: a key; the index of the leaf, in the order of `jax.tree.leaves`, is folded in.
    """
    leaf_list, structure = jax.tree.flatten(params)
    draws = [
        jax.random.uniform(jax.random.fold_in(rng, i), jnp.shape(w), jnp.promote_types(jnp.result_type(w), jnp.float32))
        for i, w in enumerate(leaf_list)
    ]
    return structure.unflatten(draws)


def saliency(params: PyTree, grads: PyTree) -> PyTree:
    """|w g|: to first order, by how much the loss changes when the entry is removed.

    Args:
      params: a tree of arrays; `None` leaves pass.
      grads: like `params`.

    Raises:
      ValueError: the trees differ in leaves or shapes.
    """
    return leaves.map_wide(lambda w, g: jnp.abs(w * g), params=params, grads=grads)


def fisher(params: PyTree, second_moment: PyTree) -> PyTree:
    """w^2 v: twice the loss that removing the entry costs, with the mean squared gradient as curvature.

    Args:
      params: a tree of arrays; `None` leaves pass.
      second_moment: v, like `params`: for instance Adam's, `optax.tree.get(opt_state, "nu")`.

    Raises:
      ValueError: the trees differ in leaves or shapes.
    """
    return leaves.map_wide(lambda w, v: w * w * v, params=params, second_moment=second_moment)


def taylor(params: PyTree, grads: PyTree, *, second: PyTree | None = None) -> PyTree:
    """|w g + w^2 h / 2|: the change of the loss to first and second order, with a diagonal curvature.

    Args:
      params: a tree of arrays; `None` leaves pass.
      grads: g, like `params`.
      second: h, like `params`, the diagonal of the Hessian (of the loss, or an estimate of it such as
        `optax.contrib.hutchinson_estimator_diag_hessian`); `None` for the Fisher diagonal g^2.

    Raises:
      ValueError: the trees differ in leaves or shapes.

    Source: Pruning as a Domain-specific LLM Extractor (2024, Zhang et al.).
    """
    if second is None:
        return leaves.map_wide(lambda w, g: jnp.abs(w * g + (w * g) ** 2 / 2), params=params, grads=grads)
    return leaves.map_wide(lambda w, g, h: jnp.abs(w * g + w * w * h / 2), params=params, grads=grads, second=second)


def movement(params: PyTree, grads: PyTree) -> PyTree:
    """-w g: how fast a step of gradient descent moves the entry away from zero; add it up over steps.

    Args:
      params: a tree of arrays; `None` leaves pass.
      grads: like `params`.

    Raises:
      ValueError: the trees differ in leaves or shapes.

    Source: Movement Pruning: Adaptive Sparsity by Fine-Tuning (2020, Sanh et al.).
    """
    return leaves.map_wide(lambda w, g: -w * g, params=params, grads=grads)


def magnitude_increase(params: PyTree, init: PyTree) -> PyTree:
    """|w| - |w_0|: by how much training has made the entry larger; negative where it has shrunk.

    Args:
      params: a tree of arrays; `None` leaves pass.
      init: the parameters of an earlier step, like `params`.

    Raises:
      ValueError: the trees differ in leaves or shapes.

    Source: Class-dependent Compression of Deep Neural Networks (2019, Entezari and Saukh).
    """
    return leaves.map_wide(lambda w, start: jnp.abs(w) - jnp.abs(start), params=params, init=init)


def prefer(scores: PyTree, masks: PyTree) -> PyTree:
    """Entries of the masks first: where(mask, top, score), with top above every finite score of the whole tree.

    top = max + 1, or where the dtype cannot tell that from max, the next number. Entries of the masks tie, so that the
    lower index comes first among them. A sparsity lower than that of the masks so keeps the masks and the best of the
    rest: a pattern like 2:4 can be approached step by step.

    Args:
      scores: a tree of arrays.
      masks: like `scores`, of bools; `None` where no entry is preferred.

    Returns:
      A tree like `scores`. Cost: a reduction to one number and an elementwise pass.

    Raises:
      ValueError: a mask has another shape than its scores.
    """
    largest = functools.reduce(jnp.maximum, map(_largest, jax.tree.leaves(scores)), -jnp.inf)

    def leaf(score, mask):
        if score is None or mask is None:
            return score
        if jnp.shape(score) != jnp.shape(mask):
            raise ValueError(f"scores of shape {jnp.shape(score)} have a mask of shape {jnp.shape(mask)}")
        return jnp.where(mask, _above(largest, jnp.result_type(score)), score)

    return jax.tree.map(leaf, scores, masks, is_leaf=tree_lib.is_none)


def _largest(score: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.max(precision.wide(score), initial=-jnp.inf, where=~jnp.isnan(score))


def _above(largest: Float[Array, ""] | float, dtype: Any) -> Float[Array, ""]:
    largest = jnp.asarray(largest, jnp.promote_types(dtype, jnp.float32))
    rounded = largest.astype(dtype)
    return jnp.maximum((largest + 1).astype(dtype), jnp.nextafter(rounded, jnp.asarray(jnp.inf, dtype)))
