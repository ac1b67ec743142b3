"""Squentropy, its square baseline and the encouraging loss against loops in float64, closed forms and slopes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import losses

LABELS = jnp.array([0, 2, 3, 1, 2, 0])
# Of sums of a few numbers below 20, in float32.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def logits(shape=(6, 4), scale=2.0):
    return jnp.asarray(scale * np.random.default_rng(0).standard_normal(shape), jnp.float32)


def rows(z, labels):
    return zip(np.asarray(z, np.float64).tolist(), np.asarray(labels).tolist(), strict=True)


def softmax(row):
    exps = [math.exp(x - max(row)) for x in row]
    return [e / sum(exps) for e in exps]


@functools.cache
def with_slopes(fn, **options):
    """The losses and each one's derivative by its own logits."""

    def value(z, labels):
        values = functools.partial(fn, **options)(z, labels)
        return jnp.sum(values), values

    return jax.jit(jax.grad(value, has_aux=True))


def evaluate(fn, z, labels, **options):
    slopes, values = with_slopes(fn, **options)(z, labels)
    return values, slopes


def test_squentropy_follows_the_definition():
    got, slopes = evaluate(losses.squentropy, logits(), LABELS)
    for value, slope, (z, y) in zip(got, slopes, rows(logits(), LABELS), strict=True):
        others = [x for j, x in enumerate(z) if j != y]
        p = softmax(z)
        np.testing.assert_allclose(value, -math.log(p[y]) + sum(x * x for x in others) / 3, **CLOSE)
        expected = [p[j] - 1 if j == y else p[j] + 2 * z[j] / 3 for j in range(4)]
        np.testing.assert_allclose(slope, expected, **CLOSE)


def test_squentropy_of_one_example_with_logits_of_zero():
    np.testing.assert_allclose(losses.squentropy(jnp.zeros(3), jnp.int32(1)), math.log(3), rtol=1e-6)


def test_squentropy_is_cross_entropy_if_the_others_are_zero():
    """log(1 + (C - 1) exp(-a))."""
    a = np.array([-3, -1, 0, 0.5, 2, 12])
    got, _ = evaluate(losses.squentropy, jnp.zeros((6, 4)).at[:, 0].set(a), jnp.zeros(6, jnp.int32))
    np.testing.assert_allclose(got, np.log1p(3 * np.exp(-a)), rtol=1e-5, atol=2.0**-22 * 12)


def test_squentropy_depends_on_a_constant():
    """c added to logits of zero adds c^2, the mean of the others' squares."""
    constants = np.arange(6.0)
    got, _ = evaluate(losses.squentropy, jnp.tile(constants[:, None], 4), LABELS)
    np.testing.assert_allclose(got - got[0], constants**2, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, {"true_weight": 5.0, "target": 15.0}])
def test_the_rescaled_square_follows_the_definition(options):
    got, slopes = evaluate(losses.rescaled_square_loss, logits(), LABELS, **options)
    weight, target = options.get("true_weight", 1.0), options.get("target", 1.0)
    for value, slope, (z, y) in zip(got, slopes, rows(logits(), LABELS), strict=True):
        terms = [weight * (x - target) ** 2 if j == y else x * x for j, x in enumerate(z)]
        np.testing.assert_allclose(value, sum(terms) / 4, rtol=1e-5)
        expected = [(2 * weight * (x - target) if j == y else 2 * x) / 4 for j, x in enumerate(z)]
        np.testing.assert_allclose(slope, expected, **CLOSE)


def bonus(p, log_end):
    if p <= log_end:
        return math.log(1 - p)
    return math.log(1 - log_end) - (p - log_end) / (1 - log_end)


@pytest.mark.parametrize("log_end", [0.05, 0.75, 1.0])
def test_the_encouraging_loss_and_its_slope_follow_the_definition(log_end):
    got, slopes = evaluate(losses.encouraging_loss, logits(scale=4.0), LABELS, log_end=log_end)
    sides = set()
    for value, slope, (z, y) in zip(got, slopes, rows(logits(scale=4.0), LABELS), strict=True):
        p = softmax(z)[y]
        sides.add(p <= log_end)
        np.testing.assert_allclose(value, -math.log(p) + bonus(p, log_end), **CLOSE)
        expected = -1 if p <= log_end else -(1 - p) - p * (1 - p) / (1 - log_end)
        np.testing.assert_allclose(slope[y], expected, **CLOSE)
        # Moving all logits together changes nothing.
        np.testing.assert_allclose(sum(slope), 0, atol=1e-5)
    assert sides == ({True} if log_end == 1 else {True, False})


def at_probability(p):
    """Logits of two classes of which the first has probability p."""
    return jnp.array([math.log(p / (1 - p)), 0.0])


def test_the_bonus_goes_on_smoothly_at_its_end():
    """Within 1e-5 of 0.75 the loss moves by a slope of at most 1 / (p (1 - p)) = 5.4, and the slope by 16 at most."""
    z = jnp.stack([at_probability(0.75 - 1e-5), at_probability(0.75 + 1e-5)])
    values, slopes = evaluate(losses.encouraging_loss, z, jnp.zeros(2, jnp.int32))
    np.testing.assert_allclose(values[0], values[1], atol=1.2e-4)
    np.testing.assert_allclose(slopes[:, 0], -1, atol=3.2e-4)


def test_of_two_classes_the_endless_bonus_leaves_the_difference():
    """Exactly so where the probability rounds to 1 too, in the last row."""
    z = jnp.concatenate([logits((9, 2), scale=10.0), jnp.array([[1e3, 0]])])
    got, slopes = evaluate(losses.encouraging_loss, z, jnp.zeros(10, jnp.int32), log_end=1.0)
    np.testing.assert_allclose(got, z[:, 1] - z[:, 0], rtol=1e-6, atol=40 * 2.0**-22)
    np.testing.assert_allclose(slopes, np.tile([-1, 1], (10, 1)), rtol=1e-6)


def test_one_class_is_certain_and_on_the_tangent():
    """log(1/4) - (1 - 3/4) / (1/4)."""
    got, slopes = evaluate(losses.encouraging_loss, jnp.array([[3.0]]), jnp.array([0]))
    np.testing.assert_allclose(got, math.log(1 / 4) - 1, rtol=1e-6)
    np.testing.assert_array_equal(slopes, 0)


@pytest.mark.parametrize("fn", [losses.squentropy, losses.rescaled_square_loss, losses.encouraging_loss])
def test_leading_axes_are_free(fn):
    assert jax.eval_shape(fn, logits((2, 3, 4)), LABELS.reshape(2, 3)).shape == (2, 3)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: losses.squentropy(jnp.ones((2, 1)), jnp.zeros(2, int)), r"\(2, 1\): squentropy needs at least 2"),
        (lambda: losses.squentropy(logits(), LABELS[:5]), r"\(5,\) and logits \(6, 4\)"),
        (lambda: losses.squentropy(logits(), LABELS + 1), r"labels=4 must lie in \[0, 4\)"),
        (lambda: losses.rescaled_square_loss(logits(), LABELS, true_weight=-1.0), r"true_weight=-1.0 .* \[0, inf\)"),
        (lambda: losses.rescaled_square_loss(logits(), LABELS, target=math.inf), r"target=inf .* \(-inf, inf\)"),
        (lambda: losses.rescaled_square_loss(logits(), LABELS[:5]), r"\(5,\) and logits \(6, 4\)"),
        (lambda: losses.encouraging_loss(logits(), LABELS, log_end=0.0), r"log_end=0.0 must lie in \(0, 1\]"),
        (lambda: losses.encouraging_loss(logits(), LABELS, log_end=1.5), r"log_end=1.5 must lie in \(0, 1\]"),
        (lambda: losses.encouraging_loss(logits(), LABELS[:5]), r"\(5,\) and logits \(6, 4\)"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
