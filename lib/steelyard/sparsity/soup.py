"""Sparse soups: several trainings under one mask, averaged, so that the average is as sparse as each of them.

Source: Sparse Model Soups: A Recipe for Improved Pruning via Model Averaging (2023, Zimmer et al.).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from steelyard import choices, precision
from steelyard import tree as tree_lib
from steelyard.sparsity import masks as masks_lib
from steelyard.sparsity import prunable, scores
from steelyard.sparsity.lottery import iterative

PyTree = Any

__all__ = ["Soup", "sparse_average", "sparse_soups"]


class Soup(NamedTuple):
    """What a round has made.

    Attributes:
      masks: like the parameters, True where a weight is left; `None` for a leaf that is not pruned.
      params: the average of the members, zero outside the masks.
      sparsity: the share of the prunable weights that is removed.
      weights: of the members in the average.
      scores: of the members, in order; `None` without `evaluate`.
    """

    masks: PyTree
    params: PyTree
    sparsity: float
    weights: Float[np.ndarray, " members"]
    scores: Float[Array, " members"] | None


def sparse_average(
    params_list: Sequence[PyTree], masks: PyTree, *, weights: Float[Array, " members"] | None = None
) -> PyTree:
    """The weighted mean of networks that share their masks.

        theta = mask sum_i weights_i theta_i

    Sums are made in float32 at least and rounded once. Leaves that are no floating-point numbers, such as counters,
    are those of the first member. Statistics of batch normalization are averaged too, which they do not survive:
    compute them again on training data.

    Costs one pass over the members; a check of their zeros, outside of jit, another.

    Args:
      params_list: trees of the same structure and shapes.
      masks: a tree like them, `None` for a dense leaf.
      weights: one for each member, of sum 1; all equal by default.

    Returns:
      A tree like the members, with at least the zeros of the masks.

    Raises:
      ValueError: no members, or of several shapes; a member that is not traced and not zero outside the masks; not one
        weight for each member, or a sum that is not 1 within 1e-6.

    Source: Sparse Model Soups (2023, Zimmer et al.).
    """
    if not params_list:
        raise ValueError("params_list is empty: at least one member is needed")
    weights = _checked_weights(weights, len(params_list))
    tree_lib.map_with_path(_check_leaf, masks, *params_list, is_leaf=tree_lib.is_none)

    def leaf(first, *rest):
        if not jnp.issubdtype(jnp.result_type(first), jnp.inexact):
            return first
        total = sum(w * precision.wide(x) for w, x in zip(weights, (first, *rest), strict=True))
        return total.astype(first.dtype)

    return masks_lib.apply(jax.tree.map(leaf, *params_list), masks)


def sparse_soups(
    train_fn: Callable[[PyTree, PyTree, Key[Array, ""]], PyTree],
    params: PyTree,
    *,
    rounds: int,
    rate: float,
    members: int = 3,
    rng: Key[Array, ""],
    greedy: bool = False,
    evaluate: Callable[[PyTree], Float[Array, ""]] | None = None,
    where: tree_lib.Where | None = None,
) -> list[Soup]:
    """Prunes in rounds; each trains several members from one pruned start and goes on with their average.

        mask_r  = the round(n (1 - rate)^r) largest |w| of theta_{r-1}
        theta_r = mean_i train(theta_{r-1} mask_r, key_i)

    with n prunable weights, compared all together; a weight that was removed stays so. One member is iterative
    magnitude pruning. Unless `greedy`, rounds of several seeds run at once under `jax.vmap`; then jit `train_fn`.

    Costs rounds x members trainings, which are independent within a round.

    Args:
      train_fn: `(params, masks, rng) -> params`, with the masks enforced, as `optim.sparse` does. Members may also
        differ in what it draws from `rng`: weight decay, learning rate.
      params: a dense network, usually a trained one; fewer than 2^31 prunable weights.
      rounds: how many, at least 1.
      rate: the share of the remaining weights that a round removes, in (0, 1).
      members: of each round.
      rng: a key; the numbers of the round and of the member are folded in.
      greedy: takes members from the best to the worst, each if with it the score of the average does not fall.
      evaluate: `params -> score`, on validation data; the higher the better. Needed for `greedy`.
      where: the leaves that are pruned; by default those with two axes or more.

    Returns:
      A soup for each round, of rising sparsity.

    Raises:
      ValueError: an argument is out of range, or `greedy` without `evaluate`.

    Source: Sparse Model Soups (2023, Zimmer et al.).
    """
    choices.require_within("rate", rate, "(0, 1)")
    rounds = choices.require_count("rounds", rounds, "[1, inf)")
    members = choices.require_count("members", members, "[1, inf)")
    if greedy and evaluate is None:
        raise ValueError("greedy=True needs evaluate, the score by which members are taken")
    masks = iterative.everything(params, prunable.selected(params, where))
    size = tree_lib.size(masks)
    soups = []
    for i in range(rounds):
        kept = min(size, max(1, round(size * (1 - rate) ** (i + 1))))
        masks = iterative.best_scored(scores.magnitude(params), masks, kept)
        start, key = masks_lib.apply(params, masks), jax.random.fold_in(rng, i)
        trained = [train_fn(start, masks, jax.random.fold_in(key, j)) for j in range(members)]
        ranks = None if evaluate is None else jnp.stack([evaluate(member) for member in trained])
        weights = _greedy(trained, masks, ranks, evaluate) if greedy else np.full(members, 1 / members)
        params = sparse_average(trained, masks, weights=weights)
        soups.append(Soup(masks, params, 1 - kept / max(size, 1), weights, ranks))
    return soups


def _greedy(trained, masks, ranks, evaluate) -> Float[np.ndarray, " members"]:
    """Equal weights of the members that are taken."""
    first, *others = np.argsort(-np.asarray(ranks), kind="stable")
    taken, best = [first], ranks[first]
    for member in others:
        score = evaluate(sparse_average([trained[j] for j in [*taken, member]], masks))
        if score >= best:
            taken, best = [*taken, member], score
    return np.isin(np.arange(len(trained)), taken) / len(taken)


def _checked_weights(weights, count: int) -> Float[Array, " members"]:
    if weights is None:
        return np.full(count, 1 / count, np.float32)
    if np.shape(weights) != (count,):
        raise ValueError(f"weights has shape {np.shape(weights)}: it must be ({count},), one for each member")
    if not isinstance(weights, jax.core.Tracer):
        total = float(np.sum(np.asarray(weights, np.float64)))
        choices.require_within("the sum of weights", total, f"[{1 - 1e-6}, {1 + 1e-6}]")
    return weights


def _check_leaf(path: str, mask: Any, *leaves: Any) -> None:
    """Refuses members that differ in shape, and those that another mask has made."""
    for i, leaf in enumerate(leaves):
        if np.shape(leaf) != np.shape(leaves[0]):
            raise ValueError(f"{path} has shape {np.shape(leaves[0])} in member 0, {np.shape(leaf)} in member {i}")
        if mask is None:
            continue
        if np.shape(leaf) != np.shape(mask):
            raise ValueError(f"{path} has shape {np.shape(leaf)}, but its mask {np.shape(mask)}")
        outside = jnp.any((leaf != 0) & ~mask)
        if not isinstance(outside, jax.core.Tracer) and outside:
            raise ValueError(f"{path} of member {i} is not zero outside masks: members must share them")
