"""TD errors, generalized Gaussians and inverse-variance weights against SciPy, loops in float64, and cases by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats
from jax.sharding import PartitionSpec

from steelyard import losses

# log Gamma is right to a few ulp of its value, which is at most 145 for the shapes below: as many 2^-22 in an exponent.
EXPONENT = 145 * 2.0**-21
SHAPES = np.array([0.1, 0.5, 1.0, 1.7, 2.0, 10.0])

nll = jax.jit(losses.generalized_gaussian_nll)
variance_of = jax.jit(losses.generalized_gaussian_variance)
kurtosis_of = jax.jit(losses.generalized_gaussian_excess_kurtosis)


weigh = jax.jit(losses.inverse_variance_weights)


def weights_of(variance, **options):
    return np.asarray(weigh(jnp.asarray(variance, jnp.float32), **options), np.float64)


def transcribed_weights(variance, offset):
    inverse = [1 / (v + offset) for v in np.asarray(variance, np.float64)]
    return np.array([x / sum(inverse) for x in inverse])


def effective_size(weights):
    return 1 / sum(w**2 for w in weights)


def test_an_ended_episode_is_worth_its_reward():
    """Two critics: 1 + 0.5 * 4 - 2 = 1 and 3 + 0 * 9 - 2 = 1; then 1 + 0.5 * 8 - 0 = 5 and 3 - 1 = 2."""
    value, following = jnp.array([[2.0, 2], [0, 1]]), jnp.array([[4.0, 9], [8, 9]])
    error = losses.td_error(jnp.array([1.0, 3]), jnp.array([0.5, 0]), value, following)
    np.testing.assert_array_equal(error, [[1, 1], [5, 2]])


def test_the_likelihood_is_that_of_scipy():
    error, scale = np.linspace(-3, 3, 7)[:, None, None], np.array([0.3, 1.0, 2.0])[:, None]
    error, scale, shape = np.broadcast_arrays(error, scale, SHAPES)
    got = nll(*(jnp.asarray(x, jnp.float32) for x in (error, shape)), scale=jnp.asarray(scale, jnp.float32))
    expected = -scipy.stats.gennorm.logpdf(error, shape, scale=scale)
    # (3 / 0.3)^10 multiplies the relative error of its base by 10.
    np.testing.assert_allclose(got, expected, rtol=10 * 2.0**-21, atol=20 * 2.0**-23)


def test_shape_two_is_normal_and_shape_one_is_laplace():
    error = np.linspace(-2, 2, 9, dtype=np.float32)
    normal = error**2 / (2 * 0.7**2) + math.log(0.7 * math.sqrt(2 * math.pi))
    np.testing.assert_allclose(nll(error, 2.0, scale=math.sqrt(2) * 0.7), normal, rtol=1e-5, atol=1e-6)
    laplace = abs(error) / 0.7 + math.log(2 * 0.7)
    np.testing.assert_allclose(nll(error, 1.0, scale=0.7), laplace, rtol=1e-5, atol=1e-6)


@functools.cache
def slopes():
    return jax.jit(jax.grad(lambda e, b, s: nll(e, b, scale=s).sum(), argnums=(0, 1, 2)))


def test_the_gradient_is_that_of_the_formula():
    e, b, s = (np.array(x) for x in ([-2.0, 0.5, 3.0], [0.5, 1.0, 2.5], [1.0, 0.5, 2.0]))
    got = slopes()(*(jnp.asarray(x, jnp.float32) for x in (e, b, s)))
    ratio = abs(e) / s
    by_error = np.sign(e) * b / s * ratio ** (b - 1)
    by_shape = ratio**b * np.log(ratio) - 1 / b - scipy.special.digamma(1 / b) / b**2
    by_scale = -b / s * ratio**b + 1 / s
    for slope, expected in zip(got, (by_error, by_shape, by_scale), strict=True):
        np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-5)


def test_at_an_error_of_zero_the_gradient_is_finite_and_that_of_the_error_is_zero():
    shape = jnp.array([0.1, 0.5, 1.0])
    by_error, by_shape, by_scale = slopes()(jnp.zeros(3), shape, jnp.ones(3))
    np.testing.assert_array_equal(by_error, 0)
    expected = -1 / shape - scipy.special.digamma(1 / np.asarray(shape, np.float64)) / np.asarray(shape) ** 2
    np.testing.assert_allclose(by_shape, expected, rtol=1e-5)
    np.testing.assert_allclose(by_scale, 1)
    np.testing.assert_allclose(
        nll(jnp.zeros(3), shape), -scipy.stats.gennorm.logpdf(0, np.asarray(shape, np.float64)), rtol=1e-5
    )


def test_moments_are_those_of_scipy():
    """Those of b = 1 and b = 2 by hand too: Laplace, and normal of variance 1/2."""
    variance, kurtosis = scipy.stats.gennorm.stats(SHAPES, scale=0.5, moments="vk")
    shapes = jnp.asarray(SHAPES, jnp.float32)
    np.testing.assert_allclose(variance_of(shapes, scale=0.5), variance, rtol=EXPONENT)
    np.testing.assert_allclose(kurtosis_of(shapes), kurtosis, rtol=4 * EXPONENT, atol=1e-5)
    by_hand = (SHAPES == 1) | (SHAPES == 2)
    np.testing.assert_allclose(variance_of(shapes, scale=1.0)[by_hand], [2, 1 / 2], rtol=1e-5)
    np.testing.assert_allclose(kurtosis_of(shapes)[by_hand], [3, 0], atol=1e-5)


def test_the_biased_variance_follows_the_definition():
    values = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    kappa = np.array([0.0, -1.2, 40.0])
    expected = []
    for column, k in zip(values.astype(np.float64).T, kappa, strict=True):
        squares = sum((x - column.mean()) ** 2 for x in column)
        expected.append(squares / 4 / (6 / 4 + k / 5))
    np.testing.assert_allclose(losses.best_biased_variance(values, excess_kurtosis=kappa), expected, rtol=1e-5)
    np.testing.assert_allclose(
        losses.best_biased_variance(values.T, excess_kurtosis=kappa, axis=1), expected, rtol=1e-5
    )
    squares = ((values - values.mean(0)) ** 2).sum(0)
    np.testing.assert_allclose(losses.best_biased_variance(values), squares / 6, rtol=1e-5)


def test_no_other_multiple_of_the_sample_variance_errs_less():
    """Of s^2 with mean 1 and second moment 1 + kappa / n + 2 / (n - 1), the error of c s^2 is c^2 m - 2 c + 1."""
    values, kappa = jnp.array([-1.0, 0.0, 1.0]), 3.0
    c = float(losses.best_biased_variance(values, excess_kurtosis=kappa)) / 1.0
    moment = 1 + kappa / 3 + 2 / 2
    best = scipy.optimize.minimize_scalar(lambda c: c**2 * moment - 2 * c + 1).x
    np.testing.assert_allclose(c, best, rtol=1e-5)


def test_the_kurtosis_and_the_weights_are_constants():
    def total(values, kappa):
        variance = losses.best_biased_variance(values, excess_kurtosis=kappa)
        return variance.sum(), losses.inverse_variance_weights(variance, offset=0.1)[0]

    values, kappa = jnp.array([[1.0, 2.0], [2.0, 5.0]]), jnp.ones(2)
    (by_values, by_kappa), of_weights = jax.jit(jax.jacrev(total, argnums=(0, 1)))(values, kappa)
    assert np.all(by_values != 0)
    np.testing.assert_array_equal(by_kappa, 0)
    for slope in of_weights:
        np.testing.assert_array_equal(slope, 0)


@pytest.mark.parametrize("offset", [0.0, 0.5, 1e9])
def test_weights_follow_the_definition(offset):
    variance = [0.1, 4.0, 1.0, 0.7]
    weights = weights_of(variance, offset=offset)
    np.testing.assert_allclose(weights, transcribed_weights(variance, offset), rtol=1e-6)
    if offset == 1e9:
        np.testing.assert_allclose(weights, 1 / 4, rtol=1e-6)


def test_examples_of_no_variance_share_all_weight_unless_there_is_an_offset():
    np.testing.assert_array_equal(weights_of([0.0, 3.0, 0.0, 1.0]), [1 / 2, 0, 1 / 2, 0])
    np.testing.assert_array_equal(weights_of([0.0, 0.0, 0.0, 0.0]), 1 / 4)
    np.testing.assert_array_equal(weights_of([0.0, 0.0, 0.0, 0.0], min_effective=3.0), 1 / 4)
    np.testing.assert_allclose(weights_of([0.0, 0.5, 0.5, 0.5], offset=0.5), [2 / 5, 1 / 5, 1 / 5, 1 / 5], rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e20])
def test_the_offset_is_the_least_that_keeps_the_effective_size(scale):
    variance = np.array([1e-3, 4.0, 1.0, 0.7])
    offset = scipy.optimize.brentq(lambda x: effective_size(transcribed_weights(variance, x)) - 3, 1e-6, 100)
    weights = weights_of(scale * variance, min_effective=3.0)
    np.testing.assert_allclose(weights, transcribed_weights(variance, offset), rtol=1e-5)
    assert effective_size(weights) >= 3 * (1 - 2.0**-22)


def test_an_effective_size_that_is_there_needs_no_offset_and_the_whole_batch_needs_equal_weights():
    variance = [1.0, 2.0, 1.0, 2.0]
    np.testing.assert_array_equal(weights_of(variance, min_effective=3.0), weights_of(variance))
    # A squared relative deviation of 2^-23 is what float32 still tells from none.
    np.testing.assert_allclose(weights_of(variance, min_effective=4.0), 1 / 4, rtol=2.0**-11)


def test_without_an_axis_name_each_shard_has_its_own_weights():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    variance = jnp.array([1e-3, 4.0, 1.0, 0.7, 2.0, 2.0, 1.0, 5.0])
    alone = functools.partial(losses.inverse_variance_weights, min_effective=3.0)
    split = PartitionSpec("data")
    got = jax.jit(jax.shard_map(alone, mesh=mesh, in_specs=split, out_specs=split))(variance)
    expected = [weights_of(half, min_effective=3.0) for half in (variance[:4], variance[4:])]
    np.testing.assert_allclose(got, np.concatenate(expected), rtol=1e-6)


def test_the_loss_of_an_ensemble_has_a_finite_gradient_for_all_that_is_learned():
    def loss(value, head):
        shape = jnp.clip(jax.nn.softplus(head), 0.1, 10)
        error = losses.td_error(jnp.ones(4), 0.9, value, jax.lax.stop_gradient(jnp.roll(value, 1, axis=1)))
        kappa = jnp.mean(losses.generalized_gaussian_excess_kurtosis(shape), axis=0)
        spread = losses.best_biased_variance(error, excess_kurtosis=kappa)
        weights = losses.inverse_variance_weights(spread, min_effective=2.0)
        trusted = shape / jnp.sum(shape, axis=0) * losses.generalized_gaussian_nll(error, shape)
        return jnp.mean(trusted) + jnp.mean(jnp.sum(weights * error**2, axis=1))

    value = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32)
    for slope in jax.jit(jax.grad(loss, argnums=(0, 1)))(value, -value):
        assert np.all(np.isfinite(slope) & (slope != 0))


ONES = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: losses.td_error(ONES, 1.0, ONES, np.ones(4)), r"value has shape \(3,\) and next_value \(4,\)"),
        (lambda: losses.td_error(ONES, 1.0, ONES[:, None], ONES[:, None]), r"reward has shape \(3,\).*value, \(3, 1\)"),
        (lambda: losses.td_error(ONES[:, None], 1.0, ONES, ONES), r"reward has shape \(3, 1\).*value, \(3,\)"),
        (lambda: losses.td_error(ONES, np.ones(2), ONES, ONES), r"discount has shape \(2,\)"),
        (lambda: losses.generalized_gaussian_nll(ONES, 0.0), r"shape=0.0 must lie in \(0, inf\)"),
        (lambda: losses.generalized_gaussian_nll(ONES, ONES - 1), r"shape=0.0 must lie in"),
        (lambda: losses.generalized_gaussian_nll(ONES, 1.0, scale=-1.0), r"scale=-1.0 must lie in"),
        (lambda: losses.generalized_gaussian_nll(ONES, ONES[:, None]), r"shape has shape \(3, 1\).*error, \(3,\)"),
        (lambda: losses.generalized_gaussian_nll(ONES, 1.0, scale=np.ones(2)), r"scale has shape \(2,\)"),
        (lambda: losses.generalized_gaussian_variance(-ONES), r"shape=-1.0 must lie in"),
        (lambda: losses.generalized_gaussian_variance(ONES, scale=0.0), r"scale=0.0 must lie in"),
        (lambda: losses.generalized_gaussian_excess_kurtosis(-ONES), r"shape=-1.0 must lie in"),
        (lambda: losses.best_biased_variance(np.ones((1, 3))), r"values has shape \(1, 3\).*at least 2.*axis 0"),
        (
            lambda: losses.best_biased_variance(ONES, excess_kurtosis=-2.5),
            r"excess_kurtosis=-2.5 must lie in \[-2",
        ),
        (lambda: losses.best_biased_variance(ONES, excess_kurtosis=ONES), r"excess_kurtosis has shape \(3,\)"),
        (lambda: losses.inverse_variance_weights(-ONES), r"variance=-1.0 must lie in \[0, inf\)"),
        (lambda: losses.inverse_variance_weights(np.ones((3, 1))), r"variance has shape \(3, 1\)"),
        (lambda: losses.inverse_variance_weights(ONES, offset=-1.0), r"offset=-1.0 must lie in \[0, inf\)"),
        (lambda: losses.inverse_variance_weights(ONES, min_effective=4), r"min_effective=4 must lie in \[1, 3\]"),
        (lambda: losses.inverse_variance_weights(ONES, min_effective=0.5), r"min_effective=0.5 must lie in \[1, 3\]"),
        (lambda: losses.inverse_variance_weights(ONES, offset=1.0, min_effective=2), "only one of them"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
