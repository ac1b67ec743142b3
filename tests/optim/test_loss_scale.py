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
        dict(backoff_factor=1.0),
        dict(backoff_factor=0.0),
        dict(growth_interval=0),
        dict(initial_scale=0.0),
        dict(min_scale=-1.0),
        dict(max_scale=1.0),
    ],
)
def test_bad_arguments(kwargs):
    with pytest.raises(ValueError, match=f"{next(iter(kwargs))}={next(iter(kwargs.values()))}"):
        optim.dynamic_loss_scale(optax.sgd(0.1), **kwargs)
