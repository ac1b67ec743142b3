"""Random displacements by their definition in loops, and pairs of images whose flow is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import data

# Sums of a few dozen products, one division and one product, in float32.
TOLERANCE = 64 * 2.0**-24


@functools.partial(jax.jit, static_argnames=("shape", "smoothing"))
def drawn(key, shape, max_displacement, smoothing):
    return data.random_displacement(key, shape, max_displacement=max_displacement, smoothing=smoothing)


displaced = jax.jit(data.displace)


def smoothed_by_loops(noise, smoothing):
    """Gaussian weights up to 4 standard deviations, and the row reflected at its ends (d c b a | a b c d | d c b a)."""
    reach = int(4 * smoothing + 0.5)
    offsets = range(-reach, reach + 1)
    weights = [np.exp(-(o**2) / (2 * smoothing**2)) for o in offsets]
    for axis in range(noise.ndim - 1):
        rows = np.moveaxis(noise, axis, 0)
        smooth, n = np.zeros_like(rows), len(rows)
        for i in range(n):
            for offset, weight in zip(offsets, weights, strict=True):
                place = (i + offset) % (2 * n)
                smooth[i] += weight / sum(weights) * rows[place if place < n else 2 * n - 1 - place]
        noise = np.moveaxis(smooth, 0, axis)
    return noise


@pytest.mark.parametrize("shape", [(8, 6), (5,), (4, 3, 5)])
def test_it_follows_its_definition(shape):
    key = jax.random.key(3)
    noise = np.asarray(jax.random.uniform(key, (*shape, len(shape)), minval=-1.0), np.float64)
    smooth = smoothed_by_loops(noise, 1.5)
    lengths = np.sqrt((smooth**2).sum(-1))
    np.testing.assert_allclose(drawn(key, shape, 2.0, 1.5), 2 * smooth / lengths.max(), atol=2 * TOLERANCE)


@pytest.mark.parametrize("smoothing", [0.0, 2.0])
def test_the_longest_displacement_is_as_long_as_asked(smoothing):
    field = drawn(jax.random.key(0), (8, 8), 1.5, smoothing)
    assert (field.shape, field.dtype) == ((8, 8, 2), jnp.float32)
    np.testing.assert_allclose(np.linalg.norm(field, axis=-1).max(), 1.5, rtol=TOLERANCE)
    np.testing.assert_array_equal(drawn(jax.random.key(0), (8, 8), 0.0, smoothing), 0)


def test_more_smoothing_is_smoother():
    steps = [np.abs(np.diff(drawn(jax.random.key(1), (16, 16), 1.0, s), axis=0)).mean() for s in (0.0, 1.0, 3.0)]
    assert steps[0] > 2 * steps[1] > 4 * steps[2]


def test_vmap_over_keys_draws_each_its_own():
    keys = jax.random.split(jax.random.key(0), 2)
    fields = jax.vmap(lambda key: drawn(key, (6, 1), 1.0, 1.0))(keys)
    for key, field in zip(keys, fields, strict=True):
        np.testing.assert_allclose(field, drawn(key, (6, 1), 1.0, 1.0), atol=TOLERANCE)
    assert not np.allclose(fields[0], fields[1], atol=0.1)


def test_a_whole_displacement_shifts_and_repeats_the_edge():
    image = jnp.arange(12.0).reshape(3, 4)
    right = jnp.zeros((3, 4, 2)).at[..., 1].set(1)
    expected = np.asarray(image)[:, [1, 2, 3, 3]]
    np.testing.assert_array_equal(displaced(image, right), expected)
    half = displaced(image.astype(jnp.bfloat16), right / 2)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_array_equal(half.astype(jnp.float32), (np.asarray(image) + expected) / 2)


def test_a_pair_of_digits_is_registered_by_its_flow():
    """An image that is linear is displaced by its slope times the flow, away from the edges; no flow, no change."""
    flow = drawn(jax.random.key(2), (8, 8), 1.0, 2.0)
    rows, columns = np.meshgrid(np.arange(8.0), np.arange(8.0), indexing="ij")
    ramp = 2 * rows - 3 * columns
    moved = np.asarray(displaced(jnp.asarray(ramp, jnp.float32), flow))
    expected = ramp + 2 * flow[..., 0] - 3 * flow[..., 1]
    np.testing.assert_allclose(moved[1:-1, 1:-1], expected[1:-1, 1:-1], atol=64 * TOLERANCE)
    digit = jnp.asarray(data.load("digits").columns["image"][0, ..., 0])
    np.testing.assert_array_equal(displaced(digit, jnp.zeros_like(flow)), digit)
    assert np.abs(displaced(digit, flow) - digit).max() > 0.1


def test_the_flow_can_be_learned_by_descent():
    """From no flow at all, the error of the pair of a smooth image goes down along the gradient."""
    y, x = np.meshgrid(np.arange(8.0), np.arange(8.0), indexing="ij")
    image = jnp.asarray(np.exp(-((y - 3) ** 2 + (x - 4) ** 2) / 6), jnp.float32)
    fixed = displaced(image, drawn(jax.random.key(5), (8, 8), 1.0, 2.0))

    def error(flow):
        return jnp.sum((data.displace(image, flow) - fixed) ** 2)

    start = jnp.zeros((8, 8, 2))
    value, grads = jax.jit(jax.value_and_grad(error))(start)
    assert jax.jit(error)(start - 0.5 * grads) < value


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda key: drawn(key, (), 1.0, 1.0), r"shape=\(\)"),
        (lambda key: drawn(key, (4, 0), 1.0, 1.0), r"shape=\(4, 0\)"),
        (
            lambda key: data.random_displacement(key, (4,), max_displacement=-1.0, smoothing=1.0),
            "max_displacement=-1",
        ),
        (lambda key: data.random_displacement(key, (4,), max_displacement=1, smoothing=-1), "smoothing=-1"),
        (lambda key: data.displace(jnp.ones((4, 4)), jnp.ones((4, 4))), r"\(4, 4, 2\).*got \(4, 4\)"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call(jax.random.key(0))
