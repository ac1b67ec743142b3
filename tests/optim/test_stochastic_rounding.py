"""Stochastic rounding: right on average, one of the two neighbours always, and no change where none is due."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from steelyard import optim, train
from steelyard.train import sharding

KEY = jax.random.key(0)
HALF = [jnp.bfloat16, jnp.float16]
DRAWS = 4096


@functools.partial(jax.jit, static_argnums=0)
def rounded(tx, params, updates, state):
    new, state = tx.update(updates, state, params)
    return optax.apply_updates(params, new), state


TX = optim.stochastic_rounding(key=KEY)


def one_step(p, u, dtype):
    """`p + u`, rounded stochastically: an independent draw for each entry."""
    return rounded(TX, jnp.asarray(p, dtype), jnp.asarray(u, jnp.float32), TX.init(None))[0]


def neighbours(s, dtype):
    """The values of the dtype below and above each of s, by stepping through them on the host."""
    dtype = np.dtype(dtype)
    near = s.astype(dtype)
    below = np.where(near.astype(np.float64) > s, np.nextafter(near, dtype.type(-np.inf)), near)
    above = np.where(near.astype(np.float64) < s, np.nextafter(near, dtype.type(np.inf)), near)
    return below.astype(np.float64), above.astype(np.float64)


# A parameter and an update: across powers of two from both sides, negative, cancelling, from zero, subnormal in float16
# (below 2^-14 = 6.1e-5), an update much larger than the parameter, and one that is exact.
CASES = [
    (1.0, 1e-3),
    (1.0, -1e-3),
    (-1.0, 1e-3),
    (-2.0, -3e-3),
    (1.9921875, 5e-3),
    (0.0, 3.3e-4),
    (0.0, -3.3e-4),
    (-0.375, 0.37501),
    (2.0**-14, -1.01e-7),
    (3e-5, 1e-8),
    (-3e-5, -7.7e-6),
    (1e-3, 123.4567),
    (40000.0, 13.0),
    (1.5, 0.25),
]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("p", "u"), CASES)
def test_the_mean_is_the_sum_and_each_draw_is_a_neighbour(p, u, dtype):
    """The fraction of draws upwards has the standard deviation sqrt(f (1 - f) / n) <= 1 / (2 sqrt(n)).

    Five of them are passed by chance in one of 1.7 million tests. In the subnormal range the probability itself is
    rounded to 2^-17 at worst, which is much less.
    """
    p = np.asarray(p, dtype)
    s = np.asarray(np.float32(p) + np.float32(u), np.float64)
    low, high = neighbours(s[None], dtype)
    q = np.asarray(one_step(np.full(DRAWS, p), np.full(DRAWS, u), dtype)).astype(np.float64)
    assert np.all((q == low) | (q == high))
    if low == high:
        assert np.all(q == s)
    else:
        up = np.mean(q == high)
        expected = ((s - low) / (high - low)).item()
        assert abs(up - expected) <= 5 / (2 * np.sqrt(DRAWS))


@pytest.mark.parametrize("dtype", HALF)
def test_what_is_representable_is_not_rounded(dtype):
    """All finite values with a zero update, and all sums that are exact; but for float32 subnormals, flushed on CPU."""
    bits = np.arange(2**16, dtype=np.uint16).view(np.dtype(dtype))
    is_kept = np.isfinite(bits.astype(np.float32)) & (np.abs(bits.astype(np.float32)) >= np.finfo(np.float32).tiny)
    p = bits[is_kept]
    np.testing.assert_array_equal(one_step(p, np.zeros(p.shape), dtype), p)
    # From anywhere to any other value: p + u is that value exactly wherever float32 can say so.
    target = np.random.default_rng(0).permutation(p)
    with np.errstate(over="ignore"):
        u = target.astype(np.float32) - p.astype(np.float32)
        exact = np.isfinite(u) & (p.astype(np.float32) + u == target.astype(np.float32))
    exact &= (u == 0) | (np.abs(u) >= np.finfo(np.float32).tiny)
    assert exact.mean() > 0.5
    np.testing.assert_array_equal(one_step(p, np.where(exact, u, 0), dtype), np.where(exact, target, p))


@pytest.mark.parametrize("dtype", HALF)
def test_infinity_and_nan_stay_and_overflow_is_that_of_nearest(dtype):
    big = float(jnp.finfo(dtype).max)
    step = big - float(np.nextafter(np.dtype(dtype).type(big), np.dtype(dtype).type(0)))
    cases = [(np.inf, 1.0), (-np.inf, 1.0), (np.nan, 1.0), (1.0, np.inf), (1.0, np.nan), (np.inf, -np.inf)]
    cases += [(sign * big, sign * f * step) for sign in (1, -1) for f in (0.01, 0.49, 0.51, 1.0)]
    for p, u in cases:
        q = np.asarray(one_step(np.full(512, p), np.full(512, u), dtype)).astype(np.float32)
        with np.errstate(all="ignore"):
            s = np.asarray(p, dtype).astype(np.float32) + np.float32(u)
            nearest = s.astype(np.dtype(dtype)).astype(np.float32)
        if not np.isfinite(s):
            np.testing.assert_array_equal(q, s)
        elif np.isfinite(nearest):
            np.testing.assert_array_equal(q, nearest)
        else:
            assert np.all(np.abs(q) >= big)


def test_other_dtypes_and_none_pass():
    params = {"wide": jnp.ones(3), "whole": jnp.arange(3), "none": None, "half": jnp.ones(3, jnp.bfloat16)}
    updates = {"wide": jnp.full(3, 1e-9), "whole": jnp.arange(3), "none": None, "half": jnp.ones(3, jnp.bfloat16)}
    new, state = TX.update(updates, TX.init(params), params)
    assert new["wide"] is updates["wide"]
    assert new["whole"] is updates["whole"]
    assert new["none"] is None
    assert new["half"].dtype == jnp.float32
    assert int(state.count) == 1
    with jax.enable_x64(True):
        params = jnp.ones(2, jnp.float64)
        assert TX.update(params, TX.init(params), params)[0] is params


def test_draws_depend_on_key_count_and_path_and_on_nothing_else():
    p, u = {name: jnp.ones(64, jnp.bfloat16) for name in "ab"}, {name: jnp.full(64, 3e-3) for name in "ab"}
    state = TX.init(p)
    first, state_1 = rounded(TX, p, u, state)
    again, _ = rounded(TX, p, u, state)
    second, _ = rounded(TX, p, u, state_1)
    other, _ = rounded(optim.stochastic_rounding(key=jax.random.key(1)), p, u, state)
    alone, _ = rounded(TX, {"b": p["b"]}, {"b": u["b"]}, state)
    draws = {"first": first["a"], "second": second["a"], "other": other["a"], "b": first["b"]}
    np.testing.assert_array_equal(again["a"], first["a"])
    np.testing.assert_array_equal(alone["b"], first["b"])
    assert len({np.asarray(x).tobytes() for x in draws.values()}) == len(draws)


def test_the_extra_argument_rng_takes_the_place_of_the_key():
    p, u = jnp.ones(64, jnp.bfloat16), jnp.full(64, 3e-3)
    tx = optax.chain(optax.identity(), optim.stochastic_rounding())
    updates, _ = tx.update(u, tx.init(p), p, rng=KEY, value=1.0)
    np.testing.assert_array_equal(updates, TX.update(u, TX.init(p), p)[0])
    # A key of its own wins over the argument.
    np.testing.assert_array_equal(TX.update(u, TX.init(p), p, rng=jax.random.key(5))[0], updates)


@pytest.mark.parametrize(
    ("params", "message"),
    [(None, "needs params"), (jnp.ones(2), r"extra argument rng: .*stochastic_rounding\(key=key\)")],
)
def test_what_is_missing_is_named(params, message):
    tx = optim.stochastic_rounding()
    with pytest.raises(ValueError, match=message):
        tx.update(jnp.ones(2), tx.init(None), params)


def test_draws_do_not_depend_on_the_sharding():
    mesh = sharding.make_mesh({"fsdp": 8})
    place = NamedSharding(mesh, PartitionSpec("fsdp"))
    p, u = jnp.ones((16, 4), jnp.bfloat16), jnp.full((16, 4), 3e-3)
    whole, _ = rounded(TX, p, u, TX.init(p))
    spread, _ = rounded(TX, jax.device_put(p, place), jax.device_put(u, place), TX.init(p))
    assert spread.sharding.is_equivalent_to(place, 2)
    np.testing.assert_array_equal(spread, whole)


# End to end. Weights start at 1, where a bfloat16 step upwards is 2^-7 = 0.0078; nearest rounding loses lr g = 1e-4.

STEPS, ENTRIES = 64, 2048


def descend(tx, dtype, entries):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jnp.full(entries, -1.0), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jnp.ones(entries, dtype)
    (params, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=STEPS))(params)
    return np.asarray(params).astype(np.float64)


def test_small_steps_arrive_on_average():
    """One step has the variance f (1 - f) h^2 < u h, u = 1e-4 and h = 2^-7, and the errors of steps are uncorrelated.

    The mean over n entries so has a standard deviation below sqrt(steps u h / n); five of them are allowed, of a
    movement that is 43 of them.
    """
    movement = 1e-4 * STEPS
    bound = 5 * np.sqrt(STEPS * 1e-4 * 2.0**-7 / ENTRIES)
    sgd = optax.sgd(1e-4)
    # float32 rounds each of the 64 sums by up to 2^-24.
    assert abs(descend(sgd, jnp.float32, ENTRIES).mean() - 1 - movement) < STEPS * 2.0**-24
    assert np.all(descend(sgd, jnp.bfloat16, ENTRIES) == 1)
    stochastic = descend(optax.chain(sgd, optim.stochastic_rounding(key=KEY)), jnp.bfloat16, ENTRIES)
    assert abs(stochastic.mean() - 1 - movement) < bound < movement / 8


def test_inside_a_train_step():
    """The loss is the mean of the weights, scaled so that lr g = 1e-4 an entry; the step gives the random key."""
    entries = 512
    tx = optax.chain(optax.sgd(1.0), optim.stochastic_rounding())
    step = jax.jit(
        train.make_step(
            lambda params, batch, *, rng, train: batch @ params,
            lambda outputs, batch: {"task": -1e-4 * outputs},
            tx,
        )
    )
    state = train.init_state(jnp.ones(entries, jnp.bfloat16), tx, rng=KEY)
    batch = jnp.ones((1, entries), jnp.bfloat16)
    for _ in range(20):
        state, _ = step(state, batch)
    assert state.params.dtype == jnp.bfloat16
    assert step._cache_size() == 1
    moved = np.asarray(state.params).astype(np.float64).mean() - 1
    gradient = float(jnp.bfloat16(1e-4))  # the gradient itself is a bfloat16
    assert abs(moved - 20 * gradient) < 5 * np.sqrt(20 * gradient * 2.0**-7 / entries)


def test_ml_dtypes_agree_on_the_neighbours():
    """The reference of these tests: next to 1 bfloat16 has 1 - 2^-8 and 1 + 2^-7."""
    low, high = neighbours(np.asarray([0.999, 1.001]), ml_dtypes.bfloat16)
    np.testing.assert_array_equal(low, [1 - 2.0**-8, 1])
    np.testing.assert_array_equal(high, [1, 1 + 2.0**-7])
