"""Iterative pruning: train, remove the least of what is left, set the rest back to where it started, and again.

Sources: The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks (2019, Frankle and Carbin);
Class-dependent Compression of Deep Neural Networks (2019, Entezari and Saukh).
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Key, Num

from steelyard import choices, selection
from steelyard import tree as tree_lib
from steelyard.sparsity import masks as masks_lib
from steelyard.sparsity import prunable, scores

PyTree = Any
TrainFn = Callable[[PyTree, PyTree, Key[Array, ""]], tuple[PyTree, PyTree | None, PyTree]]

SCOPES = ("layer", "global")


class Ticket(NamedTuple):
    """A subnetwork, and what came of training it.

    Attributes:
      masks: like the parameters, True where a weight is left; `None` for a leaf that is not pruned.
      params: where it starts: weights of the initialization or of an early step, zero outside the masks.
      trained: what training made of it.
      sparsity: the share of the prunable weights that is removed.
      metrics: whatever `train_fn` reports.
    """

    masks: PyTree
    params: PyTree
    trained: PyTree
    sparsity: float
    metrics: PyTree


def iterative_pruning(
    train_fn: TrainFn,
    init_params: PyTree,
    *,
    rate: float = 0.2,
    rounds: int = 5,
    score: Callable[..., PyTree] = scores.magnitude,
    scope: Literal["layer", "global"] = "layer",
    where: tree_lib.Where | None = None,
    output: tree_lib.Where | None = None,
    output_rate: float | None = None,
    select: str | None = None,
    stop_density: float = 0.0,
    rng: Key[Array, ""],
) -> list[Ticket]:
    """Finds ever sparser tickets: each round trains, removes a share of what is left, and rewinds the rest.

        theta_r = train(w_0 * mask_r),  mask_{r+1} = the round(kept_r (1 - rate)) best-scored of mask_r,  mask_0 = 1

    A weight that was removed never comes back; at least one is left (of each leaf, or of all). Ticket 0 is dense.

    The counts are known before anything is trained, so that under `jax.vmap` all rounds of several seeds run at once;
    then jit `train_fn`, not the loop, which would compile the training again for each round.

    Costs rounds + 1 trainings, and a selection (`steelyard.selection`) a round; nothing is gathered. Three trees of
    parameters are kept for each ticket.

    Args:
      train_fn: `(params, masks, rng) -> (trained, early, metrics)`: trains with the masks enforced, as `optim.sparse`
        does. `early` of the first training, which is dense, is what tickets are rewound to; `None`: to `init_params`.
      init_params: where the dense network starts.
      rate: the share of the remaining weights that a round removes, in (0, 1).
      rounds: of pruning; there is one more training.
      score: of the trained parameters, a tree like them; the lowest go. A function with an argument `init`, such as
        `scores.magnitude_increase`, also gets the weights that tickets are rewound to.
      scope: whether weights compete within a leaf or all together; all are then fewer than 2^31.
      where: the leaves that are pruned; by default those with two axes or more.
      output: which of these are output layers, for scope "layer"; they lose `output_rate`.
      output_rate: in [0, 1); by default half of `rate`.
      select: the name of a metric, such as a validation AUC. `train_fn` then returns checkpoints: `trained` and
        `metrics`, which is a dict, have a leading axis, and the one with the highest value is taken, the first on ties.
        NaN is never taken if there is a number.
      stop_density: stops at the first ticket of at most this density.
      rng: a key; the number of the round is folded in.

    Returns:
      The tickets, from dense to sparse: rounds + 1, or fewer with `stop_density`.

    Raises:
      ValueError: an argument is out of range, or unknown; `output_rate` without `output`, or `output` with scope
        "global"; scores that do not have the shape of the parameters; metrics without `select`.

    Source: The Lottery Ticket Hypothesis (2019, Frankle and Carbin), where rate is 0.2 and half of that in the output
    layer; `select` and `scores.magnitude_increase`: Class-dependent Compression (2019, Entezari and Saukh).
    """
    choices.require_within("rate", rate, "(0, 1)")
    rounds = choices.require_count("rounds", rounds, "[0, inf)")
    choices.require("scope", scope, SCOPES)
    choices.require_within("stop_density", stop_density, "[0, 1]")
    chosen = prunable.selected(init_params, where)
    rates = _rates(init_params, chosen, rate, scope, output, output_rate)
    masks = everything(init_params, chosen)
    sizes = [math.prod(np.shape(mask)) for mask in jax.tree.leaves(masks)]
    kept, shares = (sizes, rates) if scope == "layer" else ([sum(sizes)], [rate])
    start, tickets = init_params, []
    for i in range(rounds + 1):
        params = rewind(start, masks)
        trained, early, metrics = train_fn(params, masks, jax.random.fold_in(rng, i))
        start = early if i == 0 and early is not None else start
        if select is not None:
            trained, metrics = _best(trained, metrics, select)
        density = sum(kept) / max(sum(sizes), 1)
        tickets.append(Ticket(masks, params, trained, 1 - density, metrics))
        if i == rounds or density <= stop_density:
            break
        kept = [min(count, max(1, round(count * (1 - share)))) for count, share in zip(kept, shares, strict=True)]
        masks = best_scored(_scored(score, trained, start), masks, kept if scope == "layer" else kept[0])
    return tickets


def rewind(start: PyTree, masks: PyTree) -> PyTree:
    """Weights under their masks as they were at the start, bit for bit; zeros elsewhere.

    Args:
      start: parameters, of the initialization or an early step; of another initialization for a control.
      masks: a tree like them; a leaf whose mask is `None` is set back as a whole.

    Raises:
      ValueError: a mask does not have the shape of its leaf.
    """
    _check_shapes("start", start, masks)
    return masks_lib.apply(start, masks)


def accept(fn_before: Num[Array, "..."], fn_now: Num[Array, "..."], tolerance: float = 0.0) -> Bool[Array, "..."]:
    """Whether a ticket misses few enough examples of the class that matters: FN_now <= (1 + tolerance) FN_before.

    The last of the tickets that is accepted is the one to keep.

    Args:
      fn_before: false negatives of the dense network.
      fn_now: false negatives of the ticket.
      tolerance: the share by which they may rise; at least 0.

    Raises:
      ValueError: `tolerance` is negative.

    Source: Class-dependent Compression of Deep Neural Networks (2019, Entezari and Saukh).
    """
    choices.require_within("tolerance", tolerance, "[0, inf)")
    return jnp.asarray(fn_now) <= (1 + tolerance) * jnp.asarray(fn_before)


def everything(params: PyTree, chosen: PyTree) -> PyTree:
    """Masks that keep all of the chosen leaves; `None` for the others."""
    return jax.tree.map(
        lambda keep, w: jnp.ones_like(w, bool) if keep else None, chosen, params, is_leaf=tree_lib.is_none
    )


@jax.jit
def best_scored(score_tree: PyTree, masks: PyTree, kept: list[int] | int) -> PyTree:
    """The best of what the masks keep: so many of each leaf, or of all together.

    Raises:
      ValueError: a score does not have the shape of its mask.
    """
    _check_shapes("score", score_tree, masks)
    candidates = jax.tree.map(
        lambda mask, x: None if mask is None else selection.among(x, mask), masks, score_tree, is_leaf=tree_lib.is_none
    )
    if not isinstance(kept, list):
        return selection.top_mask(candidates, kept)
    leaves, structure = jax.tree.flatten(candidates)
    return structure.unflatten([selection.keep_largest(x, k) for x, k in zip(leaves, kept, strict=True)])


def _rates(params, chosen, rate, scope, output, output_rate) -> list[float]:
    """What each of the chosen leaves loses in a round."""
    if output is None:
        if output_rate is not None:
            raise ValueError(f"output_rate={output_rate} needs output, the path of the output layer")
        return [rate for keep in jax.tree.leaves(chosen) if keep]
    if scope == "global":
        raise ValueError(f"output={output!r} is for scope='layer'; with scope='global' leave that layer out by where")
    output_rate = rate / 2 if output_rate is None else output_rate
    choices.require_within("output_rate", output_rate, "[0, 1)")
    last = tree_lib.select(params, output, name="output")
    pairs = zip(jax.tree.leaves(chosen), jax.tree.leaves(last), strict=True)
    return [output_rate if is_output else rate for keep, is_output in pairs if keep]


def _scored(score: Callable[..., PyTree], trained: PyTree, start: PyTree) -> PyTree:
    return score(trained, init=start) if "init" in inspect.signature(score).parameters else score(trained)


def _best(trained: PyTree, metrics: PyTree, select: str) -> tuple[PyTree, PyTree]:
    choices.require("select", select, metrics)
    values = metrics[select]
    best = jnp.argmax(jnp.where(jnp.isnan(values), -jnp.inf, values))
    return jax.tree.map(lambda x: x[best], (trained, metrics))


def _check_shapes(name: str, values: PyTree, masks: PyTree) -> None:
    def check(path, mask, x):
        if mask is not None and jnp.shape(x) != jnp.shape(mask):
            raise ValueError(f"{name}: {path} has shape {jnp.shape(x)}, but its mask {jnp.shape(mask)}")

    tree_lib.map_with_path(check, masks, values, is_leaf=tree_lib.is_none)
