"""Quantized collectives against NumPy loops, on eight devices, with the bytes counted in the compiled program."""

import functools

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from launch import hlo
from steelyard import aggregate

P = jax.sharding.PartitionSpec
DEVICES = 8
# One rounding of the scale, one of the product.
ULP = 2.0**-23


@functools.cache
def mesh(*shape):
    axes = ("device",) if len(shape) == 1 else ("node", "device")
    return jax.make_mesh(shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))


def on_devices(fn, *shape):
    """`fn` of each device's rows of the input; the results one after the other."""
    where = mesh(*(shape or (DEVICES,)))
    return jax.jit(jax.shard_map(fn, mesh=where, in_specs=P(where.axis_names), out_specs=P(where.axis_names)))


def moved(fn, x, *shape):
    return hlo.collective_bytes(on_devices(fn, *shape).lower(x).compile().as_text())


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def blocks_by_hand(x, bits, block_size):
    """Codes and scales with loops, in float32 like the definition."""
    flat, top = np.asarray(x, np.float32).ravel(), np.float32(2 ** (bits - 1) - 1)
    codes, scales = [], []
    for start in range(0, flat.size, block_size):
        block = np.zeros(block_size, np.float32)
        block[: flat[start : start + block_size].size] = flat[start : start + block_size]
        scale = np.abs(block).max() / top or np.float32(1)
        codes.append([int(np.rint(entry / scale)) for entry in block])
        scales.append(scale)
    return np.array(codes), np.array(scales)


def round_trip(x, bits, block_size):
    """What arrives of x, in float64."""
    codes, scales = blocks_by_hand(x, bits, block_size)
    return (codes * scales[:, None].astype(np.float64)).ravel()[: np.size(x)].reshape(np.shape(x))


# Blocks.


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("shape", "block_size"), [((4, 6), 8), ((5, 7), 16), ((3,), 256), ((), 2), ((10, 3), 1)])
def test_codes_and_scales_are_those_by_hand(shape, block_size, bits):
    x = normal(*shape) * 100
    codes, scales = aggregate.block_quantize(x, bits=bits, block_size=block_size)
    expected = blocks_by_hand(x, bits, block_size)
    np.testing.assert_array_equal(codes, expected[0])
    np.testing.assert_array_equal(scales, expected[1])
    assert (codes.dtype, scales.dtype) == (jnp.int8, jnp.float32)
    values = aggregate.block_dequantize(codes, scales, shape)
    np.testing.assert_allclose(values, round_trip(x, bits, block_size), rtol=ULP)


FLOATS = hypothesis.extra.numpy.arrays(
    np.float32, (24,), elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)
)


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(x=FLOATS, bits=st.sampled_from([4, 8]))
def test_the_error_is_at_most_half_a_step(x, bits):
    codes, scales = aggregate.block_quantize(x, bits=bits, block_size=8)
    error = np.abs(np.float64(x) - np.asarray(aggregate.block_dequantize(codes, scales, x.shape), np.float64))
    assert np.abs(codes).max() < 2 ** (bits - 1)
    # Half a step, and a rounding of the quotient, up to 127 steps, and of the product.
    step = np.repeat(np.asarray(scales, np.float64), 8)
    largest = np.repeat(np.abs(x).reshape(-1, 8).max(axis=1), 8)
    is_zero = largest < 2e-19 * 2 ** (bits - 1)
    assert np.all((error <= step / 2 + 2 * ULP * largest) | (is_zero & (error == np.abs(x))))


@pytest.mark.parametrize("bits", [4, 8])
def test_a_block_of_equal_magnitudes_is_exact(bits):
    x = normal(16, 1) * np.array([1, -1, -1, 1], np.float32)
    values = aggregate.block_dequantize(*aggregate.block_quantize(x, bits=bits, block_size=4), x.shape)
    np.testing.assert_allclose(values, x, rtol=ULP)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_entry_spoils_its_block_alone(bad):
    x = normal(4, 8)
    x[1, 3] = bad
    values = aggregate.block_dequantize(*aggregate.block_quantize(x, block_size=8), x.shape)
    assert np.all(np.isnan(values[1]))
    assert np.all(np.isfinite(values[np.array([0, 2, 3])]))


def test_zeros_and_nothing():
    for shape in ((3, 5), (0, 4)):
        values = aggregate.block_dequantize(*aggregate.block_quantize(jnp.zeros(shape), block_size=4), shape)
        np.testing.assert_array_equal(values, np.zeros(shape))


def test_half_precision_has_the_blocks_of_its_float32():
    x = jnp.asarray(normal(40), jnp.bfloat16)
    for a, b in zip(aggregate.block_quantize(x), aggregate.block_quantize(x.astype(jnp.float32)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert aggregate.block_dequantize(*aggregate.block_quantize(x), (40,), jnp.bfloat16).dtype == jnp.bfloat16


# Gather.


@pytest.mark.parametrize("bits", [4, 8])
def test_all_gather_joins_the_parts_in_the_order_of_the_devices(bits):
    x = normal(DEVICES * 3, 5)
    gather = functools.partial(aggregate.quantized_all_gather, axis_name="device", bits=bits, block_size=4)
    everywhere = np.asarray(on_devices(gather)(x)).reshape(DEVICES, *x.shape)
    expected = np.concatenate([round_trip(part, bits, 4) for part in np.split(x, DEVICES)])
    np.testing.assert_allclose(everywhere[0], expected, rtol=ULP)
    assert all(copy.tobytes() == everywhere[0].tobytes() for copy in everywhere)
    with_vmap = jax.vmap(gather, axis_name="device")(x.reshape(DEVICES, 3, 5))
    np.testing.assert_array_equal(with_vmap, everywhere)


def test_one_device_only_rounds():
    x = normal(1, 6, 5)
    for collective in (aggregate.quantized_all_gather, aggregate.quantized_reduce_scatter):
        y = jax.vmap(functools.partial(collective, axis_name="device", bits=4, block_size=8), axis_name="device")(x)
        np.testing.assert_allclose(y[0], round_trip(x[0], 4, 8), rtol=ULP)


# Reduce and scatter.


@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_reduce_scatter_rounds_each_entry_once_and_sums(bits, mean):
    x = normal(DEVICES, DEVICES * 2, 3)
    reduce = functools.partial(
        aggregate.quantized_reduce_scatter, axis_name="device", bits=bits, block_size=4, mean=mean
    )
    total = np.asarray(on_devices(reduce)(x.reshape(-1, 3)))
    expected = sum(np.concatenate([round_trip(part, bits, 4) for part in np.split(row, DEVICES)]) for row in x)
    # Eight float32 numbers of size up to 4.
    np.testing.assert_allclose(total, expected / DEVICES if mean else expected, atol=8 * 32 * ULP)


def test_equal_devices_get_what_arrives_of_their_part():
    x = normal(DEVICES * 4, 3)
    reduce = functools.partial(aggregate.quantized_reduce_scatter, axis_name="device", block_size=8)
    parts = on_devices(reduce)(np.tile(x, (DEVICES, 1)))
    expected = np.concatenate([round_trip(part, 4, 8) for part in np.split(x, DEVICES)])
    np.testing.assert_allclose(parts, expected, rtol=8 * ULP, atol=8 * ULP)


def test_half_precision_is_summed_in_float32():
    """In bfloat16, 256 + 1 = 256; the sum 263 is rounded once, to a multiple of 2."""
    x = np.ones((DEVICES, DEVICES), np.float32)
    x[0] = 256
    reduce = functools.partial(aggregate.quantized_reduce_scatter, axis_name="device", mean=False)
    total = jax.vmap(reduce, axis_name="device")(jnp.asarray(x, jnp.bfloat16))
    assert total.dtype == jnp.bfloat16
    np.testing.assert_array_equal(total.astype(jnp.float32), 264)


NODES, INNER = 2, 4


def hierarchical(x, **options):
    return aggregate.hierarchical_reduce_scatter(x, "device", "node", **options)


@pytest.mark.parametrize("mean", [True, False])
def test_hierarchical_leaves_the_parts_where_one_step_would(mean):
    """A part is one block, whose entries are alike up to the sign, so that nothing is lost by rounding twice."""
    x = np.random.default_rng(0).integers(1, 8, (DEVICES, DEVICES, 1)) * np.array([1.0, -1.0, 1.0, 1.0], np.float32)
    run = on_devices(functools.partial(hierarchical, block_size=4, mean=mean), NODES, INNER)
    parts = run(x.reshape(-1, 4).astype(np.float32))
    np.testing.assert_allclose(parts, x.mean(axis=0) if mean else x.sum(axis=0), rtol=16 * ULP)


def test_hierarchical_rounds_twice_and_no_more():
    x = normal(DEVICES, DEVICES * 2, 8)
    parts = on_devices(functools.partial(hierarchical, block_size=16), NODES, INNER)(x.reshape(-1, 8))
    once = np.abs(x).reshape(DEVICES, DEVICES, 16).max(axis=2) / 7 / 2
    bound = 2 * once.mean(axis=0)  # The second time it is a mean that is rounded, whose largest entry is no larger.
    error = np.abs(parts - x.mean(axis=0)).reshape(DEVICES, 16).max(axis=1)
    # What was rounded the first time may exceed the largest entry by nothing: codes end at 7.
    assert np.all(error <= bound + 16 * ULP)


def test_hierarchical_of_half_precision_is_rounded_to_it_once():
    x = jnp.asarray(normal(DEVICES * DEVICES, 4), jnp.bfloat16)
    run = on_devices(hierarchical, NODES, INNER)
    assert run(x).dtype == jnp.bfloat16
    np.testing.assert_array_equal(run(x), run(x.astype(jnp.float32)).astype(jnp.bfloat16))


# The gather that can be differentiated.


def pull_back(fn, x, cotangent):
    """The gradient of `<fn(x), cotangent>`, every device with its own cotangent."""

    def local(x, cotangent):
        return jax.grad(lambda x: jnp.vdot(fn(x), cotangent))(x)

    where = mesh(NODES, INNER)
    specs = P(where.axis_names)
    return jax.jit(jax.shard_map(local, mesh=where, in_specs=(specs, specs), out_specs=specs))(x, cotangent)


@pytest.mark.parametrize(
    ("axis_name", "reduce"),
    [
        ("device", functools.partial(aggregate.quantized_reduce_scatter, axis_name="device")),
        (("node", "device"), hierarchical),
    ],
)
def test_the_gradient_of_the_gather_is_the_sum_over_devices(axis_name, reduce):
    x = normal(DEVICES * 2, 3)
    size = 2 * (INNER if axis_name == "device" else DEVICES)
    cotangent = normal(DEVICES * size, 3, seed=1)
    got = pull_back(lambda x: aggregate.quantized_gather(x, axis_name, block_size=4), x, cotangent)
    expected = on_devices(functools.partial(reduce, block_size=4, mean=False), NODES, INNER)(cotangent)
    np.testing.assert_array_equal(got, expected)


def test_the_gradient_in_8_bits_is_close_to_the_exact_one():
    x, cotangent = normal(DEVICES * 2, 3), normal(DEVICES * DEVICES * 2, 3, seed=1)
    axes = ("node", "device")
    got = pull_back(lambda x: aggregate.quantized_gather(x, axes, gradient_bits=8), x, cotangent)
    exact = cotangent.reshape(DEVICES, DEVICES * 2, 3).sum(axis=0)
    # Eight numbers of size up to 4, then two sums of four, each rounded by at most half a 127th of its block's largest.
    np.testing.assert_allclose(got, exact, atol=(8 * 4 + 2 * 16) / 254)


def test_the_gather_is_quantized_all_gather():
    x = normal(DEVICES * 2, 3)
    run = [
        on_devices(functools.partial(fn, axis_name="device", block_size=4))
        for fn in (aggregate.quantized_gather, aggregate.quantized_all_gather)
    ]
    np.testing.assert_array_equal(run[0](x), run[1](x))


# Bytes on the wire.

SIZE = DEVICES * DEVICES * 256


def test_the_gather_of_weights_moves_a_quarter():
    x = np.zeros(SIZE, np.float32)
    plain = moved(lambda x: jax.lax.all_gather(x, "device", tiled=True), x)
    quantized = moved(lambda x: aggregate.quantized_all_gather(x, "device"), x)
    assert plain == {"all-gather": 4 * SIZE}
    assert quantized == {"all-gather": SIZE + 4 * SIZE // 256}
    assert plain["all-gather"] / quantized["all-gather"] > 3.5  # 1024 / 260
    assert quantized["all-gather"] <= 0.55 * 2 * SIZE  # against bfloat16


def test_the_reduction_of_gradients_moves_an_eighth():
    x = np.zeros(DEVICES * SIZE, np.float32)
    plain = moved(lambda x: jax.lax.psum_scatter(x, "device", tiled=True), x)
    quantized = moved(lambda x: aggregate.quantized_reduce_scatter(x, "device"), x)
    assert plain == {"reduce-scatter": 4 * SIZE}
    assert quantized == {"all-to-all": SIZE // 2 + 4 * SIZE // 256}
    assert plain["reduce-scatter"] / quantized["all-to-all"] > 7.7  # 1024 / 132
    assert quantized["all-to-all"] <= 0.3 * 2 * SIZE


def test_a_training_step_sends_a_quarter_between_nodes():
    """Three times the weights in bfloat16 become a half for the forward gather, none for the backward one, which stays
    inside a node, and a quarter for the gradients; all with 2% of scales.
    """
    x = np.zeros(DEVICES * SIZE, np.float32)
    both = moved(hierarchical, x, NODES, INNER)["all-to-all"]
    inner = moved(lambda x: aggregate.quantized_reduce_scatter(x, "device"), x, NODES, INNER)["all-to-all"]
    between = (both - inner) * INNER  # What the devices of a node send together.
    weights = 2 * SIZE
    assert between == 0.25 * weights * (132 / 128)
    gather = moved(lambda x: aggregate.quantized_all_gather(x, "device"), x[:SIZE])["all-gather"]
    assert (gather + between) / weights == pytest.approx(0.75, rel=0.025)


def test_a_short_part_is_a_short_message():
    assert moved(lambda x: aggregate.quantized_all_gather(x, "device", bits=4), np.zeros(DEVICES * 5, np.float32)) == {
        "all-gather": DEVICES * (3 + 4)
    }


# What is refused.


def under_axis(collective, x, **options):
    return lambda: jax.vmap(lambda x: collective(x, axis_name="device", **options), axis_name="device")(x)


PAIR = jnp.ones((2, 4))
REFUSED = {
    r"bits=5 must be one of 4, 8": lambda: aggregate.block_quantize(PAIR, bits=5),
    r"block_size=0 must lie in \[1, inf\)": lambda: aggregate.block_quantize(PAIR, block_size=0),
    r"block_size=2\.5 must be a whole number": lambda: aggregate.block_quantize(PAIR, block_size=2.5),
    r"codes of shape \(2, 4\) are not .* \(3,\)": lambda: aggregate.block_dequantize(
        jnp.ones((2, 4), jnp.int8), jnp.ones(2), (3,)
    ),
    r"codes of shape \(2, 4\) are not .* \(9,\)": lambda: aggregate.block_dequantize(
        jnp.ones((2, 4), jnp.int8), jnp.ones(2), (9,)
    ),
    r"bits=2 must be": under_axis(aggregate.quantized_all_gather, PAIR, bits=2),
    r"leading axis to gather along, got shape \(\)": under_axis(aggregate.quantized_all_gather, jnp.ones(2)),
    r"block_size=3 must be even with bits=4": under_axis(aggregate.quantized_reduce_scatter, PAIR, block_size=3),
    r"divides into 2 parts, got shape \(3,\)": under_axis(aggregate.quantized_reduce_scatter, jnp.ones((2, 3))),
    r"divides into 2 parts, got shape \(\)": under_axis(aggregate.quantized_reduce_scatter, jnp.ones(2)),
    r"gradient_bits=16 must be": under_axis(aggregate.quantized_gather, PAIR, gradient_bits=16),
    r"divides into 1 x 2 parts, got shape \(3,\)": lambda: jax.vmap(
        jax.vmap(hierarchical, axis_name="device"), axis_name="node"
    )(jnp.ones((1, 2, 3))),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()
