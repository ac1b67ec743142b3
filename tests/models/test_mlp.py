"""The multilayer perceptron against NumPy, and the arguments it refuses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import models
from tests.models.helpers import apply, compiled, init, normal


def test_equals_numpy():
    x = normal(3, 2, 5)
    model = models.MLP((7, 6, 4), nn.tanh)
    params = init(model, x)["params"]
    y = np.asarray(x, np.float64)
    for i in range(3):
        layer = jax.tree.map(lambda p: np.asarray(p, np.float64), params[f"dense_{i}"])
        y = y @ layer["kernel"] + layer["bias"]
        y = np.tanh(y) if i < 2 else y
    # Dot products of at most 7 terms of order 1 in float32.
    np.testing.assert_allclose(apply(model, {"params": params}, x), y, rtol=1e-5, atol=1e-5)


def test_flatten_takes_images():
    images = normal(3, 4, 4, 1)
    model = models.MLP([8, 2], flatten=True)
    variables = init(model, images)
    assert variables["params"]["dense_0"]["kernel"].shape == (16, 8)
    flat = apply(models.MLP((8, 2)), variables, images.reshape(3, 16))
    np.testing.assert_array_equal(apply(model, variables, images), flat)


def test_no_activation_after_the_last_layer():
    variables = {"params": {"dense_0": {"kernel": -jnp.ones((1, 1)), "bias": jnp.zeros(1)}}}
    np.testing.assert_array_equal(apply(models.MLP((1,)), variables, jnp.ones((1, 1))), [[-1.0]])


def test_dropout_only_in_training():
    x = jnp.ones((4, 5))
    model = models.MLP((64, 3), dropout=0.5)
    variables = init(model, x)
    np.testing.assert_array_equal(apply(model, variables, x), apply(models.MLP((64, 3)), variables, x))
    run = compiled(lambda key: model.apply(variables, x, train=True, rngs={"dropout": key}))
    np.testing.assert_array_equal(run(jax.random.key(0)), run(jax.random.key(0)))
    assert not np.allclose(run(jax.random.key(0)), run(jax.random.key(1)))


def test_jit_and_bfloat16():
    x = normal(3, 5)
    model = models.MLP((7, 2), dtype=jnp.bfloat16)
    variables = init(model, x)
    y = apply(model, variables, x)
    assert y.dtype == jnp.bfloat16
    full = models.MLP((7, 2))
    np.testing.assert_allclose(apply(full, variables, x), full.apply(variables, x), rtol=1e-6, atol=1e-6)
    # bfloat16 keeps 8 bits: each of two layers rounds sums of order 1 to 2^-8.
    np.testing.assert_allclose(y.astype(jnp.float32), full.apply(variables, x), atol=0.05)


def test_refuses_bad_arguments():
    with pytest.raises(ValueError, match="features must name at least the width of the result"):
        models.MLP(())
    with pytest.raises(ValueError, match=r"features\[1\] must be at least 1, got 0"):
        models.MLP((3, 0))
    with pytest.raises(ValueError, match="dropout"):
        models.MLP((3,), dropout=-0.1)
