"""AdamP and SGDP against the paper's rule in float64 NumPy, written with loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from steelyard import optim

# The correction 1 - 0.999^t is 1e-3 at first, with an error of 2^-24 = 6e-8, 6e-5 of it; the root keeps half of that.
# Directions have entries near 1, and several steps of 0.1 add up.
CLOSE = dict(rtol=5e-5, atol=5e-5)


def cosine(a, b, eps=1e-8):
    return abs(a @ b) / (max(np.linalg.norm(a), eps) * max(np.linalg.norm(b), eps))


def reference_project(u, g, p, wd, channel_axis=-1, stack_axis=None, delta=0.1, wd_ratio=0.1, eps=1e-8):
    """One leaf: the projected and decayed direction, and the level."""
    if stack_axis is not None:
        parts = [np.moveaxis(x, stack_axis, 0) for x in (u, g, p)]
        rows = [reference_project(*row, wd, channel_axis)[0] for row in zip(*parts, strict=True)]
        return np.moveaxis(np.stack(rows), 0, stack_axis), None
    if p.ndim < 2 or channel_axis is None:
        return u + wd * p, 0
    axes = (channel_axis,) if isinstance(channel_axis, int) else channel_axis
    front = [np.moveaxis(x, axes, range(len(axes))) for x in (u, g, p)]
    channels = int(np.prod(front[0].shape[: len(axes)]))
    us, gs, ps = (x.reshape(channels, -1) for x in front)

    def radial(u, p):
        n = p / (np.linalg.norm(p) + eps)
        return n * (n @ u)

    level = 0
    if max(cosine(p, g) for p, g in zip(ps, gs, strict=True)) < delta / np.sqrt(ps.shape[1]):
        level = 1
        us = np.stack([u - radial(u, p) for u, p in zip(us, ps, strict=True)])
    elif cosine(ps.ravel(), gs.ravel()) < delta / np.sqrt(ps.size):
        level = 2
        us = us - radial(us.ravel(), ps.ravel()).reshape(us.shape)
    us = us + wd * (wd_ratio if level else 1.0) * ps
    return np.moveaxis(us.reshape(front[0].shape), range(len(axes)), axes), level


class ReferenceAdamP:
    def __init__(self, nesterov=False, b1=0.9, b2=0.999, eps=1e-8):
        self.m = self.v = self.t = 0
        self.nesterov, self.b1, self.b2, self.eps = nesterov, b1, b2, eps

    def __call__(self, g):
        self.t += 1
        self.m = self.b1 * self.m + (1 - self.b1) * g
        self.v = self.b2 * self.v + (1 - self.b2) * g * g
        m = self.b1 * self.m + (1 - self.b1) * g if self.nesterov else self.m
        return m / (1 - self.b1**self.t) / (np.sqrt(self.v / (1 - self.b2**self.t)) + self.eps)


class ReferenceSGDP:
    def __init__(self, nesterov=False, momentum=0.9, dampening=0.0):
        self.b, self.nesterov, self.momentum, self.dampening = 0, nesterov, momentum, dampening

    def __call__(self, g):
        self.b = self.momentum * self.b + (1 - self.dampening) * g
        return g + self.momentum * self.b if self.nesterov else self.b


def gradient_of_level(level, p, rng, channel_axis=-1):
    """A random gradient, orthogonal to the weight per channel (1), as a whole (2) or not at all (0)."""
    g = rng.normal(size=p.shape) + 0.5 * p
    axes = tuple(i for i in range(p.ndim) if i not in [a % p.ndim for a in np.atleast_1d(channel_axis)])
    axes = {0: None, 1: axes, 2: tuple(range(p.ndim))}[level]
    return g if axes is None else g - p * (p * g).sum(axes, keepdims=True) / (p * p).sum(axes, keepdims=True)


def follow(tx, rule, levels, shape=(7, 5), *, lr=0.1, wd=0.0, seed=0, **views):
    """Runs both along the reference's trajectory and compares the weights after every step."""
    rng = np.random.default_rng(seed)
    p = rng.normal(size=shape)
    params = jnp.asarray(p, jnp.float32)
    state = tx.init(params)
    for level in levels:
        g = gradient_of_level(level, p, rng, views.get("channel_axis", -1))
        projected, seen = reference_project(rule(g), g, p, wd, **views)
        assert seen == level
        p = p - lr * projected
        updates, state = jax.jit(tx.update)(jnp.asarray(g, jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params, p, **CLOSE)


LEVELS = [1, 0, 2, 1, 2]


def first_update(tx, grads, params):
    """The update of the first step."""
    return jax.jit(lambda g, p: tx.update(g, tx.init(p), p)[0])(grads, params)


LEVEL = jax.jit(optim.projection_level, static_argnames=("delta", "channel_axis"))
ADAMP = optim.adamp(0.1)
SHORTEN = jax.jit(lambda g, p: ADAMP.update(g, ADAMP.init(p), p)[0])


@pytest.mark.parametrize(("nesterov", "wd"), [(False, 0.0), (False, 0.3), (True, 0.3)])
def test_adamp_follows_the_paper(nesterov, wd):
    follow(optim.adamp(0.1, weight_decay=wd, nesterov=nesterov), ReferenceAdamP(nesterov), LEVELS, wd=wd)


@pytest.mark.parametrize(("nesterov", "dampening"), [(False, 0.4), (True, 0.0), (True, 0.4)])
def test_sgdp_follows_the_paper(nesterov, dampening):
    tx = optim.sgdp(0.1, 0.8, dampening=dampening, weight_decay=0.05, nesterov=nesterov)
    follow(tx, ReferenceSGDP(nesterov, 0.8, dampening), LEVELS, wd=0.05 / (1 - 0.8))


@pytest.mark.parametrize(
    ("shape", "channel_axis"), [((4, 6), 0), ((3, 2, 4, 5), -1), ((6, 2, 3), (-2, -1)), ((2, 3, 6), (0, 1))]
)
def test_channel_axes(shape, channel_axis):
    tx = optim.adamp(0.1, weight_decay=0.2, channel_axis=channel_axis)
    follow(tx, ReferenceAdamP(), LEVELS, shape, wd=0.2, channel_axis=channel_axis)


def test_channel_axis_may_depend_on_path_and_leaf():
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=(6, 5)), jnp.float32) for name in ("embed", "dense", "free")}
    grads = jax.tree.map(lambda p: jnp.asarray(gradient_of_level(1, np.asarray(p), rng, 0), jnp.float32), params)
    seen = []

    def channel_axis(path, leaf):
        seen.append((path[0].key, leaf.shape))
        return {"embed": 0, "dense": -1, "free": None}[path[0].key]

    tx = optim.scale_by_adamp(weight_decay=0.1, channel_axis=channel_axis)
    updates = first_update(tx, grads, params)
    assert sorted(seen) == [("dense", (6, 5)), ("embed", (6, 5)), ("free", (6, 5))]
    for name, axis in (("embed", 0), ("dense", -1), ("free", None)):
        g, p = np.asarray(grads[name], np.float64), np.asarray(params[name], np.float64)
        np.testing.assert_allclose(updates[name], reference_project(ReferenceAdamP()(g), g, p, 0.1, axis)[0], **CLOSE)


@pytest.mark.parametrize("stack_axis", [0, 1, -1])
def test_stacked_weights_decide_for_themselves(stack_axis):
    rng = np.random.default_rng(1)
    p = rng.normal(size=(3, 8, 5))
    g = np.stack([gradient_of_level(level, row, rng) for level, row in zip((0, 1, 2), p, strict=True)])
    p, g = np.moveaxis(p, 0, stack_axis), np.moveaxis(g, 0, stack_axis)
    tx = optim.scale_by_sgdp(0.0, weight_decay=0.1, stack_axes=stack_axis)
    params = jnp.asarray(p, jnp.float32)
    update = first_update(tx, jnp.asarray(g, jnp.float32), params)
    np.testing.assert_allclose(update, reference_project(g, g, p, 0.1, stack_axis=stack_axis)[0], **CLOSE)


def test_stacking_equals_separate_runs():
    rng = np.random.default_rng(2)
    kernels = [jnp.asarray(rng.normal(size=(6, 4)), jnp.float32) for _ in range(2)]
    grads = [jnp.asarray(gradient_of_level(i, np.asarray(p), rng), jnp.float32) for i, p in enumerate(kernels)]
    one, many = optim.adamp(0.1, weight_decay=0.1), optim.adamp(0.1, weight_decay=0.1, stack_axes=0)
    expected = [first_update(one, g, p) for g, p in zip(grads, kernels, strict=True)]
    stacked = jnp.stack(kernels)
    np.testing.assert_allclose(first_update(many, jnp.stack(grads), stacked), jnp.stack(expected), **CLOSE)


def test_stacked_vectors_are_not_projected():
    p, g = jnp.ones((3, 4)), jnp.asarray([[1.0, -1.0, 1.0, -1.0]] * 3)
    tx = optim.scale_by_sgdp(0.0, weight_decay=0.5, stack_axes=0)
    np.testing.assert_array_equal(first_update(tx, g, p), g + 0.5 * p)


@settings(max_examples=30, deadline=None)
@given(
    shape=st.sampled_from([(2, 1), (3, 4), (9, 2)]), seed=st.integers(0, 10**6), scale=st.sampled_from([1e-3, 1.0, 1e3])
)
def test_scale_invariant_weights_never_get_shorter(shape, seed, scale):
    """The update is orthogonal to each channel, so by Pythagoras no channel gets shorter."""
    rng = np.random.default_rng(seed)
    p = scale * rng.normal(size=shape)
    g = gradient_of_level(1, p, rng).astype(np.float32)
    p = p.astype(np.float32).astype(np.float64)
    moved = np.asarray(SHORTEN(g, p.astype(np.float32)), np.float64)
    products = np.abs(np.sum(p * moved, axis=0))
    lengths = np.linalg.norm(p, axis=0)
    # What stays of a radial part is rounding, and eps: n is p / (|p| + eps), which falls short by about 2 eps / |p|.
    left = (1e-5 + 2e-8 / lengths.min()) * lengths * np.linalg.norm(0.1 * np.sign(g), axis=0)
    # A residue of g so small that it is nearly parallel to p after rounding is judged as what it then is.
    if max(cosine(x, y) for x, y in zip(p.T, g.T.astype(np.float64), strict=True)) < 0.05 / np.sqrt(len(p)):
        assert np.all(products <= left)
        assert np.all(np.linalg.norm(p + moved, axis=0) ** 2 >= lengths**2 - 2 * left)


@pytest.mark.parametrize("level", [0, 1, 2])
def test_projection_level(level):
    rng = np.random.default_rng(3)
    p = rng.normal(size=(5, 3, 4))
    for axis in (-1, 0, (1, 2)):
        g = gradient_of_level(level, p, rng, axis)
        args = jnp.asarray(p, jnp.float32), jnp.asarray(g, jnp.float32)
        result = LEVEL(*args, channel_axis=axis)
        assert result == level
        assert (result.dtype, result.shape) == (jnp.int32, ())
    assert optim.projection_level(*args, channel_axis=axis) == level


def test_whole_weights_that_are_scale_invariant_never_get_shorter():
    """At level 2 the update is orthogonal to the weight as a whole, though not to each channel."""
    rng = np.random.default_rng(10)
    p = rng.normal(size=(7, 5))
    g = gradient_of_level(2, p, rng).astype(np.float32)
    p = p.astype(np.float32)
    assert LEVEL(p, g) == 2
    moved = np.asarray(SHORTEN(g, p), np.float64)
    # 35 products of at most 0.1 * 3, each off by 2^-24 of itself, and n short of a unit by about 1e-8.
    np.testing.assert_allclose(np.sum(p * moved), 0, atol=1e-5)
    assert np.abs(np.sum(p * moved, axis=0)).max() > 0.01
    assert np.linalg.norm(p + moved) > np.linalg.norm(p)


def test_one_aligned_channel_rejects_the_channel_view():
    p = jnp.eye(4, 3) + 1.0
    g = jnp.asarray(gradient_of_level(1, np.asarray(p), np.random.default_rng(4)), jnp.float32)
    assert LEVEL(p, g) == 1
    assert LEVEL(p, g.at[:, 1].set(p[:, 1])) == 0


def test_level_of_edge_cases():
    p = jnp.arange(1.0, 7.0).reshape(3, 2)
    assert LEVEL(p, jnp.zeros_like(p)) == 1
    assert LEVEL(p, jnp.full_like(p, jnp.nan)) == 0
    assert LEVEL(p, p.at[0, 0].set(jnp.nan)) == 0
    assert LEVEL(jnp.zeros_like(p), p) == 1
    assert LEVEL(p[0], p[1]) == 0
    # Fan-in one: each channel is one number, whose cosine is 1 unless the gradient is 0.
    row, ortho = jnp.asarray([[1.0, 1.0]]), jnp.asarray([[1.0, -1.0]])
    assert LEVEL(row, row) == 0
    assert LEVEL(row, ortho) == 2
    assert LEVEL(row, 0 * row) == 1
    # One channel: both views are the same, and the first wins.
    assert LEVEL(row.T, ortho.T) == 1


def test_level_of_a_gradient_shorter_than_eps():
    """The floor of the norms makes an aligned gradient of length 1e-12 look orthogonal: cos = 1e-12 / 1e-8."""
    p = jnp.asarray([[0.6], [0.8]])
    assert LEVEL(p, 1e-12 * p) == 1
    assert optim.projection_level(p, 1e-12 * p, eps=1e-20) == 0


def test_level_without_a_channel_axis_and_of_scalars():
    p = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
    assert LEVEL(p, 0 * p, channel_axis=None) == 0
    assert optim.projection_level(1.0, 0.0) == 0
    assert optim.projection_level(jnp.zeros((0, 3)), jnp.zeros((0, 3))) == 0


def test_level_in_half_precision_adds_in_float32():
    """cos = 0.04 / sqrt(D) with D = 16384: sums of D ones in bfloat16 would stop at 256 and give far more."""
    p = jnp.ones((2**14, 1), jnp.bfloat16)
    signs = jnp.where(jnp.arange(2**14) % 2 == 0, 1, -1)[:, None]
    # Three ones too many on a balance of ones and minus ones: <p, g> = 6, over |p| |g| = 2^14, is 6 / 128 / sqrt(D).
    g = signs.at[1:7:2].set(1).astype(jnp.bfloat16)
    assert LEVEL(p, g) == 1
    assert LEVEL(p, g, delta=5 / 128) == 0


def test_level_is_strict():
    # cos = 0 exactly, and delta = 0: 0 < 0 is false.
    assert LEVEL(jnp.ones((2, 1)), jnp.asarray([[1.0], [-1.0]]), delta=0.0) == 0


def test_zero_gradient_decays_less_and_zero_weight_loses_nothing():
    p = jnp.asarray([[1.0, 2.0], [3.0, 4.0]])
    tx = optim.scale_by_adamp(weight_decay=0.5, wd_ratio=0.25)
    np.testing.assert_allclose(first_update(tx, 0 * p, p), 0.5 * 0.25 * p, rtol=1e-6)
    tx = optim.scale_by_sgdp(0.0)
    np.testing.assert_array_equal(tx.update(p, tx.init(p), 0 * p)[0], p)


@pytest.mark.parametrize("shape", [(6, 4), (4,), ()])
def test_delta_zero_is_adamw_and_sgd(shape):
    """Level 0 everywhere; vectors and scalars are at level 0 for any delta."""
    delta = 0.0 if len(shape) > 1 else 0.1
    k1, k2 = jax.random.split(jax.random.key(0))
    p, g = jax.random.normal(k1, shape), jax.random.normal(k2, shape)
    sgd = optax.chain(optax.trace(0.9), optax.add_decayed_weights(0.1 / (1 - 0.9)), optax.scale_by_learning_rate(0.1))
    for ours, theirs in [
        (optim.adamp(0.1, weight_decay=0.1, delta=delta), optax.adamw(0.1, weight_decay=0.1)),
        (
            optim.adamp(0.1, weight_decay=0.1, delta=delta, mu_dtype=jnp.bfloat16),
            optax.adamw(0.1, weight_decay=0.1, mu_dtype=jnp.bfloat16),
        ),
        (optim.sgdp(0.1, weight_decay=0.1, delta=delta), sgd),
    ]:
        mine, other = ours.init(p), theirs.init(p)
        for step in range(3):
            update, mine = ours.update(g + step, mine, p)
            expected, other = theirs.update(g + step, other, p)
            np.testing.assert_array_equal(update, expected)
        assert jax.tree.map(jnp.shape, mine[0]) == jax.tree.map(jnp.shape, other[0])


def test_transposed_weight_with_channels_first():
    rng = np.random.default_rng(5)
    p = rng.normal(size=(6, 4))
    for level in (0, 1, 2):
        g = jnp.asarray(gradient_of_level(level, p, rng), jnp.float32)
        w = jnp.asarray(p, jnp.float32)
        last, first = optim.adamp(0.1, weight_decay=0.1), optim.adamp(0.1, weight_decay=0.1, channel_axis=0)
        np.testing.assert_allclose(first_update(first, g.T, w.T).T, first_update(last, g, w), **CLOSE)


def test_sgdp_is_the_projection_of_optax_trace():
    rng = np.random.default_rng(6)
    p = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    inner = optax.trace(0.9, nesterov=True)
    general = optim.tangent_projection(inner, weight_decay=0.2 / (1 - 0.9))
    special = optim.scale_by_sgdp(0.9, nesterov=True, weight_decay=0.2)
    a, b = general.init(p), special.init(p)
    for level in LEVELS:
        g = jnp.asarray(gradient_of_level(level, np.asarray(p), rng), jnp.float32)
        (x, a), (y, b) = general.update(g, a, p), special.update(g, b, p)
        np.testing.assert_array_equal(x, y)


def test_extra_arguments_reach_the_inner_rule():
    def update(updates, state, params=None, *, factor, **extra_args):
        return jax.tree.map(lambda g: factor * g, updates), state

    tx = optim.tangent_projection(optax.GradientTransformationExtraArgs(lambda p: (), update))
    np.testing.assert_array_equal(tx.update(jnp.ones(3), (), jnp.ones(3), factor=2.0)[0], 2.0)


@pytest.mark.parametrize("make", [optim.adamp, optim.sgdp])
def test_odd_trees(make):
    tx = make(0.1, weight_decay=0.1)
    params = {"a": None, "b": [jnp.ones((2, 3)), jnp.ones(())], "empty": jnp.zeros((0, 3))}
    grads = jax.tree.map(jnp.ones_like, params)
    state = tx.init(params)
    updates, new_state = tx.update(grads, state, params)
    jitted, _ = jax.jit(tx.update)(grads, state, params)
    assert updates["a"] is None
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), updates, jitted)
    assert first_update(tx, {}, {}) == {}
    scalar = jnp.asarray(2.0)
    assert first_update(tx, scalar, scalar).shape == ()


@pytest.mark.parametrize("make", [optim.adamp, optim.sgdp])
def test_bfloat16_leaves_are_projected_in_float32(make):
    rng = np.random.default_rng(7)
    p = jnp.asarray(rng.normal(size=(64, 4)), jnp.bfloat16)
    g = jnp.asarray(gradient_of_level(1, np.asarray(p, np.float64), rng), jnp.bfloat16)
    # Rounding g to 8 bits gives a cosine of about 2^-9 / sqrt(64), below 0.1 / sqrt(64).
    assert optim.projection_level(p, g) == 1
    tx = make(0.1)
    update, state = jax.jit(lambda g, p: tx.update(g, tx.init(p), p))(g, p)
    assert update.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(state) if x.ndim} == {jnp.dtype(jnp.bfloat16)}
    wide = first_update(tx, g.astype(jnp.float32), p.astype(jnp.float32))
    # The direction is rounded several times to 8 bits on its way.
    np.testing.assert_allclose(update.astype(jnp.float32), wide, rtol=0, atol=2**-5 * float(jnp.abs(wide).max()))


def test_state_dtypes():
    p = jnp.ones((2, 2))
    state = optim.scale_by_adamp(mu_dtype=jnp.bfloat16).init(p)
    assert (state.mu.dtype, state.nu.dtype) == (jnp.bfloat16, jnp.float32)
    assert optim.scale_by_sgdp(accumulator_dtype=jnp.bfloat16).init(p).trace.dtype == jnp.bfloat16


def test_float64_leaves_stay_float64():
    with jax.enable_x64(True):
        rng = np.random.default_rng(8)
        p = rng.normal(size=(5, 3))
        g = gradient_of_level(2, p, rng)
        tx = optim.scale_by_adamp(weight_decay=0.1)
        update = first_update(tx, jnp.asarray(g), jnp.asarray(p))
        assert update.dtype == jnp.float64
        np.testing.assert_allclose(update, reference_project(ReferenceAdamP()(g), g, p, 0.1)[0], rtol=1e-12)


def test_vmap_equals_a_loop_and_gradients_pass():
    keys = jax.random.split(jax.random.key(1))
    params, grads = (jax.random.normal(k, (3, 5, 4)) for k in keys)
    tx = optim.scale_by_adamp(weight_decay=0.1, delta=1.0)

    def step(g, p):
        return first_update(tx, g, p)

    np.testing.assert_allclose(
        jax.vmap(step)(grads, params), [step(*x) for x in zip(grads, params, strict=True)], **CLOSE
    )
    slope = jax.grad(lambda g: jnp.sum(step(g, params[0]) ** 2))(grads[0])
    assert bool(optim.all_finite(slope))


def test_sharded_equals_unsharded():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rng = np.random.default_rng(9)
    params = {"dense": jnp.asarray(rng.normal(size=(16, 8)), jnp.float32), "bias": jnp.ones(8)}
    spec = {"dense": PartitionSpec("x", "y"), "bias": PartitionSpec("y")}
    tx = optim.adamp(0.1, weight_decay=0.1)
    for level in (0, 1, 2):
        g = jnp.asarray(gradient_of_level(level, np.asarray(params["dense"]), rng), jnp.float32)
        grads = {"dense": g, "bias": jnp.ones(8)}
        expected = first_update(tx, grads, params)

        def shard(tree):
            return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, spec)

        p = shard(params)
        updates, _ = jax.jit(tx.update)(shard(grads), tx.init(p), p)
        assert updates["dense"].sharding.is_equivalent_to(p["dense"].sharding, 2)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **CLOSE), updates, expected)


@pytest.mark.parametrize("make", [optim.adamp, optim.sgdp])
def test_injected_hyperparameters_and_schedules(make):
    p, g = jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), jnp.asarray([[1.0, 0.5], [2.0, -1.0]])
    schedule = optax.linear_schedule(0.2, 0.0, 4)
    injected = optax.inject_hyperparams(make)(learning_rate=0.1, weight_decay=schedule)
    state = injected.init(p)
    for step in range(2):
        update, state = jax.jit(injected.update)(g, state, p)
        if step == 0:
            plain = make(0.1, weight_decay=0.2)
            np.testing.assert_allclose(update, first_update(plain, g, p), **CLOSE)
    scheduled = make(optax.constant_schedule(0.1), weight_decay=0.2)
    plain = make(0.1, weight_decay=0.2)
    np.testing.assert_allclose(first_update(scheduled, g, p), first_update(plain, g, p), **CLOSE)


@pytest.mark.parametrize(
    ("make", "kwargs", "words"),
    [
        (optim.adamp, dict(b1=1.0), r"b1=1.0 .*\[0, 1\)"),
        (optim.adamp, dict(b2=1.0), r"b2=1.0 .*\[0, 1\)"),
        (optim.adamp, dict(b2=-0.1), "b2=-0.1"),
        (optim.adamp, dict(b1=float("nan")), "b1=nan"),
        (optim.adamp, dict(eps=-1.0), "eps=-1.0"),
        (optim.adamp, dict(delta=-0.1), "delta=-0.1"),
        (optim.adamp, dict(wd_ratio=-0.1), "wd_ratio=-0.1"),
        (optim.adamp, dict(weight_decay=-0.1), "weight_decay=-0.1"),
        (optim.adamp, dict(weight_decay=optax.constant_schedule(0.1)), "inject_hyperparams"),
        (optim.sgdp, dict(momentum=1.0), "momentum=1.0"),
        (optim.sgdp, dict(momentum=-0.1), r"momentum=-0.1 .*\[0, 1\)"),
        (optim.sgdp, dict(eps=-1.0), "eps=-1.0"),
        (optim.sgdp, dict(delta=-0.1), "delta=-0.1"),
        (optim.sgdp, dict(wd_ratio=-0.1), "wd_ratio=-0.1"),
        (optim.sgdp, dict(dampening=1.5), "dampening=1.5"),
        (optim.sgdp, dict(weight_decay=-1.0), "weight_decay=-1.0"),
    ],
)
def test_bad_hyperparameters(make, kwargs, words):
    with pytest.raises(ValueError, match=words):
        make(0.1, **kwargs)


@pytest.mark.parametrize("name", ["weight_decay", "delta", "wd_ratio", "eps"])
def test_bad_hyperparameters_of_the_projection(name):
    with pytest.raises(ValueError, match=rf"{name}=-0.5 must lie in \[0, inf\)"):
        optim.tangent_projection(optax.identity(), **{name: -0.5})


@pytest.mark.parametrize("axis", [2, -3, (0, 2)])
def test_level_refuses_an_axis_that_the_weight_lacks(axis):
    with pytest.raises(ValueError, match=r"channel_axis=.*\(2, 3\)"):
        optim.projection_level(jnp.ones((2, 3)), jnp.ones((2, 3)), channel_axis=axis)


def test_bad_calls():
    p = {"dense": jnp.ones((2, 3))}
    for kwargs, words in [
        (dict(channel_axis=2), r"channel_axis=2 .*\(2, 3\).*'dense'"),
        (dict(stack_axes=0, channel_axis=2), r"channel_axis=2 .*\(5, 2\)"),
        (dict(stack_axes=5), "stack_axes=5"),
        (dict(channel_axis=jnp.asarray(-1)), "static_args='channel_axis'"),
    ]:
        tx = optim.adamp(0.1, **kwargs)
        q = {"dense": jnp.ones((3, 5, 2))} if "channel_axis" in kwargs and "stack_axes" in kwargs else p
        with pytest.raises(ValueError, match=words):
            tx.update(q, tx.init(q), q)
    tx = optim.adamp(0.1)
    with pytest.raises(ValueError, match="needs params"):
        tx.update(p, tx.init(p))
    with pytest.raises(ValueError, match=r"\(2, 3\) and grad \(3, 2\)"):
        optim.projection_level(jnp.ones((2, 3)), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match="delta=-1"):
        optim.projection_level(jnp.ones((2, 3)), jnp.ones((2, 3)), delta=-1)
    with pytest.raises(ValueError, match="eps=-1"):
        optim.projection_level(jnp.ones((2, 3)), jnp.ones((2, 3)), eps=-1)
    for tx in (optim.sgdp(0.1), optim.scale_by_sgdp(), optim.scale_by_adamp()):
        with pytest.raises(ValueError, match="needs params"):
            tx.update(p, tx.init(p))
