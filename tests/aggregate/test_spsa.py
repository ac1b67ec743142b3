"""One byte per gradient: closed forms, NumPy loops, and the same bits for all who have the bytes."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import aggregate

ULP = 2.0**-23
ROOT = jax.random.key(3)

APPLY = jax.jit(aggregate.spsa_apply, static_argnames="scale")


def make_params(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"bias": (3,), "gain": (), "kernel": (2, 3)}
    return {"none": None} | {name: jnp.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def keys_of(count):
    return jax.vmap(aggregate.spsa_key, (None, None, None, 0))(ROOT, 7, 1, jnp.arange(count))


def directions(params, key):
    """z in float64, by its definition."""
    leaves, structure = jax.tree.flatten(params)
    parts = [jax.random.normal(jax.random.fold_in(key, i), x.shape, jnp.float32) for i, x in enumerate(leaves)]
    return structure.unflatten(np.asarray(z, np.float64) for z in parts)


def inner(a, b):
    return sum(np.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def assert_close(got, expected, tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, expected)


def assert_same_bits(*trees):
    first, *others = ([np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)] for tree in trees)
    assert all(other == first for other in others)


# Bytes.


@pytest.mark.parametrize(
    ("number", "byte"),
    [
        (0.0, 0),
        (-0.0, 0),
        (math.nan, 0),
        (math.inf, 0),
        (-math.inf, 0),
        (1.0, 64),
        (-1.0, 128 + 64),
        (math.e, 72),
        (-math.exp(-0.25), 128 + 62),
        (1e30, 127),
        (-1e30, 255),
        (1e-30, 1),
        (-1e-37, 129),
    ],
)
def test_a_byte_is_sign_and_logarithm(number, byte):
    code = aggregate.encode_byte(jnp.float32(number))
    assert (code, code.dtype) == (byte, jnp.uint8)
    low = byte % 128
    value = 0 if low == 0 else (1 if byte < 128 else -1) * math.exp((low - 64) / 8)
    np.testing.assert_allclose(aggregate.decode_byte(code), value, rtol=ULP)


def test_every_byte_that_is_sent_comes_back():
    """All but 128, the negative zero, which nothing is encoded as."""
    codes = jnp.arange(256, dtype=jnp.uint8)
    values = aggregate.decode_byte(codes)
    assert np.all(np.diff(values[1:128]) > 0)
    np.testing.assert_array_equal(values[129:], -values[1:128])
    np.testing.assert_array_equal(aggregate.encode_byte(values), np.where(codes == 128, 0, codes))


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(st.floats(-7.875, 7.875), st.sampled_from([-1, 1]))
def test_a_byte_is_off_by_at_most_half_a_step(log, sign):
    g = sign * math.exp(log)
    ratio = float(aggregate.decode_byte(aggregate.encode_byte(g))) / g
    assert abs(math.log(ratio)) <= 1 / 16 + 1e-5  # float32 logarithms up to 8 have 8e-7, times the 8 steps


# The slope.


def test_the_slope_of_a_linear_loss_is_exact_at_any_distance():
    params, target = make_params(), make_params(seed=1)
    key = keys_of(1)[0]
    g = aggregate.spsa_projected_gradient(lambda p: inner_jax(target, p), params, key, epsilon=2.0)
    # Sums of ten products of size up to 10.
    np.testing.assert_allclose(g, inner(target, directions(params, key)), atol=100 * ULP)


def inner_jax(a, b):
    return sum(jax.tree.leaves(jax.tree.map(lambda x, y: jnp.sum(x * y), a, b)), start=jnp.float32(0))


def test_a_step_on_a_linear_loss_lowers_it_by_rate_times_slope_squared():
    params, target = make_params(), make_params(seed=1)
    key = keys_of(1)[0]
    loss = functools.partial(inner_jax, target)
    g = aggregate.spsa_projected_gradient(loss, params, key, epsilon=1.0)
    lower = aggregate.spsa_apply(params, key[None], g[None], learning_rate=0.5)
    np.testing.assert_allclose(loss(params) - loss(lower), 0.5 * g**2, rtol=1e-5, atol=100 * ULP)


def test_the_mean_of_slope_times_direction_is_the_gradient():
    """Of a quadratic in 5 parameters; one sample has a relative error of sqrt(6), 4096 have 4%."""
    curvature, start = jnp.arange(1.0, 6), jnp.asarray([1.0, -1, 2, 0.5, -0.3])
    keys = keys_of(4096)

    @jax.jit
    def estimate(keys):
        slope = functools.partial(aggregate.spsa_projected_gradient, lambda p: jnp.sum(curvature * p**2) / 2, start)
        # With rate 1 from the start, the update is minus the mean.
        return start - aggregate.spsa_apply(start, keys, jax.vmap(slope)(keys), learning_rate=1.0)

    gradient = curvature * start
    assert np.linalg.norm(estimate(keys) - gradient) < 0.1 * np.linalg.norm(gradient)


def test_half_precision_is_perturbed_in_float32_and_rounded():
    params, key = jnp.full((4,), 3, jnp.bfloat16), keys_of(1)[0]
    seen = []

    def loss(p):
        seen.append(p)
        return jnp.sum(p)

    g = aggregate.spsa_projected_gradient(loss, params, key, epsilon=0.1)
    z = directions(params, key)
    for p, sign in zip(seen, (1, -1), strict=True):
        assert p.dtype == jnp.bfloat16
        np.testing.assert_array_equal(p, jnp.asarray(np.float32(3 + sign * 0.1 * z), jnp.bfloat16))
    assert g.dtype == jnp.float32


def test_a_loss_that_is_not_finite_is_sent_as_nothing():
    params, key = make_params(), keys_of(1)[0]
    g = aggregate.spsa_projected_gradient(lambda p: jnp.log(-jnp.sum(p["bias"] ** 2)), params, key)
    assert not np.isfinite(g)
    assert aggregate.encode_byte(g) == 0


# The update.


@pytest.mark.parametrize(("scale", "factor"), [("mean", 1 / 5), ("sqrt", 5**-0.5)])
def test_apply_is_the_sum_by_hand(scale, factor):
    params, keys = make_params(), keys_of(5)
    projected = np.array([1.0, -2, 0, 0.25, 3], np.float32)
    got = APPLY(params, keys, projected, learning_rate=0.1, scale=scale)
    expected = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for key, g in zip(keys, projected, strict=True):
        z = directions(params, key)
        expected = jax.tree.map(lambda x, z, g=g: x - 0.1 * factor * g * z, expected, z)
    # Sums of five numbers of size up to 10.
    assert_close(got, expected, 50 * ULP)


def test_the_order_of_samples_does_not_matter():
    params, keys = make_params(), keys_of(5)
    projected, order = np.arange(5, dtype=np.float32) - 2, np.array([3, 0, 1, 4, 2])
    run = functools.partial(APPLY, params, learning_rate=0.1, scale="mean")
    assert_close(run(keys[order], projected[order]), run(keys, projected), 50 * ULP)


def test_small_updates_of_half_precision_are_summed_before_they_are_rounded():
    """Each alone is lost: near 300 a bfloat16 number has neighbours at a distance of 2."""
    params, keys = jnp.full((8,), 300, jnp.bfloat16), keys_of(64)
    signs = jnp.sign(jax.vmap(lambda key: aggregate.spsa_projected_gradient(jnp.sum, jnp.zeros(8), key))(keys))
    run = functools.partial(aggregate.spsa_apply, keys=keys, projected=signs, learning_rate=1.0, scale="sqrt")
    moved = run(params)
    assert np.all(np.abs(1 / 8 * jax.vmap(lambda key: directions_jax(key, 8))(keys)) < 1)
    assert np.any(moved != params)
    np.testing.assert_array_equal(moved, run(params.astype(jnp.float32)).astype(jnp.bfloat16))


def directions_jax(key, size):
    return jax.random.normal(jax.random.fold_in(key, 0), (size,))


def test_no_samples_no_update():
    params = make_params()
    assert_same_bits(aggregate.spsa_apply(params, keys_of(0), jnp.zeros(0), learning_rate=0.1), params)


def test_memory_does_not_grow_with_the_number_of_samples():
    params = {"a": jnp.zeros((64, 64)), "b": jnp.zeros((64, 64))}

    def temporary(count):
        run = jax.jit(functools.partial(aggregate.spsa_apply, learning_rate=0.1))
        compiled = run.lower(params, keys_of(count), jnp.ones(count)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    leaf = 4 * 64 * 64
    assert temporary(128) < temporary(2) + leaf


# Rounds and the log.

MACHINES, SAMPLES, ROUNDS = 3, 2, 6


def slopes(params, step, machine):
    """The bytes of one machine, whose loss is a quadratic around a point of its own."""

    def loss(p):
        return jnp.sum((p["bias"] - machine) ** 2) + jnp.sum(p["kernel"] ** 2) + p["gain"] ** 2

    def one(sample):
        return aggregate.spsa_projected_gradient(loss, params, aggregate.spsa_key(ROOT, step, machine, sample))

    return aggregate.encode_byte(jax.vmap(one)(jnp.arange(SAMPLES)))


slopes = jax.jit(slopes)
RUN = functools.partial(aggregate.spsa_round, root=ROOT, learning_rate=0.05)


@functools.cache
def history():
    """The parameters before each round and after the last, and the log. Machine 2 is away in the first two rounds."""
    params, log = [make_params()], []
    for step in range(ROUNDS):
        codes = np.stack([np.asarray(slopes(params[-1], step, machine)) for machine in range(MACHINES)])
        if step < 2:
            codes[2] = 0
        log.append(codes)
        params.append(RUN(params[-1], step=step, codes=codes))
    return params, np.stack(log)


@pytest.mark.parametrize("scale", ["mean", "sqrt"])
def test_a_round_is_one_update_from_the_bytes_that_were_sent(scale):
    params, codes = jnp.asarray([1.0, 2, -3]), np.array([[60, 0], [0, 0], [190, 70]], np.uint8)
    sent = [(0, 0), (2, 0), (2, 1)]
    keys = jnp.stack([aggregate.spsa_key(ROOT, 4, machine, sample) for machine, sample in sent])
    projected = jnp.stack([aggregate.decode_byte(codes[place]) for place in sent])
    expected = APPLY(params, keys, projected, learning_rate=0.05, scale=scale)
    assert_close(RUN(params, step=4, codes=codes, scale=scale), expected, 50 * ULP)


def test_the_loss_falls():
    params, log = history()
    assert not np.any(log[:2, 2])
    assert np.sum(np.square(params[-1]["kernel"])) < np.sum(np.square(params[0]["kernel"]))


def test_machines_that_exchange_bytes_hold_the_same_bits():
    """Each keeps its own parameters and evaluates its own loss; bytes are all they have in common."""
    own = [make_params() for _ in range(MACHINES)]
    for step in range(3):
        codes = np.stack([np.asarray(slopes(params, step, machine)) for machine, params in enumerate(own)])
        own = [RUN(params, step=step, codes=codes) for params in own]
        assert_same_bits(*own)


@pytest.mark.parametrize("start", [0, 2, ROUNDS])
def test_a_replay_gives_the_same_bits_from_the_start_or_a_snapshot(start):
    params, log = history()
    replayed = aggregate.spsa_replay(params[start], ROOT, log[start:], learning_rate=0.05, first_step=start)
    assert_same_bits(replayed, params[-1])


def test_a_round_without_bytes_changes_nothing():
    params = make_params()
    assert_same_bits(RUN(params, step=0, codes=np.zeros((MACHINES, SAMPLES), np.uint8)), params)


def test_rounds_machines_and_samples_have_directions_of_their_own():
    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)]
    data = {np.asarray(jax.random.key_data(aggregate.spsa_key(ROOT, *place))).tobytes() for place in places}
    assert len(data) == len(places)


# What is refused.

P = jnp.ones(3)
REFUSED = {
    r"epsilon=0 must lie in \(0, inf\)": lambda: aggregate.spsa_projected_gradient(jnp.sum, P, ROOT, epsilon=0),
    r"scale='maen' is not one of mean, sqrt; did you mean 'mean'": lambda: aggregate.spsa_apply(
        P, keys_of(1), jnp.ones(1), learning_rate=0.1, scale="maen"
    ),
    r"one length, got \(2,\) and \(3,\)": lambda: aggregate.spsa_apply(P, keys_of(2), P, learning_rate=0.1),
    r"scale='sum' is not": lambda: RUN(P, step=0, codes=np.ones((1, 1), np.uint8), scale="sum"),
    r"uint8 \[machines, samples\], got int32 of shape \(1, 1\)": lambda: RUN(P, step=0, codes=jnp.ones((1, 1), int)),
    r"got uint8 of shape \(2,\)": lambda: RUN(P, step=0, codes=np.ones(2, np.uint8)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()
