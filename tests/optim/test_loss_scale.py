"""Dynamic loss scaling: exactness, the sequence of scales, skipped steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard import optim


@functools.cache
def bounded(interval):
    tx = optim.dynamic_loss_scale(
        optax.identity(), initial_scale=4.0, growth_interval=interval, min_scale=2.0, max_scale=16.0
    )
    return tx._replace(update=jax.jit(tx.update))


def run(tx, pattern, params):
    """Updates once per entry (True: finite gradients) and returns the scales used and the last state."""
    state, scales, update = tx.init(params), [], jax.jit(tx.update)
    for is_finite in pattern:
        scales.append(float(optim.current_loss_scale(state)))
        _, state = update(jnp.full_like(params, 1.0 if is_finite else jnp.inf), state, params)
    return scales, state


def test_sequence_of_scales():
    """The scale after each step, with growth on the third finite step in a row."""
    tx = optim.dynamic_loss_scale(optax.sgd(0.1), initial_scale=1024.0, growth_interval=3)
    scales, state = run(tx, [c == "1" for c in "1111001110"], jnp.ones(2))
    # 1 1 1 grows to 2048; 1 counts one; 0 0 back off to 512; 1 1 1 grows to 1024; 0 backs off to 512.
    assert [*scales[1:], float(state.scale)] == [1024, 1024, 2048, 2048, 1024, 512, 512, 512, 1024, 512]
    assert (int(state.skipped), int(state.count)) == (3, 0)


@settings(max_examples=20, deadline=None)
@given(pattern=st.lists(st.booleans(), min_size=1, max_size=12), interval=st.sampled_from([1, 3]))
def test_scale_follows_a_plain_python_loop(pattern, interval):
    scale, count, expected = 4.0, 0, []
    for is_finite in pattern:
        expected.append(scale)
        count = count + 1 if is_finite else 0
        scale = scale if is_finite else max(scale / 2, 2.0)
        if count == interval:
            scale, count = min(scale * 2, 16.0), 0
    scales, state = run(bounded(interval), pattern, jnp.ones(()))
    assert scales == expected
    assert (float(state.scale), int(state.count), int(state.skipped)) == (scale, count, pattern.count(False))


def test_scaling_by_a_power_of_two_changes_no_bit():
    key = jax.random.key(0)
    params = {"a": jax.random.normal(key, (4, 3)), "b": None}
    plain, scaled = optax.adam(0.1), optim.dynamic_loss_scale(optax.adam(0.1), initial_scale=2.0**12, growth_interval=2)
    p, q, s, t = params, params, plain.init(params), scaled.init(params)
    for _ in range(5):

        def loss(p):
            return jnp.sum(jnp.sin(p["a"]) ** 2)

        u, s = plain.update(jax.grad(loss)(p), s, p)
        scale = optim.current_loss_scale(t)
        v, t = scaled.update(jax.grad(lambda p, k=scale: k * loss(p))(q), t, q)
        p, q = optax.apply_updates(p, u), optax.apply_updates(q, v)
    np.testing.assert_array_equal(p["a"], q["a"])


def test_a_skipped_step_changes_nothing_but_the_scale():
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    tx = optim.dynamic_loss_scale(optax.adam(0.1))
    _, state = tx.update(params, tx.init(params), params)
    bad = {"a": jnp.ones(3), "b": jnp.asarray([1.0, jnp.nan])}
    updates, after = jax.jit(tx.update)(bad, state, params)
    jax.tree.map(lambda u: np.testing.assert_array_equal(u, 0), updates)
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)
    assert float(after.scale) == float(state.scale) / 2


def test_float16_gradient_survives():
    """2^-26 is below half of float16's smallest number, 2^-24; times 2^10 it is a normal number."""
    p = jnp.ones((), jnp.float16)

    def loss(p, scale):
        return (p * jnp.float16(2.0**-13)) * (scale.astype(jnp.float16) * jnp.float16(2.0**-13))

    tx = optim.dynamic_loss_scale(optax.identity(), initial_scale=2.0**10)
    state = tx.init(p)
    assert float(jax.grad(loss)(p, jnp.float32(1))) == 0
    grad, _ = tx.update(jax.grad(loss)(p, optim.current_loss_scale(state)), state, p)
    assert grad.dtype == jnp.float32
    assert float(grad) == 2.0**-26


def test_scale_is_found_inside_chains_and_only_once():
    p = jnp.ones(2)
    scaled = optim.dynamic_loss_scale(optim.adamp(0.1), initial_scale=8.0)
    tx = optax.chain(optax.identity(), optax.masked(scaled, True))
    assert float(optim.current_loss_scale(tx.init(p))) == 8.0
    with pytest.raises(ValueError, match="holds 0"):
        optim.current_loss_scale(optax.adam(0.1).init(p))
    with pytest.raises(ValueError, match="holds 2"):
        optim.current_loss_scale(optax.chain(scaled, scaled).init(p))


@pytest.mark.parametrize(("scale", "is_finite", "expected"), [(16.0, True, 16.0), (2.0, False, 2.0), (8.0, True, 16.0)])
def test_scale_stays_within_its_bounds(scale, is_finite, expected):
    tx = bounded(1)
    state = tx.init(jnp.ones(()))._replace(scale=jnp.float32(scale))
    assert float(tx.update(jnp.float32(1 if is_finite else jnp.nan), state)[1].scale) == expected


def test_scale_stays_a_power_of_two():
    tx = optim.dynamic_loss_scale(optax.identity(), initial_scale=2.0**3, growth_interval=1)
    scales, _ = run(tx, [True, True, False, True] * 3, jnp.ones(()))
    assert all(np.frexp(scale)[0] == 0.5 for scale in scales)
    # Each period grows thrice and falls once.
    assert [np.log2(scale) for scale in scales[::4]] == [3, 5, 7]


@pytest.mark.parametrize("tree", [{}, {"a": None}, {"a": None, "steps": np.arange(2)}])
def test_trees_without_floating_leaves_are_finite(tree):
    tx = optim.dynamic_loss_scale(optax.identity(), growth_interval=1, initial_scale=4.0)
    updates, state = jax.jit(tx.update)(tree, tx.init(tree), tree)
    assert (float(state.scale), int(state.skipped)) == (8.0, 0)
    jax.tree.map(lambda u, x: np.testing.assert_array_equal(u, x), updates, tree)


def test_integer_leaves_are_neither_divided_nor_looked_at():
    grads = {"w": jnp.full(2, 8.0), "steps": jnp.arange(3)}
    tx = optim.dynamic_loss_scale(optax.identity(), initial_scale=4.0)
    updates, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_array_equal(updates["w"], 2.0)
    np.testing.assert_array_equal(updates["steps"], [0, 1, 2])
    assert updates["steps"].dtype == jnp.int32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
@pytest.mark.parametrize("inner", [optax.adam(0.1), optax.sgd(0.1, momentum=0.9)], ids=["adam", "momentum"])
def test_the_state_keeps_its_dtypes_so_that_a_step_compiles_once(inner, dtype):
    """Also for 16-bit parameters, whose gradients are unscaled to float32, and so are their moments."""
    params = {"a": jnp.ones(3, dtype), "b": None}
    tx = optim.dynamic_loss_scale(inner)
    update, state = jax.jit(tx.update), tx.init(params)
    types = jax.tree.map(jnp.result_type, state)
    for _ in range(3):
        updates, state = update(params, state, params)
        params = optax.apply_updates(params, updates)
    assert jax.tree.map(jnp.result_type, state) == types
    assert update._cache_size() == 1
    assert (updates["a"].dtype, params["a"].dtype) == (jnp.float32, dtype)


def test_float64_gradients_stay_float64():
    with jax.enable_x64(True):
        tx = optim.dynamic_loss_scale(optax.adam(0.1), initial_scale=2.0)
        update, params = jax.jit(tx.update), jnp.ones(2)
        state = tx.init(params)
        for _ in range(2):
            updates, state = update(params, state, params)
        assert updates.dtype == jnp.float64
        assert state.scale.dtype == jnp.float32
        assert update._cache_size() == 1


def test_overflow_of_one_leaf_holds_back_all_and_the_next_step_goes_on():
    """The scaled float16 gradient 2^15 * 4 is infinite; at half the scale 2^16 still is; at a quarter it is not."""
    params = {"a": jnp.ones((), jnp.float16), "b": jnp.ones((), jnp.float32)}

    def loss(p, scale):
        return (jnp.float16(4) * p["a"]).astype(jnp.float32) * scale + p["b"] * scale

    tx = optim.dynamic_loss_scale(optax.sgd(0.25), initial_scale=2.0**15)
    step = jax.jit(lambda state, p: tx.update(jax.grad(loss)(p, optim.current_loss_scale(state)), state, p))
    state, seen = tx.init(params), []
    for _ in range(3):
        updates, state = step(state, params)
        seen.append((float(updates["a"]), float(updates["b"])))
    assert seen == [(0, 0), (0, 0), (-1, -0.25)]
    assert (int(state.skipped), float(state.scale)) == (2, 2.0**13)


def test_vmapped_runs_have_a_scale_each():
    tx = optim.dynamic_loss_scale(optax.sgd(0.1), initial_scale=4.0)
    state = jax.vmap(tx.init)(jnp.ones((2, 3)))
    updates, state = jax.vmap(tx.update)(jnp.array([[1.0, 1, 1], [1, jnp.inf, 1]]), state)
    assert state.scale.tolist() == [4, 2]
    assert np.all(updates[1] == 0)
    assert np.all(updates[0] != 0)


def test_extra_arguments_reach_the_inner_rule():
    def update(updates, state, params=None, *, value, **extra_args):
        return jax.tree.map(lambda g: g * value, updates), state

    tx = optim.dynamic_loss_scale(optax.GradientTransformationExtraArgs(lambda p: (), update), initial_scale=1.0)
    np.testing.assert_array_equal(tx.update(jnp.ones(2), tx.init(None), None, value=3.0)[0], 3.0)


def test_all_finite():
    for tree, expected in [
        ({}, True),
        ({"a": None}, True),
        ({"a": jnp.arange(3), "b": None}, True),
        ({"a": jnp.ones(3, jnp.bfloat16), "b": jnp.asarray(jnp.inf)}, False),
        ([jnp.asarray([1.0, jnp.nan])], False),
        (jnp.ones(()), True),
        (1.5, True),
        (float("nan"), False),
        (jnp.zeros((0, 3)), True),
    ]:
        result = optim.all_finite(tree)
        assert bool(result) is expected
        assert (result.dtype, result.shape) == (jnp.bool_, ())
    assert not jax.jit(optim.all_finite)([jnp.ones(2), jnp.asarray(-jnp.inf)])


@pytest.mark.parametrize(
    "kwargs",
    [
        dict(growth_factor=1.0),
        dict(growth_factor=float("nan")),
        dict(backoff_factor=1.0),
        dict(backoff_factor=0.0),
        dict(growth_interval=0),
        dict(initial_scale=0.0),
        dict(initial_scale=-2.0),
        dict(min_scale=0.0),
        dict(min_scale=-1.0),
        dict(max_scale=1.0),
    ],
)
def test_bad_arguments(kwargs):
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))}={next(iter(kwargs.values()))}"):
        optim.dynamic_loss_scale(optax.sgd(0.1), **kwargs)
