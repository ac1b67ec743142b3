"""The vision transformer: heads, patches, one block against NumPy, and a few steps of training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard import models
from steelyard import tree as tree_lib
from tests.models.helpers import KEY, apply, assert_finite, compiled, init, normal, numpy_attention, to_float64


def small(**options) -> models.ViT:
    return models.ViT(10, **{"width": 8, "depth": 1, "heads": 2, "mlp_width": 12, "stem": (3,)} | options)


def images(batch: int = 2, size: int = 8, channels: int = 1) -> jax.Array:
    return normal(batch, size, size, channels)


@pytest.mark.parametrize(("size", "channels", "patch"), [(8, 1, 2), (28, 1, 4), (32, 3, 8)])
def test_heads_and_shapes(size, channels, patch):
    model = small(patch=patch, reconstruct=True)
    x = jax.ShapeDtypeStruct((2, size, size, channels), jnp.float32)
    outputs = jax.eval_shape(model.apply, jax.eval_shape(model.init, KEY, x), x)
    assert jax.tree.map(jnp.shape, outputs) == {"logits": (2, 10), "reconstruction": x.shape}


def test_parameter_paths():
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(small(reconstruct=True).init, KEY, images())["params"])

    def dense(n_in, n_out):
        return {"kernel": (n_in, n_out), "bias": (n_out,)}

    norm = {"scale": (8,), "bias": (8,)}
    assert shapes == {
        "stem_0": {"kernel": (3, 3, 1, 3), "bias": (3,)},
        "patch": dense(2 * 2 * 3, 8),
        "position": (1, 16, 8),
        "block_0": {
            "attention_norm": norm,
            "attention": {name: dense(8, 8) for name in ("query", "key", "value", "out")},
            "mlp_norm": norm,
            "mlp": {"up": dense(8, 12), "down": dense(12, 8)},
        },
        "norm": norm,
        "logits": dense(8, 10),
        "reconstruction": dense(8, 4),
    }


def numpy_layer_norm(params, x):
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + 1e-6) * params["scale"] + params["bias"]


def numpy_vit(params, image):
    """The whole model of one block without a stem, for one image, in float64."""
    rows = [image[i : i + 4, j : j + 4].reshape(-1) for i in (0, 4) for j in (0, 4)]
    x = np.stack(rows) @ params["patch"]["kernel"] + params["patch"]["bias"] + params["position"][0]
    block = params["block_0"]
    x = x + numpy_attention(block["attention"], numpy_layer_norm(block["attention_norm"], x), 2)
    hidden = numpy_layer_norm(block["mlp_norm"], x) @ block["mlp"]["up"]["kernel"] + block["mlp"]["up"]["bias"]
    hidden = hidden * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    x = x + hidden @ block["mlp"]["down"]["kernel"] + block["mlp"]["down"]["bias"]
    x = numpy_layer_norm(params["norm"], x)
    return x.mean(0) @ params["logits"]["kernel"] + params["logits"]["bias"]


def test_equals_numpy():
    model = small(stem=(), patch=4)
    variables = init(model, images())
    params = to_float64(variables["params"])
    expected = np.stack([numpy_vit(params, np.asarray(image, np.float64)) for image in images()])
    # A dozen float32 operations on numbers of order 1 to 10.
    np.testing.assert_allclose(apply(model, variables, images())["logits"], expected, rtol=1e-4, atol=1e-4)


def test_a_patch_is_a_square_in_row_order():
    image = jnp.arange(16.0).reshape(1, 4, 4, 1)
    np.testing.assert_array_equal(models.patchify(image, 2)[0, 1], [2, 3, 6, 7])
    np.testing.assert_array_equal(models.patchify(image, 2)[0, 2], [8, 9, 12, 13])


@settings(max_examples=20, deadline=None)
@given(patch=st.integers(1, 4), rows=st.integers(1, 3), columns=st.integers(1, 3), channels=st.integers(1, 3))
def test_unpatchify_undoes_patchify(patch, rows, columns, channels):
    shape = (2, rows * patch, columns * patch, channels)
    x = np.arange(np.prod(shape)).reshape(shape)
    patches = models.patchify(x, patch)
    assert patches.shape == (2, rows * columns, patch * patch * channels)
    np.testing.assert_array_equal(models.unpatchify(patches, patch, *shape[1:3]), x)


def test_jit_equals_no_jit_and_gradients_are_finite():
    model = small(reconstruct=True)
    variables = init(model, images())
    eager = model.apply(variables, images(), train=False)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
        apply(model, variables, images(), train=False),
        eager,
    )

    def loss(variables):
        return sum(jnp.sum(jnp.square(output)) for output in model.apply(variables, images()).values())

    grads = compiled(jax.grad(loss))(variables)
    assert_finite(grads)
    # Nothing is cut off, but the key's bias: it adds the same to all scores of a query, and the softmax ignores that.
    assert all(np.any(leaf != 0) for path, leaf in tree_lib.flatten(grads) if not path.endswith("key/bias"))


def test_dropout_only_in_training():
    model, plain = small(dropout=0.5), small()
    variables = init(model, images())
    evaluation = [str(jax.make_jaxpr(m.apply)(variables, images())) for m in (model, plain)]
    assert evaluation[0] == evaluation[1]
    run = compiled(lambda key: model.apply(variables, images(), train=True, rngs={"dropout": key})["logits"])
    np.testing.assert_array_equal(run(jax.random.key(0)), run(jax.random.key(0)))
    assert not np.allclose(run(jax.random.key(0)), run(jax.random.key(1)))


def test_bfloat16_computation_gives_float32_outputs():
    model = small(dtype=jnp.bfloat16, reconstruct=True)
    variables = init(model, images())
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    outputs = apply(model, variables, images())
    assert {value.dtype for value in outputs.values()} == {jnp.dtype(jnp.float32)}
    # 8 bits of mantissa through a dozen roundings of numbers of order 1.
    full = apply(small(reconstruct=True), variables, images())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=0.1), outputs, full)


def test_loss_falls_on_one_batch():
    model, x = small(), images(16)
    labels = jnp.arange(16) % 10
    tx = optax.adam(1e-2)

    def loss(params):
        logits = model.apply({"params": params}, x, train=True)["logits"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @compiled
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    params = init(model, x)["params"]
    state, values = tx.init(params), []
    for _ in range(20):
        params, state, value = step(params, state)
        values.append(float(value))
    assert values[-1] < 0.9 * values[0]


def test_refuses_bad_arguments():
    with pytest.raises(ValueError, match="heads must divide width=8, got heads=3"):
        small(heads=3)
    with pytest.raises(ValueError, match="patch must be at least 1, got 0"):
        small(patch=0)
    with pytest.raises(ValueError, match=r"patch=3 does not divide .* shape \(2, 8, 8, 3\)"):
        init(small(patch=3), images())
    with pytest.raises(ValueError, match=r"position has shape \(1, 16, 8\), but the layer needs \(1, 4, 8\)"):
        apply(small(), init(small(), images()), images(size=4))
