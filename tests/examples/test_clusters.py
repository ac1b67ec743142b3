"""Balanced clusters against a loop over sorted pairs, and temperatures against sums in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard import examples

KEY = jax.random.key(0)


def points(n, d=3, seed=0):
    return np.random.default_rng(seed).standard_normal((n, d))


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def assigned(similarities):
    """The definition: all pairs by descending similarity, full clusters closed; then what is left, one to a cluster."""
    n, count = similarities.shape
    clusters, sizes = [-1] * n, [0] * count
    order = sorted((-similarities[i, k], i, k) for i in range(n) for k in range(count))
    for most in (n // count, n // count + 1):
        for _, i, k in order:
            if clusters[i] < 0 and sizes[k] < most:
                clusters[i], sizes[k] = k, sizes[k] + 1
    return clusters


def next_round(x, clusters):
    """The assignment to the means of the clusters."""
    means = np.stack([unit(x)[clusters == k].mean(0) for k in range(max(clusters) + 1)])
    return assigned(unit(x) @ unit(means).T)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_clusters_are_balanced_and_those_of_the_definition(n, share, seed):
    x, count = points(n, seed=seed), 1 + int(share * (n - 1))
    previous, clusters = (examples.balanced_clusters(KEY, x, count, iterations=i) for i in (3, 4))
    sizes = np.bincount(clusters, minlength=count)
    assert clusters.shape == (n,)
    assert len(sizes) == count
    assert sizes.max() - sizes.min() <= 1
    np.testing.assert_array_equal(clusters, next_round(x, previous))


def test_one_round_assigns_to_points_that_were_drawn():
    """Some K of the points are the centres, so that there is a choice of them that explains the result."""
    x = points(9)
    clusters = examples.balanced_clusters(KEY, x, 2, iterations=1)
    cosines = unit(x) @ unit(x).T
    explanations = [assigned(cosines[:, [i, j]]) for i in range(9) for j in range(9) if i != j]
    assert clusters.tolist() in explanations


def test_well_separated_groups_of_equal_size_are_found():
    directions = np.eye(3).repeat(6, 0) * np.linspace(1, 50, 18)[:, None]  # lengths do not count
    x = directions + 0.01 * points(18)
    for seed in range(4):
        clusters = examples.balanced_clusters(jax.random.key(seed), x, 3).reshape(3, 6)
        if len(set(clusters[:, 0])) == 3:
            assert np.all(clusters == clusters[:, :1])
            return
    pytest.fail("no start found the groups")


def test_the_ends_one_cluster_and_a_cluster_for_each_point():
    x = points(5)
    np.testing.assert_array_equal(examples.balanced_clusters(KEY, x, 1), 0)
    assert sorted(examples.balanced_clusters(KEY, x, 5)) == [0, 1, 2, 3, 4]


def test_equal_keys_give_equal_clusters_and_equal_points_are_shared_out():
    x = jnp.asarray(points(12), jnp.bfloat16)
    a, b = (examples.balanced_clusters(jax.random.key(1), x, 3) for _ in range(2))
    np.testing.assert_array_equal(a, b)
    for same in (np.ones((7, 2)), np.zeros((7, 2))):
        assert sorted(np.bincount(examples.balanced_clusters(KEY, same, 3))) == [2, 2, 3]


def test_subclass_counts_by_hand():
    np.testing.assert_array_equal(examples.subclass_count(jnp.array([100, 59, 12, 20])), [8, 4, 1, 1])
    np.testing.assert_array_equal(examples.subclass_count(jnp.array([100, 59, 3]), minimum_size=20), [5, 2, 1])
    np.testing.assert_array_equal(examples.subclass_count(jnp.array([5, 5, 5])), 1)
    counts = np.arange(1, 3000)
    got = jax.jit(examples.subclass_count)(counts)
    np.testing.assert_array_equal(got, np.maximum(counts // 10, 1))


def temperatures_by_loops(x, labels, counts, cuts, temperature, smoothing):
    phi = []
    for c, n in enumerate(counts):
        rows = [row for row, label in zip(x, labels, strict=True) if label == c]
        mean = np.mean(rows, axis=0)
        phi.append(np.mean([math.dist(row, mean) for row in rows]) / math.log(n + smoothing))
    low, high = np.percentile(phi, [20, 80])
    phi = [min(max(p, low), high) for p in phi]
    return [temperature * p / np.mean(phi) if k > 1 else temperature for p, k in zip(phi, cuts, strict=True)]


def test_temperatures_follow_the_definition():
    x, labels = points(40, 3).astype(np.float32), np.arange(40) % 6
    x *= 1 + labels[:, None]
    counts, cuts = np.array([60, 50, 40, 30, 20, 10]), np.array([6, 5, 4, 3, 2, 1])
    got = jax.jit(examples.cluster_temperatures)(x, labels, counts, cuts, temperature=0.2, smoothing=5.0)
    expected = temperatures_by_loops(x.astype(np.float64), labels, counts, cuts, 0.2, 5.0)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert got[5] == np.float32(0.2)


def test_classes_that_are_a_point_or_have_no_rows_keep_the_temperature():
    x, labels = jnp.zeros((6, 2)), jnp.array([0, 0, 0, 1, 1, 1])
    got = jax.jit(examples.cluster_temperatures)(x, labels, jnp.array([3, 3, 5]), jnp.array([2, 2, 2]))
    np.testing.assert_allclose(got, 0.1, rtol=1e-6)


X, Y, N = jnp.ones((4, 2)), jnp.array([0, 0, 1, 1]), jnp.array([2, 2])


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: examples.balanced_clusters(KEY, X, 5), r"num_clusters=5 must lie in \[1, 4\]"),
        (lambda: examples.balanced_clusters(KEY, X, 0), r"num_clusters=0 must lie in \[1, 4\]"),
        (lambda: examples.balanced_clusters(KEY, X, 2, iterations=0), r"iterations=0 must lie in \[1, inf\)"),
        (lambda: examples.balanced_clusters(KEY, X[0], 1), r"embeddings has shape \(2,\)"),
        (lambda: examples.subclass_count(N, minimum_size=0), r"minimum_size=0 must lie in \[1, inf\)"),
        (lambda: examples.subclass_count(jnp.array([3, 0])), r"counts=0.0 must lie in \(0, inf\)"),
        (lambda: examples.cluster_temperatures(X, Y, N, N[:1]), r"subclass_counts has shape \(1,\) and counts \(2,\)"),
        (lambda: examples.cluster_temperatures(X, Y[:3], N, N), r"labels has shape \(3,\) and embeddings \(4, 2\)"),
        (lambda: examples.cluster_temperatures(X, Y + 1, N, N), r"labels=2 must lie in \[0, 2\)"),
        (lambda: examples.cluster_temperatures(X, Y, N, N, temperature=0.0), r"temperature=0.0 must lie in \(0, inf\)"),
        (lambda: examples.cluster_temperatures(X, Y, N, N, smoothing=0.5), r"smoothing=0.5 must lie in \[1, inf\)"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
