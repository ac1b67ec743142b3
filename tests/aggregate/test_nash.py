"""Nash-MTL against Newton's method in float64, cases by hand, and its invariances."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import aggregate

EPS = 2.0**-23


@functools.cache
def compiled(max_norm, normalize):
    rule = aggregate.nash(max_norm=max_norm, normalize=normalize)

    def weights_and_update(x):
        gram = aggregate.gram(x)
        return rule.gram_weights(gram, None, optax.EmptyState())[0], rule.update(x, optax.EmptyState())[0]

    return jax.jit(weights_and_update)


def run(x, max_norm=None, normalize=True):
    """Weights and update."""
    return [np.asarray(y, np.float64) for y in compiled(max_norm, normalize)(jnp.asarray(x, jnp.float32))]


def gradients(count, seed=0, size=8):
    rng = np.random.default_rng([seed, count])
    return (rng.standard_normal((count, size)) + 0.2) * 10.0 ** rng.uniform(-2, 2, (count, 1))


def reference(x):
    """`G alpha = 1 / alpha` in float64, by Newton steps in log(alpha)."""
    x = np.asarray(x, np.float64)
    gram = x @ x.T
    log = -0.5 * np.log(np.diag(gram))
    for _ in range(200):
        alpha = np.exp(log)
        residual = alpha * (gram @ alpha) - 1
        jacobian = alpha[:, None] * gram * alpha + np.diag(alpha * (gram @ alpha))
        step = np.linalg.solve(jacobian + 1e-3 * np.linalg.norm(residual) * np.eye(len(x)), residual)
        log -= step / max(1, np.abs(step).max())
    assert np.abs(residual).max() < 1e-10
    return np.exp(log)


def condition(x):
    units = np.asarray(x, np.float64) / np.linalg.norm(x, axis=1, keepdims=True)
    return np.linalg.cond(units) ** 2


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_against_float64(count, seed):
    x = gradients(count, seed).astype(np.float32)
    expected = reference(x)
    plain, _ = run(x, normalize=False)
    np.testing.assert_allclose(plain, expected, rtol=8 * count * EPS * condition(x))
    size = np.linalg.norm(x.astype(np.float64) @ x.astype(np.float64).T)
    normalized, _ = run(x)
    np.testing.assert_allclose(normalized, expected * np.sqrt(size), rtol=8 * count * EPS * condition(x))


@hypothesis.given(seed=st.integers(0, 10_000))
@hypothesis.settings(max_examples=15, deadline=None)
def test_equal_relative_gains(seed):
    """`alpha_k <g_k, out> / |G|_F = 1` for each k, up to rounding relative to the terms of the product."""
    x = gradients(4, seed)
    alpha, out = run(x)
    size = np.linalg.norm(x @ x.T)
    y = alpha * np.linalg.norm(x, axis=1) / np.sqrt(size)
    assert np.all(np.abs(alpha * (x @ out) / size - 1) <= 16 * 8 * EPS * (1 + y * y.sum()))


@pytest.mark.parametrize("factor", [1e-3, 7.0])
def test_scaling_a_gradient_divides_its_weight_and_keeps_the_update(factor):
    x = gradients(3)
    alpha, out = run(x, normalize=False)
    scaled, same = run(x * np.array([[1.0], [factor], [1.0]]), normalize=False)
    tolerance = 32 * EPS * condition(x)
    np.testing.assert_allclose(scaled, alpha / np.array([1, factor, 1]), rtol=tolerance)
    np.testing.assert_allclose(same, out, atol=tolerance * np.linalg.norm(out))


def test_two_orthogonal_gradients_by_hand():
    """(2, 0), (0, 3): alpha_k = 1 / |g_k|, out (1, 1); normalised times sqrt(|G|_F) = (16 + 81)^(1/4)."""
    np.testing.assert_allclose(run([[2.0, 0.0], [0.0, 3.0]], normalize=False)[1], [1, 1], rtol=16 * EPS)
    np.testing.assert_allclose(run([[2.0, 0.0], [0.0, 3.0]])[1], np.full(2, 97**0.25), rtol=16 * EPS)
    np.testing.assert_allclose(run([[2.0, 0.0], [0.0, 3.0]], max_norm=1.0)[1], np.full(2, 0.5**0.5), rtol=16 * EPS)


def test_one_gradient():
    x = gradients(1) * 100
    unit = x[0] / np.linalg.norm(x)
    np.testing.assert_allclose(run(x)[1], x[0], rtol=16 * EPS)
    np.testing.assert_allclose(run(x, normalize=False)[1], unit, atol=16 * EPS)
    np.testing.assert_allclose(run(x, max_norm=1.0)[1], unit, atol=16 * EPS)
    np.testing.assert_allclose(run(x / 1e6, max_norm=1.0)[1], x[0] / 1e6, rtol=16 * EPS)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_normalised_update_scales_with_the_gradients(scale):
    x = gradients(3).astype(np.float32)
    out = run(np.float32(scale) * x)[1] / scale
    np.testing.assert_allclose(out, run(x)[1], atol=32 * EPS * condition(x) * np.linalg.norm(out))


def test_a_zero_gradient_is_left_out():
    x = gradients(3)
    x[1] = 0
    alpha, out = run(x)
    assert alpha[1] == 0
    np.testing.assert_allclose(out, run(x[[0, 2]])[1], rtol=1e-5, atol=1e-5 * np.linalg.norm(out))
    np.testing.assert_array_equal(run(np.zeros((3, 4)), max_norm=1.0)[1], 0)


@pytest.mark.parametrize("rows", [[1, -1], [1, -3], [1, 2], [1, -1, 2, -0.5]])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_dependent_and_opposite_gradients_stay_finite(rows, max_norm):
    g = np.float32([1.0, -2.0, 2.0])
    alpha, out = run(np.outer(rows, g), max_norm=max_norm)
    assert np.isfinite(alpha).all()
    assert np.isfinite(out).all()
    assert np.all(alpha > 0)
    if max_norm is not None:
        # The length is known from coefficients of sum up to 1 / sqrt(K eps), in float32.
        assert np.linalg.norm(out) <= max_norm * 1.05


def test_gradients_that_are_not_finite_stay_visible():
    weights, _ = aggregate.nash().gram_weights(jnp.array([[1.0, jnp.nan], [jnp.nan, 1.0]]), None, optax.EmptyState())
    assert np.isnan(weights).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_norm": 0.0}, r"max_norm=0.0 must lie in \(0, inf\)"),
        ({"max_norm": -1.0}, r"max_norm=-1.0 must lie in \(0, inf\)"),
        ({"iterations": 0}, r"iterations=0 must lie in \[1, inf\)"),
    ],
)
def test_bad_arguments(options, text):
    with pytest.raises(ValueError, match=text):
        aggregate.nash(**options)
