"""The asymmetric losses against loops in float64, optax's losses that they contain, and slopes worked by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import losses

LABELS = jnp.array([0, 2, 3, 1, 2])
# Of logarithms of numbers that carry a rounding of 2^-24, in float32.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
# Central differences in float64, of functions with third derivatives below 100.
STEP, SLOPE = 1e-5, {"rtol": 1e-5, "atol": 1e-6}


def logits(scale=2.0):
    return scale * np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)


def targets():
    return np.random.default_rng(1).integers(0, 2, (5, 4)).astype(np.float32)


def with_slopes(fn):
    """The losses and each one's derivative by its own logits."""

    def value(z, t, *numbers):
        values = fn(z, t, *numbers)
        return jnp.sum(values), values

    def run(*args):
        slopes, values = jax.grad(value, has_aux=True)(*args)
        return values, slopes

    return run


def transcribed(z, t, gamma_positive=0.0, gamma_negative=4.0, margin=0.05):
    p = 1 / (1 + math.exp(-z))
    q = max(p - margin, 0)
    return -(t * (1 - p) ** gamma_positive * math.log(p) + (1 - t) * q**gamma_negative * math.log(1 - q))


def elementwise(z, t, *numbers):
    pairs = zip(np.ravel(np.asarray(z, np.float64)), np.ravel(np.asarray(t, np.float64)), strict=True)
    return np.reshape([transcribed(*pair, *numbers) for pair in pairs], np.shape(z))


@functools.cache
def compiled(**constants):
    """Of logits, targets, and those of gamma_positive, gamma_negative and margin that are not constants, traced."""
    names = [name for name in ("gamma_positive", "gamma_negative", "margin") if name not in constants]

    def loss(z, t, *numbers):
        return losses.asymmetric_loss(z, t, **dict(zip(names, numbers, strict=True)), **constants)

    return jax.jit(with_slopes(loss))


def evaluate(z, t, *numbers):
    """With traced numbers, but for a margin of zero."""
    z, t = np.resize(np.float32(z), (5, 4)), np.resize(np.float32(t), (5, 4))
    return compiled()(z, t, *numbers) if numbers[-1] else compiled(margin=0.0)(z, t, *numbers[:-1])


NUMBERS = [(0.0, 4.0, 0.05), (1.0, 2.5, 0.3), (0.5, 0.5, 0.0), (1.0, 0.0, 0.2)]


@pytest.mark.parametrize("numbers", NUMBERS)
def test_the_loss_and_its_slope_follow_the_definition(numbers):
    got, slopes = evaluate(logits(), targets(), *numbers)
    np.testing.assert_allclose(got, elementwise(logits(), targets(), *numbers), **CLOSE)
    z = np.asarray(logits(), np.float64)
    ahead, behind = (elementwise(z + d, targets(), *numbers) for d in (STEP, -STEP))
    np.testing.assert_allclose(slopes, (ahead - behind) / (2 * STEP), **SLOPE)


def test_targets_between_mix_both_losses():
    t = targets() * 0.7 + 0.1
    mixed, one, zero = (evaluate(logits(), x, *NUMBERS[1])[0] for x in (t, np.ones_like(t), np.zeros_like(t)))
    np.testing.assert_allclose(mixed, t * one + (1 - t) * zero, rtol=1e-5)


def test_it_contains_binary_cross_entropy_and_the_focal_loss():
    @jax.jit
    def both(z, t):
        plain = functools.partial(losses.asymmetric_loss, gamma_negative=0.0, margin=0.0)
        focused = functools.partial(losses.asymmetric_loss, gamma_positive=4.0, margin=0.0)
        ours = *with_slopes(plain)(z, t), focused(z, t)
        focal = optax.sigmoid_focal_loss(z, t, gamma=4.0)
        return ours, (*with_slopes(optax.sigmoid_binary_cross_entropy)(z, t), focal), losses.asymmetric_loss(z, t)

    ours, theirs, defaults = both(logits(5.0), targets())
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)
    np.testing.assert_allclose(defaults, elementwise(logits(5.0), targets()), **CLOSE)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 4.0])
def test_a_negative_up_to_the_margin_counts_for_nothing(gamma):
    """sigmoid(0) is 1/2, exactly the margin."""
    values, slopes = (x[0] for x in evaluate([-100, -0.1, 0, 0.1], 0, 0.0, gamma, 0.5))
    np.testing.assert_array_equal(values[:3], 0)
    np.testing.assert_array_equal(slopes[:3], 0)
    assert values[3] > 0
    assert slopes[3] > 0


@pytest.mark.parametrize("numbers", [*NUMBERS, (0.01, 0.01, 0.0)])
def test_saturated_logits_have_the_limits_of_the_slopes(numbers):
    """log p and log(1 - p) are -100 where they are wrong; with a margin 1 - q does not fall below it."""
    values, slopes = (x[0] for x in evaluate([-100, -100, 100, 100], [0, 1, 0, 1], *numbers))
    _, gamma, margin = numbers
    worst = (1 - margin) ** gamma * -math.log(margin) if margin else 100
    # What is right has less than exp(-100) of loss.
    np.testing.assert_allclose(values, [0, 100, worst, 0], rtol=1e-6, atol=1e-40)
    np.testing.assert_allclose(slopes, [0, -1, 0 if margin else 1, 0], rtol=1e-6, atol=1e-40)


def test_stopped_powers_are_constant_weights():
    """The slope is then the weight times that of the logarithm: -(1 - p) for a positive, p (1 - p) / (1 - q) else."""
    numbers = (1.0, 2.0, 0.1)
    values, slopes = compiled(stop_focus_gradient=True)(logits(), targets(), *numbers)
    np.testing.assert_allclose(values, elementwise(logits(), targets(), *numbers), **CLOSE)
    p = 1 / (1 + np.exp(-np.asarray(logits(), np.float64)))
    q = np.maximum(p - 0.1, 0)
    expected = np.where(targets() == 1, -((1 - p) ** 2), q**2 * p * (1 - p) / (1 - q))
    np.testing.assert_allclose(slopes, expected, **CLOSE)


def transcribed_softmax(z, y, gamma_positive, gamma_negative, label_smoothing):
    p = [math.exp(x) / sum(math.exp(x) for x in z) for x in z]
    total = 0.0
    for k, p_k in enumerate(p):
        weight = (1 - p_k) ** gamma_positive if k == y else p_k**gamma_negative
        total -= ((1 - label_smoothing) * (k == y) + label_smoothing / len(z)) * weight * math.log(p_k)
    return total


@functools.cache
def softmax_form():
    """Of logits, labels, gamma_positive, gamma_negative and label_smoothing."""
    names = ("gamma_positive", "gamma_negative", "label_smoothing")

    def loss(z, labels, *numbers):
        return losses.asymmetric_softmax_loss(z, labels, **dict(zip(names, numbers, strict=True)))

    return jax.jit(with_slopes(loss))


@pytest.mark.parametrize("numbers", [(0.0, 4.0, 0.1), (1.0, 0.5, 0.3), (2.0, 4.0, 0.0)])
def test_the_softmax_form_and_its_slope_follow_the_definition(numbers):
    got, slopes = softmax_form()(logits(), LABELS, *numbers)
    steps = STEP * np.eye(4)
    for value, slope, z, y in zip(got, slopes, np.asarray(logits(), np.float64), LABELS.tolist(), strict=True):
        np.testing.assert_allclose(value, transcribed_softmax(z, y, *numbers), **CLOSE)
        ahead, behind = ([transcribed_softmax(z + s, y, *numbers) for s in sign * steps] for sign in (1, -1))
        np.testing.assert_allclose(slope, np.subtract(ahead, behind) / (2 * STEP), **SLOPE)


def test_the_softmax_form_without_gammas_is_cross_entropy_with_smoothed_labels():
    @jax.jit
    def both(z):
        ours = functools.partial(losses.asymmetric_softmax_loss, gamma_negative=0.0, label_smoothing=0.2)
        smoothed = optax.smooth_labels(jax.nn.one_hot(LABELS, 4), 0.2)
        return with_slopes(ours)(z, LABELS), with_slopes(optax.softmax_cross_entropy)(z, smoothed)

    for a, b in zip(*both(logits()), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)


def test_the_softmax_form_knows_how_far_from_certain_it_is():
    """1 - p = exp(-30) / (1 + exp(-30)), far below the precision of p: the loss is its square."""
    z = np.tile(np.float32([30, 0, -99, -99]), (5, 1))
    got, _ = softmax_form()(z, jnp.zeros(5, int), 1.0, 4.0, 0.0)
    np.testing.assert_allclose(got, math.exp(-60), rtol=1e-5)


def test_the_softmax_form_of_one_class_is_zero():
    got, slopes = softmax_form()(np.float32([[3]]), jnp.zeros(1, int), 0.5, 4.0, 0.1)
    np.testing.assert_array_equal(got, 0)
    np.testing.assert_array_equal(slopes, 0)


def test_leading_axes_are_free():
    z = jnp.ones((2, 3, 4))
    assert jax.eval_shape(losses.asymmetric_loss, z, z).shape == (2, 3, 4)
    assert jax.eval_shape(losses.asymmetric_softmax_loss, z, jnp.ones((2, 3), int)).shape == (2, 3)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        *[
            (functools.partial(losses.asymmetric_loss, logits(), targets(), **{name: bad}), f"{name}={bad} must lie in")
            for name, bad in [("gamma_positive", -1.0), ("gamma_negative", -0.5), ("margin", 1.0), ("margin", -0.1)]
        ],
        (lambda: losses.asymmetric_loss(logits(), targets()[:4]), r"\(5, 4\) and targets \(4, 4\)"),
        *[
            (functools.partial(losses.asymmetric_softmax_loss, logits(), LABELS, **{name: bad}), f"{name}={bad} must")
            for name, bad in [("gamma_positive", -1.0), ("gamma_negative", -0.5), ("label_smoothing", 1.5)]
        ],
        (lambda: losses.asymmetric_softmax_loss(logits(), LABELS[:4]), r"\(4,\) and logits \(5, 4\)"),
        (lambda: losses.asymmetric_softmax_loss(logits(), LABELS + 1), r"labels=4 must lie in \[0, 4\)"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
