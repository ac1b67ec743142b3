"""M-ConFIG: a conflict-free direction of K momenta, while each step back-propagates one loss (2024, Liu et al.).

ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks, the section on M-ConFIG and its algorithm.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from steelyard import choices, precision
from steelyard.aggregate import stacked as stacked_lib
from steelyard.aggregate.conflict_free import conflict_free

PyTree = Any


class MomentumConflictFreeState(NamedTuple):
    """State of `momentum_conflict_free`; trees are in float32 at least.

    Attributes:
      momenta: decayed mean of each task's gradients, leaves `[K, ...]`.
      counts: how many gradients each task has given, int32.
      step: how many updates were not zero, int32.
      mean: decayed mean of the pseudo-gradients, a tree like the parameters.
      square: decayed mean of their squares, a tree like the parameters.
      inner: state of the aggregator.
    """

    momenta: PyTree
    counts: Int[Array, "K"]
    step: Int[Array, ""]
    mean: PyTree
    square: PyTree
    inner: PyTree


def momentum_conflict_free(
    num_tasks: int,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    aggregator: optax.GradientTransformationExtraArgs | None = None,
) -> stacked_lib.Aggregator:
    """A direction that conflicts with no task's momentum, from fresh gradients of one or a few of the tasks a step.

    With fresh gradients `g_i` of the tasks i in `indices`, c_i counting those of task i so far,

        m_i <- b1 m_i + (1 - b1) g_i                     for i in indices
        d = aggregator(m_k / (1 - b1^c_k) for all k)
        mean' = (1 - b1^t) d,   pg = (mean' - b1 mean) / (1 - b1),   mean <- mean'
        square <- b2 square + (1 - b2) pg^2
        update = d / (sqrt(square / (1 - b2^t)) + eps)

    The pseudo-gradient `pg` is the gradient whose Adam momentum would be d. Until every task has given a gradient the
    update is zero and t, the number of updates since, stays 0. The update has the shape of Adam's: chain it with
    `optax.scale_by_learning_rate`, not with an optimizer that has moments. One gradient per task and step is ConFIG on
    momenta with Adam's second moment.

    Cost: as many backward passes as there are fresh gradients, and K + 2 times the parameters of state. Which loss is
    back-propagated is for the caller to decide, as `steelyard.aggregate.value_and_grad_cyclic` does.

    Its update takes the extra arguments `indices`, distinct task numbers below K, one per fresh gradient, in any order
    (repeated or larger ones give undefined results; without the argument there must be K gradients, in order), and
    `num_losses`, which is only compared with `num_tasks`. Others go on to the aggregator, `losses` only if there is one
    for each task.

    Args:
      num_tasks: K.
      b1: decay of the momenta, in [0, 1).
      b2: decay of the squares, in [0, 1).
      eps: added to the root.
      aggregator: makes one direction of the K momenta; `conflict_free()` if `None`.

    Returns:
      An aggregator with a `MomentumConflictFreeState`.

    Raises:
      ValueError: an argument out of its range; while tracing, the fresh gradients are more than K or not as many as
        the indices, or `num_losses` is not K.
    """
    _check(num_tasks, b1, b2, eps)
    if aggregator is None:
        aggregator = conflict_free()

    def init(params):
        zeros = functools.partial(stacked_lib.wide_zeros, params)
        counts, step = jnp.zeros((num_tasks,), jnp.int32), jnp.zeros((), jnp.int32)
        return MomentumConflictFreeState(zeros(num_tasks), counts, step, zeros(), zeros(), aggregator.init(params))

    def update(fresh, state, params=None, *, indices=None, losses=None, num_losses=num_tasks, **extra_args):
        rows = stacked_lib.count_rows(fresh)
        at = slice(None) if indices is None else jnp.asarray(indices)
        _check_rows(None if indices is None else at, rows, num_tasks, num_losses)
        counts = state.counts.at[at].add(1)
        momenta = jax.tree.map(
            lambda m, g: m.at[at].set(b1 * m[at] + (1 - b1) * precision.wide(g)), state.momenta, fresh
        )
        if losses is not None and rows == num_tasks:
            extra_args["losses"] = jnp.zeros_like(losses).at[at].set(losses)
        unbiased = jax.tree.map(lambda m: m / _correction(b1, jnp.maximum(counts, 1), m), momenta)
        direction, inner = aggregator.update(unbiased, state.inner, params, **extra_args)
        update, moments = _adam_shaped(direction, state, b1, b2, eps)
        complete = jnp.all(counts > 0)
        moved = state._replace(**moments, inner=inner)
        kept = jax.tree.map(lambda new, old: jnp.where(complete, new, old), moved, state)
        update = jax.tree.map(lambda u, g: jnp.where(complete, u, 0).astype(g.dtype), update, fresh)
        return update, kept._replace(momenta=momenta, counts=counts)

    return stacked_lib.Aggregator(init, update)


def value_and_grad_cyclic(
    losses: Sequence[Callable[..., Float[Array, ""]]], aggregator: optax.GradientTransformationExtraArgs
) -> Callable[..., tuple[Float[Array, ""], PyTree, PyTree]]:
    """Like `jax.value_and_grad`, of one of K losses a step, in turn, for an aggregator that takes `indices`.

    All K passes are compiled, as the branches of one switch, and only that of loss `step % K` is run. Under `jax.vmap`
    this holds as long as `step` is the same for the whole batch; with different steps all branches are run.

    Args:
      losses: functions `(params, *args) -> scalar`, of one dtype.
      aggregator: `momentum_conflict_free(K)`, alone or in a chain; its `init` takes the parameters.

    Returns:
      `f(params, state, step, *args) -> (loss, update, state)`: the loss of this step before the update. `step` counts
      from 0, and `state` is the aggregator's.

    Raises:
      ValueError: `losses` is not a sequence of functions, or empty; while tracing, `aggregator` is for another number
        of tasks.
    """
    if callable(losses) or not losses or not all(callable(loss) for loss in losses):
        raise ValueError(f"losses must be a sequence of at least one function (params, *args) -> scalar, got {losses}")
    branches = [jax.value_and_grad(loss) for loss in losses]

    def f(params, state, step, *args):
        index = jnp.asarray(step) % len(branches)
        loss, grads = jax.lax.switch(index, branches, params, *args)
        update, state = aggregator.update(
            jax.tree.map(lambda g: g[None], grads),
            state,
            params,
            indices=index[None],
            losses=jax.lax.stop_gradient(loss)[None],
            num_losses=len(branches),
        )
        return loss, update, state

    return f


def _check(num_tasks: int, b1: float, b2: float, eps: float) -> None:
    choices.require_count("num_tasks", num_tasks, "[1, inf)")
    choices.require_within("b1", b1, "[0, 1)")
    choices.require_within("b2", b2, "[0, 1)")
    choices.require_within("eps", eps, "(0, inf)")


def _check_rows(indices: Int[Array, "n"] | None, rows: int, num_tasks: int, num_losses: int) -> None:
    if num_losses != num_tasks:
        raise ValueError(f"momentum_conflict_free was made for {num_tasks} tasks, but {num_losses} losses take turns")
    if indices is None and rows != num_tasks:
        raise ValueError(
            f"momentum_conflict_free was made for {num_tasks} tasks: {rows} gradients need the extra argument indices, "
            "which says of which tasks they are"
        )
    if indices is not None and (indices.shape != (rows,) or rows > num_tasks):
        raise ValueError(
            f"momentum_conflict_free was made for {num_tasks} tasks and needs one distinct index per fresh gradient: "
            f"indices have shape {indices.shape}, but there are {rows} gradients"
        )


def _adam_shaped(
    direction: PyTree, state: MomentumConflictFreeState, b1: float, b2: float, eps: float
) -> tuple[PyTree, dict[str, PyTree]]:
    """The update along a direction, and the fields of the state that change with it."""

    def moment(mean, last, square):
        return b2 * square + (1 - b2) * jnp.square((mean - b1 * last) / (1 - b1))

    step = state.step + 1
    mean = jax.tree.map(lambda d: d * _correction(b1, step, d), direction)
    square = jax.tree.map(moment, mean, state.mean, state.square)
    update = jax.tree.map(lambda d, v: d / (jnp.sqrt(v / _correction(b2, step, v)) + eps), direction, square)
    return update, {"step": step, "mean": mean, "square": square}


def _correction(decay: float, count: Int[Array, "..."], like: Array) -> Array:
    """`1 - decay^count`, in the dtype of `like`; with one count per row, along its leading axis."""
    correction = (1 - decay**count).astype(like.dtype)
    return correction.reshape(correction.shape + (1,) * (like.ndim - correction.ndim))
