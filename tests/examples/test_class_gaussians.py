"""Estimates against loops in float64, and what is drawn from them by its moments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.neighbors

from steelyard import examples

FEATURES = 3
SIZES = np.array([20, 16, 12, 4, 1])
IS_HEAD = np.array([True, True, True, False, False])
LABELS = np.repeat(np.arange(5), SIZES)
PLAIN = {"keep": 1.0, "mixture": 0.0, "jitter": 0.0}


def features(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(len(LABELS), FEATURES)) + 2 * rng.normal(size=(5, FEATURES))[LABELS]


estimate = functools.partial(examples.class_gaussians, num_classes=5, is_head=IS_HEAD)


def moments(rows):
    """Mean and covariance over n - 1, by loops."""
    mean = sum(rows) / len(rows)
    outer = sum(np.outer(row - mean, row - mean) for row in rows)
    return mean, outer / (len(rows) - 1) if len(rows) > 1 else np.zeros((FEATURES, FEATURES))


def test_without_borrowing_they_are_sample_means_and_covariances():
    x = features()
    got = estimate(x, LABELS, **PLAIN)
    np.testing.assert_array_equal(got.count, SIZES)
    for c in range(5):
        mean, covariance = moments([row for row, label in zip(x, LABELS, strict=True) if label == c])
        np.testing.assert_allclose(got.mean[c], mean, rtol=1e-6)
        np.testing.assert_allclose(got.covariance[c], covariance, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("borrow", [1, 2])
def test_small_classes_borrow_from_the_nearest_heads(borrow):
    x = features()
    own = [moments(rows) for rows in np.split(x, np.cumsum(SIZES)[:-1])]
    got = estimate(x, LABELS, keep=1.0, borrow=borrow, mixture=0.3, jitter=0.5)
    for k in (3, 4):
        distance = {c: sum((own[k][0] - own[c][0]) ** 2) for c in range(3)}
        near = sorted(distance, key=distance.get)[:borrow]
        weight = {c: SIZES[c] / distance[c] / sum(SIZES[d] / distance[d] for d in near) for c in near}
        mean, covariance = (0.3 * sum(weight[c] * own[c][part] for c in near) + 0.7 * own[k][part] for part in (0, 1))
        np.testing.assert_allclose(got.mean[k], mean, rtol=1e-5)
        np.testing.assert_allclose(got.covariance[k], covariance + 0.25 * np.eye(FEATURES), rtol=1e-5, atol=1e-6)
    for c in range(3):
        np.testing.assert_allclose(got.mean[c], own[c][0], rtol=1e-5)
        np.testing.assert_allclose(got.covariance[c], own[c][1], rtol=1e-5, atol=1e-6)


def test_a_head_in_the_same_place_lends_alone():
    x = np.array([[0.0], [2], [9], [11], [1]])
    got = examples.class_gaussians(
        x,
        np.array([0, 0, 1, 1, 2]),
        3,
        is_head=np.array([True, True, False]),
        keep=1.0,
        borrow=2,
        mixture=1.0,
        jitter=0.0,
    )
    np.testing.assert_allclose(got.mean[2], 1)
    np.testing.assert_allclose(got.covariance[2], 2)


def test_outliers_are_dropped_from_classes_that_have_enough_neighbours():
    x = features()
    x[0] += 50  # class 0
    x[-2] += 50  # class 3
    got = estimate(x, LABELS, keep=0.9, neighbors=10, mixture=0.0, jitter=0.0)
    kept = []
    for c in range(3):
        rows = x[SIZES[:c].sum() :][: SIZES[c]]
        factors = -sklearn.neighbors.LocalOutlierFactor(n_neighbors=10).fit(rows).negative_outlier_factor_
        kept.append(sorted(range(SIZES[c]), key=factors.__getitem__)[: round(0.9 * SIZES[c])])
        np.testing.assert_allclose(got.mean[c], moments(rows[kept[c]])[0], rtol=1e-5)
    assert 0 not in kept[0]
    # Four examples are fewer than eleven: all count.
    np.testing.assert_allclose(got.mean[3], x[48:52].mean(0), rtol=1e-6)
    np.testing.assert_array_equal(got.count, SIZES)


def test_results_have_the_precision_of_the_features():
    half = jnp.asarray(features(), jnp.bfloat16)
    got = estimate(half, LABELS)
    assert got.mean.dtype == got.covariance.dtype == jnp.float32
    np.testing.assert_array_equal(got.mean, estimate(half.astype(jnp.float32), LABELS).mean)
    with jax.enable_x64(True):
        assert estimate(features(), LABELS).covariance.dtype == jnp.float64


@functools.cache
def draw():
    return jax.jit(examples.sample_features)


def test_samples_have_the_moments_of_their_class():
    gaussians = estimate(features().astype(np.float32), LABELS)
    n = 2000
    labels = np.arange(5 * n) % 5
    drawn = np.asarray(draw()(jax.random.key(0), gaussians, labels))
    for c in range(5):
        rows, covariance = drawn[c::5], np.asarray(gaussians.covariance[c])
        deviations = np.sqrt(np.diag(covariance))
        np.testing.assert_array_less(np.abs(rows.mean(0) - gaussians.mean[c]), 4 * deviations / np.sqrt(n))
        # A sample covariance has the variance (s_ij^2 + s_ii s_jj) / n.
        errors = np.sqrt((covariance**2 + np.outer(deviations, deviations) ** 2) / n)
        np.testing.assert_array_less(np.abs(np.cov(rows.T) - covariance), 4 * errors)


def test_a_singular_covariance_can_be_drawn_from():
    """A class of one example without jitter: what is left is the least variance, 1e-6."""
    gaussians = estimate(features().astype(np.float32), LABELS, **PLAIN)
    drawn = draw()(jax.random.key(0), gaussians, np.full(10_000, 4))
    deviations = np.std(drawn - gaussians.mean[4], axis=0)
    # Four standard errors, 4 / sqrt(2 n); and the rounding of features near 2, 2^-24 of them.
    np.testing.assert_allclose(deviations, 1e-3, rtol=4 / np.sqrt(20_000) + 1e-3)


def test_draws_depend_on_the_key_alone():
    gaussians = estimate(features().astype(np.float32), LABELS)
    labels = np.full(10_000, 2)
    a, b, c = (draw()(jax.random.key(seed), gaussians, labels) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0.1


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: estimate(features(), LABELS, neighbors=0), r"neighbors=0 must lie in \[1, inf\)"),
        (lambda: estimate(features(), LABELS, keep=0.0), r"keep=0.0 must lie in \(0, 1\]"),
        (lambda: estimate(features(), LABELS, mixture=1.5), r"mixture=1.5 must lie in \[0, 1\]"),
        (lambda: estimate(features(), LABELS, jitter=-1.0), r"jitter=-1.0 must lie in \[0, inf\)"),
        (lambda: estimate(features(), LABELS, borrow=0), r"borrow=0 must lie in \[1, inf\)"),
        (lambda: estimate(features(), LABELS, borrow=4), "borrow=4, but is_head names 3 classes"),
        (lambda: estimate(features(), LABELS[:3]), r"labels has shape \(3,\) and features \(53, 3\)"),
        (lambda: estimate(features(), LABELS + 1), r"labels=5 must lie in \[0, 5\)"),
        (lambda: estimate(features(), np.zeros_like(LABELS)), "class 1 has no examples"),
        (lambda: estimate(features(), LABELS, is_head=IS_HEAD[:2]), r"is_head has shape \(2,\)"),
        (lambda: estimate(features(), LABELS / 1), "labels are float.*; they must be integers"),
        (
            lambda: examples.sample_features(jax.random.key(0), estimate(features(), LABELS), np.zeros(2)),
            "labels must be a vector of integers",
        ),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
