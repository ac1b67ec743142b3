"""The product with integer weights against NumPy float64, and the packing against bytes made by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard_kernels import quant_matmul


def operands(bits, groups=1, zero=False, rows=16, columns=6, batch=(3,), seed=0):
    rng = np.random.default_rng(seed)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = rng.integers(low, high, (rows, columns)).astype(np.int8)
    scale = rng.uniform(0.1, 1, (groups, columns)).astype(np.float32)
    zero_point = rng.integers(low, high, (groups, columns)).astype(np.int8) if zero else None
    x = rng.normal(size=(*batch, rows)).astype(np.float32)
    dense = codes.astype(np.float64) - (0 if zero_point is None else np.repeat(zero_point, rows // groups, 0))
    dense = dense * np.repeat(scale, rows // groups, 0)
    stored = codes if bits == 8 else quant_matmul.pack(codes, bits)
    return x, stored, scale, zero_point, dense


# Float32 sums of 16 products of size 1: 16 roundings of 6e-8, against values of size 10.
CLOSE = {"rtol": 2e-6, "atol": 2e-5}


def test_bytes_by_hand():
    codes = np.int8([[1], [-1], [-8], [7]])
    np.testing.assert_array_equal(quant_matmul.pack(codes, 4), np.uint8([[1 + 16 * 15], [8 + 16 * 7]]))
    codes = np.int8([[1], [-1], [-2], [0]])
    np.testing.assert_array_equal(quant_matmul.pack(codes, 2), np.uint8([[1 + 4 * 3 + 16 * 2 + 64 * 0]]))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([(1, -2, 2), (2, 0, 2), (4, -2, 1), (4, 1, 0), (8, -1, 2)]), st.booleans(), st.integers(0, 2**31)
)
def test_unpack_inverts_pack(layout, signed, seed):
    bits, axis, bytes_ = layout
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1)) if signed else (0, 2**bits)
    shape = [3, 2]
    shape[axis] = bytes_ * (8 // bits)
    codes = np.random.default_rng(seed).integers(low, high, shape)
    packed = quant_matmul.pack(jnp.asarray(codes), bits, axis)
    assert packed.dtype == jnp.uint8
    assert packed.shape[axis] == bytes_
    unpacked = quant_matmul.unpack(packed, bits, axis, signed=signed)
    assert unpacked.dtype == (jnp.int8 if signed else jnp.uint8)
    np.testing.assert_array_equal(unpacked, codes)


def test_order_is_that_of_native_int4():
    # A byte viewed as two int4 gives the lower half first: packed weights need no repacking on a TPU.
    codes = np.random.default_rng(0).integers(-8, 8, (8, 3)).astype(np.int8)
    pairs = jax.lax.bitcast_convert_type(quant_matmul.pack(codes, 4), jnp.int4).astype(jnp.int8)
    np.testing.assert_array_equal(jnp.moveaxis(pairs, -1, 1).reshape(8, 3), codes)


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("zero", [False, True])
def test_matches_float64(bits, groups, zero):
    x, codes, scale, zero_point, dense = operands(bits, groups, zero)
    y = quant_matmul.quant_matmul(x, codes, scale, zero_point, bits=bits)
    np.testing.assert_allclose(y, x @ dense, **CLOSE)


@pytest.mark.parametrize("batch", [(), (1,), (2, 3)])
def test_leading_axes_and_a_named_backend(batch):
    x, codes, scale, _, dense = operands(4, batch=batch)
    y = jax.jit(lambda x: quant_matmul.quant_matmul(x, codes, scale, bits=4, backend="reference"))(x)
    assert y.shape == (*batch, 6)
    np.testing.assert_allclose(y, x @ dense, **CLOSE)


def test_dtypes():
    x, codes, scale, _, dense = operands(4)
    for dtype, expected in (
        ("bfloat16", "bfloat16"),
        ("float16", "float16"),
        ("float32", "float32"),
        ("int32", "float32"),
    ):
        assert quant_matmul.quant_matmul(jnp.ones((2, 16), dtype), codes, scale, bits=4).dtype == expected
    assert quant_matmul.quant_matmul(x, codes, scale.astype(jnp.bfloat16), bits=4).dtype == "float32"
    y = quant_matmul.quant_matmul(jnp.asarray(x, jnp.bfloat16), codes, scale, bits=4)
    exact = np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) @ dense
    # Rounded once, at the end: half a unit of bfloat16's 8 bits, and the float32 sum.
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8, atol=2e-5)


def test_accumulates_in_float32():
    x, codes, scale = jnp.ones((1, 1024), jnp.bfloat16), np.ones((1024, 1), np.int8), np.ones((1, 1), np.float32)
    # A bfloat16 sum of ones stops at 256.
    assert float(quant_matmul.quant_matmul(x, codes, scale, bits=8)[0, 0]) == 1024


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("zero", [False, True])
def test_gradients_in_x_and_scale(bits, zero):
    x, codes, scale, zero_point, dense = operands(bits, 2, zero)
    weights = np.random.default_rng(9).normal(size=(3, 6))

    def loss(x, scale):
        return jnp.sum(quant_matmul.quant_matmul(x, codes, scale, zero_point, bits=bits) * weights)

    dx, dscale = jax.jit(jax.grad(loss, (0, 1)))(x, scale)
    np.testing.assert_allclose(dx, weights @ dense.T, **CLOSE)
    steps = dense / np.repeat(scale, 8, 0)
    np.testing.assert_allclose(
        dscale, ((x.T @ weights) * steps).reshape(2, 8, 6).sum(1), rtol=2e-5, atol=2e-4 * 2**bits / 16
    )


def test_float_zero_point_has_a_gradient_and_integers_have_none():
    x, codes, scale, zero_point, _ = operands(4, 2, True)

    def loss(codes, zero_point):
        return jnp.sum(quant_matmul.quant_matmul(x, codes, scale, zero_point, bits=4))

    dcodes, dzero = jax.grad(loss, (0, 1), allow_int=True)(codes, zero_point.astype(np.float32))
    assert dcodes.dtype == jax.dtypes.float0
    expected = -(scale * x.sum(0).reshape(2, 8, 1).sum(1))
    np.testing.assert_allclose(dzero, expected, **CLOSE)
    assert jax.grad(loss, 1, allow_int=True)(codes, zero_point).dtype == jax.dtypes.float0


def test_backward_keeps_no_decoded_weight():
    x, codes, scale, _, _ = operands(2, rows=64, columns=64)
    _, pullback = jax.vjp(lambda x: quant_matmul.quant_matmul(x, codes, scale, bits=2), x)
    assert max(leaf.nbytes for leaf in jax.tree.leaves(pullback)) <= 64 * 64 // 4


def test_vmap_over_a_stack():
    stacks = [operands(4, seed=seed) for seed in range(3)]
    x, codes, scale = (np.stack([np.asarray(s[i]) for s in stacks]) for i in range(3))
    y = jax.vmap(lambda x, c, s: quant_matmul.quant_matmul(x, c, s, bits=4))(x, codes, scale)
    for i, stack in enumerate(stacks):
        np.testing.assert_allclose(y[i], x[i] @ stack[4], **CLOSE)


def test_planes_of_three_bits():
    # code = low + 4 * high with low in {0..3} (stored less 4 * its own sign bit) and high in {-1, 0}.
    rng = np.random.default_rng(0)
    codes = rng.integers(-4, 4, (16, 6))
    low, high = codes & 3, codes >> 2
    x, scale = rng.normal(size=(3, 16)).astype(np.float32), np.full((1, 6), 0.5, np.float32)
    product = [
        quant_matmul.quant_matmul(x, quant_matmul.pack(jnp.asarray(plane), 2), scale, zero, bits=2)
        for plane, zero in ((low - 2, np.full((1, 6), -2, np.int8)), (high, None))
    ]
    np.testing.assert_allclose(product[0] + 4 * product[1], x @ (codes * 0.5), rtol=1e-5, atol=1e-5)


def test_division_is_rounded_once():
    x = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)
    scale = np.random.default_rng(1).uniform(0.1, 2, (1, 6)).astype(np.float32)
    for divide in (
        quant_matmul.divide,
        jax.jit(quant_matmul.divide),
        lambda x, _: jax.jit(lambda x: quant_matmul.divide(x, scale))(x),
    ):
        np.testing.assert_array_equal(divide(x, scale), x / scale)
    np.testing.assert_array_equal(jax.jit(lambda x: quant_matmul.divide(x, 127.5))(x), x / np.float32(127.5))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, "bits=3 is not one of 8, 4, 2"),
        ({"bits": 8}, "must be int8"),
        ({"backend": "tpu"}, "built: auto, reference"),
        ({"backend": "autoo"}, "did you mean 'auto'"),
        ({"x": np.ones((3, 8), np.float32)}, r"\(3, 8\).*\(8, 6\).*16 rows"),
        ({"scale": np.ones((3, 6), np.float32)}, r"\(3, 6\).*\(16, 6\)"),
        ({"scale": np.ones((6,), np.float32)}, r"\(6,\).*\(16, 6\)"),
        ({"zero_point": np.ones((2, 6), np.int8)}, r"\(2, 6\).*\(1, 6\)"),
    ],
)
def test_errors(change, message):
    x, codes, scale, zero_point, _ = operands(4)
    arguments = {"x": x, "codes": codes, "scale": scale, "zero_point": zero_point, "bits": 4, **change}
    with pytest.raises(ValueError, match=message):
        quant_matmul.quant_matmul(**arguments)


def test_packing_errors():
    with pytest.raises(ValueError, match="not a multiple of 2"):
        quant_matmul.pack(jnp.zeros((3, 2), jnp.int8), 4)
    with pytest.raises(ValueError, match="bits=3"):
        quant_matmul.pack(jnp.zeros((3, 2), jnp.int8), 3)
    with pytest.raises(ValueError, match="axis=-2"):
        quant_matmul.unpack(jnp.zeros((3,), jnp.uint8), 4)
