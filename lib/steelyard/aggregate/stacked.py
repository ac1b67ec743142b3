"""What every aggregation rule is made of: the `Aggregator` type, Gram matrices, weighted sums, and two builders.

A *stacked* tree holds K gradients (of tasks, classes, workers or clients): each leaf is `[K, ...]`, and *row* k is
gradient k. Nearly every rule is `update = sum_k w_k g_k` with weights that depend on the losses and a state, or also on
the Gram matrix `G[k, l] = <g_k, g_l>` over all leaves. Such a rule is one small function, `from_losses` or `from_gram`
makes an aggregator of it, and `steelyard.aggregate.value_and_grad` chooses how to run it.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float
from optax.experimental import aggregating

from steelyard import precision
from steelyard import tree as tree_lib

PyTree = Any
AxisName = Hashable | Sequence[Hashable]
LossRule = Callable[[Float[Array, "K"], PyTree], tuple[Float[Array, "K"], PyTree]]
GramRule = Callable[[Float[Array, "K K"], Float[Array, "K"] | None, PyTree], tuple[Float[Array, "K"], PyTree]]


class Aggregator(aggregating.Aggregator):
    """An optax aggregator that may say how its weights come about.

    It is a gradient transformation whose `update(stacked, state, params=None, *, losses=None, **extra_args)` takes
    leaves `[K, ...]` and returns leaves without that axis, so that `optax.chain(aggregator, optimizer)` is a multi-task
    optimizer. `optax.chain` returns a transformation without the two attributes below: take them before chaining.

    Attributes:
      init: `params -> state`, where `params` has no K axis.
      update: as above.
      weights: `(losses, state) -> (weights, state)`, set for rules that need no gradients; else `None`.
      gram_weights: `(gram, losses, state) -> (weights, state)`, set for rules that need the Gram matrix alone of the
        gradients; else `None`.
    """

    weights: LossRule | None = None
    gram_weights: GramRule | None = None

    def __new__(cls, init, update, *, weights=None, gram_weights=None):
        self = super().__new__(cls, init, update)
        self.weights = weights
        self.gram_weights = gram_weights
        return self


def count_rows(stacked: PyTree) -> int:
    """The K that all leaves of a stacked tree share.

    Raises:
      ValueError: two leaves disagree, a leaf is a scalar, or there is no leaf or no row.
    """
    leaves = tree_lib.flatten(stacked)
    if not leaves:
        raise ValueError("stacked has no array leaves, so the number of gradients is not known")
    (first_path, first), *_ = leaves
    for path, leaf in leaves:
        if jnp.ndim(leaf) == 0 or jnp.ndim(first) == 0 or leaf.shape[0] != first.shape[0]:
            raise ValueError(
                "stacked leaves must share their leading axis K: "
                f"{first_path!r} has shape {jnp.shape(first)}, {path!r} has shape {jnp.shape(leaf)}"
            )
    if first.shape[0] == 0:
        raise ValueError(f"stacked has no rows: {first_path!r} has shape {first.shape}")
    return first.shape[0]


def gram(
    stacked: PyTree,
    *,
    center: bool = False,
    mesh: jax.sharding.Mesh | None = None,
    specs: PyTree = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "K K"]:
    """Inner products of all pairs of rows, over all leaves: `G[k, l] = <g_k, g_l>`.

    Always float32, at the highest matrix-product precision. Norms outside 1e-19 to 1e19 leave the range of their
    squares. Under plain jit the compiler adds one all-reduce per sharded leaf; `mesh` and `specs` give exactly one.

    Args:
      stacked: leaves `[K, ...]`; `None` and masked leaves are skipped, a bare array is a tree.
      center: subtract the mean over K first. Rules that depend on differences alone need this: distances from a Gram
        matrix that is not centred lose all digits when the rows nearly agree.
      mesh: the mesh of the leaves, given together with `specs`.
      specs: a tree of `PartitionSpec` like `stacked`; the first entry of each is `None` (K is not sharded).
      axis_name: inside `jax.shard_map`, the mesh axes over which the coordinates are split: each device holds all K
        rows of its own part.

    Raises:
      ValueError: leaves with unequal K, `mesh` without `specs` or the reverse, both `mesh` and `axis_name`, or a spec
        that shards K.
    """
    return _sum_parts(lambda leaf: _leaf_gram(leaf, center), stacked, mesh, specs, axis_name)


def square_norms(
    stacked: PyTree,
    *,
    mesh: jax.sharding.Mesh | None = None,
    specs: PyTree = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "K"]:
    """The diagonal of `gram`, `|g_k|^2`, without the rest of it. Arguments and errors as there."""

    def partial(leaf):
        square = jnp.square(jnp.abs(precision.wide(leaf)))
        return jnp.sum(square, axis=tuple(range(1, leaf.ndim))).astype(jnp.float32)

    return _sum_parts(partial, stacked, mesh, specs, axis_name)


def finite_rows(
    stacked: PyTree,
    *,
    mesh: jax.sharding.Mesh | None = None,
    specs: PyTree = None,
    axis_name: AxisName | None = None,
) -> Bool[Array, "K"]:
    """Which rows can be worked with: those whose squared norm is finite in float32.

    That leaves out rows with NaN or infinite entries, and rows longer than 1.8e19. Arguments and errors as in `gram`.
    """
    return jnp.isfinite(square_norms(stacked, mesh=mesh, specs=specs, axis_name=axis_name))


def zero_rows(stacked: PyTree, valid: Bool[Array, "K"]) -> PyTree:
    """The stacked tree with zeros in the rows that are not valid, so that a weight of 0 really leaves them out."""
    return jax.tree.map(lambda leaf: jnp.where(_along_rows(valid, leaf), leaf, jnp.zeros((), leaf.dtype)), stacked)


def choose_rows(chosen: Bool[Array, "K"], these: PyTree, others: PyTree) -> PyTree:
    """A stacked tree with the rows that are chosen from `these` and the rest from `others`."""
    return jax.tree.map(lambda x, y: jnp.where(_along_rows(chosen, x), x, y), these, others)


def wide_zeros(params: PyTree, *leading: int) -> PyTree:
    """Zeros like the parameters, in float32 at least, with leading axes: for state that is accumulated."""
    return jax.tree.map(lambda p: jnp.zeros((*leading, *jnp.shape(p)), precision.wide(p).dtype), params)


def matvec(matrix: Float[Array, "K K"], vector: Float[Array, "K"]) -> Float[Array, "K"]:
    """At full float32 precision on every device."""
    return jnp.matmul(matrix, vector, precision=jax.lax.Precision.HIGHEST)


def pairwise_sqdist(gram: Float[Array, "K K"], valid: Bool[Array, "K"] | None = None) -> Float[Array, "K K"]:
    """Squared distances of all pairs of rows, `max(G_kk + G_ll - 2 G_kl, 0)`.

    Args:
      gram: of the rows, or of the rows minus any common vector, which keeps more digits.
      valid: rows that count; distances to and from the others are infinite, and so are those too large for float32.
    """
    square = jnp.diagonal(gram)
    distances = jnp.maximum(square[:, None] + square - 2 * gram, 0)
    distances = jnp.where(jnp.isnan(distances), jnp.inf, distances)
    distances = jnp.where(jnp.eye(gram.shape[0], dtype=bool), 0, distances)
    return distances if valid is None else jnp.where(valid[:, None] & valid, distances, jnp.inf)


def _along_rows(vector: Array, leaf: Array) -> Array:
    return vector.reshape(vector.shape + (1,) * (leaf.ndim - 1))


def _leaf_gram(leaf: Float[Array, "K ..."], center: bool) -> Float[Array, "K K"]:
    """The part of one leaf, contracted without a reshape: that would gather a sharded leaf."""
    wide = jnp.promote_types(leaf.dtype, jnp.float32)
    if center:
        leaf = leaf.astype(wide)
        leaf = leaf - leaf.mean(axis=0)
    axes = tuple(range(1, leaf.ndim))
    product = jax.lax.dot_general(
        leaf, leaf, ((axes, axes), ((), ())), precision=jax.lax.Precision.HIGHEST, preferred_element_type=wide
    )
    return product.astype(jnp.float32)


def _sum_parts(
    partial: Callable[[Array], Array],
    stacked: PyTree,
    mesh: jax.sharding.Mesh | None,
    specs: PyTree,
    axis_name: AxisName | None,
) -> Array:
    """The sum of `partial(leaf)`, itself a sum over coordinates, over the leaves and over the mesh."""
    count_rows(stacked)
    if (mesh is None) != (specs is None):
        raise ValueError(f"mesh and specs must be given together; mesh={mesh}, specs={specs}")
    if mesh is not None and axis_name is not None:
        raise ValueError(f"axis_name={axis_name!r} is for the inside of shard_map, mesh and specs are for its outside")
    if mesh is not None:
        return _sum_over_mesh(partial, stacked, mesh, specs)
    total = sum(partial(leaf) for leaf in jax.tree.leaves(stacked))
    return total if axis_name is None else jax.lax.psum(total, axis_name)


def _sum_over_mesh(partial, stacked: PyTree, mesh: jax.sharding.Mesh, specs: PyTree) -> Array:
    leaves = jax.tree.leaves(stacked)
    specs = jax.tree.leaves(specs, is_leaf=lambda spec: isinstance(spec, jax.sharding.PartitionSpec))
    _check_specs(leaves, specs)
    used = [_mesh_axes(spec) for spec in specs]
    summed = tuple(axis for axis in mesh.axis_names if any(axis in axes for axes in used))

    def local(leaves):
        total = jnp.zeros((), jnp.float32)
        for leaf, axes in zip(leaves, used, strict=True):
            # The sum over the mesh counts a leaf once per device that holds the same part of it.
            copies = math.prod(mesh.shape[axis] for axis in summed if axis not in axes)
            total = total + partial(leaf) / copies
        return jax.lax.psum(total, summed) if summed else total

    return jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=jax.sharding.PartitionSpec())(leaves)


def _check_specs(leaves: list[Array], specs: list[jax.sharding.PartitionSpec]) -> None:
    if len(specs) != len(leaves):
        raise ValueError(f"specs must be a tree like stacked: it has {len(specs)} specs for {len(leaves)} leaves")
    for spec in specs:
        if len(spec) > 0 and spec[0] is not None:
            raise ValueError(f"specs must not shard the leading axis K: the first entry of {spec} must be None")


def _mesh_axes(spec: jax.sharding.PartitionSpec) -> set[str]:
    entries = [(entry,) if isinstance(entry, str) else entry for entry in spec if entry is not None]
    return {axis for entry in entries for axis in entry}


def combine(weights: Float[Array, "K"], stacked: PyTree) -> PyTree:
    """The weighted sum of the rows, `sum_k weights_k g_k`.

    Accumulated in float32 (float64 for such leaves) and cast back to each leaf's dtype; needs no communication. A row
    that is not finite stays visible even if its weight is 0: a rule that leaves rows out must set them to zero first.

    Args:
      weights: one number per row.
      stacked: leaves `[K, ...]`; `None` leaves stay `None`.

    Returns:
      A tree like `stacked`, without the axis K.

    Raises:
      ValueError: `weights` and the leaves disagree on K.
    """
    rows = count_rows(stacked)
    if jnp.shape(weights) != (rows,):
        raise ValueError(f"weights have shape {jnp.shape(weights)} but there are {rows} gradients: expected ({rows},)")
    weights = jax.lax.stop_gradient(jnp.asarray(weights))

    def weighted_sum(leaf):
        wide = jnp.promote_types(leaf.dtype, jnp.float32)
        total = jnp.tensordot(weights.astype(wide), leaf.astype(wide), axes=1, precision=jax.lax.Precision.HIGHEST)
        return total.astype(leaf.dtype)

    return jax.tree.map(weighted_sum, stacked)


def from_gram(
    rule: GramRule,
    init: Callable[[], PyTree] | None = None,
    *,
    center: bool = False,
    num_tasks: int | None = None,
) -> Aggregator:
    """An aggregator from a rule on the Gram matrix.

    Its update takes the extra arguments `mesh` and `specs`, or `axis_name`, of `gram`.

    Args:
      rule: `(gram, losses, state) -> (weights, state)`; `losses` is `None` if the caller has none. In error texts it
        goes by the name of the function that made it.
      init: `() -> state`; an empty state if not given.
      center: give the rule the Gram matrix of the rows minus their mean. Then `gram_weights` is not set, because
        centring needs all rows at once.
      num_tasks: the K that the state is made for; any if `None`.
    """
    name = _maker(rule)
    rule = _constant_weights(rule)

    def checked(matrix, losses, state):
        check_losses(name, losses, matrix.shape[0], num_tasks)
        return rule(matrix, losses, state)

    def update(stacked, state, params=None, *, losses=None, mesh=None, specs=None, axis_name=None, **extra_args):
        del params, extra_args
        matrix = gram(stacked, center=center, mesh=mesh, specs=specs, axis_name=axis_name)
        weights, state = checked(matrix, losses, state)
        return combine(weights, stacked), state

    return Aggregator(_init_fn(init), update, gram_weights=None if center else checked)


def from_losses(
    rule: LossRule, init: Callable[[], PyTree] | None = None, *, num_tasks: int | None = None
) -> Aggregator:
    """An aggregator from a rule on the losses.

    Args:
      rule: `(losses, state) -> (weights, state)`. In error texts it goes by the name of the function that made it.
      init: `() -> state`; an empty state if not given.
      num_tasks: the K that the state is made for; any if `None`.
    """
    name = _maker(rule)
    rule = _constant_weights(rule)

    def checked(losses, state):
        check_losses(name, losses, jnp.size(losses), num_tasks)
        return rule(losses, state)

    def update(stacked, state, params=None, *, losses=None, **extra_args):
        del params, extra_args
        if losses is None:
            raise ValueError(f"{name} needs the losses: update(stacked, state, losses=...) with one loss per gradient")
        check_losses(name, losses, count_rows(stacked), num_tasks)
        weights, state = rule(losses, state)
        return combine(weights, stacked), state

    return Aggregator(_init_fn(init), update, weights=checked)


def from_distances(
    rule: Callable[[Float[Array, "K K"], Bool[Array, "K"]], Float[Array, "K"]],
    check: Callable[[int], None] | None = None,
    *,
    center: bool = True,
) -> Aggregator:
    """An aggregator that survives bad rows, from a rule on the Gram matrix of the good ones.

    A row is valid if `finite_rows` says so; the others become zero, in the Gram matrix and in the sum. With `center`,
    a common vector is subtracted first: the mean of those valid rows whose norm is at most the median one, so that
    neither what the rows share nor a huge row costs the distances their digits.

    Its update takes the extra arguments `mesh` and `specs`, or `axis_name`, of `gram`.

    Args:
      rule: `(gram, valid) -> weights`, 0 for rows that are not valid.
      check: `K -> None`, raises `ValueError` where the rule is impossible with K rows; called while tracing.
      center: `False` for rules that depend on more than differences.
    """
    rule = _constant_weights(rule)

    def update(stacked, state, params=None, *, mesh=None, specs=None, axis_name=None, **extra_args):
        del params, extra_args
        where = {"mesh": mesh, "specs": specs, "axis_name": axis_name}
        if check is not None:
            check(count_rows(stacked))
        squares = square_norms(stacked, **where)
        valid = jnp.isfinite(squares)
        rows = zero_rows(stacked, valid)
        compared = _centered(rows, squares, valid) if center else rows
        return combine(rule(gram(compared, **where), valid), rows), state

    return Aggregator(optax.init_empty_state, update)


def _centered(rows: PyTree, squares: Float[Array, "K"], valid: Bool[Array, "K"]) -> PyTree:
    middle = jnp.nanmedian(jnp.where(valid, squares, jnp.nan))
    near = valid & (squares <= middle)
    share = near / jnp.maximum(jnp.sum(near), 1)

    def leaf(x):
        x = precision.wide(x)
        center = jnp.tensordot(share.astype(x.dtype), x, axes=1, precision=jax.lax.Precision.HIGHEST)
        return jnp.where(_along_rows(valid, x), x - center, 0)

    return jax.tree.map(leaf, rows)


def check_losses(name: str, losses: Float[Array, "K"] | None, count: int, num_tasks: int | None = None) -> None:
    """Raises `ValueError` if `name`, made for `num_tasks`, gets `count` gradients, or losses of another number."""
    if num_tasks is not None and count != num_tasks:
        raise ValueError(f"{name} was made for {num_tasks} gradients, but there are {count}")
    if losses is not None and jnp.shape(losses) != (count,):
        raise ValueError(f"{name}: losses must have shape ({count},), one per gradient, got {jnp.shape(losses)}")


def _maker(rule: Callable[..., Any]) -> str:
    """The name of the function in which a rule is defined."""
    return getattr(rule, "__qualname__", repr(rule)).split(".")[0]


def _init_fn(init: Callable[[], PyTree] | None) -> Callable[[PyTree], PyTree]:
    def init_fn(params):
        del params
        return optax.EmptyState() if init is None else init()

    return init_fn


def _constant_weights(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The rule with stop-gradient on what goes in: nothing differentiates through how gradients are weighed."""

    def stopped(*inputs):
        return rule(*jax.lax.stop_gradient(inputs))

    return stopped
