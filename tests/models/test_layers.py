"""Dense, Conv and Embed against NumPy, and parameters that are stored in other formats."""

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import formats, models
from steelyard.models import layers
from tests.models.helpers import KEY, apply, init, normal

# A float32 dot product of at most 72 terms of order 1, summed in another order: 72 * 2^-24 = 4e-6.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def test_dense_is_the_matrix_product():
    x = normal(3, 5, 7)
    layer = models.Dense(4, bias_init=nn.initializers.normal())
    variables = init(layer, x)
    kernel, bias = (np.asarray(variables["params"][name], np.float64) for name in ("kernel", "bias"))
    expected = np.einsum("abk,kn->abn", np.asarray(x, np.float64), kernel) + bias
    np.testing.assert_allclose(apply(layer, variables, x), expected, **TOLERANCE)


def test_dense_starts_like_the_dense_layer_of_flax():
    x = normal(3, 5)
    ours, theirs = (jax.jit(layer.init)(KEY, x) for layer in (models.Dense(4), nn.Dense(4)))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 0), (0, 2))])
@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
def test_conv_equals_flax(padding, strides):
    x = normal(2, 5, 6, 3)
    ours = models.Conv(4, (3, 2), strides, padding, bias_init=nn.initializers.normal())
    theirs = nn.Conv(4, (3, 2), strides, padding)
    variables = init(ours, x)
    np.testing.assert_allclose(apply(ours, variables, x), apply(theirs, variables, x), **TOLERANCE)


def test_conv_is_the_sum_over_the_window():
    x = normal(1, 4, 4, 2)
    layer = models.Conv(3, (2, 2), padding="VALID", use_bias=False)
    variables = init(layer, x)
    kernel, image = (np.asarray(a, np.float64) for a in (variables["params"]["kernel"], x[0]))
    expected = np.array(
        [[np.einsum("hwc,hwcn->n", image[i : i + 2, j : j + 2], kernel) for j in range(3)] for i in range(3)]
    )
    np.testing.assert_allclose(apply(layer, variables, x)[0], expected, **TOLERANCE)


def test_embed_takes_rows_and_attend_gives_inner_products():
    class Tied(nn.Module):
        @nn.compact
        def __call__(self, indices, x):
            embed = models.Embed(6, 4, name="embed")
            return embed(indices), embed.attend(x)

    indices, x = jnp.array([[5, 0], [2, 2]]), normal(3, 4)
    variables = init(Tied(), indices, x)
    table = np.asarray(variables["params"]["embed"]["embedding"], np.float64)
    rows, products = apply(Tied(), variables, indices, x)
    np.testing.assert_array_equal(rows, table[np.asarray(indices)].astype(np.float32))
    np.testing.assert_allclose(products, np.asarray(x, np.float64) @ table.T, **TOLERANCE)


@pytest.mark.parametrize("layer", [models.Dense(4, dtype=jnp.bfloat16), models.Conv(4, dtype=jnp.bfloat16)])
def test_computes_in_the_asked_dtype_and_keeps_float32_parameters(layer):
    x = normal(2, 5, 5, 3)
    variables = init(layer, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert apply(layer, variables, x).dtype == jnp.bfloat16


def test_embed_in_bfloat16():
    embed = models.Embed(6, 4, dtype=jnp.bfloat16)
    variables = init(embed, jnp.array([1]))
    assert apply(embed, variables, jnp.array([1, 2])).dtype == jnp.bfloat16


def test_wrong_shape_is_an_error_that_names_path_and_shapes():
    model = models.MLP((4, 2))
    variables = model.init(KEY, jnp.ones((1, 3)))
    with pytest.raises(ValueError, match=r"dense_0/kernel has shape \(3, 4\), but the layer needs \(5, 4\)"):
        model.apply(variables, jnp.ones((1, 5)))


def test_wrong_shape_of_a_packed_weight_is_the_same_error():
    layer = models.Dense(4, use_bias=False)
    packed = formats.Quantized.from_dense(normal(8, 4), "int8")
    with pytest.raises(ValueError, match=r"kernel has shape \(8, 4\), but the layer needs \(16, 4\)"):
        layer.apply({"params": {"kernel": packed}}, jnp.ones((1, 16)))


def test_missing_parameter_is_reported():
    with pytest.raises(flax.errors.FlaxError, match="kernel"):
        models.Dense(4, use_bias=False).apply({"params": {"other": jnp.ones(1)}}, jnp.ones((1, 3)))


def test_a_name_cannot_be_used_twice():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            return sum(layers.weight(self, "w", nn.initializers.ones, (2,)).sum() for _ in range(2)) + x

    with pytest.raises((ValueError, flax.errors.FlaxError), match=r"\bw\b"):
        Twice().init(KEY, 0.0)


def test_partitioned_boxes_are_opened():
    layer = models.Dense(4, kernel_init=nn.with_partitioning(nn.initializers.lecun_normal(), (None, "tensor")))
    x = normal(2, 3)
    variables = init(layer, x)
    assert isinstance(variables["params"]["kernel"], nn.Partitioned)
    np.testing.assert_array_equal(apply(layer, variables, x), apply(layer, nn.unbox(variables), x))


def test_shapes_alone_suffice_for_initialisation():
    shapes = jax.eval_shape(models.Dense(4).init, KEY, jax.ShapeDtypeStruct((2, 3), jnp.float32))
    assert shapes["params"]["kernel"].shape == (3, 4)


def test_inputs_are_collected_only_when_asked_for():
    model, x = models.MLP((4, 2)), normal(3, 5)
    variables = init(model, x)
    assert set(variables) == {"params"}
    _, collected = model.apply(variables, x, mutable=["intermediates"])
    np.testing.assert_array_equal(collected["intermediates"]["dense_0"]["inputs"][0], x)
    assert collected["intermediates"]["dense_1"]["inputs"][0].shape == (3, 4)


def test_bad_numbers_are_named():
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        layers.require_positive(depth=1, width=0)
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\), got 1.0"):
        layers.require_fraction(dropout=1.0)
