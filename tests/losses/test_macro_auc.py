"""The surrogates of macro-AUC against loops over pairs in float64, cases worked by hand, and the compiled memory."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import losses

PHI = {"logistic": lambda d: math.log1p(math.exp(-d)), "hinge": lambda d: max(0, 1 - d)}
SLOPE = {"logistic": lambda d: -1 / (1 + math.exp(d)), "hinge": lambda d: -1 if d < 1 else 0}
BATCH, LABELS = 10, 4


def batch():
    """The last two labels have no positive and no negative."""
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, (BATCH, LABELS)).astype(np.float32)
    targets[:, 2:] = [0, 1]
    return rng.standard_normal((BATCH, LABELS)).astype(np.float32), targets


@functools.cache
def compiled(fn, **options):
    """Losses, and the gradient of their sum."""

    def value(scores, targets):
        values = fn(scores, targets, **options)
        return jnp.sum(values), values

    def run(*args):
        gradient, values = jax.grad(value, has_aux=True)(*args)
        return values, gradient

    return jax.jit(run)


pairwise = functools.partial(compiled, losses.macro_auc_pairwise)
univariate = functools.partial(compiled, losses.macro_auc_univariate)


def sides(targets):
    return np.flatnonzero(targets == 1), np.flatnonzero(targets == 0)


def transcribed_pairwise(scores, targets, surrogate):
    """Of one label."""
    scores, (positive, negative) = np.asarray(scores, np.float64), sides(targets)
    value, gradient = 0.0, np.zeros(len(scores))
    for p in positive:
        for n in negative:
            weight = 1 / (len(positive) * len(negative))
            value += weight * PHI[surrogate](scores[p] - scores[n])
            slope = weight * SLOPE[surrogate](scores[p] - scores[n])
            gradient[p] += slope
            gradient[n] -= slope
    return value, gradient


def transcribed_univariate(scores, targets, surrogate, reweight):
    scores, (positive, negative) = np.asarray(scores, np.float64), sides(targets)
    terms = [PHI[surrogate](scores[p]) for p in positive], [PHI[surrogate](-scores[n]) for n in negative]
    if not reweight:
        return (sum(terms[0]) + sum(terms[1])) / len(scores)
    return sum(sum(side) / len(side) for side in terms) if all(terms) else 0


def assert_follows_pairs(got, scores, targets, surrogate):
    for k, (value, gradient) in enumerate(zip(got[0], np.transpose(got[1]), strict=True)):
        expected = transcribed_pairwise(scores[:, k], targets[:, k], surrogate)
        np.testing.assert_allclose(value, expected[0], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradient, expected[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("surrogate", PHI)
def test_pairwise_and_its_gradient_follow_the_pairs(surrogate):
    scores, targets = batch()
    got = pairwise(surrogate=surrogate)(scores, targets)
    assert_follows_pairs(got, scores, targets, surrogate)
    np.testing.assert_array_equal(got[0][2:], 0)
    np.testing.assert_array_equal(got[1][:, 2:], 0)


@pytest.mark.parametrize("surrogate", PHI)
@pytest.mark.parametrize("reweight", [False, True])
def test_univariate_follows_the_definition(reweight, surrogate):
    scores, targets = batch()
    got, _ = univariate(reweight=reweight, surrogate=surrogate)(scores, targets)
    expected = [transcribed_univariate(s, t, surrogate, reweight) for s, t in zip(scores.T, targets.T, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_a_constant_leaves_the_pairs_alone():
    """Quarters and halves, so that their differences are exact."""
    scores, targets = np.round(4 * batch()[0]) / 4, batch()[1]
    expected, _ = pairwise(surrogate="logistic")(scores, targets)
    got, _ = pairwise(surrogate="logistic")(scores + np.float32([-64, 0.5, 3, 1024]), targets)
    np.testing.assert_array_equal(got, expected)
    moved, _ = univariate(reweight=True, surrogate="logistic")(scores + 1, targets)
    still, _ = univariate(reweight=True, surrogate="logistic")(scores, targets)
    assert np.all(moved[:2] != still[:2])


def test_equal_scores_are_a_guess():
    scores, targets = np.full((BATCH, LABELS), 7, np.float32), batch()[1]
    for surrogate, value in {"logistic": math.log(2), "hinge": 1}.items():
        got, _ = pairwise(surrogate=surrogate)(scores, targets)
        np.testing.assert_allclose(got, [value, value, 0, 0], rtol=1e-6)


def test_of_balanced_labels_reweighting_is_a_factor_of_two():
    scores, targets = batch()[0], np.float32([[1, 0] * 2] * 5 + [[0, 1] * 2] * 5)
    (plain, _), (weighed, _) = (univariate(reweight=r, surrogate="logistic")(scores, targets) for r in (False, True))
    np.testing.assert_allclose(weighed, 2 * plain, rtol=1e-6)


def test_wide_hinges_count_wrong_pairs():
    """Of scores two apart, a pair in the right order has a hinge of 0; one in the wrong order, next to it, of 3."""
    scores, targets = (
        np.arange(0, 2 * BATCH, 2, np.float32)[:, None],
        np.float32([0, 0, 0, 0, 1, 0, 1, 1, 1, 1])[:, None],
    )
    got, _ = pairwise(surrogate="hinge")(np.tile(scores, LABELS), np.tile(targets, LABELS))
    np.testing.assert_allclose(got, 3 / 25, rtol=1e-6)


def memory(batch_size, labels):
    """Bytes that the gradient needs beside its arguments and result."""
    shape = jax.ShapeDtypeStruct((batch_size, labels), jnp.float32)
    program = jax.jit(jax.grad(lambda s, t: jnp.sum(losses.macro_auc_pairwise(s, t)))).lower(shape, shape).compile()
    return program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("n", [256, 512])
def test_the_gradient_holds_at_most_one_array_of_pairs(n):
    """Beside it masks and sums, of which there are a few in a row or column of pairs; and of many pairs only a part."""
    k = 3
    assert memory(n, k) < (1.1 if n == 256 else 0.6) * 4 * n * n * k


@pytest.mark.parametrize(
    ("call", "match"),
    [
        *[
            (lambda fn=fn: fn(*batch(), surrogate="logistc"), "surrogate='logistc' .* did you mean 'logistic'")
            for fn in (losses.macro_auc_pairwise, losses.macro_auc_univariate)
        ],
        (lambda: losses.macro_auc_pairwise(batch()[0], batch()[1][:9]), r"\(10, 4\) and targets \(9, 4\)"),
        (lambda: losses.macro_auc_univariate(jnp.ones(3), jnp.ones(3)), r"scores has shape \(3,\): .* \[batch, labels"),
        (lambda: losses.macro_auc_pairwise(*batch(), where=jnp.ones(9, bool)), r"where has shape \(9,\): .* \(10,\)"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
