"""Cumulative logits against loops in float64, logistic regression, SciPy's minimizer, and cases by hand."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special

from steelyard import losses

# Ordered, so that all classes have a probability, from one threshold to four.
LOGITS = np.cumsum(np.abs(np.random.default_rng(0).normal(size=(7, 4))), axis=1) - 2

probabilities_of = jax.jit(losses.cumulative_probabilities)
nll = jax.jit(lambda logits, labels, min_gap=1e-6: losses.cumulative_nll(logits, labels, min_gap=min_gap))
slopes = jax.jit(jax.grad(lambda logits, labels: losses.cumulative_nll(logits, labels).sum()))


def transcribed(logits):
    """The probabilities, as differences."""
    rows = []
    for row in np.asarray(logits, np.float64):
        below = [0.0, *(1 / (1 + math.exp(-x)) for x in row), 1.0]
        rows.append([b - a for a, b in itertools.pairwise(below)])
    return np.array(rows)


def data(n=60, d=3, thresholds=2, seed=0):
    rng = np.random.default_rng(seed)
    x, weights = rng.uniform(-1, 1, (n, d)), rng.uniform(-1, 1, d)
    noisy = x @ weights + rng.logistic(size=n)
    return jnp.asarray(x, jnp.float32), jnp.asarray(np.digitize(-noisy, np.arange(thresholds)), jnp.int32)


def test_logits_are_one_regression_for_each_threshold():
    rng = np.random.default_rng(0)
    x, weights, intercepts = rng.normal(size=(2, 3, 5)), rng.normal(size=(5, 4)), rng.normal(size=4)
    got = losses.cumulative_logits(*(jnp.asarray(a, jnp.float32) for a in (x, weights, intercepts)))
    expected = np.einsum("abd,dk->abk", x, weights) + intercepts
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("thresholds", [1, 2, 4])
def test_probabilities_and_likelihood_follow_the_definition(thresholds):
    logits = jnp.asarray(LOGITS[:, :thresholds], jnp.float32)
    expected = transcribed(logits)
    probabilities = probabilities_of(logits)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-6)
    for label in range(thresholds + 1):
        got = nll(logits, jnp.full(7, label))
        np.testing.assert_allclose(got, -np.log(expected[:, label]), rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_the_likelihood():
    """By the two thresholds of class y: (sigma'(hi), -sigma'(lo)) / p, with sigma' = sigma (1 - sigma)."""
    labels = np.array([0, 1, 2, 3, 4, 2, 1])
    got = slopes(jnp.asarray(LOGITS, jnp.float32), jnp.asarray(labels))
    expected = np.zeros(LOGITS.shape)
    for i, y in enumerate(labels):
        p = transcribed(LOGITS[i : i + 1])[0, y]
        for k, sign in ((y, -1), (y - 1, 1)):
            if 0 <= k < LOGITS.shape[1]:
                s = scipy.special.expit(LOGITS[i, k])
                expected[i, k] = sign * s * (1 - s) / p
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


def test_one_threshold_is_logistic_regression():
    logits = jnp.linspace(-3, 3, 7)[:, None]
    for label, sign in ((0, -1), (1, 1)):
        expected = np.logaddexp(0, sign * np.linspace(-3, 3, 7))
        np.testing.assert_allclose(nll(logits, jnp.full(7, label)), expected, rtol=1e-5)


def test_far_from_zero_nothing_cancels():
    """Between thresholds at 40 and 41, e^-40 (1 - e^-1), which is a difference of two ones."""
    logits, label = jnp.array([[40.0, 41.0], [-41.0, -40.0], [80.0, 81.0]]), jnp.ones(3, int)
    expected = np.exp([-40.0, -40.0, -80.0]) * (1 - math.exp(-1))
    np.testing.assert_allclose(nll(logits, label), -np.log(expected), rtol=1e-6)
    np.testing.assert_allclose(probabilities_of(logits)[:, 1], expected, rtol=1e-5)


def test_crossed_thresholds_cost_a_finite_amount_and_are_pushed_apart():
    """The amount at a gap of 1e-6; the probability is negative, and all still sum to 1."""
    logits, label = jnp.array([[2.0, -1.0], [1.0, 1.0], [500.0, -500.0]]), jnp.ones(3, int)
    expected = [np.logaddexp(0, -b) + np.logaddexp(0, a) - math.log(-math.expm1(-1e-6)) for a, b in logits.tolist()]
    np.testing.assert_allclose(nll(logits, label), expected, rtol=1e-5)
    below, above = np.asarray(slopes(logits, label)).T
    assert np.all(below > 0)
    assert np.all(above < 0)
    wider = nll(logits, label, min_gap=1e-3)
    np.testing.assert_allclose(wider, np.array(expected) - math.log(1e3), rtol=1e-3)
    probabilities = probabilities_of(logits)
    np.testing.assert_allclose(probabilities, transcribed(np.clip(logits, -100, 100)), rtol=1e-5, atol=1e-7)


def test_probabilities_have_the_gradient_of_their_differences_also_where_thresholds_meet():
    logits = jnp.array([[1.0, 1.0], [0.5, -0.5], [60.0, -60.0]])
    jacobian = jax.jit(jax.vmap(jax.jacrev(losses.cumulative_probabilities)))(logits)
    s = scipy.special.expit(np.asarray(logits, np.float64))
    a, b = (s * (1 - s)).T
    expected = np.stack([np.stack([a, 0 * a], 1), np.stack([-a, b], 1), np.stack([0 * b, -b], 1)], 1)
    np.testing.assert_allclose(jacobian, expected, rtol=1e-5, atol=1e-7)


def test_differences_and_weights_are_inverse_and_the_penalty_is_the_sum_of_their_sizes():
    weights = jnp.array([[1.0, 3.0, 3.0], [-2.0, 0.0, -1.0]])
    differences = losses.to_differences(weights)
    np.testing.assert_array_equal(differences, [[1, 2, 0], [-2, 2, -1]])
    np.testing.assert_array_equal(losses.from_differences(differences), weights)
    assert losses.fused_penalty(weights) == 1 + 2 + 0 + 2 + 2 + 1


def test_differences_beyond_the_first_column_of_zero_are_proportional_odds():
    """All log-odds then differ between two examples by the same amount."""
    x, _ = data(n=4)
    differences = jnp.array([[1.0, 0, 0], [-2.0, 0, 0], [0.5, 0, 0]])
    fn = jax.jit(lambda x, d, a: losses.cumulative_logits(x, losses.from_differences(d), a))
    logits = np.asarray(fn(x, differences, jnp.array([-1.0, 0, 2])))
    shifts = logits[1:] - logits[:1]
    np.testing.assert_allclose(shifts, np.repeat(shifts[:, :1], 3, axis=1), atol=1e-6)


def test_the_threshold_solves_its_problem_and_keeps_the_dtype():
    x = np.array([-2.0, -0.5, 0.0, 0.3, 1.0])
    got = jax.jit(losses.soft_threshold)(jnp.asarray(x, jnp.float32), 0.5)
    solved = [scipy.optimize.minimize_scalar(lambda u, a=a: (u - a) ** 2 / 2 + 0.5 * abs(u)).x for a in x]
    np.testing.assert_allclose(got, solved, atol=1e-6)
    assert np.count_nonzero(got) == 2
    half = jax.eval_shape(losses.soft_threshold, jnp.ones(2, jnp.bfloat16), jnp.float32(0.5))
    assert half.dtype == jnp.bfloat16


@functools.cache
def solve():
    """Proximal gradient descent in the differences, 2000 steps of 1/2 on the mean likelihood."""

    def run(x, y, strength):
        def loss(params):
            logits = losses.cumulative_logits(x, losses.from_differences(params[0]), params[1])
            return losses.cumulative_nll(logits, y).mean()

        def step(params, _):
            differences, intercepts = jax.tree.map(lambda p, g: p - 0.5 * g, params, jax.grad(loss)(params))
            return (losses.soft_threshold(differences, 0.5 * strength), intercepts), None

        start = jnp.zeros((x.shape[1], 2)), jnp.array([-1.0, 1.0])
        return jax.lax.scan(step, start, length=2000)[0]

    return jax.jit(run)


def test_an_infinite_penalty_leaves_intercepts_that_reproduce_the_frequencies():
    x, y = data()
    differences, intercepts = solve()(x, y, 1e6)
    np.testing.assert_array_equal(differences, 0)
    frequencies = np.bincount(y, minlength=3) / len(y)
    np.testing.assert_allclose(probabilities_of(intercepts[None])[0], frequencies, atol=1e-4)


def test_without_penalty_it_is_the_maximum_of_the_likelihood():
    x, y = data()
    differences, intercepts = solve()(x, y, 0.0)
    rows, labels = np.asarray(x, np.float64), np.asarray(y)

    def objective(flat):
        weights, intercepts = flat[:6].reshape(3, 2), flat[6:]
        with np.errstate(all="ignore"):
            p = transcribed(rows @ weights + intercepts)[np.arange(len(labels)), labels]
        return -np.log(np.maximum(p, 1e-12)).mean()

    best = scipy.optimize.minimize(objective, np.r_[np.zeros(6), -1, 1], method="BFGS")
    found = objective(np.r_[np.ravel(losses.from_differences(differences)), np.asarray(intercepts)])
    assert found <= best.fun + 1e-5


LOGITS_OF_TWO, LABELS = np.zeros((3, 2), np.float32), np.zeros(3, np.int32)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: losses.cumulative_nll(LOGITS_OF_TWO, LABELS + 3), r"labels=3 must lie in \[0, 3\)"),
        (lambda: losses.cumulative_nll(LOGITS_OF_TWO, LABELS - 1), r"labels=-1 must lie in \[0, 3\)"),
        (lambda: losses.cumulative_nll(LOGITS_OF_TWO, LABELS[:2]), r"labels has shape \(2,\)"),
        (lambda: losses.cumulative_nll(LOGITS_OF_TWO, LABELS, min_gap=0.0), r"min_gap=0.0 must lie in \(0, inf\)"),
        (lambda: losses.cumulative_nll(np.zeros((3, 0)), LABELS), r"logits has shape \(3, 0\)"),
        (lambda: losses.cumulative_probabilities(np.zeros((3, 0))), r"logits has shape \(3, 0\)"),
        (lambda: losses.cumulative_logits(np.ones((4, 3)), np.ones((2, 2)), np.ones(2)), r"\(4, 3\), \(2, 2\), \(2,\)"),
        (lambda: losses.cumulative_logits(np.ones((4, 3)), np.ones((3, 2)), np.ones(3)), r"\(3, 2\), \(3,\)"),
        (lambda: losses.cumulative_logits(np.ones((4, 3)), np.ones(3), np.ones(2)), r"\(3,\), \(2,\)"),
        (lambda: losses.soft_threshold(np.ones(3), -1.0), r"threshold=-1.0 must lie in \[0, inf\)"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
