"""Adam in a low-rank subspace for the direction of each matrix, in full for the length of its columns.

A matrix is split as in weight normalization: the *direction* gradient is what of it is orthogonal to the columns, the
*magnitude* gradient is what lies along them. The former is projected onto its own leading singular vectors (GaLore),
so that the moments of Adam are small; the latter is one number a column.

Memory: for a matrix `[in, out]` and rank r the state has 2 r min(in, out) + r max(in, out) + 2 out entries, Adam's
2 in out. Time: one singular value decomposition of each matrix every `update_every` steps.

Source: Gradient Weight-normalized Low-rank Projection for Efficient LLM Training (2025, Huang et al.).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from steelyard import choices, precision

PyTree = Any


class GradNormLowRankState(NamedTuple):
    """State of `grad_norm_low_rank`; every array is float32 at least.

    Attributes:
      direction: GaLore's: the projector of each matrix, `[in, r]` or `[out, r]`, and the moments of Adam, `[r, out]` or
        `[in, r]`; of other leaves the moments in full.
      magnitude: the moments of Adam for the columns of each matrix, `[1, out]`, without entries for other leaves.
    """

    direction: optax.contrib.GaLoreState
    magnitude: optax.ScaleByAdamState


class _Split(NamedTuple):
    """A matrix W and its gradient G, by columns, float32: n = |W|, V = W / n, along = <G, V>, across = G - V along."""

    norm: Float[Array, "1 out"]
    along: Float[Array, "1 out"]
    across: Float[Array, "in out"]


class _Absent(NamedTuple):
    """Stands for `None` where GaLore, which takes no `None`, sees the tree."""


def grad_norm_low_rank(
    learning_rate: optax.ScalarOrSchedule,
    *,
    rank: int = 128,
    update_every: int = 200,
    scale: float = 0.25,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Adam for the direction of each matrix in a subspace of rank r, and for the lengths of its columns.

    For a matrix W `[in, out]` with gradient G, norms by columns, in step t = 1, 2, ...:

        n = |W|,  V = W / n,  g = sum(G V) over each column,  G_v = G - V g
        if (t - 1) mod update_every = 0:  P = the first r left (in >= out) or right singular vectors of G_v
        R = P' G_v  or  G_v P,  D = scale P Adam(R)  or  scale Adam(R) P'
        v = W - lr D,  m = n - lr Adam(g)
        W <- m v / |v| - lr weight_decay W

    with r = min(rank, in, out). The moments are kept when P changes. A column of zeros has no direction: it becomes v,
    and the moments of its length stay. If m is negative the column turns round. Leaves that are no matrices (those of
    stacked layers too) get plain Adam and no decay. Since W is not linear in the learning rate there is no
    `scale_by_` form. Singular vectors are defined up to their sign; nothing depends on it until P changes. With
    `optax.inject_hyperparams`, name `rank` and `update_every` as static arguments.

    Args:
      learning_rate: a number or a schedule, read at count t - 1.
      rank: of the subspace.
      update_every: steps between two decompositions.
      scale: of the direction's step.
      b1: decay rate of the first moments, in [0, 1).
      b2: decay rate of the second moments, in [0, 1).
      eps: added to the roots of the second moments.
      weight_decay: decoupled decay of the matrices.

    Returns:
      A transformation with the state `GradNormLowRankState`; `update` needs `params`.

    Raises:
      ValueError: a hyperparameter out of its range, or `update` without params.

    Source: Gradient Weight-normalized Low-rank Projection (2025, Huang et al.), section 3. The authors' program takes
    the moments of the whole G instead of G_v, and forgets the length after each step; here the rule is as written.
    """
    _check(rank, update_every, scale, b1, b2, eps, weight_decay)
    adam = optax.scale_by_adam(b1, b2, eps)
    galore = optax.contrib.scale_by_galore(rank, update_every, scale, adam)

    def init(params):
        params = _hide_none(jax.tree.map(precision.wide, params))
        lengths = jax.tree.map(lambda p: jnp.zeros((1, p.shape[1]) if p.ndim == 2 else (0,), p.dtype), params)
        return _show_none(GradNormLowRankState(galore.init(params), adam.init(lengths)))

    def update(updates, state, params=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("update needs params: tx.update(grads, state, params)")
        if not jax.tree.leaves(updates):  # which GaLore cannot take
            return updates, state
        step_size = learning_rate(state.magnitude.count) if callable(learning_rate) else learning_rate
        state = _hide_none(state)
        wide_params, grads = (_hide_none(jax.tree.map(precision.wide, tree)) for tree in (params, updates))

        splits = jax.tree.map(_split, wide_params, grads)
        across, direction_state = galore.update(_field(splits, "across"), state.direction)
        along, magnitude_state = adam.update(_field(splits, "along"), state.magnitude)
        magnitude_state = _keep_without_direction(magnitude_state, state.magnitude, _field(splits, "norm"))

        moved = jax.tree.map(
            lambda p, split, d, m: _move(p, split.norm, d, m, step_size, weight_decay),
            wide_params, splits, across, along,
        )  # fmt: skip
        moved = jax.tree.map(lambda u, g: u.astype(g.dtype), _show_none(moved), updates)
        return moved, _show_none(GradNormLowRankState(direction_state, magnitude_state))

    return optax.GradientTransformationExtraArgs(init, update)


def _split(p: Array, g: Array) -> _Split:
    """For a leaf that is no matrix all of the gradient lies across."""
    if p.ndim != 2:
        nothing = jnp.zeros((0,), p.dtype)
        return _Split(nothing, nothing, g)
    norm = _column_norms(p)
    unit = p / jnp.where(norm > 0, norm, 1)
    along = jnp.sum(g * unit, 0, keepdims=True)
    return _Split(norm, along, g - unit * along)


def _move(p, norm, direction, magnitude, step_size, weight_decay) -> Array:
    """The update of a leaf, whose shape tells whether it is a matrix."""
    if p.ndim != 2:
        return -step_size * direction
    v = p - step_size * direction
    length = _column_norms(v)
    has_direction = (norm > 0) & (length > 0)
    factor = jnp.where(has_direction, (norm - step_size * magnitude) / jnp.where(has_direction, length, 1), 1)
    return factor * v - p - step_size * weight_decay * p


def _column_norms(p: Float[Array, "in out"]) -> Float[Array, "1 out"]:
    return jnp.sqrt(jnp.sum(jnp.square(p), 0, keepdims=True))


def _keep_without_direction(new: optax.ScaleByAdamState, old: optax.ScaleByAdamState, norms: PyTree):
    """The moments of columns of zeros stay as they were."""

    def kept(new, old):
        return jax.tree.map(lambda n, o, norm: jnp.where(norm > 0, n, o), new, old, norms)

    return new._replace(mu=kept(new.mu, old.mu), nu=kept(new.nu, old.nu))


def _field(splits: PyTree, name: str) -> PyTree:
    return jax.tree.map(lambda split: getattr(split, name), splits, is_leaf=lambda x: isinstance(x, _Split))


def _hide_none(tree: PyTree) -> PyTree:
    return _replace(tree, lambda x: x is None, _Absent())


def _show_none(tree: PyTree) -> PyTree:
    return _replace(tree, lambda x: isinstance(x, _Absent), None)


def _replace(tree: PyTree, is_old: Callable[[Any], bool], new: Any) -> PyTree:
    return jax.tree.map(lambda x: new if is_old(x) else x, tree, is_leaf=is_old)


def _check(rank, update_every, scale, b1, b2, eps, weight_decay) -> None:
    for name, value, interval in (
        ("rank", rank, "[1, inf)"),
        ("update_every", update_every, "[1, inf)"),
        ("scale", scale, "[0, inf)"),
        ("b1", b1, "[0, 1)"),
        ("b2", b2, "[0, 1)"),
        ("eps", eps, "[0, inf)"),
        ("weight_decay", weight_decay, "[0, inf)"),
    ):
        choices.require_within(name, value, interval)
