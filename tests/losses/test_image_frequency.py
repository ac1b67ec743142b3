"""Weights of logits by rarity against the formulas with scipy in float64, and cases worked by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from steelyard import losses

COUNTS = np.array([1000, 30, 4, 1])
FORMULAS = {
    "raw": lambda n, total: math.log(total / n),
    "smooth": lambda n, total: math.log((total + 1) / (n + 1)) + 1,
    "rel": lambda n, total: math.log((total - n) / n),
    "normit": lambda n, total: -scipy.stats.norm.ppf(n / total),
    "gombit": lambda n, total: -math.log(-math.log(1 - n / total)),
    "base2": lambda n, total: math.log2(total / n),
    "base10": lambda n, total: math.log10(total / n),
}


@functools.cache
def compiled(fn):
    return jax.jit(fn, static_argnames=("variant", "norm"))


@pytest.mark.parametrize("variant", FORMULAS)
def test_weights_follow_the_formulas(variant):
    expected = [FORMULAS[variant](n, COUNTS.sum()) for n in COUNTS]
    got = compiled(losses.inverse_image_frequency)(COUNTS, variant=variant)
    # Of the largest class only the difference of its share and 1 tells: four digits less.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_cases_by_hand():
    counts = np.array([1, 1, 2])
    np.testing.assert_allclose(compiled(losses.inverse_image_frequency)(counts), np.log([4, 4, 2]), rtol=1e-6)
    np.testing.assert_allclose(compiled(losses.inverse_image_frequency)(counts, variant="base2"), [2, 2, 1], rtol=1e-6)
    # The class with half of all examples.
    for variant in ("rel", "normit"):
        assert compiled(losses.inverse_image_frequency)(counts, variant=variant)[2] == 0
    assert (compiled(losses.inverse_image_frequency)(np.array([9, 1]), variant="rel")[0]) < 0


@pytest.mark.parametrize(("norm", "lengths"), [(1, 5), (2, 3), (math.inf, 2)])
def test_a_norm_divides_the_weights(norm, lengths):
    got = compiled(losses.inverse_image_frequency)(np.array([1, 1, 2]), variant="base2", norm=norm)
    np.testing.assert_allclose(got, np.array([2, 2, 1]) / lengths, rtol=1e-6)


def test_a_single_class_has_no_weight():
    np.testing.assert_array_equal(compiled(losses.inverse_image_frequency)(np.array([7])), [0])
    np.testing.assert_array_equal(compiled(losses.inverse_image_frequency)(np.array([7]), norm=2), [0])


def test_the_loss_is_cross_entropy_of_multiplied_logits():
    rng = np.random.default_rng(0)
    z, y = jnp.asarray(rng.standard_normal((2, 3, 4)), jnp.float32), jnp.asarray(rng.integers(0, 4, (2, 3)))
    weights = compiled(losses.inverse_image_frequency)(COUNTS, variant="smooth", norm=1)
    plain = jax.jit(optax.softmax_cross_entropy_with_integer_labels)
    got = compiled(losses.iif_loss)(z, y, counts=COUNTS, variant="smooth", norm=1)
    np.testing.assert_allclose(got, plain(z * weights, y), rtol=1e-6)
    equal = compiled(losses.iif_loss)(z, y, counts=np.full(4, 6))
    np.testing.assert_allclose(equal, plain(math.log(4) * z, y), rtol=1e-5)


def test_the_loss_keeps_the_precision_of_the_logits():
    z, y = np.ones((2, 4), np.float32), np.zeros(2, int)
    with jax.enable_x64(True):
        assert jax.eval_shape(losses.iif_loss, z, y, counts=COUNTS.astype(np.float64)).dtype == jnp.float32
        assert jax.eval_shape(losses.iif_loss, z.astype(np.float64), y, counts=COUNTS).dtype == jnp.float64


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: losses.inverse_image_frequency(COUNTS, variant="normitt"), "did you mean 'normit'"),
        (lambda: losses.inverse_image_frequency(np.array([1, 0])), r"counts=0.0 must lie in \(0, inf\)"),
        (lambda: losses.inverse_image_frequency(np.ones((2, 2))), r"counts has shape \(2, 2\)"),
        (lambda: losses.inverse_image_frequency(COUNTS, norm=0.5), r"norm=0.5 must lie in \[1, inf\]"),
        (lambda: losses.iif_loss(jnp.ones((2, 3)), jnp.zeros(2, int), counts=COUNTS), r"\(4,\).*\(3,\)"),
        (lambda: losses.iif_loss(jnp.ones((2, 4)), jnp.zeros(3, int), counts=COUNTS), r"\(3,\) and logits \(2, 4\)"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
