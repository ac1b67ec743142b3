"""Parameter-efficient sparse training: the weight is frozen, and low-rank factors train its update and its mask.

Source: Parameter-Efficient Sparsity for Large Language Models Fine-Tuning (2022, Li et al.).
"""

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from steelyard import choices, precision
from steelyard import tree as tree_lib
from steelyard.reparam import base
from steelyard.sparsity import masks, prunable

PyTree = Any


class Factors(NamedTuple):
    """What is stored of a weight [..., in, out] and trains; float32 at least.

    Attributes:
      u, v: of the update, [..., in, rank] and [..., rank, out].
      a, b: of the importance, [..., in, mask_rank] and [..., mask_rank, out].
      row, col: the importance of whole rows [..., in] and columns [..., out].
    """

    u: Float[Array, "... in rank"]
    v: Float[Array, "... rank out"]
    a: Float[Array, "... in mask_rank"]
    b: Float[Array, "... mask_rank out"]
    row: Float[Array, "... in"]
    col: Float[Array, "... out"]


class PSTState(NamedTuple):
    """State of `pst`.

    Attributes:
      frozen: the parameters as `init` got them; none of them trains.
      sparsity: that of the next step, a float32 scalar.
    """

    frozen: PyTree
    sparsity: Float[Array, ""]


def pst_weight(
    w: Float[Array, "... in out"],
    u: Float[Array, "... in rank"],
    v: Float[Array, "... rank out"],
    a: Float[Array, "... in mask_rank"],
    b: Float[Array, "... mask_rank out"],
    row: Float[Array, "... in"],
    col: Float[Array, "... out"],
    sparsity: float | Float[Array, ""],
    *,
    beta: float = 1.0,
    alpha1: float = 1.0,
    alpha2: float = 1.0,
) -> Float[Array, "... in out"]:
    """A weight with a low-rank update, masked by its magnitude and a learned importance.

        W = w + beta u v,  S = |W| + alpha1 a b + alpha2 (row_i + col_j),  output = W top(S)

    where top keeps the largest 1 - sparsity of all entries (`masks.topk_mask`). The mask passes gradients straight
    through: with g that of the output, dS = g W and dW = g top(S) + dS sign(W), for every entry; `w` gets none.

    Args:
      w: the frozen weight.
      u, v: its update.
      a, b: the importance of its entries.
      row, col: the importance of its rows and columns.
      sparsity: the fraction removed, in [0, 1]; may be traced.
      beta: of the update.
      alpha1: of the importance of entries.
      alpha2: of the importance of rows and columns.

    Returns:
      Of the shape and dtype of `w`; computed in float32 at least.

    Raises:
      ValueError: shapes do not fit, or a concrete `sparsity` lies outside [0, 1].

    Cost: two products of rank `rank` and `mask_rank`, and a selection.

    Source: Parameter-Efficient Sparsity (2022, Li et al.); its gradients for the straight-through mask.
    """
    w = jnp.asarray(w)
    _check_shapes(w.shape, Factors(u, v, a, b, row, col))
    updated, scores = _updated(jax.lax.stop_gradient(w), Factors(u, v, a, b, row, col), (beta, alpha1, alpha2))
    return _masked(updated, scores, masks.topk_mask(scores, sparsity)).astype(w.dtype)


# Compiled as one piece wherever it is called, and kept apart from what uses it: products that are fused differently
# differ in the last bit, and then the mask in an entry.
@jax.jit
def _updated(w, factors: Factors, strengths) -> tuple[Array, Array]:
    """The weight with its update, and what every entry of it is worth."""
    u, v, a, b, row, col = factors
    beta, alpha1, alpha2 = strengths
    updated = precision.wide(w) + beta * (u @ v)
    lines = row[..., :, None] + col[..., None, :]
    return jax.lax.optimization_barrier((updated, jnp.abs(updated) + alpha1 * (a @ b) + alpha2 * lines))


@jax.custom_vjp
def _masked(weight, scores, mask):
    del scores
    return masks.apply(weight, mask)


def _masked_forward(weight, scores, mask):
    return _masked(weight, scores, mask), (weight, mask)


def _masked_backward(residuals, g):
    weight, mask = residuals
    return masks.apply(g, mask), g * weight, None


_masked.defvjp(_masked_forward, _masked_backward)


def pst(
    sparsity: float | Callable[[Any], Any],
    *,
    rank: int = 8,
    mask_rank: int = 8,
    beta: float = 1.0,
    alpha1: float = 1.0,
    alpha2: float = 1.0,
    where: tree_lib.Where | None = None,
) -> base.Reparam:
    """Freezes the parameters and trains, for each selected weight, the factors of `pst_weight`.

    u and a start at N(0, 1), everything else at zero, so that training begins with magnitude pruning. A selected weight
    is stored as `Factors`, r (in + out) + r' (in + out) + in + out numbers; all other parameters are frozen too and
    stand in the state (`reparam.only` leaves them to the optimizer: `only(pst(0.9), r".*/kernel")`).

    Args:
      sparsity: the fraction removed, a number in [0, 1] or a schedule step -> sparsity, such as
        `schedules.polynomial`.
      rank: of the update.
      mask_rank: of the importance.
      beta, alpha1, alpha2: of `pst_weight`.
      where: which leaves; by default float leaves with two axes or more. Axes before the last two are stacks.

    Returns:
      A reparameterization with the state `PSTState`; the model sees `pst_weight` and, elsewhere, what was there.
      `finish` stores arrays with zeros.

    Raises:
      ValueError: a rank below 1 or a sparsity out of range; at `init`, a pattern matches nothing, or a selected leaf
        has less than two axes.

    Cost: see `pst_weight`, for each weight and step. Gradients and moments exist for the factors alone.

    Source: Parameter-Efficient Sparsity (2022, Li et al.).
    """
    rank = choices.require_count("rank", rank, "[1, inf)")
    mask_rank = choices.require_count("mask_rank", mask_rank, "[1, inf)")
    if not callable(sparsity):
        choices.require_within("sparsity", sparsity, "[0, 1]")

    def level(step):
        return jnp.asarray(sparsity(step) if callable(sparsity) else sparsity, jnp.float32)

    def init(params, rng):
        def leaf(path, w, is_chosen):
            return _factors(path, w, rank, mask_rank, rng) if is_chosen else None

        stored = tree_lib.map_with_path(leaf, params, prunable.selected(params, where))
        return stored, PSTState(params, level(0))

    def apply(stored, state, *, step, rng, train):
        del step, rng, train

        def leaf(w, factors):
            if factors is None:
                return w
            return pst_weight(w, *factors, state.sparsity, beta=beta, alpha1=alpha1, alpha2=alpha2)

        return jax.tree.map(leaf, jax.lax.stop_gradient(state.frozen), stored)

    def update(state, stored, grads, *, step, rng):
        del stored, grads, rng
        return state._replace(sparsity=level(step + 1)) if callable(sparsity) else state

    return base.Reparam(init, apply, update)


def _factors(path: str, w: Array, rank: int, mask_rank: int, rng: Key[Array, ""]) -> Factors:
    if jnp.ndim(w) < 2:
        raise ValueError(f"{path} has shape {jnp.shape(w)}: low-rank factors need two axes")
    *stack, rows, columns = w.shape
    dtype = precision.wide(w).dtype
    keys = jax.random.split(jax.random.fold_in(rng, zlib.crc32(path.encode())))
    u, a = (jax.random.normal(key, (*stack, rows, r), dtype) for key, r in zip(keys, (rank, mask_rank), strict=True))
    v, b, row, col = (
        jnp.zeros((*stack, *shape), dtype) for shape in ((rank, columns), (mask_rank, columns), (rows,), (columns,))
    )
    return Factors(u, v, a, b, row, col)


def _check_shapes(shape: tuple[int, ...], factors: Factors) -> None:
    if len(shape) < 2:
        raise ValueError(f"w of shape {shape} has no rows and columns: two axes are needed")
    *stack, rows, columns = shape
    rank, mask_rank = jnp.shape(factors.u)[-1:], jnp.shape(factors.a)[-1:]
    needed = Factors(
        (*stack, rows, *rank),
        (*stack, *rank, columns),
        (*stack, rows, *mask_rank),
        (*stack, *mask_rank, columns),
        (*stack, rows),
        (*stack, columns),
    )
    for name, given, expected in zip(Factors._fields, map(jnp.shape, factors), needed, strict=True):
        if given != expected:
            raise ValueError(f"{name} of shape {given} does not fit w of shape {shape}: it must be {expected}")
