"""All pairs by loops in float64, and the ring of devices against them: values, gradients, memory."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from steelyard import losses
from steelyard.losses.sigmoid_contrastive import INITIAL_BIAS, INITIAL_LOG_SCALE

SPECS = (PartitionSpec("data"), PartitionSpec("data"), PartitionSpec(), PartitionSpec())


def log1p_exp(z):
    return max(z, 0) + math.log1p(math.exp(-abs(z)))


def transcribed(images, texts, log_scale, bias):
    """The losses and, of their weighted sum, the gradients, by loops in float64; weights as in `weighted`."""
    images, texts = np.asarray(images, np.float64), np.asarray(texts, np.float64)
    n, scale = len(images), math.exp(log_scale)
    values, d_images, d_texts, d_log_scale, d_bias = np.zeros(n), np.zeros_like(images), np.zeros_like(texts), 0.0, 0.0
    for i in range(n):
        for j in range(n):
            product = images[i] @ texts[j]
            z = scale * product + bias
            values[i] += log1p_exp(-z if i == j else z)
            slope = math.cos(i) * (1 / (1 + math.exp(-z)) - (i == j))
            d_images[i] += slope * scale * texts[j]
            d_texts[j] += slope * scale * images[i]
            d_log_scale += slope * scale * product
            d_bias += slope
    return values, (d_images, d_texts, d_log_scale, d_bias)


def weighted(fn):
    """`arguments -> (sum of losses by weights that differ from row to row, losses)`."""

    def value(*args):
        values = fn(*args)
        return jnp.sum(jnp.cos(jnp.arange(len(values))) * values), values

    return value


def dense(images, texts, log_scale, bias, axis_name=None):
    return losses.sigmoid_contrastive(images, texts, log_scale=log_scale, bias=bias, axis_name=axis_name)


def ring(devices):
    """The compiled losses and gradients on some devices: `lower(...)` and call as any jitted function."""
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=auto, devices=jax.devices()[:devices])
    mapped = jax.shard_map(
        functools.partial(dense, axis_name="data"), mesh=mesh, in_specs=SPECS, out_specs=PartitionSpec("data")
    )
    places = tuple(NamedSharding(mesh, spec) for spec in SPECS)
    return jax.jit(jax.grad(weighted(mapped), (0, 1, 2, 3), has_aux=True), in_shardings=places)


def embeddings(n=8, d=3, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return tuple(losses.normalize(jnp.asarray(rng.standard_normal((n, d)))).astype(dtype) for _ in range(2))


def assert_close(got, expected):
    """Sums of up to 64 float32 terms, each of a score of up to 10 that has lost its last bits."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        tolerance = 2**-8 if a.dtype == jnp.bfloat16 else 1e-5
        np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=tolerance, atol=tolerance * np.abs(b).max())


@functools.cache
def whole():
    return jax.jit(jax.grad(weighted(dense), (0, 1, 2, 3), has_aux=True))


def test_values_and_gradients_follow_the_definition():
    args = (*embeddings(), jnp.float32(1.5), jnp.float32(-2.0))
    values, gradients = transcribed(*args)
    assert_close(whole()(*args), (gradients, values))


@pytest.mark.parametrize("devices", [1, 4])
def test_the_ring_gives_values_and_gradients_of_the_whole_batch(devices):
    args = (*embeddings(), jnp.float32(1.5), jnp.float32(-2.0))
    values, gradients = transcribed(*args)
    assert_close(ring(devices)(*args), (gradients, values))


def test_half_precision_texts_go_round_as_they_are_and_are_multiplied_in_float32():
    images, texts = embeddings(dtype=jnp.bfloat16)
    args = (images, texts, jnp.float32(1.5), jnp.float32(-2.0))
    values, expected = transcribed(*args)
    gradients, got = ring(2)(*args)
    assert got.dtype == jnp.float32
    assert gradients[1].dtype == jnp.bfloat16
    assert_close((gradients, got), (expected, values))


def test_memory_of_a_device_does_not_grow_with_the_number_of_devices():
    """At 64 rows a device: the same temporary memory on 2 and 8, and no array greater than one block of pairs."""
    rows, d, temporary = 64, 16, []
    for devices in (2, 8):
        shapes = (*[jax.ShapeDtypeStruct((rows * devices, d), jnp.float32)] * 2, *[jnp.float32(0)] * 2)
        compiled = ring(devices).lower(*shapes).compile()
        temporary.append(compiled.memory_analysis().temp_size_in_bytes)
        sizes = [math.prod(map(int, dims.split(","))) for dims in re.findall(r"f32\[([\d,]+)\]", compiled.as_text())]
        assert max(sizes) == rows * rows
    assert rows * rows * 4 <= temporary[0]
    # A block of texts of each of the six more devices would be four times this.
    assert temporary[1] - temporary[0] <= rows * d * 4 * 6 / 4


def test_at_the_start_wrong_pairs_cost_little():
    """Of orthonormal rows the right pair is undecided, z = 10 - 10, and each wrong one costs log(1 + exp(-10))."""
    rows = jnp.eye(8)
    values = jax.jit(dense)(rows, rows, INITIAL_LOG_SCALE, INITIAL_BIAS)
    np.testing.assert_allclose(values, math.log(2) + 7 * math.log1p(math.exp(-10)), rtol=1e-6)


def test_exchanging_images_and_texts_transposes_the_pairs():
    images, texts = embeddings()
    (_, one), (_, other) = (whole()(*rows, 1.5, -2.0) for rows in ((images, texts), (texts, images)))
    np.testing.assert_allclose(one.sum(), other.sum(), rtol=1e-6)


def test_a_pair_that_is_found_with_certainty_still_costs_its_exponential():
    one = jnp.ones((1, 1))
    value = jax.jit(dense)(one, one, math.log(30), 0.0)
    np.testing.assert_allclose(value, math.exp(-30), rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: dense(jnp.ones((4, 2)), jnp.ones((3, 2)), 0.0, 0.0), r"\(4, 2\) and texts \(3, 2\)"),
        (lambda: dense(jnp.ones(4), jnp.ones(4), 0.0, 0.0), r"\(4,\).*\[batch, d\]"),
        (lambda: dense(*embeddings(), jnp.zeros(3), 0.0), r"log_scale has shape \(3,\)"),
        (lambda: dense(*embeddings(), 0.0, jnp.zeros((1, 1))), r"bias has shape \(1, 1\)"),
        (lambda: ring(2).lower(jnp.ones((4, 2)), jnp.ones((8, 2)), 0.0, 0.0), r"\(2, 2\) and texts \(4, 2\)"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
