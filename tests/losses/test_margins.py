"""Logits moved class by class, unit vectors, and entries chosen by a label."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import losses
from steelyard.losses import margins

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2, 3, 4)).astype(np.float32)
LABELS = RNG.integers(0, 4, (2, 3))


def test_scale_then_offset_then_margin():
    scale, offset, margin = RNG.uniform(0.5, 2, (3, 4)).astype(np.float32)
    got = losses.adjust_logits(LOGITS, LABELS, scale=scale, offset=offset, margin=margin)
    expected = np.zeros_like(LOGITS)
    for i in np.ndindex(2, 3):
        for c in range(4):
            expected[(*i, c)] = scale[c] * LOGITS[(*i, c)] + offset[c] - (margin[c] if c == LABELS[i] else 0)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_what_is_left_out_is_not_done():
    np.testing.assert_array_equal(losses.adjust_logits(LOGITS), LOGITS)
    np.testing.assert_array_equal(losses.adjust_logits(LOGITS, offset=1.0), LOGITS + 1)
    assert losses.adjust_logits(jnp.ones(3, jnp.bfloat16), scale=2.0).dtype == jnp.float32


def test_unit_vectors_and_the_zero_vector():
    x = jnp.array([[3.0, 4.0], [0.0, 0.0], [1e-3, 0.0]])
    np.testing.assert_allclose(losses.normalize(x), [[0.6, 0.8], [0, 0], [1, 0]], rtol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(losses.normalize(x)))(x)
    assert np.all(np.isfinite(gradient))
    np.testing.assert_allclose(losses.normalize(x.T, axis=0), losses.normalize(x).T)


@pytest.mark.parametrize("lead", [-20.0, 0.0, 3.0, 20.0, 1e4])
def test_the_complement_and_the_odds_are_exact_however_certain(lead):
    """Two rivals at 0: p = e^l / (e^l + 2), so log(1 - p) = log 2 - log(e^l + 2), and the log-odds are l - log 2."""
    logits, label = jnp.array([0.0, lead, 0.0]), jnp.array(1)
    expected = np.log(2) - np.logaddexp(lead, np.log(2))
    np.testing.assert_allclose(losses.log_one_minus_p(logits, label), expected, rtol=2e-6)
    np.testing.assert_allclose(margins.log_odds(logits, label), lead - np.log(2), rtol=1e-6, atol=1e-6)


def test_the_odds_of_a_single_class_are_large_with_a_finite_gradient():
    odds, gradient = jax.value_and_grad(lambda z: margins.log_odds(z, jnp.array(0)))(jnp.array([2.0]))
    assert odds > 1e30
    assert np.isfinite(gradient)


def test_the_entry_at_the_label():
    np.testing.assert_array_equal(
        margins.at_label(LOGITS, LABELS), np.take_along_axis(LOGITS, LABELS[..., None], -1)[..., 0]
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: losses.adjust_logits(LOGITS, margin=1.0), "margin needs labels"),
        (lambda: losses.adjust_logits(LOGITS, scale=jnp.ones(3)), r"scale has shape \(3,\).*\(4,\)"),
        (lambda: losses.normalize(LOGITS, eps=0.0), r"eps=0.0 must lie in \(0, inf\)"),
        (lambda: losses.log_one_minus_p(LOGITS, LABELS[0]), r"labels has shape \(3,\) and logits \(2, 3, 4\)"),
        (lambda: losses.log_one_minus_p(LOGITS, LABELS + 2), r"labels=4 must lie in \[0, 4\)|labels=5"),
        (lambda: losses.log_one_minus_p(LOGITS, LABELS * 1.0), "labels are float"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
