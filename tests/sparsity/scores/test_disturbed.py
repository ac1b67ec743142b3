"""The disturbed loss of a linear student, in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard.sparsity import scores

X = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)
W = jnp.asarray(np.random.default_rng(1).normal(size=(3, 2)), jnp.float32)


def student(w):
    return X @ w


def gradient(std, key=0):
    return jax.grad(scores.disturbed_loss(student, student(W), jax.random.key(key), std=std))(W)


def test_without_noise_the_gradient_is_exactly_zero():
    np.testing.assert_array_equal(gradient(0.0), 0)


def test_value_and_gradient_are_those_of_the_noise():
    """At the teacher, loss = mean n^2 and gradient = -2 X^T n / size, with the noise n that moving the target shows."""
    key, std = jax.random.key(3), 0.5
    at_teacher = scores.disturbed_loss(student, student(W), key, std=std)
    noise = std * np.asarray(jax.random.normal(key, (6, 2)), np.float64)
    np.testing.assert_allclose(at_teacher(W), np.mean(noise**2), rtol=1e-4)
    np.testing.assert_allclose(jax.grad(at_teacher)(W), -2 * X.T @ noise / noise.size, rtol=1e-4, atol=1e-5)


def test_scores_are_linear_in_the_noise():
    one, four = (scores.saliency(W, gradient(std)) for std in (0.01, 0.04))
    np.testing.assert_allclose(four, 4 * one, rtol=1e-2)
    assert not np.array_equal(gradient(0.01), gradient(0.01, key=1))


def test_half_precision_is_compared_in_float32():
    half = student(W).astype(jnp.bfloat16)
    value = scores.disturbed_loss(lambda w: half, half, jax.random.key(0), std=1e-4)(W)
    assert value.dtype == jnp.float32
    # In bfloat16 a noise of 1e-4 would vanish beside outputs near 1.
    assert 0 < value < 1e-7


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"std=-1 must lie in \[0, inf\)"):
        scores.disturbed_loss(student, student(W), jax.random.key(0), std=-1)
    with pytest.raises(ValueError, match=r"outputs have shape \(6, 2\), the teacher's \(6,\)"):
        scores.disturbed_loss(student, jnp.ones(6), jax.random.key(0))(W)
