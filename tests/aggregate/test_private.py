"""Splitting privacy budgets against loops in float64, closed forms, and by what they promise."""

import functools
import math

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import aggregate

# A logarithm, an exponential of up to 2 * 14, a sum of a few terms, a division and a root.
ROUNDING = 2.0**-24
WEIGHT = 64 * ROUNDING

MEMBERSHIPS = hypothesis.extra.numpy.arrays(bool, (6, 4))


def transcribed(membership, counts, exponent=-0.5, budget=1.0):
    """The weights by loops in float64."""
    omega = [max(count, 1.0) ** exponent for count in counts]
    weights = np.zeros(np.shape(membership))
    for i, row in enumerate(membership):
        tasks = [j for j, there in enumerate(row) if there]
        norm = math.sqrt(sum(omega[j] ** 2 for j in tasks))
        for j in tasks:
            weights[i, j] = math.sqrt(budget) * omega[j] / norm
    return weights


compiled = jax.jit(aggregate.private_task_weights)


def weights_of(membership, counts, **options):
    return np.asarray(compiled(np.asarray(membership), np.asarray(counts, np.float32), **options), np.float64)


@functools.cache
def counter(stddev, sample):
    return jax.jit(functools.partial(aggregate.noisy_counts, stddev=stddev, sample=sample))


count_each = jax.jit(jax.vmap(functools.partial(aggregate.noisy_counts, stddev=0.0, sample=2)))


def counts_of(membership, seed=0, *, stddev=0.0, sample=None):
    return np.asarray(counter(stddev, sample)(jnp.asarray(membership), jax.random.key(seed)))


@hypothesis.given(
    membership=MEMBERSHIPS,
    counts=hypothesis.extra.numpy.arrays(np.float32, 4, elements=st.floats(0, 2**20, width=32)),
    exponent=st.floats(-1, 0, width=32),
    budget=st.floats(0.125, 8, width=32),
)
@hypothesis.settings(max_examples=20, deadline=None)
def test_weights_follow_the_definition(membership, counts, exponent, budget):
    weights = weights_of(membership, counts, exponent=exponent, budget=budget)
    expected = transcribed(membership, counts.astype(np.float64), exponent, budget)
    np.testing.assert_allclose(weights, expected, rtol=WEIGHT)
    np.testing.assert_allclose((weights**2).sum(1), budget * membership.any(1), rtol=WEIGHT)


def test_three_tasks_by_hand():
    """omega = 1/2, 1/3, 1/6 for counts 4, 9, 36; over the first two 1/4 + 1/9 = 13/36."""
    membership = [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    expected = [[3 / math.sqrt(13), 2 / math.sqrt(13), 0], [0, 1, 0], [0, 0, 0]]
    np.testing.assert_allclose(weights_of(membership, [4, 9, 36]), expected, rtol=WEIGHT)


@hypothesis.given(membership=MEMBERSHIPS)
@hypothesis.settings(max_examples=10, deadline=None)
def test_exponent_zero_splits_equally(membership):
    weights = weights_of(membership, [1, 10, 100, 1000], exponent=0.0, budget=2.0)
    expected = membership * np.sqrt(2 / np.maximum(membership.sum(1, keepdims=True), 1))
    np.testing.assert_allclose(weights, expected, rtol=WEIGHT)


@pytest.mark.parametrize("factor", [2.0, 10.0, 1e4])
def test_scaled_counts_give_the_same_weights(factor):
    membership, counts = np.random.default_rng(0).random((8, 4)) < 0.6, np.array([1.0, 5, 20, 300])
    weights = [weights_of(membership, scale * counts) for scale in (1, factor)]
    np.testing.assert_allclose(*weights, rtol=WEIGHT)


def test_rare_tasks_get_more():
    assert np.all(np.diff(weights_of(np.ones((1, 4)), [1000, 100, 10, 1])[0]) > 0)


def test_counts_below_one_are_one():
    membership = np.ones((2, 3))
    np.testing.assert_array_equal(weights_of(membership, [0.0, -5, 9]), weights_of(membership, [1.0, 1, 9]))


def test_a_user_without_tasks_has_zeros():
    weights = weights_of(np.array([[0, 0], [1, 0]]), [3, 5])
    np.testing.assert_array_equal(weights, [[0, 0], [1, 0]])


def test_steep_exponents_do_not_underflow():
    """Powers such as 1e30 ** -2 are not float32 numbers; their ratios are."""
    np.testing.assert_allclose(weights_of(np.ones((1, 2)), [1e30, 1e30], exponent=-2.0), math.sqrt(0.5), rtol=WEIGHT)
    np.testing.assert_array_equal(weights_of(np.array([[1, 0]]), [1e30, 1], exponent=-2.0), [[1, 0]])


def test_any_number_but_zero_is_membership():
    """A 3 that counted thrice would break the promise of the budget."""
    counts = [4, 9, 1]
    expected = weights_of(np.array([[True, True, False]]), counts)
    np.testing.assert_array_equal(weights_of(np.array([[3.0, 0.5, 0]]), counts), expected)
    np.testing.assert_array_equal(counts_of([[3, 0], [1, 1]]), [2, 1])


def test_one_user_changes_a_weighted_sum_by_at_most_the_root_of_the_budget():
    """The sum over users and tasks of weighted unit vectors, with and without one user, other counts staying."""
    rng = np.random.default_rng(0)
    membership, counts = rng.random((20, 5)) < 0.5, rng.uniform(1, 100, 5)
    vectors = rng.standard_normal((20, 5, 3))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    weights = weights_of(membership, counts, budget=4.0)
    changes = np.linalg.norm((weights[:, :, None] * vectors).reshape(20, -1), axis=1)
    np.testing.assert_allclose(changes[membership.any(1)], 2, rtol=WEIGHT)


@pytest.mark.parametrize("counts", [[1, 2], jnp.array([1, 2]), jnp.array([1, 2], jnp.bfloat16)])
def test_weights_are_float32(counts):
    weights = aggregate.private_task_weights([[1, 1]], counts)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, [[math.sqrt(2 / 3), math.sqrt(1 / 3)]], rtol=WEIGHT)


def test_without_noise_and_sample_counts_are_exact():
    membership = np.random.default_rng(0).random((50, 4)) < [0.9, 0.5, 0.1, 0.0]
    np.testing.assert_array_equal(counts_of(membership), np.maximum(membership.sum(0), 1))


@hypothesis.given(membership=MEMBERSHIPS, seed=st.integers(0, 1000))
@hypothesis.settings(max_examples=20, deadline=None)
def test_at_most_sample_tasks_of_each_user_count(membership, seed):
    """Users one by one, each beside one with all tasks, so that the floor of 1 is mostly out of the way."""
    rows = jnp.asarray(np.concatenate([membership[:, None], np.ones((6, 1, 4), bool)], axis=1))
    sums = np.asarray(count_each(rows, jax.random.split(jax.random.key(seed), 6)))
    # The full user adds 2, the other one its number of tasks up to 2; where the sum is 0 the floor adds 1.
    floors = (sums == 1).sum(1)
    expected = 2 + np.minimum(membership.sum(1), 2)
    assert np.all((sums.sum(1) >= expected) & (sums.sum(1) - floors <= expected))


def test_the_sample_is_only_of_tasks_that_the_user_has():
    membership = np.tile([[0, 1, 0, 1]], (40, 1))
    np.testing.assert_array_equal(counts_of(membership, sample=2), [1, 40, 1, 40])
    np.testing.assert_array_equal(counts_of(membership, sample=9), [1, 40, 1, 40])
    one = counts_of(membership, sample=1)
    assert one[0] == one[2] == 1
    assert one[1] + one[3] == 40


def test_the_sample_is_uniform():
    """4000 users with 4 tasks, one counts: each sum is binomial(4000, 1/4), with standard deviation 27."""
    deviation = counts_of(np.ones((4000, 4)), sample=1) - 1000
    assert deviation.sum() == 0
    assert np.all(np.abs(deviation) < 4 * math.sqrt(4000 * 3 / 16))


def test_noise_has_the_standard_deviation_asked_for():
    """2000 tasks without noise at 100: mean and standard deviation to 4 standard errors."""
    counts = counts_of(np.ones((100, 2000)), stddev=5.0)
    assert abs(counts.mean() - 100) < 4 * 5 / math.sqrt(2000)
    assert abs(counts.std() - 5) < 4 * 5 / math.sqrt(2 * 2000)
    assert counts.dtype == np.float32
    assert not np.array_equal(counts, counts_of(np.ones((100, 2000)), seed=1, stddev=5.0))


def test_noisy_counts_are_at_least_one():
    counts = counts_of(np.zeros((3, 500)), stddev=10.0)
    assert counts.min() == 1
    assert counts.max() > 10


ONES, KEY = np.ones((3, 2)), jax.random.key(0)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: aggregate.private_task_weights(ONES, np.ones(2), exponent=0.5), r"exponent=0.5 must lie in \(-inf, 0"),
        (lambda: aggregate.private_task_weights(ONES, np.ones(2), budget=0.0), r"budget=0.0 must lie in \(0, inf\)"),
        (lambda: aggregate.private_task_weights(ONES, np.ones(3)), r"\(3, 2\), counts \(3,\)"),
        (lambda: aggregate.private_task_weights(np.ones(3), np.ones(3)), r"membership must be a matrix.*\(3,\)"),
        (lambda: aggregate.noisy_counts(ONES, KEY, stddev=-1.0), r"stddev=-1.0 must lie in \[0, inf\)"),
        (lambda: aggregate.noisy_counts(ONES, KEY, stddev=1.0, sample=0), r"sample=0 must lie in \[1, inf\)"),
        (lambda: aggregate.noisy_counts(np.ones(3), KEY, stddev=1.0), "membership must be a matrix"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
