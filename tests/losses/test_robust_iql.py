"""Losses of robust implicit Q-learning against loops in float64, closed forms, NumPy's quantiles, and by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from steelyard import losses


def critics(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(scale=2, size=(5, 6)).astype(np.float32), rng.normal(scale=2, size=6).astype(np.float32)


def transcribed(q, target, sigma):
    beta = 1 / sigma**2
    result = np.zeros(q.shape)
    for critic, values in enumerate(q.astype(np.float64)):
        for i, (value, aim) in enumerate(zip(values, target.astype(np.float64), strict=True)):
            d = abs(value - aim)
            result[critic, i] = d**2 / (2 * beta) if d < beta else d - beta / 2
    return result


critic_loss = jax.jit(lambda q, target, sigma: losses.riql_critic_loss(q, target, sigma=sigma))


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0, 3.0])
def test_the_critics_loss_follows_the_definition(sigma):
    q, target = critics()
    np.testing.assert_allclose(critic_loss(q, target, sigma), transcribed(q, target, sigma), rtol=1e-5, atol=1e-6)


def test_a_small_sigma_is_a_square_and_a_large_one_the_absolute_error():
    q, target = critics()
    np.testing.assert_allclose(critic_loss(q, target, 1e-3), (q - target) ** 2 * 1e-6 / 2, rtol=1e-5)
    np.testing.assert_allclose(critic_loss(q, target, 1e3), abs(q - target), rtol=1e-5, atol=1e-6)


def test_a_corrupt_target_pulls_with_slope_one_and_gets_no_gradient():
    """Of errors 1/2 and 100 with beta = 1."""
    by_q, by_target = jax.jit(jax.grad(lambda q, t: losses.riql_critic_loss(q, t).sum(), argnums=(0, 1)))(
        jnp.array([[0.5, 100.0], [-0.5, -100.0]]), jnp.zeros(2)
    )
    np.testing.assert_array_equal(by_q, [[0.5, 1], [-0.5, -1]])
    np.testing.assert_array_equal(by_target, 0)


def test_one_critic_needs_no_axis():
    q, target = critics()
    np.testing.assert_array_equal(losses.riql_critic_loss(q[0], target), losses.riql_critic_loss(q, target)[0])


@pytest.mark.parametrize("expectile", [0.1, 0.5, 0.7])
def test_the_expectile_is_where_the_loss_is_least(expectile):
    """Against SciPy's expectile, found by its equation; 1/2 is the mean."""
    targets = np.random.default_rng(0).normal(size=40).astype(np.float32)
    least = scipy.stats.expectile(targets.astype(np.float64), expectile)
    slope = jax.jit(jax.grad(lambda v: losses.expectile_loss(targets - v, expectile).mean()))(jnp.float32(least))
    np.testing.assert_allclose(slope, 0, atol=1e-6)


def test_the_expectile_loss_by_hand():
    u = jnp.array([2.0, -2.0, 0.0])
    np.testing.assert_allclose(losses.expectile_loss(u, 0.75), [3, 1, 0])
    np.testing.assert_array_equal(losses.expectile_loss(u, 0.5), u**2 / 2)
    np.testing.assert_allclose(losses.expectile_loss(u), [2.8, 1.2, 0], rtol=1e-6)


quantile_of = jax.jit(losses.ensemble_quantile)


@pytest.mark.parametrize("quantile", [0.0, 0.1, 0.25, 0.5, 1.0])
def test_the_quantile_is_that_of_numpy(quantile):
    q, _ = critics()
    np.testing.assert_allclose(quantile_of(q, quantile), np.quantile(q, quantile, axis=0), rtol=1e-5, atol=1e-6)
    if quantile == 0:
        np.testing.assert_array_equal(quantile_of(q, quantile), q.min(0))


def test_of_one_critic_any_quantile_is_its_value_and_none_has_a_gradient():
    q, _ = critics()
    np.testing.assert_array_equal(quantile_of(q[:1], 0.1), q[0])
    np.testing.assert_array_equal(jax.jit(jax.grad(lambda q: losses.ensemble_quantile(q).sum()))(q), 0)
    assert quantile_of(q.reshape(5, 2, 3), 0.1).shape == (2, 3)


def test_one_critic_that_went_wrong_decides_the_minimum_but_not_the_quantile():
    """The quarter of five sorted values is the second."""
    q = jnp.array([[3.0], [1.0], [2.0], [-1e6], [4.0]])
    assert quantile_of(q, 0.25) == 1
    assert quantile_of(q, 0.0) == -1e6


def test_advantages_weigh_up_to_the_maximum():
    advantage = np.array([-1e4, -1.0, 0.0, 0.5, 1e4])
    expected = [0, math.exp(-3), 1, math.exp(1.5), 100]
    np.testing.assert_allclose(losses.advantage_weights(jnp.asarray(advantage, jnp.float32)), expected, rtol=1e-5)
    capped = losses.advantage_weights(jnp.asarray(advantage, jnp.float32), temperature=1.0, maximum=1.2)
    np.testing.assert_allclose(capped, np.minimum(np.exp(np.minimum(advantage, 9)), 1.2), rtol=1e-5)
    np.testing.assert_array_equal(losses.advantage_weights(jnp.ones(3), temperature=0.0), 1)


def test_advantage_weights_are_constants_and_their_options_may_be_traced():
    def total(advantage, temperature, maximum):
        return losses.advantage_weights(advantage, temperature=temperature, maximum=maximum).sum()

    value, slope = jax.jit(jax.value_and_grad(total))(jnp.array([0.0, 9.0]), 2.0, 7.0)
    np.testing.assert_allclose(value, 1 + 7, rtol=1e-6)
    np.testing.assert_array_equal(slope, 0)


ONES = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (functools.partial(losses.riql_critic_loss, ONES, ONES[0], sigma=0.0), r"sigma=0.0 must lie in \(0, inf\)"),
        (lambda: losses.riql_critic_loss(ONES, ONES), r"target has shape \(2, 3\) and q \(2, 3\)"),
        (lambda: losses.riql_critic_loss(ONES, np.ones(2)), r"target has shape \(2,\) and q \(2, 3\).*\(3,\)"),
        *[
            (functools.partial(losses.expectile_loss, ONES, e), rf"expectile={e} must lie in \(0, 1\)")
            for e in (0.0, 1.0)
        ],
        *[
            (functools.partial(losses.ensemble_quantile, ONES, q), rf"quantile={q} must lie in \[0, 1\]")
            for q in (-0.1, 1.1)
        ],
        (lambda: losses.advantage_weights(ONES, temperature=-1.0), r"temperature=-1.0 must lie in \[0, inf\)"),
        (lambda: losses.advantage_weights(ONES, maximum=0.0), r"maximum=0.0 must lie in \(0, inf\)"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
