"""Storage in few bits against fake quantization (bit for bit) and NumPy float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from steelyard import formats, quant, tree

PACKED = {"int4": 2, "nf4": 2, "int2": 4}


def data(shape=(32, 6), seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def assert_same_bits(a, b):
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a.view(f"u{a.dtype.itemsize}"), b.view(f"u{b.dtype.itemsize}"))


# One of each way to store codes; int5, int6 and int7 are stored as int8 is.
STORAGES = ("int8", "int4", "int3", "int2", "fp8_e4m3", "fp4_e2m1", "nf4")


@pytest.mark.parametrize("format", STORAGES)
def test_dense_is_what_fake_quantization_gives(format):
    w = jnp.asarray(data())
    expected = quant.fake_quantize(w, format, *quant.calibrate(w, format))
    assert_same_bits(formats.Quantized.from_dense(w, format).dense(), expected)
    # A model is finished without jit and evaluated under it.
    assert_same_bits(jax.jit(lambda w: formats.Quantized.from_dense(w, format).dense())(w), expected)
    assert_same_bits(jax.jit(lambda w: quant.fake_quantize(w, format, *quant.calibrate(w, format)))(w), expected)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"block": (8, 1), "symmetric": False}, "float32"),
        ({"block": (8, 3), "bound": "max"}, "bfloat16"),
        ({"block": (-1, -1), "power_of_two": True}, "float32"),
    ],
)
def test_dense_is_what_fake_quantization_gives_with_options(options, dtype):
    w = jnp.asarray(data(), dtype)
    expected = quant.fake_quantize(w, "int4", *quant.calibrate(w, "int4", **options))
    q = formats.Quantized.from_dense(w, "int4", **options)
    assert q.dtype == dtype
    assert_same_bits(q.dense(), expected)
    assert_same_bits(jax.jit(lambda w: formats.Quantized.from_dense(w, "int4", **options).dense())(w), expected)


def test_stored_scale_is_the_one_that_codes_were_made_with():
    w = jnp.asarray(data())
    scale = quant.calibrate(w, "int4").scale.astype(jnp.bfloat16)
    q = formats.Quantized.from_dense(w, "int4", scale_dtype=jnp.bfloat16)
    assert q.scale.dtype == jnp.bfloat16
    assert_same_bits(q.dense(), quant.fake_quantize(w, "int4", scale))
    tiny = formats.Quantized.from_dense(w * 1e-12, "int4", scale_dtype=jnp.float16)
    np.testing.assert_array_equal(tiny.dense(), np.zeros_like(w))


def test_x64():
    with jax.enable_x64(True):
        w = jnp.asarray(data(dtype=np.float64))
        q = formats.Quantized.from_dense(w, "int8")
        assert q.dense().dtype == jnp.float64
        assert q.scale.dtype == jnp.float32
        assert_same_bits(q.dense(), quant.fake_quantize(w, "int8", *quant.calibrate(w, "int8")))
        assert formats.matmul(jnp.ones((2, 32)), q).dtype == jnp.float64


@pytest.mark.parametrize("format", STORAGES)
def test_stored_codes(format):
    q = formats.Quantized.from_dense(data(), format)
    per_byte = PACKED.get(format, 1)
    assert q.packed == (format in PACKED)
    assert q.codes.shape == (32 // per_byte, 6)
    assert q.codes.dtype == ("uint8" if q.packed else quant.get_format(format).dtype)
    assert q.shape == (32, 6)
    assert (q.ndim, q.size) == (2, 192)
    assert q.nbytes == 192 // per_byte + 6 * 4 == tree.nbytes(q)
    expected = quant.encode(data(), format, q.scale)
    np.testing.assert_array_equal(np.asarray(q.unpacked(), np.float32), np.asarray(expected, np.float32))


def test_worked_byte_counts():
    asymmetric = formats.Quantized.from_dense(data((32, 6)), "int4", block=(8, 1), symmetric=False)
    assert asymmetric.nbytes == 16 * 6 + 4 * 6 * 4 + 4 * 6 == 216
    assert formats.Quantized.from_dense(data((32, 6)), "int8").nbytes == 192 + 24 == 216
    tiles = formats.Quantized.from_dense(jnp.zeros((64, 64)), "int4", block=(64, 64))
    assert 8 * tiles.nbytes / 64**2 == 4 + 32 / 64**2  # bits a weight: one float32 scale a tile


@pytest.mark.parametrize(("format", "shape"), [("int4", (5, 3)), ("int2", (6, 3)), ("nf4", (8,))])
def test_axis_that_does_not_divide_stays_unpacked(format, shape):
    w = jnp.asarray(data(shape))
    q = formats.Quantized.from_dense(w, format)
    assert not q.packed
    assert q.shape == shape
    assert_same_bits(q.dense(), quant.fake_quantize(w, format, *quant.calibrate(w, format)))
    np.testing.assert_allclose(
        formats.matmul(jnp.ones((2, shape[0])), q), np.ones((2, shape[0])) @ q.dense(), rtol=1e-5
    )


def test_shape_follows_the_children():
    stack = formats.Quantized.from_dense(data((4, 8, 6)), "int4", block=(1, -1, 1))
    assert stack.shape == (4, 8, 6)
    layer = jax.tree.map(lambda a: a[1], stack)
    assert layer.shape == (8, 6)
    assert_same_bits(layer.dense(), stack.dense()[1])


def test_rebuilt_with_anything():
    q = formats.Quantized.from_dense(data(), "int4", block=(8, 1), symmetric=False)
    leaves, structure = jax.tree.flatten(q)
    for child in (object(), None, True, P("k", "n"), jax.ShapeDtypeStruct((2, 2), jnp.float32)):
        rebuilt = jax.tree.unflatten(structure, [child] * len(leaves))
        assert type(rebuilt) is formats.Quantized
        assert rebuilt.codes is child
    shapes = jax.eval_shape(lambda: q)
    assert (shapes.shape, shapes.nbytes) == (q.shape, q.nbytes)
    assert tree.paths({"kernel": q}) == ["kernel/codes", "kernel/scale", "kernel/zero_point"]
    assert structure == jax.tree.structure(dataclasses.replace(q, dtype="float32"))


def test_outliers():
    w = jnp.asarray(data())
    index = np.int32([0, 7, 191])
    kept = w.reshape(-1).at[index].set(0).reshape(w.shape)
    scale, zero_point = quant.calibrate(kept, "int4", symmetric=False)
    codes = quant.encode(kept, "int4", scale, zero_point)
    beside = (w.reshape(-1)[index] * 100).astype(jnp.bfloat16)
    q = formats.Quantized.from_codes(codes, scale, zero_point, "int4", outliers=beside, index=index)
    expected = np.array(quant.fake_quantize(kept, "int4", scale, zero_point)).reshape(-1)
    np.testing.assert_array_equal(expected[index], 0)
    expected[index] = np.asarray(beside, np.float32)
    np.testing.assert_array_equal(q.dense(), expected.reshape(32, 6))
    assert q.nbytes == 96 + 24 + 6 + 3 * 2 + 3 * 4
    x = data((3, 32), 1)
    np.testing.assert_allclose(
        formats.matmul(x, q), x.astype(np.float64) @ expected.reshape(32, 6), rtol=1e-5, atol=1e-4
    )

    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), q)
    np.testing.assert_array_equal(stacked.dense()[1], q.dense())

    def loss(outliers):
        return jnp.sum(formats.matmul(x, dataclasses.replace(q, outliers=outliers)) ** 2)

    dense_gradient = 2 * x.T.astype(np.float64) @ (x @ expected.reshape(32, 6))
    np.testing.assert_allclose(
        jax.grad(loss)(beside.astype(jnp.float32)), dense_gradient.reshape(-1)[index], rtol=1e-4, atol=1e-2
    )


@pytest.mark.parametrize("format", ["int8", "int4", "fp8_e4m3", "nf4"])
def test_gradients_match_the_dense_formula(format):
    w, x = data((8, 6)), data((3, 8), 1)
    q = formats.Quantized.from_dense(w, format, block=(4, 1))
    weights = data((3, 6), 2)

    def loss(x, q):
        return jnp.sum(formats.matmul(x, q) * weights)

    dx, dq = jax.jit(jax.grad(loss, (0, 1), allow_int=True))(jnp.asarray(x), q)
    dense = np.asarray(q.dense(), np.float64)
    np.testing.assert_allclose(dx, weights @ dense.T, rtol=1e-5, atol=1e-5)
    steps = dense / np.repeat(np.asarray(q.scale, np.float64), 4, 0)
    expected = ((x.T @ weights) * steps).reshape(2, 4, 6).sum(1)
    # Sums of 4 terms of codes up to 128 (448 for the float grid) in float32.
    np.testing.assert_allclose(dq.scale, expected, rtol=1e-5, atol=1e-5 * quant.get_format(format).high + 1e-5)
    if jnp.issubdtype(q.codes.dtype, jnp.integer):
        assert dq.codes.dtype == jax.dtypes.float0
    else:
        assert not np.any(np.asarray(dq.codes, np.float32))


def test_scan_over_a_stack():
    w = data((3, 8, 8))
    x = jnp.asarray(data((2, 8), 1))
    stack = formats.Quantized.from_dense(w, "int4", block=(1, 4, 1), symmetric=False)

    @jax.jit
    def run(x, stack):
        return jax.lax.scan(lambda x, q: (jnp.tanh(formats.matmul(x, q)), q.shape[0] * jnp.ones(())), x, stack)[0]

    expected = np.asarray(x, np.float64)
    for layer in np.asarray(stack.dense(), np.float64):
        expected = np.tanh(expected @ layer)
    np.testing.assert_allclose(run(x, stack), expected, rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda x: jnp.sum(run(x, stack)))(x)
    assert np.all(np.isfinite(gradient))
    assert np.any(gradient)


def test_vmap_over_experts():
    w, x = data((3, 8, 6)), jnp.asarray(data((3, 2, 8), 1))
    stack = jax.vmap(lambda w: formats.Quantized.from_dense(w, "int4"))(w)
    assert stack.shape == (3, 8, 6)
    y = jax.vmap(formats.matmul)(x, stack)
    np.testing.assert_allclose(y, np.matmul(x, stack.dense()), rtol=1e-5, atol=1e-5)
    # The same stack as one operand: as jnp.matmul does.
    np.testing.assert_allclose(formats.matmul(x, stack), y, rtol=1e-5, atol=1e-5)


def test_donated():
    q = formats.Quantized.from_dense(data(), "int4")
    halved = jax.jit(lambda q: dataclasses.replace(q, scale=q.scale / 2), donate_argnums=0)(q)
    assert q.codes.is_deleted()
    assert halved.shape == (32, 6)


@pytest.mark.parametrize(
    ("spec", "scale_spec", "block"),
    [
        (P(None, "n"), P(None, "n"), (-1, 1)),
        (P("k", "n"), P(None, "n"), (-1, 1)),
        (P("k", "n"), P("k", "n"), (4, 1)),
    ],
)
def test_sharded_over_eight_devices(spec, scale_spec, block):
    mesh = jax.make_mesh((2, 4), ("k", "n"), axis_types=(AxisType.Auto,) * 2)
    w, x = data((16, 8)), jnp.asarray(data((3, 16), 1))
    q = formats.Quantized.from_dense(w, "int4", block=block, symmetric=False)
    shardings = dataclasses.replace(
        q, codes=NamedSharding(mesh, spec), **dict.fromkeys(("scale", "zero_point"), NamedSharding(mesh, scale_spec))
    )
    placed = jax.device_put(q, shardings)
    assert placed.codes.sharding.spec == spec
    replicated = NamedSharding(mesh, P())
    product = jax.jit(
        formats.matmul, in_shardings=(replicated, shardings), out_shardings=NamedSharding(mesh, P(None, "n"))
    )
    compiled = product.lower(x, placed).compile()
    np.testing.assert_allclose(
        compiled(jax.device_put(x, replicated), placed), np.asarray(x) @ np.asarray(q.dense()), rtol=1e-5, atol=1e-5
    )
    # Each device decodes its own shard: neither codes nor scales travel.
    assert "all-gather" not in compiled.as_text()
    dense = jax.jit(lambda q: q.dense(), out_shardings=NamedSharding(mesh, spec))(placed)
    assert_same_bits(dense, q.dense())


@pytest.mark.parametrize(
    ("format", "block"), [("int8", (1, -1)), ("int4", (8, 2)), ("int2", (1, -1)), ("nf4", (8, 2)), ("fp4_e2m1", (1, 1))]
)
def test_take_decodes_rows(format, block):
    q = formats.Quantized.from_dense(data(), format, block=block)
    indices = np.int32([[0, 31, 5], [-1, 17, -32]])
    assert_same_bits(q.take(indices), np.asarray(q.dense())[indices])
    assert np.all(np.isnan(jax.jit(q.take)(np.int32([32, -33]))))


def test_take_of_a_stored_zero_point_and_half_precision():
    q = formats.Quantized.from_dense(jnp.asarray(data(), jnp.bfloat16), "int4", block=(8, 1), symmetric=False)
    assert_same_bits(q.take(jnp.int32(9)), q.dense()[9])


def test_stochastic_rounding_needs_a_key():
    with pytest.raises(ValueError, match="rng="):
        formats.Quantized.from_dense(data(), "int4", rounding="stochastic")
    q = formats.Quantized.from_dense(data(), "int4", rounding="stochastic", rng=jax.random.key(0))
    assert np.max(np.abs(q.dense() - data()) / np.asarray(q.scale)) < 1.001


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: formats.Quantized.from_dense(data(), "int44"), "did you mean 'int4'"),
        (lambda: formats.Quantized.from_dense(data(), "int4", block=(5, 1)), "axis 0 of size 32"),
        (lambda: formats.Quantized.from_codes(np.zeros((4, 3)), np.ones((3, 3)), None, "int8"), r"\(3, 3\).*\(4, 3\)"),
        (lambda: formats.Quantized.from_codes(np.zeros((4, 3)), np.ones((3,)), None, "int8"), r"\(3,\).*\(4, 3\)"),
        (
            lambda: formats.Quantized.from_codes(np.zeros((4, 3)), np.ones((1, 3)), np.ones((2, 3)), "int8"),
            r"\(2, 3\).*\(1, 3\)",
        ),
        (
            lambda: formats.Quantized.from_codes(np.zeros((4, 3)), np.ones((1, 3)), None, "int8", outliers=np.ones(2)),
            "belong together",
        ),
        (
            lambda: formats.matmul(jnp.ones((2, 16)), formats.Quantized.from_dense(data(), "int4")),
            r"\(2, 16\).*\(32, 6\)",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
