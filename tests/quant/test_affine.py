"""Encoding and decoding against NumPy: float64 definitions, NumPy's own small floats, exact cases."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard import quant

INTEGERS = ("int2", "int3", "int4", "int5", "int6", "int7", "int8")
FLOATS = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}


def data(shape=(8, 6), seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def bits_of(x):
    return np.asarray(x).view(f"u{np.asarray(x).dtype.itemsize}")


def integer_codes(x, bits, scale, zero=0):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return np.clip(np.rint(x.astype(np.float64) / scale.astype(np.float64) + zero), low, high)


@pytest.mark.parametrize("name", INTEGERS)
def test_integer_codes_match_float64(name):
    x, scale = data(), np.float32([[0.3, 0.1, 0.7, 1.0, 0.05, 2.0]])
    codes = quant.encode(x, name, scale)
    assert codes.dtype == jnp.int8
    np.testing.assert_array_equal(codes, integer_codes(x, int(name[3:]), scale))


def test_rounds_half_to_even_and_divides_exactly():
    # 0.1f * (c + 1/2) / 0.1f is c + 1/2 again when the quotient is rounded once: the product with the rounded
    # reciprocal misses some of these ties. A power-of-two scale makes all of them exact.
    halves = np.arange(-4, 4) + 0.5
    np.testing.assert_array_equal(quant.encode(np.float32(halves / 8), "int4", np.float32(1 / 8)), np.rint(halves))
    scale = np.float32([[0.1, 0.3, 0.7]])
    x = data((4096, 3)) * 3
    expected = np.clip(np.rint(x / scale), -128, 127)  # IEEE float32 division
    np.testing.assert_array_equal(quant.encode(x, "int8", scale), expected)
    np.testing.assert_array_equal(jax.jit(lambda x, s: quant.encode(x, "int8", s))(x, scale), expected)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["int2", "int5", "int8"]), st.integers(0, 2**31), st.floats(1e-3, 1e3))
def test_decode_inverts_encode_on_grid_points(name, seed, size):
    grid = quant.get_format(name)
    rng = np.random.default_rng(seed)
    codes = rng.integers(int(grid.low), int(grid.high) + 1, (4, 3)).astype(np.int8)
    scale = np.float32(size * rng.uniform(0.5, 1, (1, 3)))
    zero = rng.integers(int(grid.low), int(grid.high) + 1, (1, 3)).astype(np.int8)
    for zero_point in (None, zero):
        values = quant.decode(codes, name, scale, zero_point)
        np.testing.assert_array_equal(quant.encode(values, name, scale, zero_point), codes)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["int2", "int5", "int8"]), st.integers(0, 2**31))
def test_error_is_half_a_step_inside_the_range(name, seed):
    x = data((6, 4), seed)
    scale, zero_point = quant.calibrate(x, name, symmetric=False)
    error = np.abs(np.asarray(quant.fake_quantize(x, name, scale, zero_point)) - x)
    # Half a step, and as much again at the ends of the range, which the rounding of the zero point moves.
    assert np.all(error <= np.asarray(scale) * 1.0001)
    inner = np.abs(x - x.mean(0)) < 0.3 * (x.max(0) - x.min(0))
    inner &= (x > x.min(0) + scale) & (x < x.max(0) - scale)
    assert np.all((error <= np.asarray(scale) * 0.5001)[inner])


def test_expands_blocks_on_every_axis():
    codes = np.arange(24, dtype=np.int8).reshape(4, 6)
    scale = np.float32([[1, 2, 3], [4, 5, 6]])
    expected = codes * np.repeat(np.repeat(scale, 2, 0), 2, 1)
    np.testing.assert_array_equal(quant.decode(codes, "int8", scale), expected)
    np.testing.assert_array_equal(jax.jit(lambda c, s: quant.decode(c, "int8", s))(codes, scale), expected)
    stacked = jax.vmap(lambda c, s: quant.decode(c, "int8", s))(np.stack([codes, codes]), np.stack([scale, 2 * scale]))
    np.testing.assert_array_equal(stacked, np.stack([expected, 2 * expected]))


@pytest.mark.parametrize("name", FLOATS)
def test_float_grids_match_numpy_and_saturate(name):
    high = quant.get_format(name).high
    assert high == {"fp8_e4m3": 448, "fp8_e5m2": 57344, "fp4_e2m1": 6}[name]
    x = np.concatenate([data((500,)) * high / 3, np.float32([0, 1e6, -1e6, high, -high])])
    codes = quant.encode(x, name, np.float32(1))
    expected = np.clip(x, -high, high).astype(FLOATS[name])
    np.testing.assert_array_equal(bits_of(codes), bits_of(expected))
    assert np.all(np.isfinite(np.asarray(codes, np.float32)))


@pytest.mark.parametrize("name", FLOATS)
def test_float_grids_store_negative_zero_as_zero(name):
    codes = quant.encode(np.float32([-0.0, 0.0]), name, np.float32(0.3))
    np.testing.assert_array_equal(bits_of(codes), [0, 0])


def test_nf4_takes_the_nearest_level():
    levels = np.asarray(quant.NF4_LEVELS)
    x = np.float32(np.random.default_rng(0).uniform(-1.2, 1.2, 400))
    codes = quant.encode(x, "nf4", np.float32(1))
    assert codes.dtype == jnp.uint8
    np.testing.assert_array_equal(codes, np.argmin(np.abs(x[:, None].astype(np.float64) - levels), axis=1))
    np.testing.assert_array_equal(quant.encode(np.float32(levels * 2), "nf4", np.float32(2)), np.arange(16))
    np.testing.assert_array_equal(
        quant.decode(np.arange(16, dtype=np.uint8), "nf4", np.float32(2)), np.float32(levels) * 2
    )


def test_stochastic_rounding_is_unbiased_and_exact_on_the_grid():
    x = jnp.full((20_000,), 0.3)
    codes = quant.encode(x, "int4", jnp.float32(1), rounding="stochastic", rng=jax.random.key(0))
    assert set(np.unique(codes)) == {0, 1}
    # The mean of 20 000 Bernoulli(0.3) has deviation sqrt(0.21 / 20000) = 0.0033; five of them.
    assert abs(float(jnp.mean(codes.astype(jnp.float32))) - 0.3) < 0.017
    grid = jnp.arange(-8.0, 8.0)
    codes = quant.encode(grid / 4, "int4", jnp.float32(0.25), rounding="stochastic", rng=jax.random.key(1))
    np.testing.assert_array_equal(codes, grid)


def test_clipped_gradient_hand_case():
    # int2 with scale 1 and zero point 1: x + 1 must lie in [-2, 1], so x in [-3, 0].
    x = jnp.array([-3.5, -3.0, -1.2, 0.0, 0.4])
    zero = jnp.int8(1)

    def loss(x, gradient):
        return jnp.sum(quant.fake_quantize(x, "int2", jnp.float32(1), zero, gradient=gradient) * jnp.arange(1.0, 6.0))

    np.testing.assert_array_equal(jax.grad(loss)(x, "clipped"), [0, 2, 3, 4, 0])
    np.testing.assert_array_equal(jax.grad(loss)(x, "identity"), [1, 2, 3, 4, 5])


def test_clipped_gradient_of_float_and_level_grids():
    x = jnp.array([-449.0, -448.0, 3.0, 448.0, 449.0])
    gradient = jax.grad(lambda x: jnp.sum(quant.fake_quantize(x, "fp8_e4m3", jnp.float32(1))))(x)
    np.testing.assert_array_equal(gradient, [0, 1, 1, 1, 0])
    gradient = jax.grad(lambda x: jnp.sum(quant.fake_quantize(x, "nf4", jnp.float32(448))))(x)
    np.testing.assert_array_equal(gradient, [0, 1, 1, 1, 0])


def test_scale_gets_no_gradient():
    x = jnp.asarray(data())
    gradient = jax.grad(lambda s: jnp.sum(quant.fake_quantize(x, "int4", s) ** 2))(jnp.full((1, 6), 0.2))
    np.testing.assert_array_equal(gradient, np.zeros((1, 6)))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("int8", "float32"), ("fp8_e4m3", "float32"), ("nf4", "bfloat16"), ("int4", "bfloat16")],
)
def test_fake_quantize_is_the_same_under_jit_and_keeps_dtype(name, dtype):
    x = jnp.asarray(data((16, 6))).astype(dtype)

    def apply(x):
        return quant.fake_quantize(x, name, *quant.calibrate(x, name, block=(4, 1)))

    eager, jitted = apply(x), jax.jit(apply)(x)
    assert eager.dtype == x.dtype
    np.testing.assert_array_equal(bits_of(eager), bits_of(jitted))
    np.testing.assert_array_equal(jax.vmap(apply)(jnp.stack([x, 2 * x]))[0], eager)


def test_scalar_x64_and_forward_mode():
    # A step of 0.5: 0.3 is nearest to 0.5.
    assert float(quant.fake_quantize(jnp.float32(0.3), "int8", jnp.float32(0.5))) == 0.5
    np.testing.assert_array_equal(quant.encode(0.26, "int8", 0.5), 1)
    with jax.enable_x64(True):
        x = jnp.asarray(data(dtype=np.float64))
        y = quant.fake_quantize(x, "int8", jnp.full((1, 6), 0.1))
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, np.rint(np.asarray(x) / 0.1) * 0.1, rtol=1e-15)
    _, tangent = jax.jvp(lambda x: quant.fake_quantize(x, "int8", jnp.float32(1)), (jnp.ones(3),), (jnp.full(3, 2.0),))
    np.testing.assert_array_equal(tangent, [2, 2, 2])


def test_round_ste():
    x = jnp.array([0.5, 1.5, -0.7])
    np.testing.assert_array_equal(quant.round_ste(x), [0, 2, -1])
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(quant.round_ste(x) * x))(x), quant.round_ste(x) + x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, s: quant.encode(x, "int44", s), "did you mean 'int4'"),
        (lambda x, s: quant.encode(x, "fp8_e4m3fn", s), "did you mean 'fp8_e4m3'"),
        (lambda x, s: quant.encode(x, "int9", s), "int8"),
        (lambda x, s: quant.encode(x, "nf4", s, jnp.int8(0)), "zero point"),
        (lambda x, s: quant.decode(x, "fp8_e5m2", s, jnp.int8(0)), "zero point"),
        (lambda x, s: quant.encode(x, "int4", s, rounding="stochastik"), "did you mean 'stochastic'"),
        (lambda x, s: quant.encode(x, "int4", s, rounding="stochastic"), "rng="),
        (lambda x, s: quant.encode(x, "nf4", s, rounding="stochastic", rng=jax.random.key(0)), "integer format"),
        (lambda x, s: quant.fake_quantize(x, "int4", s, gradient="clip"), "did you mean 'clipped'"),
        (lambda x, s: quant.encode(x, "int4", jnp.ones((3, 6))), r"\(3, 6\).*\(8, 6\)"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(jnp.asarray(data()), jnp.ones((1, 6)))
