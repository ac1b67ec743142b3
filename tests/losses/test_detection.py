"""Priors by counting and by inverting the sigmoid in float64; the guided scale by hand, and over devices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import losses

guided = jax.jit(jax.value_and_grad(losses.guided_loss_scale, (0, 1)))


def test_the_bias_of_the_paper():
    """At the frequency 0.01 of RetinaNet, -log 99."""
    np.testing.assert_allclose(losses.prior_bias(), -math.log(99), rtol=2.0**-22)


def test_the_sigmoid_of_the_bias_is_the_prior():
    priors = np.array([1e-7, 1e-3, 0.5, 0.75], np.float32)
    bias = np.asarray(losses.prior_bias(priors), np.float64)
    # The bias reaches 16 and is rounded by 2^-20 of that order; e^bias by as much, relative.
    np.testing.assert_allclose(1 / (1 + np.exp(-bias)), priors, rtol=2.0**-18)
    assert losses.prior_bias(0.5) == 0


def test_the_mean_first_score_is_the_prior():
    """A last layer with small kernels and this bias: sigmoid'' is of order pi, so that a spread s adds pi s^2 / 2."""
    prior = losses.foreground_prior(30, 20_000, 3)
    noise = 0.01 * np.random.default_rng(0).standard_normal((1000, 3))
    scores = jax.nn.sigmoid(losses.prior_bias(prior) + jnp.asarray(noise, jnp.float32))
    # Of 3000 scores of relative spread 0.01, the mean has one of 0.01 / sqrt(3000) = 0.0002.
    np.testing.assert_allclose(np.mean(scores), prior, rtol=1e-3)


def test_the_prior_is_the_share_of_positive_targets():
    rng = np.random.default_rng(1)
    matched = np.where(rng.random(500) < 0.04, rng.integers(0, 4, 500), -1)
    targets = [[float(label == c) for c in range(4)] for label in matched]
    prior = losses.foreground_prior(int(np.sum(matched >= 0)), len(matched), 4)
    np.testing.assert_allclose(prior, np.mean(targets), rtol=1e-12)
    np.testing.assert_allclose(losses.adaptive_threshold(prior, 4), np.mean(matched >= 0), rtol=1e-12)


def test_counts_beyond_32_bits():
    """10^5 anchors on 10^5 images."""
    assert losses.foreground_prior(10**7, 10**10, 1) == 1e-3


def test_counts_may_be_summed_over_hosts_inside_jit():
    def host(foreground, every):
        totals = (jax.lax.psum(x, "host") for x in (foreground, every))
        prior = losses.foreground_prior(*totals, 2)
        return losses.prior_bias(prior), losses.adaptive_threshold(prior, 2)

    bias, threshold = jax.jit(jax.vmap(host, axis_name="host"))(jnp.array([1, 3]), jnp.array([50, 30]))
    np.testing.assert_allclose(bias, math.log(4 / 160 / (1 - 4 / 160)), rtol=2.0**-20)
    np.testing.assert_allclose(threshold, 4 / 80, rtol=2.0**-21)


def test_every_anchor_may_be_an_object():
    assert losses.adaptive_threshold(losses.foreground_prior(7, 7, 3), 3) == 1


def test_the_guided_loss_has_the_value_of_one_and_the_gradient_of_the_other():
    value, grads = guided(jnp.float32(4), jnp.float32(0.5))
    assert value == 0.5
    assert grads == (0.125, 0)


@pytest.mark.parametrize(("classification", "regression"), [(0.0, 0.5), (0.0, 0.0), (1e-30, 2.0), (3.0, 0.0)])
def test_the_guided_loss_at_zero(classification, regression):
    value, grads = guided(jnp.float32(classification), jnp.float32(regression))
    expected = regression / max(classification, 1e-12)
    np.testing.assert_allclose(value, classification * expected, rtol=1e-6)
    np.testing.assert_allclose(grads, (expected, 0), rtol=1e-6)


def test_devices_share_the_ratio_if_the_losses_are_averaged_first():
    """Halves of losses (4, 1) and (2, 5): a ratio of 3 / 3, or of 1 / 4 and 5 / 2; each has half of the gradient."""
    classification, regression = jnp.array([4.0, 2.0]), jnp.array([1.0, 5.0])

    def device(c, r, averaged):
        parts = [jax.lax.pmean(x, "data") for x in (c, r)] if averaged else [c, r]
        return jax.lax.pmean(losses.guided_loss_scale(*parts), "data")

    def of_all(c, averaged):
        return jax.vmap(functools.partial(device, averaged=averaged), axis_name="data")(c, regression)[0]

    together, apart = jax.jit(lambda c: [jax.grad(of_all)(c, averaged) for averaged in (True, False)])(classification)
    np.testing.assert_allclose(together, [1 / 2, 1 / 2])
    np.testing.assert_allclose(apart, [1 / 8, 5 / 4])


def test_the_guided_loss_is_of_a_whole_batch():
    assert losses.guided_loss_scale.batch_dependent
    assert losses.guided_loss_scale(jnp.bfloat16(4), jnp.bfloat16(0.5)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("call", "match"),
    [
        *[
            (lambda prior=prior: losses.prior_bias(prior), rf"prior={prior} must lie in \(0, 1\)")
            for prior in (0.0, 1.0, -0.1)
        ],
        (lambda: losses.prior_bias(jnp.array([0.5, 1.0])), r"prior=1.0 must lie in \(0, 1\)"),
        (lambda: losses.foreground_prior(0, 10, 2), r"num_foreground=0 must lie in \(0, 10\]"),
        (lambda: losses.foreground_prior(11, 10, 2), r"num_foreground=11 must lie in \(0, 10\]"),
        (lambda: losses.foreground_prior(1, 0, 2), r"num_all=0 must lie in \(0, inf\)"),
        (lambda: losses.foreground_prior(1, 10, 0), r"num_classes=0 must lie in \[1, inf\)"),
        (lambda: losses.adaptive_threshold(0.3, 4), r"prior=0.3 must lie in \(0, 0.25\]"),
        (lambda: losses.adaptive_threshold(0.3, 1.5), r"num_classes=1.5 must be a whole number"),
        (lambda: losses.guided_loss_scale(jnp.ones(3), 1.0), r"classification has shape \(3,\)"),
        (lambda: losses.guided_loss_scale(1.0, jnp.ones((2, 1))), r"regression has shape \(2, 1\)"),
        (lambda: losses.guided_loss_scale(1.0, 1.0, eps=0.0), r"eps=0.0 must lie in \(0, inf\)"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
