"""Profits by counting customers, regrets and SPO+ by trying both decisions in float64, and by property."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import losses

SCORES, VALUES = (
    np.asarray(x, np.float32).ravel()
    for x in np.meshgrid([-40.0, -3.0, -0.5, 0.0, 0.25, 1.0, 60.0], [-20.0, -1.0, 0.0, 0.5, 2.0, 30.0])
)
SURROGATES = (losses.targeting_regret_smooth, losses.spo_plus_targeting)


@functools.cache
def compiled(fn, **options):
    """Losses, and gradients with respect to the scores."""

    def run(score, value):
        loss, pull = jax.vjp(lambda s: fn(s, value, **options), score)
        return loss, pull(jnp.ones_like(loss))[0]

    return jax.jit(run)


def regret(score, value):
    """Of the better decision, less that of the decision taken."""
    taken = value if score > 0 else 0.0
    return max(value, 0.0) - taken


def spo_plus(score, value):
    """The definition, by trying both decisions."""
    best = 1 if value > 0 else 0
    return max((2 * score - value) * z for z in (0, 1)) - 2 * score * best + value * best


def over_grid(fn):
    return np.array([fn(float(s), float(v)) for s, v in zip(SCORES, VALUES, strict=True)])


def test_the_expected_value_counts_customers():
    """Of 10 alike, 4 would leave, and of these half accept; each costs a contact of 1, each who accepts or stays 3."""
    stays, refuses, kept = 6 * (-3 - 1), 2 * -1, 2 * (20 - 3 - 1)
    each = losses.targeting_value(0.4, 20.0, incentive=3.0, contact=1.0, acceptance=0.5)
    np.testing.assert_allclose(each, (stays + refuses + kept) / 10, rtol=1e-6)
    outcomes = losses.targeting_value(jnp.array([1, 0]), jnp.array([20, 20]), incentive=3.0, contact=1.0)
    np.testing.assert_allclose(outcomes, [0.3 * 17 - 1, -4], rtol=1e-6)


def test_costs_may_differ_from_customer_to_customer():
    rng = np.random.default_rng(0)
    churn, lifetime, incentive, contact, acceptance = rng.random((5, 2, 3)).astype(np.float32)
    got = jax.jit(losses.targeting_value)(churn, lifetime, incentive=incentive, contact=contact, acceptance=acceptance)
    rows = zip(*(np.float64(x).ravel() for x in (churn, lifetime, incentive, contact, acceptance)), strict=True)
    expected = [p * (a * (v - i) - c) - (1 - p) * (i + c) for p, v, i, c, a in rows]
    np.testing.assert_allclose(got.ravel(), expected, atol=8 * 2.0**-23)


def test_the_regret_is_that_of_the_decision():
    got, gradient = compiled(losses.targeting_regret)(SCORES, VALUES)
    np.testing.assert_array_equal(got, over_grid(regret))
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_the_smooth_regret_is_expected_over_random_decisions(temperature):
    def expected(score, value):
        p = 1 / (1 + math.exp(-score / temperature))
        return p * regret(1, value) + (1 - p) * regret(-1, value)

    got, gradient = compiled(losses.targeting_regret_smooth, temperature=temperature)(SCORES, VALUES)
    np.testing.assert_allclose(got, over_grid(expected), rtol=1e-5, atol=30 * 2.0**-52)
    step = 1e-5
    slope = over_grid(lambda s, v: (expected(s + step, v) - expected(s - step, v)) / (2 * step))
    # In float64 the difference of two values up to 30 keeps 30 2^-52 / step.
    np.testing.assert_allclose(gradient, slope, rtol=1e-4, atol=1e-8)


def test_a_small_smooth_regret_keeps_its_digits():
    """max(v, 0) - v sigmoid(s) would be 0 in float32 beyond s = 17."""
    got = losses.targeting_regret_smooth(jnp.array([60.0, -60.0]), jnp.array([2.0, -2.0]))
    np.testing.assert_allclose(got, 2 * math.exp(-60), rtol=1e-5)


def test_the_smooth_regret_tends_to_the_regret():
    decided = SCORES != 0
    got, _ = compiled(losses.targeting_regret_smooth, temperature=1e-3)(SCORES, VALUES)
    np.testing.assert_allclose(np.asarray(got)[decided], over_grid(regret)[decided], atol=1e-30)


def test_spo_plus_is_the_definition():
    got, gradient = compiled(losses.spo_plus_targeting)(SCORES, VALUES)
    np.testing.assert_array_equal(got, over_grid(spo_plus))
    side = np.where(VALUES > 0, -2, 2)
    np.testing.assert_array_equal(gradient, np.where(over_grid(spo_plus) > 0, side, 0))


def test_spo_plus_bounds_the_regret_and_is_convex():
    rng = np.random.default_rng(0)
    score, value = rng.standard_normal((2, len(SCORES))).astype(np.float32)
    value[::7] = 0
    bound = compiled(losses.spo_plus_targeting)
    loss, _ = bound(score, value)
    assert np.all(loss >= compiled(losses.targeting_regret)(score, value)[0])
    between, ends = bound((score + 1) / 2, value)[0], (loss + bound(np.ones_like(score), value)[0]) / 2
    assert np.all(between <= ends + 8 * 2.0**-23)


def test_half_of_the_value_is_enough_for_spo_plus():
    value = np.array([3.0, -3.0, 0.5], np.float32)
    factors = np.array([[0.49], [0.5], [1], [10]], np.float32)
    loss, _ = compiled(losses.spo_plus_targeting)(factors * value, np.tile(value, (4, 1)))
    assert np.all(loss[0] > 0)
    np.testing.assert_array_equal(loss[1:], 0)


def test_on_scattered_values_spo_plus_follows_the_majority():
    """One gain of 9 and three losses of 1 are worth 3 / 2 on average; below -1 / 2 only the gain is still felt."""
    scores = np.linspace(-8, 8, 65, dtype=np.float32)
    value = np.array([9, -1, -1, -1], np.float32)
    pairs = np.broadcast_arrays(scores[:, None], value)
    smooth, spo = (np.mean(compiled(fn)(*pairs)[0], axis=1) for fn in SURROGATES)
    assert scores[np.argmin(spo)] == -1 / 2
    assert np.all(np.diff(smooth) < 0)


def test_a_customer_of_no_value():
    """The smaller decision is the right one, and the slope of SPO+ keeps to it."""
    score, value = np.array([-2.0, 0.0, 2.0], np.float32), np.zeros(3, np.float32)
    loss, gradient = compiled(losses.spo_plus_targeting)(score, value)
    np.testing.assert_array_equal(loss, [0, 0, 4])
    np.testing.assert_array_equal(gradient, [0, 0, 2])
    np.testing.assert_array_equal(losses.targeting_regret_smooth(score, value), 0)


@pytest.mark.parametrize("fn", [losses.targeting_regret, losses.spo_plus_targeting])
def test_the_unit_of_money_only_scales(fn):
    np.testing.assert_array_equal(fn(4 * SCORES, 4 * VALUES), 4 * fn(SCORES, VALUES))


def test_the_temperature_may_be_one_for_each_customer_and_traced():
    temperatures = np.where(VALUES > 0, 2, 0.5).astype(np.float32)
    got = jax.jit(lambda t: losses.targeting_regret_smooth(SCORES, VALUES, temperature=t))(temperatures)
    np.testing.assert_allclose(got, losses.targeting_regret_smooth(SCORES / temperatures, VALUES), rtol=1e-5)


VALUE = functools.partial(losses.targeting_value, incentive=1.0, contact=0.1)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: VALUE(1.5, 1.0), r"churn=1.5 must lie in \[0, 1\]"),
        (lambda: VALUE(jnp.zeros(2), jnp.zeros(3)), r"churn has shape \(2,\) and lifetime_value \(3,\)"),
        (lambda: VALUE(0.5, 1.0, acceptance=-0.1), r"acceptance=-0.1 must lie in \[0, 1\]"),
        (lambda: VALUE(0.5, 1.0, acceptance=2), r"acceptance=2 must lie in \[0, 1\]"),
        (lambda: VALUE(0.5, 1.0, incentive=-1.0), r"incentive=-1.0 must lie in \[0, inf\)"),
        (lambda: VALUE(0.5, 1.0, contact=math.inf), r"contact=inf must lie in \[0, inf\)"),
        (lambda: VALUE(jnp.ones(2), jnp.ones(2), contact=jnp.ones((2, 1))), r"contact has shape \(2, 1\).*\(2,\)"),
        *[
            (lambda fn=fn: fn(jnp.zeros(2), jnp.zeros((2, 1))), r"score has shape \(2,\) and value \(2, 1\)")
            for fn in (losses.targeting_regret, *SURROGATES)
        ],
        (
            lambda: losses.targeting_regret_smooth(jnp.zeros(2), jnp.zeros(2), temperature=0.0),
            r"temperature=0.0 must lie in \(0, inf\)",
        ),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
