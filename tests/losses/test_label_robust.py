"""Label-distributionally robust losses against loops in float64, their limits, and the adaptive one's two visits."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard import losses

CLASSES = 4
LABELS = jnp.array([0, 2, 3, 1, 2])
DEFAULTS = {"reference": 1.0, "alpha": 2.0, "margin": 1.0, "smoothing": 1e-5, "min_temperature": 1e-4}


def logits(scale=2.0):
    return jnp.asarray(scale * np.random.default_rng(0).standard_normal((5, CLASSES)), jnp.float32)


def gaps(z, y, margin):
    return [x - z[y] + margin * (k != y) for k, x in enumerate(z)]


def transcribed(z, y, temperature, margin=0.0):
    d = gaps(z, y, margin)
    top = max(d)
    total = sum(math.exp((x - top) / temperature) for x in d)
    return temperature * (math.log(total) - math.log(len(d))) + top


def transcribed_adaptive(z, y, temperature, reference, alpha, margin, smoothing, min_temperature):
    """The loss and the next temperature of one example."""
    classes, size = len(z), sum(abs(x) for x in z) / len(z)
    z = [x / size for x in z]
    exps = [math.exp((x - max(z)) / temperature) for x in z]
    q = [e / sum(exps) + smoothing for e in exps]
    q = [x / sum(q) for x in q]
    kl = sum(x * math.log(classes * x) for x in q)
    after = max(reference * (1 - kl / (alpha * math.log(classes))), min_temperature)
    penalty = alpha * math.log(classes) / (2 * reference) * (after - reference) ** 2
    return transcribed(z, y, after, margin) - penalty, after


def rows(z):
    return zip(np.asarray(z, np.float64).tolist(), LABELS.tolist(), strict=True)


@jax.jit
def evaluate(z, temperature, margin=0.0):
    """The losses and the gradient of their sum."""

    def value(z):
        values = losses.ldr_loss(z, LABELS, temperature=temperature, margin=margin)
        return jnp.sum(values), values

    gradient, values = jax.grad(value, has_aux=True)(z)
    return values, gradient


@jax.jit
def _adaptive(z, temperature, options):
    def value(z):
        values, after = losses.adaptive_ldr_loss(z, LABELS, temperature, **options)
        # The temperatures are in the sum: they must add nothing to the gradient.
        return jnp.sum(values) + jnp.sum(after), (values, after)

    gradient, (values, after) = jax.grad(value, has_aux=True)(z)
    return values, after, gradient


def adaptive(z, temperature=1.0, **options):
    """Losses, next temperatures, and the gradient of their sum."""
    return _adaptive(z, jnp.full(5, temperature), {**DEFAULTS, **options})


@pytest.mark.parametrize("margin", [0.0, 1.5])
def test_the_loss_follows_the_definition_with_a_temperature_for_each_example(margin):
    temperatures = np.array([0.1, 0.5, 1.0, 4.0, 20.0])
    got, _ = evaluate(logits(), temperatures, margin)
    expected = [transcribed(z, y, t, margin) for (z, y), t in zip(rows(logits()), temperatures, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=20 * 2.0**-22)


def test_at_temperature_one_it_is_cross_entropy_less_that_of_a_guess():
    expected = jax.jit(optax.losses.softmax_cross_entropy_with_integer_labels)(logits(), LABELS) - math.log(CLASSES)
    np.testing.assert_allclose(jax.jit(losses.ldr_loss)(logits(), LABELS), expected, rtol=1e-5, atol=1e-6)


def test_in_the_cold_it_is_the_multiclass_hinge():
    """Within T log C of it, from below."""
    cold = 1e-3
    got, _ = evaluate(logits(), np.full(5, cold), 1.5)
    for value, (z, y) in zip(got, rows(logits()), strict=True):
        hinge = max(gaps(z, y, 1.5))
        assert hinge - cold * math.log(CLASSES) - 1e-5 <= value <= hinge + 1e-5


def test_in_the_heat_it_is_the_mean_gap():
    """Within max |d|^2 / 2 T of it, and the rounding of T log C."""
    hot = 1e3
    got, _ = evaluate(logits(), np.full(5, hot), 1.5)
    for value, (z, y) in zip(got, rows(logits()), strict=True):
        d = gaps(z, y, 1.5)
        bound = max(abs(x) for x in d) ** 2 / (2 * hot) + hot * math.log(CLASSES) * 2.0**-22
        np.testing.assert_allclose(value, np.mean(d), atol=bound)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.floats(1 / 16, 20, width=32), st.floats(1, 4, width=32), st.floats(1 / 8, 5, width=32))
def test_it_falls_with_the_temperature_between_the_greatest_and_the_mean_gap(temperature, factor, scale):
    z = logits(scale)
    low, high = (evaluate(z, np.full(5, t), 1.5)[0] for t in (temperature, temperature * factor))
    slack = 80 * math.log(CLASSES) * 2.0**-22
    assert np.all(high <= low + slack)
    for value, (row, y) in zip(high, rows(z), strict=True):
        d = gaps(row, y, 1.5)
        assert np.mean(d) - slack <= value <= max(d) + slack


def test_the_gradient_weighs_the_gaps_by_their_softmax():
    temperature = 0.7
    _, got = evaluate(logits(), np.full(5, temperature), 1.0)
    for slope, (z, y) in zip(got, rows(logits()), strict=True):
        p = scipy.special.softmax(np.array(gaps(z, y, 1.0)) / temperature)
        np.testing.assert_allclose(slope, p - np.eye(CLASSES)[y], atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"reference": 4.0, "alpha": 0.8, "margin": 0.5, "smoothing": 0.01}])
def test_the_adaptive_loss_follows_the_definition_over_two_visits(options):
    settings = {**DEFAULTS, **options}
    before = np.full(5, settings["reference"])
    for z in (logits(), logits(0.3) - 0.2):
        values, after, gradient = adaptive(z, before, **options)
        for i, (row, y) in enumerate(rows(z)):
            expected, temperature = transcribed_adaptive(row, y, before[i], **settings)
            np.testing.assert_allclose(after[i], temperature, rtol=1e-5)
            np.testing.assert_allclose(values[i], expected, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(gradient[i], slopes(row, y, temperature, settings["margin"]), atol=1e-4)
        before = np.asarray(after, np.float64)


def slopes(z, y, temperature, margin, step=1e-5):
    """Central differences of the loss with the temperature held, through the normalisation."""

    def value(z):
        return transcribed(list(z / np.mean(np.abs(z))), y, temperature, margin)

    return [(value(z + e) - value(z - e)) / (2 * step) for e in step * np.eye(CLASSES)]


CERTAIN = jnp.zeros((5, CLASSES)).at[:, 0].set(1e3)


def test_certain_predictions_cool_down_and_uniform_ones_keep_the_reference():
    """At T = 1/16 logits of mean size 1 are 64 apart: q is one-hot to the smoothing, which costs a few 1e-4 of KL."""
    _, after, _ = adaptive(CERTAIN.at[2:].set(2.0), 1 / 16, reference=10.0, alpha=4.0)
    np.testing.assert_allclose(after, [10 * (1 - 1 / 4)] * 2 + [10] * 3, rtol=1e-3)


def test_a_soft_reference_stops_at_the_least_temperature():
    """alpha < 1 would take a certain one below zero."""
    values, after, gradient = adaptive(CERTAIN, 1 / 16, alpha=0.5, min_temperature=0.01)
    np.testing.assert_allclose(after, 0.01, rtol=1e-6)
    assert np.isfinite(values).all()
    assert np.isfinite(gradient).all()


def test_the_adaptive_loss_depends_on_the_direction_only():
    (values, after, gradient), (scaled, scaled_after, scaled_gradient) = (adaptive(s * logits()) for s in (1, 64))
    np.testing.assert_allclose(scaled, values, rtol=1e-5)
    np.testing.assert_allclose(scaled_after, after, rtol=1e-6)
    np.testing.assert_allclose(64 * scaled_gradient, gradient, atol=1e-5)
    # So that the gradient is at right angles to the logits.
    np.testing.assert_allclose(np.sum(np.asarray(gradient) * logits(), -1), 0, atol=1e-5)


def test_logits_of_zero_keep_the_reference_and_a_finite_gradient():
    """All gaps are the margin but the label's: log mean exp."""
    values, after, gradient = adaptive(jnp.zeros((5, CLASSES)), 2.0, reference=2.0)
    np.testing.assert_allclose(after, 2, rtol=1e-6)
    np.testing.assert_allclose(values, 2 * math.log((3 * math.exp(1 / 2) + 1) / 4), rtol=1e-5)
    assert np.isfinite(gradient).all()


def test_leading_axes_are_free():
    z, labels = jnp.ones((2, 3, CLASSES)), jnp.ones((2, 3), int)
    values, after = jax.eval_shape(losses.adaptive_ldr_loss, z, labels, 1.0)
    assert values.shape == after.shape == jax.eval_shape(losses.ldr_loss, z, labels).shape == (2, 3)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: losses.ldr_loss(logits(), LABELS, temperature=0.0), r"temperature=0.0 must lie in \(0, inf\)"),
        (lambda: losses.ldr_loss(logits(), LABELS, temperature=-np.ones(5)), r"temperature=-1.0 must lie in"),
        (
            lambda: losses.ldr_loss(logits(), LABELS, temperature=np.ones(4)),
            r"temperature has shape \(4,\): .* have shape \(5,\)",
        ),
        (lambda: losses.ldr_loss(logits(), LABELS, margin=-1.0), r"margin=-1.0 must lie in \[0, inf\)"),
        (lambda: losses.ldr_loss(logits(), LABELS[:4]), r"\(4,\) and logits \(5, 4\)"),
        *[
            (functools.partial(losses.adaptive_ldr_loss, logits(), LABELS, 1.0, **{name: bad}), f"{name}={bad} must")
            for name, bad in [
                ("reference", 0.0),
                ("alpha", 0.0),
                ("alpha", -1.0),
                ("min_temperature", 0.0),
                ("margin", -1.0),
                ("smoothing", -1.0),
            ]
        ],
        (lambda: losses.adaptive_ldr_loss(logits(), LABELS, 0.0), r"temperature=0.0 must lie in \(0, inf\)"),
        (
            lambda: losses.adaptive_ldr_loss(logits(), LABELS, np.ones(4)),
            r"temperature has shape \(4,\): .* have shape \(5,\)",
        ),
        (
            lambda: losses.adaptive_ldr_loss(jnp.ones((2, 1)), jnp.zeros(2, int), 1.0),
            r"\(2, 1\): .* at least 2",
        ),
        (lambda: losses.adaptive_ldr_loss(logits(), LABELS[:4], 1.0), r"\(4,\) and logits \(5, 4\)"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
