"""The ranking hinge against loops in float64, and cases worked by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import losses

WORKED = np.float32([0.9, 0.2, 0.5]), np.float32([1, 1, 0])


@functools.cache
def compiled():
    """The losses, and the gradient of their sum."""

    def run(scores, labels):
        values, pull = jax.vjp(lambda s: losses.ranking_hinge(s, labels), scores)
        return values, pull(jnp.ones_like(values))[0]

    return jax.jit(run)


def logits(probabilities):
    return np.log(probabilities / (1 - probabilities))


def transcribed(scores, labels):
    """Value and gradient of one label."""
    p = 1 / (1 + np.exp(-np.asarray(scores, np.float64)))
    value, slopes = 0.0, np.zeros(len(p))
    positives, negatives = np.flatnonzero(labels == 1), np.flatnonzero(labels == 0)
    if len(negatives):
        top = negatives[np.argmax(p[negatives])]
        for i in positives:
            gap = min(p[i] - p[top], 0)
            value += gap**2 / (len(positives) + 1)
            slopes[i] += 2 * gap / (len(positives) + 1)
            slopes[top] -= 2 * gap / (len(positives) + 1)
    return value, slopes * p * (1 - p)


def test_it_and_its_gradient_follow_the_definition():
    """The last two labels have no positive and no negative."""
    rng = np.random.default_rng(0)
    scores, labels = rng.standard_normal((9, 5)).astype(np.float32), rng.integers(0, 2, (9, 5)).astype(np.float32)
    labels[:, 3:] = [0, 1]
    values, gradient = compiled()(scores, labels)
    for k in range(5):
        value, slopes = transcribed(scores[:, k], labels[:, k])
        np.testing.assert_allclose(values[k], value, rtol=1e-5)
        np.testing.assert_allclose(gradient[:, k], slopes, rtol=1e-5, atol=1e-8)
    assert np.all(values[:3] > 0)
    np.testing.assert_array_equal(values[3:], 0)
    np.testing.assert_array_equal(gradient[:, 3:], 0)


def test_worked_by_hand():
    """The positive at 0.9 is above the negative at 0.5, that at 0.2 falls short by 0.3: 0.3^2 / 3."""
    value, gradient = compiled()(logits(WORKED[0]), WORKED[1])
    np.testing.assert_allclose(value, 0.03, rtol=1e-5)
    np.testing.assert_allclose(gradient, [0, -0.2 * 0.2 * 0.8, 0.2 * 0.5 * 0.5], rtol=1e-5)


@pytest.mark.parametrize(
    ("scores", "zero"), [([2, 1, 1], True), ([2, 1, 0.5], True), ([2, 1, 1.01], False), ([2, 0.5, 1], False)]
)
def test_it_is_zero_exactly_if_every_positive_reaches_the_highest_negative(scores, zero):
    value, _ = compiled()(np.float32(scores), WORKED[1])
    assert (value == 0) == zero


def test_a_padded_row_that_is_not_finite_does_no_harm():
    scores, labels = logits(WORKED[0]), WORKED[1]
    value, gradient = jax.jit(jax.value_and_grad(losses.ranking_hinge))(
        np.append(scores, np.float32(np.nan)), np.append(labels, np.float32(0)), where=np.arange(4) < 3
    )
    expected, slopes = compiled()(scores, labels)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient, [*slopes, 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: losses.ranking_hinge(jnp.ones(3), jnp.ones(2)), r"scores has shape \(3,\) and labels \(2,\)"),
        (lambda: losses.ranking_hinge(jnp.float32(1), jnp.float32(1)), r"scores has shape \(\): it must be \[batch\]"),
        (lambda: losses.ranking_hinge(*WORKED, where=jnp.ones(2, bool)), r"where has shape \(2,\): .* \(3,\)"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
