"""Losses of regression against their formulas by loops in float64, limits, closed forms, and by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import sklearn.metrics

from steelyard import losses

ERRORS = np.array([-300.0, -2.0, -0.3, -1e-4, 0.0, 1e-4, 0.7, 1.0, 5.0, 1e4], np.float32)

huber = jax.jit(losses.pseudo_huber, static_argnames="axis")
slope = jax.jit(jax.grad(lambda errors, delta: losses.pseudo_huber(errors, delta).sum()))


def pseudo_huber(error, delta):
    """As written in the paper, which float64 allows where e / delta is not tiny."""
    return delta**2 * (math.sqrt(1 + (error / delta) ** 2) - 1)


# Rounded are the square, two divisions, sum, root, sum and quotient: less than 8 ulp.
ROUNDING = 8 * 2.0**-24


@pytest.mark.parametrize("delta", [0.01, 0.5, 1.0, 30.0])
def test_pseudo_huber_follows_the_definition(delta):
    expected = [pseudo_huber(float(e), delta) for e in ERRORS]
    # The definition itself loses 2^-53 delta^2 of a small error.
    np.testing.assert_allclose(huber(ERRORS, delta), expected, rtol=ROUNDING, atol=2.0**-52 * delta**2)


def test_pseudo_huber_does_not_cancel():
    """1e-4 squared vanishes beside 1 in float32, but half of it is the loss."""
    np.testing.assert_allclose(huber(np.float32(1e-4), 1.0), 5e-9, rtol=1e-6)


def test_a_large_delta_gives_half_the_square_and_a_small_one_the_absolute_error():
    half = ERRORS.astype(np.float64) ** 2 / 2
    np.testing.assert_allclose(huber(ERRORS, math.inf), half, rtol=ROUNDING)
    np.testing.assert_allclose(huber(ERRORS, 1e30), half, rtol=ROUNDING)
    np.testing.assert_allclose(huber(ERRORS, 1e8), optax.huber_loss(ERRORS, delta=1e8), rtol=ROUNDING)
    # The loss is delta |e| up to delta^2.
    for delta in (1e-6, 1e-12):
        np.testing.assert_allclose(huber(ERRORS, delta), delta * abs(ERRORS), rtol=ROUNDING, atol=delta**2)


@pytest.mark.parametrize("delta", [1e-3, 0.5, 30.0])
def test_the_slope_is_below_delta_and_zero_at_zero(delta):
    """It is e / sqrt(1 + e^2 / delta^2)."""
    got = slope(ERRORS, delta)
    expected = [float(e) / math.sqrt(1 + (float(e) / delta) ** 2) for e in ERRORS]
    np.testing.assert_allclose(got, expected, rtol=4 * ROUNDING)
    assert np.all(np.abs(got) <= np.float32(delta) * (1 + 4 * ROUNDING))
    np.testing.assert_array_equal(np.sign(got), np.sign(ERRORS))


def test_over_axes_the_error_is_the_length_of_a_vector_and_each_may_have_its_delta():
    errors = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
    deltas = np.array([0.1, 1.0, 10.0], np.float32)
    got = huber(errors, deltas, axis=(1, 2))
    lengths = [math.sqrt(sum(v**2 for v in vector.ravel().tolist())) for vector in errors]
    expected = [pseudo_huber(e, d) for e, d in zip(lengths, deltas.tolist(), strict=True)]
    np.testing.assert_allclose(got, expected, rtol=4 * ROUNDING)
    each = huber(errors, deltas[:, None, None])
    assert each.shape == errors.shape
    np.testing.assert_allclose(each[2, 1], [pseudo_huber(e, 10) for e in errors[2, 1].tolist()], rtol=4 * ROUNDING)
    zero = jax.jit(jax.grad(lambda e: losses.pseudo_huber(e, 0.1, axis=-1)))(np.zeros(4, np.float32))
    np.testing.assert_array_equal(zero, 0)


def test_the_exponential_schedule_is_geometric():
    steps = np.array([0, 250, 500, 1000])
    expected = [1, 0.1, 0.01, 1e-4]
    # The exponent reaches log(1e4) = 9.2; its logarithm, product and quotient are rounded.
    for schedule in (losses.pseudo_huber_delta, jax.jit(losses.pseudo_huber_delta)):
        got = schedule(steps, 1000, delta=1e-4)
        np.testing.assert_allclose(got, expected, rtol=4 * 9.2 * 2.0**-24)
        assert got.dtype == jnp.float32


by_noise = jax.jit(losses.pseudo_huber_delta_snr)


def test_the_schedule_by_noise_follows_the_definition_and_reaches_its_ends():
    alpha_bar = np.array([0.9999, 0.8, 0.5, 0.1, 1e-6], np.float32)
    expected = [0.7 / (1 + math.sqrt((1 - a) / a)) ** 2 + 0.3 for a in alpha_bar.astype(np.float64).tolist()]
    # 1 - alpha_bar is exact, and its root enters by its ratio to that of alpha_bar.
    np.testing.assert_allclose(by_noise(alpha_bar, delta=0.3), expected, rtol=1e-6)
    np.testing.assert_array_equal(by_noise(np.array([1, 0, 1, 0, 1], np.float32), delta=0.25), [1, 0.25, 1, 0.25, 1])


amplified = jax.jit(losses.amplify)


def test_amplify_follows_its_series_and_the_logarithm():
    small = np.array([0, 1e-6, 1e-4, 1e-2], np.float32)
    # The next term is e^3 / 3.
    series = small + small.astype(np.float64) ** 2 / 2
    np.testing.assert_allclose(amplified(small), series, rtol=1e-6, atol=1.01e-6 / 3)
    np.testing.assert_allclose(amplified(np.array([0.5, 0.75, 0.9375])), math.log(2) * np.array([1, 2, 4]), rtol=1e-6)


def test_amplify_is_steeper_the_larger_the_error_up_to_its_limit():
    errors = np.array([0.0, 0.5, 0.75, 0.875, 1 - 2.0**-10, 1.0, 3.0], np.float32)
    cap = jnp.float32(1 - 1e-6)
    values = amplified(errors)
    np.testing.assert_allclose(values[-2:], -math.log(1 - float(cap)), rtol=1e-6)
    np.testing.assert_allclose(values[-1], 13.8, atol=0.02)
    slopes = jax.jit(jax.grad(lambda e: losses.amplify(e).sum()))(jnp.append(errors, cap))
    np.testing.assert_allclose(slopes, [1, 2, 4, 8, 1024, 0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(losses.amplify(errors, limit=0.5), -np.log1p(-np.minimum(errors, 0.5)), rtol=1e-6)


EDGES = np.array([-1.0, 0.5, 2.0], np.float32)


def test_bins_count_the_edges_below_and_those_met():
    targets = [-50.0, -1.0, -0.999, 0.5, 1.9, 2.0, 1e9, -math.inf, math.inf]
    bins = losses.bin_targets(jnp.array(targets), EDGES)
    np.testing.assert_array_equal(bins, [sum(edge <= t for edge in EDGES.tolist()) for t in targets])
    np.testing.assert_array_equal(bins, [0, 1, 1, 2, 2, 3, 3, 0, 3])
    assert jnp.issubdtype(bins.dtype, jnp.integer)
    assert losses.bin_targets(jnp.zeros((2, 3)), EDGES[:1]).shape == (2, 3)


def test_uniform_edges_divide_a_range_evenly():
    np.testing.assert_allclose(losses.uniform_edges(-1, 3, 4), [0, 1, 2], atol=1e-6)
    traced = jax.jit(losses.uniform_edges, static_argnums=2)
    np.testing.assert_allclose(traced(-1.0, 3.0, 4), [0, 1, 2], atol=1e-6)
    np.testing.assert_array_equal(traced(0.0, 1.0, 2), [0.5])


@pytest.mark.parametrize("n", [5, 12, 100, 101])
@pytest.mark.parametrize("bins", [2, 3, 4, 5, 10])
def test_quantile_edges_equalise_the_histogram(n, bins):
    """With fewer targets than bins each has a bin of its own."""
    targets = np.random.default_rng(n).lognormal(sigma=3, size=n).astype(np.float32)
    edges = losses.quantile_edges(targets, bins)
    counts = np.bincount(np.searchsorted(edges, targets, side="right"), minlength=len(edges) + 1)
    assert len(counts) == len(edges) + 1 == min(bins, n)
    assert counts.min() >= 1
    assert counts.max() - counts.min() <= 1


def test_equal_targets_are_not_divided():
    """Half of the targets are the smallest: the quarter is no edge, and the median is the first above it."""
    targets = np.array([[0, 0, 0, 0], [1, 2, 3, 3]])
    np.testing.assert_array_equal(losses.quantile_edges(targets, 4), [1, 3])
    np.testing.assert_array_equal(losses.quantile_edges(targets, 2), [1])
    # Three quarters are zero: an edge still parts them from the rest.
    np.testing.assert_array_equal(losses.quantile_edges([0, 0, 0, 0, 0, 0, 5, 9], 4), [5])
    # Equal in float32.
    np.testing.assert_array_equal(losses.quantile_edges(np.array([0, 1, 1 + 1e-12, 1 + 2e-12]), 4), [1])


def data():
    rng = np.random.default_rng(0)
    prediction, target = rng.normal(size=(2, 6)).astype(np.float32)
    return prediction, rng.normal(size=(6, 4)).astype(np.float32), target


together = jax.jit(lambda p, z, t, w: losses.regression_with_classification(p, z, t, edges=EDGES, weight=w))


def test_the_classification_is_added_to_the_squared_error():
    """Against scikit-learn's log loss, one example at a time."""
    prediction, logits, target = data()
    probabilities = np.exp(logits.astype(np.float64))
    probabilities /= probabilities.sum(1, keepdims=True)
    bins = np.digitize(target, EDGES)
    nats = [sklearn.metrics.log_loss([c], [p], labels=range(4)) for c, p in zip(bins, probabilities, strict=True)]
    expected = (prediction.astype(np.float64) - target) ** 2 + 0.3 * np.array(nats)
    np.testing.assert_allclose(together(prediction, logits, target, 0.3), expected, rtol=1e-5)
    default = losses.regression_with_classification(prediction, logits, target, edges=EDGES)
    np.testing.assert_allclose(default, together(prediction, logits, target, 0.1), rtol=1e-6)


def test_without_weight_it_is_the_squared_error():
    prediction, logits, target = data()
    np.testing.assert_array_equal(together(prediction, logits, target, 0.0), optax.squared_error(prediction, target))
    parts = prediction.reshape(2, 3), logits.reshape(2, 3, 4), target.reshape(2, 3)
    assert jax.eval_shape(together, *parts, 1.0).shape == (2, 3)


ONES = np.ones(3, np.float32)
combined = functools.partial(losses.regression_with_classification, edges=EDGES)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: losses.pseudo_huber(ONES, 0.0), r"delta=0.0 must lie in \(0, inf\]"),
        (lambda: losses.pseudo_huber(ONES, np.array([1.0, -1.0, 1.0])), r"delta=-1.0 must lie in \(0, inf\]"),
        (lambda: losses.pseudo_huber(ONES, np.ones(2)), r"delta has shape \(2,\).*the losses, \(3,\)"),
        (lambda: losses.pseudo_huber(ONES, ONES, axis=0), r"delta has shape \(3,\).*the losses, \(\)"),
        (lambda: losses.pseudo_huber_delta(3, 0), r"total=0 must lie in \(0, inf\)"),
        (lambda: losses.pseudo_huber_delta(11, 10), r"timestep=11 must lie in \[0, 10\]"),
        (lambda: losses.pseudo_huber_delta(3, 10, delta=0.0), r"delta=0.0 must lie in \(0, inf\)"),
        (lambda: losses.pseudo_huber_delta_snr(1.5), r"alpha_bar=1.5 must lie in \[0, 1\]"),
        (lambda: losses.pseudo_huber_delta_snr(0.5, delta=-1.0), r"delta=-1.0 must lie in \(0, inf\)"),
        (lambda: losses.amplify(ONES, limit=0.0), r"limit=0.0 must lie in \(0, 1\)"),
        (lambda: losses.amplify(ONES, limit=1 - 1e-9), r"limit=1.0 must lie in \(0, 1\)"),
        (lambda: losses.bin_targets(ONES, np.ones((1, 2))), r"edges has shape \(1, 2\)"),
        (lambda: losses.bin_targets(ONES, []), r"edges has shape \(0,\)"),
        (lambda: losses.bin_targets(ONES, [2.0, 1.0]), r"edges=\[2. 1.\] must be finite and ascend"),
        (lambda: losses.bin_targets(ONES, [1.0, 1.0]), r"edges=\[1. 1.\] must be finite and ascend"),
        (lambda: losses.bin_targets(ONES, [math.nan]), r"edges=\[nan\] must be finite and ascend"),
        (lambda: losses.uniform_edges(0.0, 1.0, 1), r"bins=1 must lie in \[2, inf\)"),
        (lambda: losses.uniform_edges(0.0, 1.0, 2.5), "bins=2.5 must be a whole number"),
        (lambda: losses.uniform_edges(1.0, 1.0, 2), r"low=1.0 must lie in \(-inf, 1.0\)"),
        (lambda: losses.quantile_edges([1.0, 2.0], 1), r"bins=1 must lie in \[2, inf\)"),
        (lambda: losses.quantile_edges([1.0, math.nan], 2), r"targets=nan must lie in \(-inf, inf\)"),
        (lambda: losses.quantile_edges([1.0, 1.0], 2), "targets has 2 numbers, no two of them different"),
        (lambda: losses.quantile_edges([], 2), "targets has 0 numbers"),
        (lambda: combined(ONES, np.ones((3, 4)), ONES, weight=-1.0), r"weight=-1.0 must lie in \[0, inf\)"),
        (lambda: combined(ONES[:, None], np.ones((3, 4)), ONES), r"prediction has shape \(3, 1\) and target \(3,\)"),
        (lambda: combined(ONES, np.ones((3, 3)), ONES), r"edges \(3,\) and logits \(3, 3\).*shape \(3, 4\)"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
