"""Scales and zero points against float64 definitions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard import quant

TINY = float(np.sqrt(np.finfo(np.float32).tiny))


def data(shape=(8, 6), seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def blocks(x, counts):
    """Float64 blocks by explicit slicing: {index of the block: its entries}."""
    sizes = [n // c for n, c in zip(x.shape, counts, strict=True)]
    return {
        index: x[tuple(slice(i * b, (i + 1) * b) for i, b in zip(index, sizes, strict=True))].astype(np.float64)
        for index in itertools.product(*map(range, counts))
    }


def per_block(fn, x, counts):
    out = np.empty(counts)
    for index, values in blocks(x, counts).items():
        out[index] = fn(values)
    return out


@pytest.mark.parametrize(
    ("shape", "block", "counts"),
    [
        ((8, 6), None, (1, 6)),
        ((8, 6), (-1, -1), (1, 1)),
        ((8, 6), (4, 1), (2, 6)),
        ((8, 6), (2, 3), (4, 2)),
        ((3, 3, 2, 4), None, (1, 1, 1, 4)),
        ((2, 8, 6), (1, -1, 1), (2, 1, 6)),
        ((5,), None, (1,)),
        ((1, 1), None, (1, 1)),
    ],
)
def test_range_and_blocks(shape, block, counts):
    x = data(shape)
    scale, zero_point = quant.calibrate(x, "int8", block=block)
    assert zero_point is None
    assert scale.dtype == jnp.float32
    assert scale.shape == counts
    # The quotient is rounded once: it is the float32 nearest to the float64 one.
    expected = np.float32(per_block(lambda b: np.abs(b).max() / 127.5, x, counts))
    np.testing.assert_array_equal(scale, expected)


@pytest.mark.parametrize(
    ("name", "edge", "largest"),
    [
        ("int4", 7.5, 7),
        ("int2", 1.5, 1),
        ("fp8_e4m3", 448, 448),
        ("fp4_e2m1", 6, 6),
        ("nf4", 1, 1),
    ],
)
def test_divisors(name, edge, largest):
    x = np.float32([[3.0], [-2.0]])
    np.testing.assert_array_equal(quant.calibrate(x, name).scale, np.float32([[3 / edge]]))
    np.testing.assert_array_equal(quant.calibrate(x, name, bound="max").scale, np.float32([[3 / largest]]))


def test_scalar():
    scale, _ = quant.calibrate(jnp.float32(-2), "int4", bound="max")
    assert scale.shape == ()
    np.testing.assert_array_equal(scale, np.float32(2 / 7))


def test_rms_and_percentile():
    x = data((16, 6))
    scale = quant.calibrate(x, "int4", method="rms", factor=2.5, block=(8, 2)).scale
    expected = per_block(lambda b: 2.5 * np.sqrt(np.mean(b**2)) / 7.5, x, (2, 3))
    np.testing.assert_allclose(scale, expected, rtol=1e-6)  # float32 sums of 16 terms
    scale = quant.calibrate(x, "int4", method="percentile", q=90.0, block=(8, 2)).scale
    expected = per_block(lambda b: np.percentile(np.abs(b), 90) / 7.5, x, (2, 3))
    np.testing.assert_allclose(scale, expected, rtol=1e-6)


def test_percentile_ignores_an_outlier_in_a_thousand():
    x = np.append(np.linspace(-1, 1, 2000), 100).astype(np.float32)
    scale = quant.calibrate(x, "int8", method="percentile").scale
    # Of 2001 sorted |x| the 99.9-th percentile lies at position 1998, below the outlier at 2000.
    np.testing.assert_allclose(scale, np.percentile(np.abs(x.astype(np.float64)), 99.9) / 127.5, rtol=1e-6)
    assert float(scale[0]) < 1.01 / 127.5


def brute_force_mse(block, p=2.4, steps=80, shrink=0.01):
    best, best_scale = np.inf, None
    for i in range(steps):
        scale = np.abs(block).max() * (1 - i * shrink) / 7.5
        decoded = np.clip(np.rint(block / scale), -8, 7) * scale
        error = np.mean(np.abs(decoded - block) ** p)
        if error < best:
            best, best_scale = error, scale
    return best_scale, best


def test_mse_finds_the_best_candidate():
    x = data((64, 3))
    scale = quant.calibrate(x, "int4", method="mse").scale
    for column in range(3):
        block = x[:, column].astype(np.float64)
        expected, error = brute_force_mse(block)
        mine = np.mean(
            np.abs(np.clip(np.rint(block / float(scale[0, column])), -8, 7) * float(scale[0, column]) - block) ** 2.4
        )
        # Float32 errors may order two nearly equal candidates differently, but not by more than their rounding.
        assert mine <= error * (1 + 1e-4)
        assert abs(float(scale[0, column]) / expected - 1) < 0.02
    assert np.all(np.asarray(scale) <= np.asarray(quant.calibrate(x, "int4").scale))


def test_mse_keeps_the_largest_on_ties():
    # All candidates decode zeros exactly; the empty range then has scale 1 for each of them.
    np.testing.assert_array_equal(quant.calibrate(np.zeros((4, 2), np.float32), "int4", method="mse").scale, [[1, 1]])
    # On {-1.5, 1.5} with q = 1.5 the first candidate (scale 1) rounds to +-2, clipped to {-2, 1}: error 0.5^p each.
    # p = 1 makes every candidate above 1/2 in scale an error of at least that, and ties go to the first.
    x = np.float32([[1.5], [-1.5]])
    scale = quant.calibrate(x, "int2", method="mse", p=1.0, steps=2, shrink=0.0).scale
    np.testing.assert_array_equal(scale, [[1.0]])


@settings(max_examples=30, deadline=None)
@given(st.sampled_from([2, 5, 8]), st.integers(0, 2**31), st.floats(-3, 3))
def test_asymmetric_range_represents_zero_exactly(bits, seed, shift):
    x = data((8, 3), seed) + np.float32(shift)
    name, low, high = f"int{bits}", -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale, zero_point = quant.calibrate(x, name, symmetric=False)
    assert zero_point.dtype == jnp.int8
    mn, mx = np.minimum(x.min(0), 0).astype(np.float64), np.maximum(x.max(0), 0).astype(np.float64)
    np.testing.assert_allclose(scale[0], (mx - mn) / (2**bits - 1), rtol=3e-7)  # two float32 roundings
    expected = np.clip(np.rint(low - mn / np.asarray(scale[0], np.float64)), low, high)
    assert np.all(np.abs(np.asarray(zero_point[0]) - expected) <= (np.abs(low - mn / scale[0]) % 1 > 0.499))
    zeros = np.zeros_like(x)
    np.testing.assert_array_equal(quant.fake_quantize(zeros, name, scale, zero_point), zeros)


def test_asymmetric_percentile_is_two_sided():
    x = np.linspace(-1, 3, 1001, dtype=np.float32)
    scale, _ = quant.calibrate(x, "int8", symmetric=False, method="percentile", q=90.0)
    expected = (np.percentile(x, 90) - np.percentile(x, 10)) / 255
    np.testing.assert_allclose(scale, [expected], rtol=1e-5)


def test_asymmetric_range_of_positive_values_starts_at_zero():
    scale, zero_point = quant.calibrate(np.float32([[1.0], [5.1]]), "int8", symmetric=False)
    np.testing.assert_allclose(scale, [[5.1 / 255]], rtol=1e-6)
    np.testing.assert_array_equal(zero_point, [[-128]])


@pytest.mark.parametrize("symmetric", [True, False])
def test_empty_range_has_scale_one(symmetric):
    x = np.zeros((4, 3), np.float32)
    x[:, 1] = TINY / 10
    x[:, 2] = TINY * 1000
    scale, _ = quant.calibrate(x, "int4", symmetric=symmetric)
    np.testing.assert_array_equal(np.asarray(scale)[0, :2], [1, 1])
    assert 0 < float(scale[0, 2]) < 1e-15
    assert np.all(np.isfinite(np.asarray(quant.fake_quantize(x, "int4", scale))))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-6, 1e6))
def test_power_of_two_rounds_up(seed, size):
    x = data((4, 3), seed) * np.float32(size)
    plain, power = quant.calibrate(x, "int4").scale, quant.calibrate(x, "int4", power_of_two=True).scale
    np.testing.assert_array_equal(power, 2.0 ** np.ceil(np.log2(np.asarray(plain, np.float64))))


def test_power_of_two_keeps_exact_powers():
    powers = 2.0 ** np.arange(-60, 60)
    scale = quant.calibrate(np.float32(7 * powers)[None], "int4", bound="max", power_of_two=True).scale
    np.testing.assert_array_equal(scale[0], powers)


def test_power_of_two_moves_the_zero_point_too():
    x = np.float32([[-1.0], [2.2]])
    scale, zero_point = quant.calibrate(x, "int4", symmetric=False, power_of_two=True)
    np.testing.assert_array_equal(scale, [[0.25]])  # 3.2 / 15 = 0.213
    np.testing.assert_array_equal(zero_point, [[-8 + 4]])


def test_max_bound_is_idempotent():
    x = data((32, 4))
    scale, _ = quant.calibrate(x, "int4", bound="max")
    once = quant.fake_quantize(x, "int4", scale)
    again, _ = quant.calibrate(once, "int4", bound="max")
    np.testing.assert_allclose(again, scale, rtol=2e-7)
    np.testing.assert_allclose(quant.fake_quantize(once, "int4", again), once, rtol=5e-7)


@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"method": "mse", "steps": 9}, {"power_of_two": True}])
def test_same_under_jit_and_vmap(options):
    x = jnp.asarray(data((3, 8, 6)))

    def apply(x):
        return quant.calibrate(x, "int4", block=(4, 1), **options)

    eager, jitted = apply(x[0]), jax.jit(apply)(x[0])
    batched = jax.vmap(apply)(x)
    # Bits for the extrema; the mean inside the search may be summed in another order.
    compare = np.testing.assert_array_equal if options.get("method") != "mse" else np.testing.assert_allclose
    jax.tree.map(compare, eager, jitted)
    jax.tree.map(compare, eager, jax.tree.map(lambda a: a[0], batched))


def test_scale_is_float32_for_other_dtypes():
    x = jnp.asarray(data()).astype(jnp.bfloat16)
    scale, _ = quant.calibrate(x, "int8")
    assert scale.dtype == jnp.float32
    np.testing.assert_array_equal(scale, quant.calibrate(x.astype(jnp.float32), "int8").scale)
    with jax.enable_x64(True):
        assert quant.calibrate(jnp.asarray(data(), jnp.float64), "int8").scale.dtype == jnp.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "int1"}, "int2"),
        ({"format": "nf5"}, "did you mean 'nf4'"),
        ({"method": "entropi"}, "range, rms, percentile, mse"),
        ({"method": "percentil"}, "did you mean 'percentile'"),
        ({"bound": "edges"}, "did you mean 'edge'"),
        ({"format": "fp8_e4m3", "symmetric": False}, "zero point"),
        ({"format": "nf4", "symmetric": False}, "zero point"),
        ({"symmetric": False, "method": "mse"}, "range and percentile"),
        ({"method": "rms"}, "factor="),
        ({"method": "mse", "step": 3}, "did you mean 'steps'"),
        ({"method": "mse", "steps": 0}, "steps=0"),
        ({"method": "percentile", "q": 101.0}, "q=101"),
        ({"factor": 3.0}, "no options"),
        ({"block": (3, 1)}, r"block entry 3 does not divide axis 0 of size 8; the nearest divisors are 2 and 4"),
        ({"block": (0, 1)}, "axis 0"),
        ({"block": (1,)}, "1 entries"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        quant.calibrate(data(), **{"format": "int4", **arguments})
