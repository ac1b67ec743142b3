"""Retraining after pruning with few parameters: biases, norms, the head, and low-rank updates that fill no hole.

Source: PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs (2023, Zimmer et al.).
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from steelyard import choices, precision
from steelyard import tree as tree_lib

PyTree = Any

__all__ = ["masked_lora_weight", "scaled_lora_weight", "trainable"]

# Of whole paths. A module is a norm or a head by the name of a folder on the way, whatever its parameters are called.
_SUBSETS = {
    "bias": r"(.*/)?bias",
    "norm": r"(.*/)?([^/]*norm[^/]*/.*|scale)",
    "head": r"(.*/)?(head|logits)(/.*)?",
}


def trainable(params: PyTree, select: Sequence[str] = ("bias", "norm", "head")) -> PyTree:
    """Labels the parameters that are retrained, and those that stay as they are.

    Made for `optax.partition({"train": tx, "freeze": optax.set_to_zero()}, labels)`, in which moments exist only for
    what trains. The gradient is computed for all of `params`; differentiate with respect to the trained part alone
    (`tree.partition`) to save that too.

    Args:
      params: a tree of parameters; `None` leaves stay `None`.
      select: what trains: "bias" (leaves of that name), "norm" (what lies in a module with "norm" in its name, and
        leaves named "scale"), "head" (a module named "head" or "logits"), or a regular expression for the whole path of
        a leaf. A model without norms has simply none, but an expression must match.

    Returns:
      A tree like `params` of "train" and "freeze".

    Raises:
      ValueError: a misspelt name, an expression that matches no parameter, or nothing that trains.

    >>> trainable({"dense": {"kernel": 1, "bias": 2}, "head": {"kernel": 3}})
    {'dense': {'bias': 'train', 'kernel': 'freeze'}, 'head': {'kernel': 'train'}}
    """
    if isinstance(select, str):
        raise ValueError(f"select={select!r} must be a sequence of names or patterns: ({select!r},)")
    patterns = [_SUBSETS.get(name) or _checked(params, name) for name in select]
    labels = tree_lib.map_with_path(
        lambda path, leaf: "train" if any(re.fullmatch(pattern, path) for pattern in patterns) else "freeze", params
    )
    found = jax.tree.leaves(labels)
    if found and "train" not in found:
        raise ValueError(f"select={tuple(select)} selects none of the {len(found)} parameters: nothing would train")
    return labels


def _checked(params: PyTree, pattern: str) -> str:
    if pattern.isidentifier() and pattern not in tree_lib.paths(params):
        choices.require("select", pattern, _SUBSETS)
    tree_lib.select(params, pattern, name="select")
    return pattern


def masked_lora_weight(
    weight: Float[Array, "*stack d_in d_out"],
    a: Float[Array, "*stack d_in r"],
    b: Float[Array, "*stack r d_out"],
    *,
    scale: float | Float[Array, ""] = 1.0,
    mask: Bool[Array, "*stack d_in d_out"] | None = None,
) -> Float[Array, "*stack d_in d_out"]:
    """A pruned weight with a low-rank update that leaves the pruned entries zero.

        (weight + scale * a b) * mask,  mask = [weight != 0] if none is given

    Train through it and store its result: what is stored is what was trained, and it has every zero that the mask has.
    Costs one product a b, of the size of the weight, a step; the optimizer holds r (d_in + d_out) numbers a leaf.

    Args:
      weight: pruned and frozen.
      a: the first factor, random at the start.
      b: the second factor, zero at the start: the update then is none.
      scale: alpha / r; published with alpha 32 and r 16.
      mask: of the pruning, True where an entry is kept. By default an entry that is exactly zero counts as pruned.

    Returns:
      A weight in the dtype of `weight`; product and sum are in float32 at least.

    Raises:
      ValueError: `a b`, or `mask`, has not the shape of `weight`.
    """
    _check_shapes(weight, a, b)
    if mask is not None and jnp.shape(mask) != jnp.shape(weight):
        raise ValueError(f"mask has shape {jnp.shape(mask)}, but weight has shape {jnp.shape(weight)}")
    kept = weight != 0 if mask is None else mask
    updated = precision.wide(weight) + scale * (precision.wide(a) @ precision.wide(b))
    return jnp.where(kept, updated, 0).astype(jnp.result_type(weight))


def scaled_lora_weight(
    weight: Float[Array, "*stack d_in d_out"],
    a: Float[Array, "*stack d_in r"],
    b: Float[Array, "*stack r d_out"],
) -> Float[Array, "*stack d_in d_out"]:
    """A pruned weight whose entries are rescaled by a matrix of low rank: weight * (a b).

    Zeros stay zero of themselves. Costs as `masked_lora_weight`, without a mask.

    Args:
      weight: pruned and frozen.
      a, b: the factors; filled with 1 / sqrt(r) at the start, so that a b = 1. With r = 1 they rescale the inputs and
        the outputs.

    Returns:
      A weight in the dtype of `weight`; the products are in float32 at least.

    Raises:
      ValueError: `a b` has not the shape of `weight`.
    """
    _check_shapes(weight, a, b)
    scaled = precision.wide(weight) * (precision.wide(a) @ precision.wide(b))
    return scaled.astype(jnp.result_type(weight))


def _check_shapes(weight: Array, a: Array, b: Array) -> None:
    shapes = jnp.shape(a), jnp.shape(b)
    is_low_rank = min(map(len, shapes)) >= 2 and shapes[0][-1] == shapes[1][-2]
    if not is_low_rank or (*shapes[0][:-1], shapes[1][-1]) != jnp.shape(weight) or shapes[0][:-2] != shapes[1][:-2]:
        raise ValueError(
            f"a of shape {shapes[0]} times b of shape {shapes[1]} does not have the shape {jnp.shape(weight)} of weight"
        )
