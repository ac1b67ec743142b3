"""The residual network: shapes, batch statistics, and one block against a direct computation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import models
from tests.models.helpers import KEY, apply, assert_finite, compiled, init, normal


def small(**options) -> models.ResNet:
    return models.ResNet(10, num_blocks=1, width=4, **options)


@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3)])
def test_shapes(shape):
    images = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
    variables = jax.eval_shape(small().init, KEY, images)
    logits = jax.eval_shape(small().apply, variables, images)
    assert (logits.shape, logits.dtype) == ((2, 10), jnp.float32)
    assert variables["params"]["logits"]["kernel"].shape == (16, 10)


def test_parameter_paths():
    variables = jax.eval_shape(models.ResNet(10, num_blocks=2, width=4).init, KEY, jnp.ones((1, 8, 8, 1)))
    shapes = jax.tree.map(jnp.shape, variables["params"])
    norm = {"scale": (4,), "bias": (4,)}
    assert shapes["stem"] == {"kernel": (3, 3, 1, 4)}
    assert shapes["stem_norm"] == norm
    conv = {"kernel": (3, 3, 4, 4)}
    assert shapes["stage_0_block_1"] == {"conv_0": conv, "conv_1": conv, "norm_0": norm, "norm_1": norm}
    assert shapes["stage_1_block_0"]["shortcut"] == {"kernel": (1, 1, 4, 8)}
    assert "shortcut" not in shapes["stage_1_block_1"]
    blocks = {f"stage_{s}_block_{b}" for s in range(3) for b in range(2)}
    assert set(shapes) == blocks | {"stem", "stem_norm", "logits"}


def test_training_changes_the_statistics_and_evaluation_uses_them():
    images = normal(4, 8, 8, 1)
    model = small()
    variables = init(model, images)
    _, changed = apply(model, variables, images, train=True, mutable=["batch_stats"])
    # The first layer's statistics, directly: mean <- 0.9 mean + 0.1 * mean of the stem's output.
    stem = models.Conv(4, use_bias=False).apply({"params": variables["params"]["stem"]}, images)
    old, new = (np.asarray(v["batch_stats"]["stem_norm"]["mean"], np.float64) for v in (variables, changed))
    np.testing.assert_allclose(new, 0.9 * old + 0.1 * np.asarray(stem, np.float64).mean((0, 1, 2)), atol=1e-6)
    run = compiled(model.apply)
    before = run(variables, images)
    assert not np.allclose(run({**variables, **changed}, images), before)
    # In evaluation examples do not meet.
    np.testing.assert_allclose(run(variables, images.at[1:].set(0.0))[0], before[0], rtol=1e-4, atol=1e-5)


def test_jit_equals_no_jit_and_gradients_are_finite():
    images = normal(2, 8, 8, 1)
    model = small()
    variables = init(model, images)
    # Float32 through 8 convolutions of up to 144 terms, in another order of summation.
    np.testing.assert_allclose(apply(model, variables, images), model.apply(variables, images), atol=1e-4)

    def loss(params):
        outputs, _ = model.apply({**variables, "params": params}, images, train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(outputs, jnp.array([3, 7])).mean()

    grads = compiled(jax.grad(loss))(variables["params"])
    assert_finite(grads)


def test_bfloat16_computation_gives_float32_logits():
    images = jnp.ones((2, 8, 8, 1))
    model = small(dtype=jnp.bfloat16)
    variables = jax.eval_shape(model.init, KEY, images)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert jax.eval_shape(model.apply, variables, images).dtype == jnp.float32


def test_refuses_bad_arguments():
    with pytest.raises(ValueError, match="num_blocks must be at least 1, got 0"):
        models.ResNet(10, num_blocks=0)
