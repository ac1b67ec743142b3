"""Contrast with mined negatives, graded pairs and stale negatives, by loops in float64 and in cases worked by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import losses

N, M, D = 5, 2, 3


def vectors(seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((N, D), (N, D), (N, M, D))
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in shapes)


def cosine(a, b):
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def transcribed(queries, positives, negatives, temperature, in_batch, share_negatives, where):
    q, p, n = (np.asarray(x, np.float64) for x in (queries, positives, negatives))
    result = np.zeros(len(q))
    rows = [i for i in range(len(q)) if where[i]]
    for i in rows:
        columns = [p[j] for j in rows if in_batch or j == i]
        columns += [n[j, k] for j in rows for k in range(n.shape[1]) if share_negatives or j == i]
        exps = [math.exp(cosine(q[i], c) / temperature) for c in columns]
        result[i] = math.log(sum(exps)) - cosine(q[i], p[i]) / temperature
    return result


info_nce = jax.jit(losses.info_nce, static_argnames=("in_batch", "share_negatives"))
cosent = jax.jit(jax.value_and_grad(losses.cosent))


@pytest.mark.parametrize("in_batch", [True, False])
@pytest.mark.parametrize("share_negatives", [True, False])
def test_losses_follow_the_definition(in_batch, share_negatives):
    where = np.array([True, True, False, True, True])
    options = {"in_batch": in_batch, "share_negatives": share_negatives}
    got = info_nce(*vectors(), temperature=0.2, where=where, **options)
    expected = transcribed(*vectors(), 0.2, in_batch, share_negatives, where)
    # Cosines lose a few bits, and the temperature multiplies them by 5.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=5 * 2.0**-20)


def test_no_negatives_are_none():
    queries, positives, negatives = vectors()
    expected = info_nce(queries, positives)
    np.testing.assert_array_equal(info_nce(queries, positives, negatives[:, :0]), expected)
    everyone = transcribed(queries, positives, negatives[:, :0], 0.05, True, False, np.ones(N, bool))
    np.testing.assert_allclose(expected, everyone, rtol=1e-5, atol=20 * 2.0**-20)


def test_a_query_without_anything_to_confuse_it_with_costs_nothing():
    queries, positives, _ = vectors()
    value, gradients = jax.jit(
        jax.value_and_grad(lambda q, p: losses.info_nce(q, p, in_batch=False).sum(), argnums=(0, 1))
    )(queries, positives)
    assert value == 0
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0)
    np.testing.assert_array_equal(info_nce(queries, positives, where=np.arange(N) == 1), 0)


def test_a_negative_equal_to_the_positive_costs_one_bit():
    queries, positives, _ = vectors()
    got = info_nce(queries, positives, 3 * positives[:, None], in_batch=False)
    np.testing.assert_allclose(got, math.log(2), rtol=20 * 2.0**-21)


def test_a_positive_that_is_found_with_certainty_still_costs_its_exponential():
    """The cosines are 1 and -1."""
    queries = jnp.array([[1.0, 0.0]])
    got = info_nce(queries, queries, -queries[:, None])
    np.testing.assert_allclose(got, math.exp(-2 / 0.05), rtol=1e-5)


def test_half_precision_is_widened_first():
    half = [x.astype(jnp.bfloat16) for x in vectors()]
    got = info_nce(*half, temperature=0.2)
    assert got.dtype == jnp.float32
    expected = transcribed(*half, 0.2, True, False, np.ones(N, bool))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=5 * 2.0**-20)


def test_cosent_follows_the_definition():
    rng = np.random.default_rng(0)
    similarity, targets, where = rng.uniform(-1, 1, 6), np.array([2, 0, 1, 1, 2, 3]), np.arange(6) != 4
    total = 1.0
    for a in range(6):
        for b in range(6):
            if where[a] and where[b] and targets[a] > targets[b]:
                total += math.exp((similarity[b] - similarity[a]) / 0.3)
    got, _ = cosent(jnp.asarray(similarity, jnp.float32), jnp.asarray(targets), temperature=0.3, where=where)
    np.testing.assert_allclose(got, math.log(total), rtol=1e-5)


def test_cosent_of_two_pairs():
    """One comparison: log(1 + exp(difference / temperature)), linear if far wrong, an exponential if far right."""
    cases = (([0.5, 0.5], 1.0, math.log(2)), ([-1.0, 1.0], 1e-3, 2000), ([1.0, -1.0], 0.05, math.exp(-40)))
    for similarity, temperature, expected in cases:
        value, _ = cosent(jnp.array(similarity), jnp.array([1.0, 0.0]), temperature=temperature)
        np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_cosent_without_unequal_targets_is_zero():
    value, gradient = cosent(jnp.array([0.3, -0.2]), jnp.ones(2), temperature=0.05)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


def test_negatives_that_have_fallen_are_stale():
    """1.15 * 0.5 = 0.575 < 0.6 and 1.15 * 0.7 = 0.805 < 0.9; 1.15 * 0.9 is not less than 0.9."""
    score, initial = jnp.array([0.9, 0.5, 0.7]), jnp.array([0.9, 0.6, 0.9])
    assert losses.stale_negatives(score, initial).tolist() == [False, True, True]
    assert losses.stale_negatives(score, initial, ceiling=0.6).tolist() == [False, True, False]
    assert losses.stale_negatives(score, initial, ratio=1.25).tolist() == [False, False, True]


def test_negatives_far_on_the_other_side_are_not_stale():
    """What counts is how near to the query or its opposite they are."""
    assert losses.stale_negatives(jnp.array([-0.9, -0.7]), jnp.zeros(2)).tolist() == [False, True]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda q, p, n: losses.info_nce(q, p, temperature=0.0), r"temperature=0.0 must lie in \(0, inf\)"),
        (lambda q, p, n: losses.info_nce(q, p[:3]), r"queries has shape \(5, 3\) and positives \(3, 3\)"),
        (lambda q, p, n: losses.info_nce(q[0], p[0]), r"\(3,\).*\[batch, d\]"),
        (lambda q, p, n: losses.info_nce(q, p, n[:4]), r"\(4, 2, 3\) and queries \(5, 3\).*\(5, m, 3\)"),
        (lambda q, p, n: losses.info_nce(q, p, n[:, 0]), r"\(5, 3\).*\(5, m, 3\)"),
        (lambda q, p, n: losses.info_nce(q, p, where=jnp.ones(4, bool)), r"where has shape \(4,\)"),
        (lambda q, p, n: losses.cosent(q[0], p[0], temperature=-1), r"temperature=-1 must lie in \(0, inf\)"),
        (lambda q, p, n: losses.cosent(q[0], p[0, :2]), r"similarity has shape \(3,\) and targets \(2,\)"),
        (lambda q, p, n: losses.cosent(q, p), r"\(5, 3\).*\[pairs\]"),
        (lambda q, p, n: losses.cosent(q[0], p[0], where=True), r"where has shape \(\)"),
        (lambda q, p, n: losses.stale_negatives(q[0], p[0], ratio=0), r"ratio=0 must lie in \(0, inf\)"),
        (lambda q, p, n: losses.stale_negatives(q[0], p[0], ceiling=0), r"ceiling=0 must lie in \(0, inf\)"),
        (lambda q, p, n: losses.stale_negatives(q[0], p[1, :2]), r"score has shape \(3,\) and initial \(2,\)"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call(*vectors())
