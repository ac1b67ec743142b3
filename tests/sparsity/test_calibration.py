"""Calibration statistics against NumPy sums over all rows at once, and over eight devices against one."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import hlo
from steelyard.models import layers
from steelyard.sparsity import calibration, scores

P = jax.sharding.PartitionSpec
WINDOWS = {"conv/kernel": calibration.Window((2, 1), ((1, 0), (0, 2)))}


class Model(nn.Module):
    """A strided convolution, a layer that is called twice, and one that has no kernel to prune."""

    @nn.compact
    def __call__(self, x):
        x = layers.Conv(3, (3, 2), *WINDOWS["conv/kernel"], name="conv")(x)
        twice = layers.Dense(3, name="twice")
        x = twice(nn.relu(twice(x)))
        return nn.LayerNorm(name="norm")(x)


MODEL = Model()
IMAGES = np.random.default_rng(0).normal(size=(6, 8, 5, 4, 2)).astype(np.float32)  # six batches of eight
PARAMS = jax.jit(MODEL.init)(jax.random.key(0), IMAGES[0])["params"]


def inputs_of(params, images):
    _, sown = MODEL.apply({"params": params}, images, mutable=["intermediates"])
    return sown["intermediates"]


def loss(params, images):
    return jnp.mean(MODEL.apply({"params": params}, images)[..., 0] ** 2)


@functools.cache
def collected(count=3):
    options = dict(windows=WINDOWS, hessian=True, products=True, grad_squares=True)
    return calibration.collect(inputs_of, PARAMS, IMAGES[:count], loss_fn=loss, **options)


def patches_by_hand(images):
    """Rows [.., height * width * channels] of a 3 x 2 window with strides 2 and 1 over images with a padded border."""
    padded = np.pad(images.astype(np.float64), ((0, 0), (1, 0), (0, 2), (0, 0)))
    rows = []
    for i in range(0, padded.shape[1] - 2, 2):
        for j in range(padded.shape[2] - 1):
            rows.append(padded[:, i : i + 3, j : j + 2].reshape(len(images), -1))
    return np.concatenate(rows)


def rows_by_hand(count=3):
    images = IMAGES[:count].reshape(-1, *IMAGES.shape[2:])
    sown = jax.jit(inputs_of)(PARAMS, images)["twice"]["inputs"]
    twice = np.concatenate([np.asarray(x, np.float64).reshape(-1, 3) for x in sown])
    return {"conv": patches_by_hand(images), "twice": twice}


def test_sums_are_those_of_all_rows():
    got = collected()
    assert float(got.batches) == 3
    for name, rows in rows_by_hand().items():
        kernel = PARAMS[name]["kernel"]
        assert float(got.rows[name]["kernel"]) == len(rows)
        squares = np.sum(rows**2, axis=0).reshape(kernel.shape[:-1])
        np.testing.assert_allclose(got.squares[name]["kernel"], squares, rtol=1e-5)
        gram = rows.T @ rows
        np.testing.assert_allclose(got.gram[name]["kernel"], gram, rtol=1e-5, atol=1e-5 * gram.max())


def test_norms_and_hessians_are_means_over_rows():
    norms, hessians = jax.jit(lambda x: (calibration.input_norm(x), calibration.hessian(x)))(collected())
    rows = rows_by_hand()["twice"]
    np.testing.assert_allclose(norms["twice"]["kernel"], np.sqrt(np.mean(rows**2, axis=0)), rtol=1e-5)
    np.testing.assert_allclose(hessians["twice"]["kernel"], 2 * rows.T @ rows / len(rows), rtol=1e-4, atol=1e-5)
    assert {x.dtype for x in jax.tree.leaves((norms, hessians, collected()))} == {jnp.dtype("float32")}


def test_the_hessian_is_that_of_the_layers_error():
    """E(V) = mean |rows (V - W)|^2 for one output unit has the second derivative 2 / N X^T X."""
    rows = rows_by_hand()["twice"]
    curved = jax.jit(jax.hessian(lambda v: jnp.mean((jnp.asarray(rows, jnp.float32) @ v) ** 2)))(jnp.ones(3))
    np.testing.assert_allclose(calibration.hessian(collected())["twice"]["kernel"], curved, rtol=1e-4, atol=1e-5)


def test_sums_of_gradients():
    gradient = jax.jit(jax.grad(loss))
    grads = [gradient(PARAMS, images) for images in IMAGES[:3]]
    for name in ("conv", "twice"):
        w = np.asarray(PARAMS[name]["kernel"], np.float64)
        g = np.stack([np.asarray(grad[name]["kernel"], np.float64) for grad in grads])
        np.testing.assert_allclose(collected().products[name]["kernel"], np.abs(w * g).sum(0), rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(collected().grad_squares[name]["kernel"], (g**2).sum(0), rtol=1e-3, atol=1e-7)


def test_the_trees_are_those_of_the_parameters_and_serve_scores():
    for tree in (collected().squares, collected().gram, collected().products):
        assert jax.tree.structure(jax.tree.map(lambda _: 0, tree)) == jax.tree.structure(
            {name: {key: 0 if key == "kernel" else None for key in leaves} for name, leaves in PARAMS.items()}
        )

    @jax.jit
    def both(params, statistics):
        norms, hessians = calibration.input_norm(statistics), calibration.hessian(statistics)
        return [
            calibration.map_kernels(score, params, x) for score, x in ((scores.wanda, norms), (scores.obs, hessians))
        ]

    wanda, obs = both(PARAMS, collected())
    for name in ("conv", "twice"):
        assert wanda[name]["kernel"].shape == obs[name]["kernel"].shape == PARAMS[name]["kernel"].shape
        assert wanda[name]["bias"] is obs[name]["bias"] is None
    assert wanda["norm"] == {"scale": None, "bias": None}


def test_only_what_is_asked_for():
    shapes = jax.eval_shape(inputs_of, PARAMS, IMAGES[0])
    plain = calibration.init(PARAMS, shapes, windows=WINDOWS)
    assert plain.gram is plain.products is plain.grad_squares is None
    assert calibration.init(PARAMS, shapes, windows=WINDOWS, hessian="twice/.*").gram["conv"]["kernel"] is None
    part = calibration.init(PARAMS, shapes, where="twice/kernel", products=True)
    assert part.squares["conv"]["kernel"] is part.products["conv"]["kernel"] is None
    # One set of windows serves a part of the model, too.
    after = jax.eval_shape(functools.partial(calibration.update, windows=WINDOWS), plain, shapes)
    assert jax.tree.structure(after) == jax.tree.structure(plain)


def test_a_stack_and_a_plain_function():
    """Two layers of one shape in one leaf; the inputs of a function that is no module, a row of zeros among them."""
    x = np.random.default_rng(1).normal(size=(2, 7, 3)).astype(np.float32)
    x[:, 4] = 0
    params, inputs = {"kernel": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 4))}, {"inputs": jnp.asarray(x)}
    start = calibration.init(params, inputs, where="kernel", hessian=True)
    got = jax.jit(calibration.update)(start, inputs)
    assert float(got.rows["kernel"]) == 7
    np.testing.assert_allclose(got.squares["kernel"], np.sum(x**2, axis=1), rtol=1e-6)
    np.testing.assert_allclose(got.gram["kernel"], np.einsum("lri,lrj->lij", x, x), rtol=1e-5, atol=1e-6)


def test_half_precision_is_summed_in_float32():
    """256 ones more than 256 leave a sum of bfloat16 where it is."""
    inputs = {"inputs": jnp.ones((512, 2), jnp.bfloat16)}
    start = calibration.init({"kernel": jnp.ones((2, 2), jnp.bfloat16)}, inputs, hessian=True)
    got = jax.jit(calibration.update)(start, inputs)
    np.testing.assert_array_equal(got.squares["kernel"], 512)
    np.testing.assert_array_equal(got.gram["kernel"], 512)


def test_over_eight_devices_only_statistics_are_exchanged():
    """A convolution and matrices, each device with one image of eight: what moves is an all-reduce of the sums."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    step = jax.jit(functools.partial(calibration.update, windows=WINDOWS))
    inputs = jax.jit(inputs_of)(PARAMS, IMAGES[0])
    start = calibration.init(PARAMS, inputs, windows=WINDOWS, hessian=True)
    cut = jax.device_put(inputs, jax.NamedSharding(mesh, P("data")))
    start_everywhere = jax.device_put(start, jax.NamedSharding(mesh, P()))
    compiled = step.lower(start_everywhere, cut).compile()
    for got, expected in zip(
        *map(jax.tree.leaves, (compiled(start_everywhere, cut), step(start, inputs))), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5 * np.max(expected))
    moved = hlo.collective_bytes(compiled.as_text())
    assert moved.keys() == {"all-reduce"}
    # Each of the two calls of a layer may send its own; the convolution may send the sum of its squared images instead.
    sums = 4 * sum(x.size for x in jax.tree.leaves((start.squares, start.gram)))
    calls = 4 * (3 + 9)
    assert moved["all-reduce"] <= sums + calls + 4 * IMAGES[0, 0].size


def test_memory_does_not_grow_with_the_batches():
    def run(params, images):
        start = calibration.init(params, jax.eval_shape(inputs_of, params, images[0]), windows=WINDOWS, hessian=True)
        step = lambda stats, x: (calibration.update(stats, inputs_of(params, x), windows=WINDOWS), None)  # noqa: E731
        return jax.lax.scan(step, start, images)[0]

    few, many = (jax.ShapeDtypeStruct((count, *IMAGES.shape[1:]), jnp.float32) for count in (2, 64))
    temporary = [jax.jit(run).lower(PARAMS, x).compile().memory_analysis().temp_size_in_bytes for x in (few, many)]
    assert temporary[0] == temporary[1]


KERNEL, X = {"a": {"kernel": jnp.ones((3, 2))}}, {"a": {"inputs": jnp.ones((4, 3))}}
CONV = {"a": {"kernel": jnp.ones((3, 3, 2, 5))}}
START = calibration.init(KERNEL, X, products=True, grad_squares=True)
REFUSED = {
    r"no kernel has an input: selected are a/kernel; .* modules 'b'": lambda: calibration.init(KERNEL, {"b": X["a"]}),
    r"an input of shape \(4, 2\) does not fit 'a/kernel' of shape \(3, '...'\)": lambda: calibration.init(
        KERNEL, {"a": {"inputs": jnp.ones((4, 2))}}
    ),
    r"\(1, 5, 5, 2\) does not fit .* a convolution needs an entry in windows": lambda: calibration.init(
        CONV, {"a": {"inputs": jnp.ones((1, 5, 5, 2))}}
    ),
    r"\(5, 5, 2\) does not fit .* as a convolution": lambda: calibration.init(
        CONV, {"a": {"inputs": jnp.ones((5, 5, 2))}}, windows={"a/.*": calibration.Window()}
    ),
    r"windows='b/kernel' matches none.*a/kernel": lambda: calibration.init(
        CONV, X, windows={"b/kernel": calibration.Window()}
    ),
    r"hessian='b/kernel' matches none": lambda: calibration.init(KERNEL, X, hessian="b/kernel"),
    r"inputs has nothing for 'a/kernel'": lambda: calibration.update(START, {}),
    r"an input of shape \(4, 5\) does not fit": lambda: calibration.update(START, {"a": {"inputs": jnp.ones((4, 5))}}),
    r"products needs params and grads": lambda: calibration.update(START, X),
    r"grad_squares needs grads": lambda: calibration.update(START._replace(products=None), X, params=KERNEL),
    r"batches is empty": lambda: calibration.collect(inputs_of, PARAMS, []),
    r"no gram: make them with hessian=True": lambda: calibration.hessian(START),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()
