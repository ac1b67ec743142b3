"""Divergences of predictions against sums by loops in float64, and by property."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard import losses

CLASSES = 5
DIVERGENCES = (losses.forward_kl, losses.reverse_kl, losses.balanced_kl)
# A sum over 5 classes of products of numbers up to 20 (differences of log-probabilities) and at most 1.
TOLERANCE = 5 * 20 * 2.0**-22


def softmax(row, temperature):
    top = max(row)
    exps = [math.exp((x - top) / temperature) for x in row]
    return [e / sum(exps) for e in exps]


def kl(p, q):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True))


def entropy(p):
    return -sum(a * math.log(a) for a in p)


def transcribed(student, teacher, temperature=1.0, major=2.0, minor=1.0):
    """Forward, reverse and balanced divergence of each example, by loops in float64."""
    result = []
    for s, t in zip(np.asarray(student, np.float64).tolist(), np.asarray(teacher, np.float64).tolist(), strict=True):
        s, t = softmax(s, temperature), softmax(t, temperature)
        a, b = (major, minor) if entropy(t) >= entropy(s) else (minor, major)
        result.append((kl(t, s), kl(s, t), temperature**2 * (a * kl(t, s) + b * kl(s, t))))
    return np.array(result).T


def logits(seed=0, scale=2.0, shape=(6, CLASSES)):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(scale * rng.standard_normal(shape), jnp.float32) for _ in range(2))


@functools.cache
def compiled(fn):
    return jax.jit(fn)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_divergences_follow_the_definition(temperature):
    student, teacher = logits()
    expected = transcribed(student, teacher, temperature)
    for fn, values in zip(DIVERGENCES, expected, strict=True):
        got = fn(student, teacher, temperature=temperature)
        assert got.shape == (6,)
        np.testing.assert_allclose(got, values, rtol=1e-5, atol=TOLERANCE)


def test_both_branches_of_the_balance_are_taken():
    student, teacher = logits()
    certain = losses.entropy(teacher) >= losses.entropy(student)
    assert 0 < int(certain.sum()) < len(certain)
    got = losses.balanced_kl(student, teacher, major=5.0, minor=0.25)
    np.testing.assert_allclose(got, transcribed(student, teacher, 1.0, 5.0, 0.25)[2], rtol=1e-5, atol=TOLERANCE)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_entropy_follows_the_definition_and_has_its_bounds(temperature):
    rows, _ = logits()
    expected = [entropy(softmax(row, temperature)) for row in rows.tolist()]
    np.testing.assert_allclose(losses.entropy(rows, temperature=temperature), expected, atol=TOLERANCE)
    np.testing.assert_allclose(losses.entropy(jnp.zeros((2, CLASSES))), math.log(CLASSES), rtol=1e-6)
    np.testing.assert_array_equal(losses.entropy(jnp.array([1e4, 0, -1e4])), 0)
    np.testing.assert_array_equal(losses.entropy(rows[:, :1]), 0)


def test_equal_weights_at_temperature_one_give_the_symmetric_divergence():
    """Jeffreys: sum (p_t - p_s) (log p_t - log p_s)."""
    student, teacher = logits()
    p_s, p_t = (np.array([softmax(row, 1.0) for row in x.tolist()]) for x in (student, teacher))
    jeffreys = ((p_t - p_s) * (np.log(p_t) - np.log(p_s))).sum(1)
    got = losses.balanced_kl(student, teacher, major=1.0, minor=1.0)
    np.testing.assert_allclose(got, jeffreys, rtol=1e-5, atol=TOLERANCE)
    np.testing.assert_allclose(losses.balanced_kl(teacher, student, major=1.0, minor=1.0), got, rtol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(-30, 30, width=32), min_size=2 * CLASSES, max_size=2 * CLASSES))
def test_divergences_are_not_negative_and_do_not_depend_on_a_constant(values):
    student, teacher = jnp.asarray(values, jnp.float32).reshape(2, 1, CLASSES)
    for fn in DIVERGENCES[:2]:
        value = compiled(fn)(student, teacher)
        assert value >= -TOLERANCE
        # The constant costs the logits of up to 30 their last bits: 4 ulp of 64 on either side.
        moved = compiled(fn)(student + 7, teacher - 11)
        np.testing.assert_allclose(moved, value, rtol=1e-5, atol=8 * 64 * 2.0**-23)


def test_the_balance_does_not_depend_on_a_constant():
    student, teacher = logits()
    moved = losses.balanced_kl(student + 7, teacher - 11)
    np.testing.assert_allclose(moved, losses.balanced_kl(student, teacher), rtol=1e-4, atol=TOLERANCE)


def test_a_uniform_teacher_always_spreads_the_student():
    student, _ = logits()
    teacher = jnp.zeros_like(student)
    expected = 2 * losses.forward_kl(student, teacher) + losses.reverse_kl(student, teacher)
    np.testing.assert_allclose(losses.balanced_kl(student, teacher), expected, rtol=1e-6)


@pytest.mark.parametrize("fn", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equal_predictions_have_no_divergence_and_no_gradient(fn, temperature):
    student, _ = logits()
    value, grads = jax.value_and_grad(lambda s: fn(s, student, temperature=temperature).sum())(student)
    assert value == 0
    # Left over are roundings of probabilities that sum to 1, of weight 3 temperature at most.
    np.testing.assert_allclose(grads, 0, atol=3 * temperature * CLASSES * 2.0**-23)


@pytest.mark.parametrize("fn", DIVERGENCES)
def test_extreme_logits_give_finite_values_and_gradients(fn):
    student = jnp.array([[1e4, 0.0, -1e4], [-1e4, 1e4, 0.0], [0.0, 0.0, 0.0]])
    teacher = jnp.array([[-1e4, 0.0, 1e4], [-1e4, 1e4, 0.0], [1e4, -1e4, 0.0]])
    value, grads = jax.value_and_grad(lambda s, t: fn(s, t).sum(), argnums=(0, 1))(student, teacher)
    assert np.isfinite(value)
    assert all(np.isfinite(g).all() for g in grads)


def test_the_gradient_of_the_forward_divergence_is_the_difference_of_probabilities():
    student, teacher = logits()
    got = jax.grad(lambda s: losses.forward_kl(s, teacher, temperature=2.0).sum())(student)
    p_s, p_t = (np.array([softmax(row, 2.0) for row in x.tolist()]) for x in (student, teacher))
    np.testing.assert_allclose(got, (p_s - p_t) / 2, atol=1e-6)


def test_the_gradient_of_the_balance_does_not_pass_through_the_choice():
    """It is that of the weighed sum with the weights held fixed."""
    student, teacher = logits()
    spread = losses.entropy(teacher) >= losses.entropy(student)

    def fixed(s):
        forward, reverse = losses.forward_kl(s, teacher), losses.reverse_kl(s, teacher)
        return jnp.where(spread, 2 * forward + reverse, forward + 2 * reverse).sum()

    got = jax.grad(lambda s: losses.balanced_kl(s, teacher).sum())(student)
    np.testing.assert_allclose(got, jax.grad(fixed)(student), rtol=1e-5, atol=1e-6)


def test_with_the_roles_exchanged_the_reverse_divergence_trains_the_teacher():
    student, teacher = logits()
    np.testing.assert_array_equal(losses.reverse_kl(teacher, student), losses.forward_kl(student, teacher))


@pytest.mark.parametrize("fn", DIVERGENCES)
def test_half_precision_is_computed_in_float32(fn):
    student, teacher = (x.astype(jnp.bfloat16) for x in logits())
    got = fn(student, teacher, temperature=2.0)
    assert got.dtype == jnp.float32
    expected = fn(student.astype(jnp.float32), teacher.astype(jnp.float32), temperature=2.0)
    np.testing.assert_array_equal(got, expected)


def test_float64_stays_and_leading_axes_are_free():
    with jax.enable_x64(True):
        student, teacher = (x.astype(jnp.float64) for x in logits(shape=(2, 3, CLASSES)))
        got = losses.balanced_kl(student, teacher, temperature=2.0)
        assert got.dtype == jnp.float64
    assert got.shape == (2, 3)
    flat = transcribed(student.reshape(6, CLASSES), teacher.reshape(6, CLASSES), 2.0)[2]
    np.testing.assert_allclose(got.reshape(6), flat, rtol=1e-12)


def test_the_temperature_may_be_traced():
    student, teacher = logits()
    got = jax.jit(lambda t: losses.balanced_kl(student, teacher, temperature=t))(4.0)
    np.testing.assert_allclose(got, transcribed(student, teacher, 4.0)[2], rtol=1e-4, atol=TOLERANCE * 16)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        *[
            (functools.partial(fn, *logits(), temperature=t), r"must lie in \(0, inf\)")
            for fn in DIVERGENCES
            for t in (0.0, -1.0)
        ],
        (lambda: losses.entropy(jnp.ones(3), temperature=0.0), r"temperature=0.0 must lie in \(0, inf\)"),
        (lambda: losses.balanced_kl(*logits(), major=-1.0), r"major=-1.0 must lie in \[0, inf\)"),
        (lambda: losses.balanced_kl(*logits(), minor=math.inf), r"minor=inf must lie in \[0, inf\)"),
        *[(functools.partial(fn, jnp.ones((2, 3)), jnp.ones((2, 4))), r"\(2, 3\) and \(2, 4\)") for fn in DIVERGENCES],
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
