"""Root mean square normalization against its formula, Flax and layer normalization."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard import models
from tests.models.helpers import normal

# A mean of up to 64 squares in float32, a root and a product: a few times 2^-24, well below 2e-6.
TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}


def numpy_rms_norm(x, fraction=1.0, epsilon=1e-8):
    x = np.asarray(x, np.float64)
    count = int(np.ceil(fraction * x.shape[-1] - 1e-9))
    return x / np.sqrt(np.mean(x[..., :count] ** 2, axis=-1, keepdims=True) + epsilon)


def test_worked_case():
    # (3, 4): the mean square is (9 + 16) / 2, so y = x / sqrt(12.5).
    expected = np.array([3.0, 4.0]) / np.sqrt(12.5)
    np.testing.assert_allclose(models.rms_norm(jnp.array([3.0, 4.0])), expected, **TOLERANCE)


@settings(max_examples=20, deadline=None)
@given(d=st.sampled_from((1, 7, 32)), fraction=st.sampled_from((0.01, 0.3, 1.0)), seed=st.integers(0, 99))
def test_equals_the_formula_in_float64(d, fraction, seed):
    # The worst amplification is a first feature near 0 with fraction * d <= 1: y is then large, and so is its error.
    x = normal(3, d, seed=seed)
    np.testing.assert_allclose(models.rms_norm(x, fraction=fraction), numpy_rms_norm(x, fraction), rtol=1e-5)


def test_a_product_just_above_an_integer_counts_no_extra_feature():
    assert 0.1 * 3 * 10 > 3  # In floating point.
    x = normal(10)
    np.testing.assert_allclose(models.rms_norm(x, fraction=0.1 * 3), numpy_rms_norm(x, 0.3), **TOLERANCE)
    np.testing.assert_allclose(
        models.rms_norm(x, fraction=0.1 * 3), x / np.sqrt(np.mean(np.square(x[:3])) + 1e-8), **TOLERANCE
    )


def test_at_least_one_feature_is_counted():
    x = normal(4, 5)
    y = models.rms_norm(x, fraction=1e-12)
    np.testing.assert_allclose(y, x / np.abs(x[:, :1]), rtol=1e-5)


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_fraction_outside_its_range(fraction):
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\]"):
        models.rms_norm(jnp.ones(3), fraction=fraction)
    with pytest.raises(ValueError, match=r"fraction must lie in \(0, 1\]"):
        models.RMSNorm(fraction=fraction)


@pytest.mark.parametrize("name", ["scale", "bias"])
def test_affine_of_the_wrong_length(name):
    with pytest.raises(ValueError, match=rf"{name} has shape \(2,\), but x has shape \(4, 3\)"):
        models.rms_norm(jnp.ones((4, 3)), **{name: jnp.ones(2)})


@pytest.mark.parametrize("fraction", [1.0, 0.25])
@pytest.mark.parametrize("factor", [1e-2, 3.0, 1e4])
def test_invariant_to_a_positive_factor(fraction, factor):
    # epsilon = 1e-8 beside a mean square of about 1e-4 changes the result by 5e-5 of itself.
    x = normal(6, 32)
    y = models.rms_norm(x, fraction=fraction)
    np.testing.assert_allclose(models.rms_norm(factor * x, fraction=fraction), y, rtol=2e-4)


def test_equals_flax():
    x, scale = normal(5, 16), normal(16, seed=2)
    ours, theirs = models.RMSNorm(), nn.RMSNorm(epsilon=1e-8)
    variables = {"params": {"scale": scale}}
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(0), x)) == {"params": {"scale": (16,)}}
    np.testing.assert_allclose(ours.apply(variables, x), theirs.apply(variables, x), **TOLERANCE)


def test_equals_layer_norm_on_centred_inputs():
    x = normal(5, 16)
    x = x - x.mean(-1, keepdims=True)
    layer = nn.LayerNorm(epsilon=1e-8, use_scale=False, use_bias=False, use_fast_variance=False)
    np.testing.assert_allclose(models.rms_norm(x), layer.apply({}, x), rtol=1e-5, atol=1e-5)


def test_gradient_is_orthogonal_to_the_input():
    x, weights = normal(7, 12), normal(7, 12, seed=2)
    grads = jax.grad(lambda x: jnp.sum(weights * models.rms_norm(x)))(x)
    cosine = jnp.sum(grads * x, -1) / jnp.linalg.norm(grads, axis=-1) / jnp.linalg.norm(x, axis=-1)
    # y(c x) = y(x) up to epsilon = 1e-8, so the derivative along x vanishes up to rounding.
    np.testing.assert_allclose(cosine, 0, atol=1e-6)


@pytest.mark.parametrize("fraction", [1.0, 0.1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_zero_vector_gives_the_bias_and_a_finite_gradient(fraction, dtype):
    x, bias = jnp.zeros((2, 5), dtype), jnp.arange(5.0)
    np.testing.assert_array_equal(models.rms_norm(x, None, bias, fraction=fraction), np.tile(bias, (2, 1)))
    grads = jax.grad(lambda x: models.rms_norm(x, fraction=fraction).astype(jnp.float32).sum())(x)
    assert bool(jnp.all(jnp.isfinite(grads)))


def test_one_feature_gives_the_sign():
    # epsilon = 1e-8 beside 0.04, the smallest square.
    np.testing.assert_allclose(models.rms_norm(jnp.array([[-2.0], [0.2], [0.0]])), [[-1], [1], [0]], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_inputs_are_reduced_in_float32(dtype):
    # In float16, 300^2 overflows; in bfloat16, a sum of 512 ones stops growing at 256.
    for x in (jnp.full((512,), 300.0, dtype), jnp.ones((512,), dtype)):
        y = models.rms_norm(x)
        assert y.dtype == dtype
        np.testing.assert_array_equal(y.astype(jnp.float32), np.ones(512))


def test_only_live_features_count():
    x, where = normal(3, 8), jnp.arange(8) < 5
    y = models.rms_norm(x, where=where)
    np.testing.assert_allclose(y[:, :5], models.rms_norm(x[:, :5]), **TOLERANCE)
    np.testing.assert_array_equal(y[:, 5:], 0)
    np.testing.assert_array_equal(models.rms_norm(x, where=jnp.zeros(8, bool)), 0)


def test_module_parameters_and_result_dtype():
    x = normal(2, 6).astype(jnp.bfloat16)
    module = models.RMSNorm(use_bias=True, dtype=jnp.float32)
    variables = module.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables["params"]) == {"bias": (6,), "scale": (6,)}
    y = module.apply(variables, x)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, numpy_rms_norm(x), **TOLERANCE)
    assert models.RMSNorm().apply({"params": {"scale": jnp.ones(6)}}, x).dtype == jnp.bfloat16


def test_module_without_parameters():
    module = models.RMSNorm(use_scale=False)
    assert not module.init(jax.random.key(0), jnp.ones((2, 3)))


def test_jit_and_vmap():
    x = normal(4, 6)
    y = models.rms_norm(x, fraction=0.5)
    np.testing.assert_allclose(jax.jit(lambda x: models.rms_norm(x, fraction=0.5))(x), y, **TOLERANCE)
    np.testing.assert_allclose(jax.vmap(lambda x: models.rms_norm(x, fraction=0.5))(x), y, **TOLERANCE)
