"""Derivatives of random calibrated losses: against a transcription and SciPy, by property, and as a gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from steelyard import losses

COUNT = 8
CAP, FLOOR = 1.0, 1e-6


def inputs(scale=2.0, seed=0):
    rng = np.random.default_rng(seed)
    return (jnp.asarray(x, jnp.float32) for x in (scale * rng.standard_normal(COUNT), rng.standard_normal(COUNT)))


def transcribed(margins, draws, box_cox=0.0, cap=CAP, floor=FLOOR):
    margins, draws = np.asarray(margins, np.float64), np.asarray(draws, np.float64)
    with np.errstate(divide="ignore"):
        base = np.maximum(1 + box_cox * draws, 0)
        values = np.exp(draws) if box_cox == 0 else base ** (1 / box_cox)
    slopes = sorted(max(-g, -cap) for g in values)
    result = np.empty(len(margins))
    for slope, i in zip(slopes, sorted(range(len(margins)), key=lambda i: margins[i]), strict=True):
        result[i] = (slope / margins[i] if margins[i] > 1 else slope) - floor
    return result


@functools.cache
def compiled(**options):
    return jax.jit(functools.partial(losses.calibrated_derivatives, **options))


@functools.cache
def traced():
    return jax.jit(lambda margins, draws, box_cox: losses.calibrated_derivatives(margins, draws, box_cox=box_cox))


@pytest.mark.parametrize("box_cox", [-1.0, -0.5, 0.0, 0.3, 1.0])
def test_derivatives_follow_the_definition_with_a_traced_parameter(box_cox):
    margins, draws = inputs()
    assert 0 < int(jnp.sum(margins > 1)) < COUNT
    got = traced()(margins, draws, box_cox)
    np.testing.assert_allclose(got, transcribed(margins, draws, box_cox), rtol=1e-5, atol=1e-6)


def test_cap_and_floor_follow_the_definition():
    margins, draws = inputs()
    got = compiled(cap=2.0, floor=0.1)(margins, draws)
    np.testing.assert_allclose(got, transcribed(margins, draws, cap=2.0, floor=0.1), rtol=1e-5)


@pytest.mark.parametrize("box_cox", [1e-6, -1e-3])
def test_parameters_near_zero_keep_their_digits(box_cox):
    """SciPy's transformation of one draw, below the cap, at a margin below 1."""
    draws = np.array([-1.25, -0.5, -2.0], np.float32)
    got = traced()(jnp.array([-2.0, -1.0, 0.0]), draws, box_cox)
    expected = -np.sort(scipy.special.inv_boxcox(draws.astype(np.float64), box_cox))[::-1] - FLOOR
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize(("box_cox", "expected"), [(1.0, 0.0), (0.5, 0.0), (-0.5, -CAP), (-1.0, -CAP)])
def test_beyond_the_transformations_support(box_cox, expected):
    """1 + box_cox z = -4 counts as 0: its power is 0 or infinite, which the cap ends."""
    got = traced()(jnp.zeros(1), jnp.array([-5 / box_cox]), box_cox)
    np.testing.assert_allclose(got, expected - FLOOR, rtol=1e-6)


finite = st.floats(-100, 100, width=32)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.lists(finite, min_size=COUNT, max_size=COUNT),
    st.lists(st.floats(-5, 5, width=32), min_size=COUNT, max_size=COUNT),
    st.floats(-1, 1, width=32),
    st.permutations(range(COUNT)),
)
def test_the_loss_is_convex_calibrated_and_does_not_depend_on_the_order(margins, draws, box_cox, order):
    margins, draws, order = np.array(margins, np.float32), np.array(draws, np.float32), np.array(order)
    got = np.asarray(traced()(margins, draws, box_cox))
    assert np.all(got < 0)
    assert np.all(got >= np.float32(-CAP) - np.float32(FLOOR))
    assert np.all(np.diff(got[np.argsort(margins, kind="stable")]) >= 0)
    if len(set(margins.tolist())) == COUNT:
        np.testing.assert_array_equal(traced()(margins[order], draws, box_cox), got[order])
    np.testing.assert_array_equal(traced()(margins, draws[order], box_cox), got)


def test_equal_margins_get_their_derivatives_in_their_order():
    got = compiled()(jnp.zeros(COUNT), jnp.linspace(-3, -0.1, COUNT))
    assert np.all(np.diff(got) > 0)


def test_one_example_gets_its_own_draw():
    np.testing.assert_allclose(traced()(jnp.array([4.0]), jnp.array([-1.0]), 0.0), -np.exp(-1) / 4 - FLOOR, rtol=1e-6)


def test_a_margin_of_nan_is_passed_on_and_spoils_no_other():
    margins, draws = inputs()
    got = traced()(margins.at[3].set(jnp.nan), draws, 0.0)
    np.testing.assert_array_equal(np.isnan(got), np.arange(COUNT) == 3)


def test_large_margins_fall_off_as_their_inverse_and_an_infinite_one_keeps_the_floor():
    draws = jnp.full(3, 2.0)
    got = compiled(floor=0.25)(jnp.array([1.0, 1e4, jnp.inf]), draws)
    np.testing.assert_allclose(got, [-1.25, -0.2501, -0.25], rtol=1e-6)


@functools.cache
def gradient():
    def total(margins, key, box_cox):
        values = losses.ensemble_calibrated_loss(margins, key, box_cox=box_cox)
        return jnp.sum(values), values

    return jax.jit(jax.grad(total, has_aux=True))


def test_the_gradient_is_the_derivatives_and_the_value_their_product_with_the_margins():
    margins, _ = inputs()
    key = jax.random.key(3)
    slopes, values = gradient()(margins, key, 0.3)
    expected = transcribed(margins, jax.random.normal(key, (COUNT,)), 0.3)
    np.testing.assert_allclose(slopes, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values, slopes * margins, rtol=1e-6)


def test_another_key_is_another_loss_and_rematerialisation_draws_the_same():
    margins, _ = inputs()
    first, second = (gradient()(margins, jax.random.key(i), 0.0)[0] for i in range(2))
    assert not np.allclose(first, second)
    total = jax.checkpoint(lambda m: losses.ensemble_calibrated_loss(m, jax.random.key(0)).sum())
    again = jax.jit(jax.grad(total))(margins)
    np.testing.assert_allclose(again, first, rtol=1e-6)


def test_a_sharded_batch_is_sorted_as_a_whole():
    margins, _ = inputs()
    expected, _ = gradient()(margins, jax.random.key(0), 0.0)
    mesh = Mesh(np.array(jax.devices()[:COUNT]), ("data",))
    split = jax.device_put(margins, NamedSharding(mesh, PartitionSpec("data")))
    got, _ = gradient()(split, jax.random.key(0), 0.0)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_a_shard_draws_a_convex_calibrated_loss_of_its_own():
    margins, _ = inputs()
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    spec = PartitionSpec("data")

    def local(m, key):
        return losses.ensemble_calibrated_loss(m, jax.random.fold_in(key, jax.lax.axis_index("data")))

    sharded = jax.shard_map(local, mesh=mesh, in_specs=(spec, PartitionSpec()), out_specs=spec)
    slopes = jax.jit(jax.grad(lambda m: sharded(m, jax.random.key(0)).sum()))(margins)
    for shard, (rows, got) in enumerate(zip(np.split(margins, 2), np.split(slopes, 2), strict=True)):
        draws = jax.random.normal(jax.random.fold_in(jax.random.key(0), shard), (COUNT // 2,))
        np.testing.assert_allclose(got, transcribed(rows, draws), rtol=1e-5)


def test_it_is_declared_as_one_that_depends_on_the_batch():
    assert losses.ensemble_calibrated_loss.batch_dependent


def test_parameters_are_uniform_between_minus_one_and_one():
    drawn = np.asarray(jax.jit(jax.vmap(losses.box_cox_parameter))(jax.random.split(jax.random.key(0), 1000)))
    assert drawn.dtype == jnp.float32
    assert -1 <= drawn.min() < -0.99
    assert 0.99 < drawn.max() < 1
    # Standard deviation of the mean: 1 / sqrt(3 * 1000).
    np.testing.assert_allclose(drawn.mean(), 0, atol=5 / np.sqrt(3000))


THREE = np.ones(3)


def call(fn=losses.calibrated_derivatives, margins=THREE, other=THREE, **options):
    return lambda: fn(margins, other, **options)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (call(box_cox=np.nan), r"box_cox=nan must lie in \(-inf, inf\)"),
        (call(cap=0.0), r"cap=0.0 must lie in \(0, inf\)"),
        (call(floor=0.0), r"floor=0.0 must lie in \(0, inf\)"),
        (call(other=np.ones(4)), r"\(3,\) and draws \(4,\)"),
        (call(margins=np.ones((2, 2)), other=np.ones((2, 2))), r"margins has shape \(2, 2\): it must be \(batch,\)"),
        (call(losses.ensemble_calibrated_loss, np.ones((2, 2)), jax.random.key(0)), r"shape \(2, 2\)"),
        (call(losses.ensemble_calibrated_loss, other=jax.random.key(0), floor=-1.0), r"floor=-1.0 must lie in"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
