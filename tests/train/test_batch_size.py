"""Steps to a target, the critical batch size and the noise scale, on curves and gradients that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard import train

quick = settings(max_examples=30, deadline=None)


@quick
@given(st.lists(st.floats(-5, 5) | st.just(np.nan), max_size=12), st.sampled_from(["min", "max"]))
def test_steps_to_target_is_the_first_that_reached_it(values, mode):
    reached = [i for i, v in enumerate(values) if (v <= 1.0 if mode == "min" else v >= 1.0)]
    expected = reached[0] if reached else None
    assert train.steps_to_target(values, 1.0, mode=mode) == expected
    steps = [10 * (i + 1) for i in range(len(values))]
    with_steps = train.steps_to_target(values, 1.0, mode=mode, steps=steps)
    assert with_steps == (None if expected is None else steps[expected])


def test_not_a_number_never_reaches_and_equality_does():
    assert train.steps_to_target([np.nan, np.inf, 0.5], 0.5) == 2
    assert train.steps_to_target([np.nan, -np.inf, 0.5], 0.5, mode="max") == 2
    assert train.steps_to_target([np.nan], np.inf) is None
    assert isinstance(train.steps_to_target(jnp.ones(3), 1.0), int)


@quick
@given(st.floats(1, 1e4), st.floats(1, 1e4), st.sets(st.integers(1, 4096), min_size=2, max_size=8))
def test_critical_batch_size_recovers_its_own_model(least, critical, sizes):
    fit = train.critical_batch_size(list(sizes), [least * (1 + critical / b) for b in sizes])
    # The steps are float64, but with sizes close to each other the system of equations is badly conditioned.
    inverse = 1 / np.array(list(sizes), float)
    condition = np.linalg.cond(np.stack([np.ones_like(inverse), inverse], 1))
    tolerance = 1e-14 * condition * (1 + critical)
    np.testing.assert_allclose(fit, (least, critical), rtol=max(tolerance, 1e-12))


def test_critical_batch_size_by_hand():
    sizes = [8, 64, 512]
    fit = train.critical_batch_size(sizes, [100 * (1 + 50 / b) for b in sizes])
    np.testing.assert_allclose(fit, (100, 50), rtol=1e-12)
    # Three points that are on no curve: the normal equations, with x = 1 / B.
    x, y = np.array([1, 1 / 2, 1 / 4]), np.array([10.0, 7.0, 3.0])
    slope = np.sum((x - x.mean()) * (y - y.mean())) / np.sum((x - x.mean()) ** 2)
    least = y.mean() - slope * x.mean()
    np.testing.assert_allclose(train.critical_batch_size([1, 2, 4], list(y)), (least, slope / least), rtol=1e-12)


def test_sizes_that_did_not_get_there_are_left_out():
    assert train.critical_batch_size([4, 8, 16, 2], [30, 20, 15, None]) == train.critical_batch_size(
        [4, 8, 16], [30, 20, 15]
    )


def test_perfect_scaling_has_no_critical_size():
    assert train.critical_batch_size([1, 2], [100, 40]).critical == np.inf


def test_noise_scale_by_hand():
    got = train.gradient_noise_scale(small_sq=5.0, big_sq=2.0, small_batch=10, big_batch=1000)
    # (1000 * 2 - 10 * 5) / 990 and (5 - 2) / (1 / 10 - 1 / 1000).
    np.testing.assert_allclose(got, (1950 / 990, 3 / 0.099, 3 / 0.099 * 990 / 1950), rtol=1e-6)


def test_noise_scale_of_a_linear_model_is_unbiased():
    """Averaged over ALL batches, the estimates are the mean gradient and the covariance trace of the examples.

    Batches are drawn with replacement, so that the gradient's variance is exactly trace / batch; of 5 examples there
    are 25 pairs and 125 triples.
    """
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(5, 3)), rng.normal(size=5), rng.normal(size=3)
    grads = (x @ w - y)[:, None] * x
    mean_sq = np.sum(grads.mean(0) ** 2)
    trace = np.sum(np.mean(grads**2, 0) - grads.mean(0) ** 2)

    def all_batches(size):
        picks = np.stack(np.meshgrid(*[range(5)] * size), -1).reshape(-1, size)
        return np.mean(np.sum(grads[picks].mean(1) ** 2, -1))

    got = train.gradient_noise_scale(small_sq=all_batches(2), big_sq=all_batches(3), small_batch=2, big_batch=3)
    # Differences of numbers of similar size: a few float32 roundings of the larger, times B b / (B - b) = 6.
    np.testing.assert_allclose(got, (mean_sq, trace, trace / mean_sq), rtol=1e-5)


def test_noise_scale_without_signal():
    small = jnp.asarray([5.0, 1.0, 1.0])
    big = jnp.asarray([0.5, 0.0, 2.0])
    got = train.gradient_noise_scale(small_sq=small, big_sq=big, small_batch=1, big_batch=10)
    np.testing.assert_allclose(got.grad_sq, (10 * big - small) / 9, atol=1e-7)
    # |G|^2 = 0 with noise; below 0 with noise; a negative noise with a signal is as it is.
    assert got.scale[0] == got.scale[1] == np.inf
    assert got.scale[2] < 0
    nothing = train.gradient_noise_scale(small_sq=0.0, big_sq=0.0, small_batch=1, big_batch=2)
    assert np.isnan(nothing.scale)


def test_noise_scale_jitted_and_in_half_precision():
    def scale(small, big):
        return train.gradient_noise_scale(small_sq=small, big_sq=big, small_batch=2, big_batch=8)

    small, big = jnp.asarray([4.0, 9.0], jnp.bfloat16), jnp.asarray([2.0, 3.0], jnp.bfloat16)
    plain, jitted = scale(small, big), jax.jit(jax.vmap(scale))(small, big)
    assert {x.dtype for x in plain} == {jnp.dtype(jnp.float32)}
    for a, b in zip(plain, jitted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: train.steps_to_target([1.0], 1.0, mode="mim"), "did you mean 'min'"),
        (lambda: train.steps_to_target([1.0], 1.0, steps=[1, 2]), r"values has shape \(1,\) and steps \(2,\)"),
        (lambda: train.steps_to_target(np.ones((2, 2)), 1.0), r"values has shape \(2, 2\)"),
        (lambda: train.critical_batch_size([1, 2], [3]), "batch_sizes has 2 entries and steps 1"),
        (lambda: train.critical_batch_size([1], [3]), "two different sizes"),
        (lambda: train.critical_batch_size([4, 4], [3, 5]), "two different sizes"),
        (lambda: train.critical_batch_size([1, 2, 4], [3, None, None]), "two different sizes"),
        (lambda: train.critical_batch_size([0, 2], [3, 1]), r"batch_sizes=0 must lie in \[1, inf\)"),
        (
            lambda: train.gradient_noise_scale(small_sq=1.0, big_sq=1.0, small_batch=8, big_batch=8),
            r"big_batch=8 must lie in \(8, inf\)",
        ),
        (
            lambda: train.gradient_noise_scale(small_sq=1.0, big_sq=1.0, small_batch=0, big_batch=8),
            r"small_batch=0 must lie in \[1, inf\)",
        ),
    ],
)
def test_refuses(call, text):
    with pytest.raises(ValueError, match=text):
        call()
