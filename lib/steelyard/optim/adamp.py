"""AdamP and SGDP: momentum without the growth of scale-invariant weights.

A weight that is followed by a normalization is *scale-invariant*: its length does not matter, and its gradient is
orthogonal to it. Momentum adds old gradients that are no longer orthogonal, so the weight grows and the effective
step shrinks. These rules detect such weights by the angle between weight and raw gradient, and remove from the
momentum's update its radial part (the part along the weight).

Every weight is looked at in two *views*. Channel view: one vector per index of the channel axes, over all other axes.
Layer view: the whole leaf as one vector. The *projection level* of a leaf is 1 if all its channels look
scale-invariant, else 2 if the whole leaf does, else 0.

Memory traffic: the four inner products that both views need are sums per channel, taken in one pass over the leaf;
all else is a coefficient per channel, applied in a second pass. Compiled for a TPU, a float32 AdamP step reads and
writes 40 bytes a parameter (AdamW 28) and keeps no temporary of a leaf's size. XLA on CPU takes a pass for each
product: there AdamP takes 1.5 to 1.8 times as long as AdamW while no weight is projected, and 2.5 when all are.

Source: AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights (2021, Heo et al.).
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from steelyard import choices, precision
from steelyard import tree as tree_lib

PyTree = Any
Axes = int | tuple[int, ...] | None
AxesRule = Axes | Callable[[jax.tree_util.KeyPath, Any], Axes]

# A tuple, not the int -1: `optax.inject_hyperparams` would turn an int default into a traced array.
_LAST = (-1,)


class _View(NamedTuple):
    """Which axes of a leaf are summed into channels, and channels into layers; stacked axes are in neither."""

    within: tuple[int, ...]
    channels: tuple[int, ...]
    channel_size: int
    layer_size: int


class _Products(NamedTuple):
    """Inner products of the weight `p` and the raw gradient `g`, float32, axes kept."""

    pp: Float[Array, "..."]
    gg: Float[Array, "..."]
    pg: Float[Array, "..."]


class _Direction(NamedTuple):
    """Directions `compute(*operands)` of each leaf, computed where they are used instead of stored."""

    compute: Callable[..., Array]
    operands: tuple[PyTree, ...]


def tangent_projection(
    inner: optax.GradientTransformation,
    *,
    weight_decay: float = 0.0,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    eps: float = 1e-8,
    channel_axis: AxesRule = _LAST,
    stack_axes: AxesRule = None,
) -> optax.GradientTransformationExtraArgs:
    """Runs any inner rule on the raw gradient and removes the radial part of its result from scale-invariant weights.

    With weight p, raw gradient g, direction u = inner(g), and D the number of entries of the vectors compared:

        cos(a, b) = |<a, b>| / (max(|a|, eps) max(|b|, eps))
        level 1 if max over channels of cos(p_c, g_c) < delta / sqrt(D), else 2 if cos(p, g) < delta / sqrt(D), else 0
        u <- u - n <n, u>,  n = p / (|p| + eps)        per channel at level 1, whole leaf at level 2
        u <- u + weight_decay r p,  r = wd_ratio if level > 0 else 1

    A zero gradient has cosine zero, so its leaf is at level 1 and decays by `wd_ratio * weight_decay`. A gradient that
    is not finite gives level 0. Leaves with fewer than two axes (biases, scales), stacked axes not counted, and empty
    ones are never projected and decay in full. Products and projection are in float32 at least; the result has the
    dtype of the inner rule's. With `optax.inject_hyperparams`, name `channel_axis` and `stack_axes` as static
    arguments where they are given.

    Args:
      inner: the rule whose positive direction u (not yet scaled by the learning rate) is projected.
      weight_decay: decoupled decay per step, added after the projection. For a schedule use `optax.inject_hyperparams`.
      delta: how nearly orthogonal counts as scale-invariant; 0 never projects.
      wd_ratio: what part of the decay scale-invariant weights get.
      eps: floor of the norms in the cosine, and addend of the norm in the projection.
      channel_axis: axes of output channels, counted without the stacked ones: an int, a tuple (fused heads), `None`
        (never project this leaf), or `(key path, leaf) -> one of these`. Last for Dense `[in, out]` and Conv
        `[h, w, in, out]`; 0 for embedding tables `[vocab, dim]`; (-2, -1) for fused heads `[d, heads, head_dim]`.
      stack_axes: axes along which independent weights are stacked (scanned layers, experts), each with a decision of
        its own; the same kinds of value.

    Returns:
      A transformation with the inner rule's state; `update` needs `params`.

    Raises:
      ValueError: a negative hyperparameter, an axis that a leaf lacks, or `update` without params.

    Source: AdamP (2021, Heo et al.), algorithms 1 and 2.
    """
    for name, value in dict(weight_decay=weight_decay, delta=delta, wd_ratio=wd_ratio, eps=eps).items():
        choices.require_within(name, value, "[0, inf)")
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra_args):
        if params is None:
            raise ValueError("update needs params: tx.update(grads, state, params)")
        directions, state = inner.update(updates, state, params, **extra_args)
        compute, trees = directions if isinstance(directions, _Direction) else (_identity, (directions,))

        def project(path, g, p, *operands):
            if operands[0] is None:
                return None
            g, p, *operands = map(jnp.asarray, (g, p, *operands))
            view = _view(path, p, channel_axis, stack_axes)
            if view is None:
                u = compute(*operands)
                return u if _is_zero(weight_decay) else (u + weight_decay * p).astype(u.dtype)
            return _projected(compute, operands, g, p, view, weight_decay, delta, wd_ratio, eps)

        return jax.tree_util.tree_map_with_path(project, updates, params, *trees, is_leaf=tree_lib.is_none), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def projection_level(
    param: Float[Array, "..."],
    grad: Float[Array, "..."],
    *,
    delta: float = 0.1,
    eps: float = 1e-8,
    channel_axis: Axes = -1,
) -> Int[Array, ""]:
    """Which view of one weight looks scale-invariant: 0 none, 1 the channels, 2 the layer.

    Args:
      param: the weight; with fewer than two axes the level is 0.
      grad: its raw gradient, same shape.
      delta, eps, channel_axis: as in `tangent_projection`.

    Raises:
      ValueError: the shapes differ, a negative hyperparameter, or an axis that the weight lacks.

    Source: AdamP (2021, Heo et al.), the condition of algorithms 1 and 2.
    """
    for name, value in dict(delta=delta, eps=eps).items():
        choices.require_within(name, value, "[0, inf)")
    if jnp.shape(param) != jnp.shape(grad):
        raise ValueError(f"param has shape {jnp.shape(param)} and grad {jnp.shape(grad)}; they must be equal")
    view = _view((), param, channel_axis, None)
    if view is None:
        return jnp.zeros((), jnp.int32)
    return _level(_products(grad, param, view), view, delta, eps).reshape(())


def scale_by_adamp(
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    nesterov: bool = False,
    channel_axis: AxesRule = _LAST,
    stack_axes: AxesRule = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamP without the learning rate: the tangent projection of Adam's direction.

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,  t = 1, 2, ...
        u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

    With `nesterov` the m in u is replaced by b1 m + (1 - b1) g (the new m), still divided by 1 - b1^t. This is the
    paper's code and not Nadam, whose correction is one step ahead (`optax.scale_by_adam(nesterov=True)`).

    Args:
      b1: decay rate of the first moment, in [0, 1).
      b2: decay rate of the second moment, in [0, 1).
      eps: added to the root of the second moment; also the eps of the projection.
      mu_dtype: dtype in which the first moment is stored; by default that of the parameter.
      weight_decay, delta, wd_ratio, channel_axis, stack_axes: as in `tangent_projection`.

    Returns:
      A transformation whose state is `optax.ScaleByAdamState`.

    Raises:
      ValueError: a hyperparameter out of its range; the rest as `tangent_projection`.

    Source: AdamP (2021, Heo et al.), algorithm 2.
    """
    choices.require_within("b1", b1, "[0, 1)")
    choices.require_within("b2", b2, "[0, 1)")
    projection = dict(delta=delta, wd_ratio=wd_ratio, channel_axis=channel_axis, stack_axes=stack_axes)
    return tangent_projection(_adam(b1, b2, eps, nesterov, mu_dtype), weight_decay=weight_decay, eps=eps, **projection)


def adamp(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    *,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    nesterov: bool = False,
    channel_axis: AxesRule = _LAST,
    stack_axes: AxesRule = None,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamP: `scale_by_adamp` times minus the learning rate, which so multiplies the decay too.

    Args:
      learning_rate: a number or a schedule.
    """
    projection = dict(delta=delta, wd_ratio=wd_ratio, channel_axis=channel_axis, stack_axes=stack_axes)
    direction = scale_by_adamp(b1, b2, eps, weight_decay, nesterov=nesterov, mu_dtype=mu_dtype, **projection)
    return optax.chain(direction, optax.scale_by_learning_rate(learning_rate))


def scale_by_sgdp(
    momentum: float = 0.9,
    *,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    eps: float = 1e-8,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    channel_axis: AxesRule = _LAST,
    stack_axes: AxesRule = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """SGDP without the learning rate: the tangent projection of the momentum.

        b = momentum b + (1 - dampening) g,  from b = 0 on the first step too
        u = b,  or  g + momentum b  with `nesterov`

    The decay is divided by 1 - momentum, so that it is as strong as one inside the gradient would be. The buffer b
    itself is not projected, as in the paper's algorithm (the authors' code projects it in place).

    Args:
      momentum: decay rate of the buffer, in [0, 1).
      dampening: what part of the gradient does not enter the buffer, in [0, 1].
      accumulator_dtype: dtype in which the buffer is stored; by default that of the parameter.
      weight_decay, eps, delta, wd_ratio, channel_axis, stack_axes: as in `tangent_projection`.

    Returns:
      A transformation whose state is `optax.TraceState`.

    Raises:
      ValueError: a hyperparameter out of its range; the rest as `tangent_projection`.

    Source: AdamP (2021, Heo et al.), algorithm 1.
    """
    choices.require_within("momentum", momentum, "[0, 1)")
    choices.require_within("dampening", dampening, "[0, 1]")
    choices.require_within("weight_decay", weight_decay, "[0, inf)")
    projection = dict(delta=delta, wd_ratio=wd_ratio, channel_axis=channel_axis, stack_axes=stack_axes)
    inner = _momentum(momentum, dampening, nesterov, accumulator_dtype)
    return tangent_projection(inner, weight_decay=weight_decay / (1 - momentum), eps=eps, **projection)


def sgdp(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.9,
    *,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    eps: float = 1e-8,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    channel_axis: AxesRule = _LAST,
    stack_axes: AxesRule = None,
    accumulator_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """SGDP: `scale_by_sgdp` times minus the learning rate, which so multiplies the decay too.

    Args:
      learning_rate: a number or a schedule.
    """
    projection = dict(eps=eps, delta=delta, wd_ratio=wd_ratio, channel_axis=channel_axis, stack_axes=stack_axes)
    buffer = dict(dampening=dampening, nesterov=nesterov, accumulator_dtype=accumulator_dtype)
    direction = scale_by_sgdp(momentum, weight_decay=weight_decay, **buffer, **projection)
    return optax.chain(direction, optax.scale_by_learning_rate(learning_rate))


def _adam(b1, b2, eps, nesterov, mu_dtype) -> optax.GradientTransformation:
    """Adam whose updates are a `_Direction`."""
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)

    def update(updates, state, params=None):
        _, new_state = adam.update(updates, state, params)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)

        def compute(m, v, *g):
            m = optax.tree.update_moment(*g, m, b1, 1) if nesterov else m
            m, v = (optax.tree.bias_correction(x, b, new_state.count) for x, b in ((m, b1), (v, b2)))
            return m / (jnp.sqrt(v) + eps)

        return _Direction(compute, (mu, nu, updates) if nesterov else (mu, nu)), new_state

    return optax.GradientTransformation(adam.init, update)


def _momentum(momentum, dampening, nesterov, accumulator_dtype) -> optax.GradientTransformation:
    trace = optax.trace(momentum, accumulator_dtype=accumulator_dtype)

    def update(updates, state, params=None):
        buffer, state = trace.update(jax.tree.map(lambda g: (1 - dampening) * g, updates), state, params)
        if nesterov:
            buffer = jax.tree.map(lambda g, b: g + momentum * b, updates, buffer)
        return buffer, state

    return optax.GradientTransformation(trace.init, update)


def _view(path, leaf, channel_axis, stack_axes) -> _View | None:
    """How to look at the leaf, or `None` if it is never projected."""
    shape = jnp.shape(leaf)
    channel_axis = channel_axis(path, leaf) if callable(channel_axis) else channel_axis
    stack_axes = stack_axes(path, leaf) if callable(stack_axes) else stack_axes
    if len(shape) < 2 or math.prod(shape) == 0 or channel_axis is None:
        return None
    layer = _axes_but("stack_axes", path, shape, () if stack_axes is None else stack_axes)
    if len(layer) < 2:
        return None
    layer_shape = tuple(shape[a] for a in layer)
    within = tuple(layer[a] for a in _axes_but("channel_axis", path, layer_shape, channel_axis))
    channels = tuple(a for a in layer if a not in within)
    return _View(within, channels, math.prod(shape[a] for a in within), math.prod(layer_shape))


def _axes_but(name, path, shape, axes) -> tuple[int, ...]:
    if isinstance(axes, jax.Array):
        raise ValueError(
            f"{name}={axes} must be a Python int or a tuple, not an array; with optax.inject_hyperparams "
            f"add static_args={name!r}"
        )
    try:
        return tree_lib.axes_except(np.broadcast_to(0, shape), axes)
    except ValueError as error:
        where = f" of parameter {tree_lib.path_str(path)!r}" if path else ""
        raise ValueError(f"{name}={axes} names an axis that shape {shape}{where} lacks") from error


def _projected(compute, operands, g, p, view: _View, weight_decay, delta, wd_ratio, eps) -> Array:
    products = _products(g, p, view)
    level = _level(products, view, delta, eps)
    radial = _radial_coefficient(products.pp, _radial_product(compute, operands, p, level, view), level, view, eps)
    decay = weight_decay * jnp.where(level > 0, wd_ratio, 1.0)
    u = compute(*operands)
    return (precision.wide(u) - (radial - decay) * precision.wide(p)).astype(u.dtype)


def _products(g, p, view: _View) -> _Products:
    # The first barrier keeps <g, g> from sharing g^2 with the inner rule, which would be stored for that (on CPU).
    # The second, as that of `_radial_product`, keeps sums over a layer (sums of these) from being rewritten as further
    # sums over the leaf: u would then have several readers, and would be stored instead of computed again.
    g = jax.lax.optimization_barrier(g)
    return jax.lax.optimization_barrier(_Products(_dot(p, p, view), _dot(g, g, view), _dot(p, g, view)))


def _radial_product(compute, operands, p, level, view: _View) -> Float[Array, "..."]:
    """<p, u> of every channel; on CPU zero where nothing will be projected."""

    def product(p, *operands):
        return _dot(p, compute(*operands), view)

    # Accelerators fuse this with the other products into one pass over the leaf. On CPU each product is a pass of its
    # own, and this one the dearest, so that it is taken only for what is projected; and a branch computes u for
    # itself, where u would otherwise be stored for the last pass, which doubles the time.
    def product_if_projected(p, *operands):
        zeros = optax.tree.zeros_like(jax.eval_shape(product, p, *operands))
        return jax.lax.cond(jnp.any(level > 0), product, lambda *_: zeros, p, *operands)

    pu = jax.lax.platform_dependent(p, *operands, cpu=product_if_projected, default=product)
    return jax.lax.optimization_barrier(pu)


def _dot(a, b, view: _View) -> Float[Array, "..."]:
    return jnp.sum(precision.wide(a) * precision.wide(b), view.within, keepdims=True)


def _over_layer(x, view: _View):
    return jax.tree.map(lambda x: jnp.sum(x, view.channels, keepdims=True), x)


def _level(products: _Products, view: _View, delta, eps) -> Int[Array, "..."]:
    channel = jnp.max(_cosine(products, eps), view.channels, keepdims=True)
    layer = _cosine(_over_layer(products, view), eps)
    in_layer = jnp.where(layer < delta / math.sqrt(view.layer_size), 2, 0)
    return jnp.where(channel < delta / math.sqrt(view.channel_size), 1, in_layer).astype(jnp.int32)


def _cosine(products: _Products, eps) -> Float[Array, "..."]:
    p_norm = jnp.maximum(jnp.sqrt(products.pp), eps)
    g_norm = jnp.maximum(jnp.sqrt(products.gg), eps)
    return jnp.abs(products.pg) / (p_norm * g_norm)


def _radial_coefficient(pp, pu, level, view: _View, eps) -> Float[Array, "..."]:
    """The factor c such that u - c p is the projection, per channel."""

    def ratio(pp, pu):
        return pu / (jnp.sqrt(pp) + eps) ** 2

    in_layer = jnp.where(level == 2, ratio(*_over_layer((pp, pu), view)), 0.0)
    return jnp.where(level == 1, ratio(pp, pu), in_layer)


def _identity(x):
    return x


def _is_zero(x) -> bool:
    return isinstance(x, int | float) and x == 0
