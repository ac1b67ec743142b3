"""Centered clipping and worker momentum against loops in NumPy float64, and the bounds that they promise."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from launch import hlo
from steelyard import aggregate

P = jax.sharding.PartitionSpec
EPS = 2.0**-23
WORKERS, SIZE = 5, 12
# Sums of a dozen float32 numbers, a few times over.
CLOSE = {"rtol": 64 * EPS, "atol": 64 * EPS}


def reference(steps, radius, iterations):
    """The aggregates of some steps of rows [K, n]."""
    center = np.zeros(steps[0].shape[1])
    out = []
    for rows in steps:
        with np.errstate(over="ignore"):
            valid = np.isfinite(np.sum(np.square(rows.astype(np.float32)), axis=1))
        rows = rows.astype(np.float64)
        for _ in range(iterations):
            move = np.zeros_like(center)
            for row in rows[valid]:
                distance = np.linalg.norm(row - center)
                move += (row - center) * (1 if distance <= radius else radius / distance)
            center = center + move / len(rows)
        out.append(center)
    return out


@functools.cache
def compiled(radius, iterations):
    return jax.jit(aggregate.centered_clip(radius=radius, iterations=iterations).update)


def run(steps, radius=10.0, iterations=1, center=None):
    state = aggregate.CenteredClipState(jnp.zeros(steps[0].shape[1]) if center is None else jnp.asarray(center))
    out = []
    for rows in steps:
        update, state = compiled(radius, iterations)(jnp.asarray(rows), state)
        np.testing.assert_array_equal(update, state.center)
        out.append(np.asarray(update))
    return out


def gradients(seed=0, scale=1.0, count=WORKERS):
    return (scale * np.random.default_rng([3, seed]).standard_normal((count, SIZE))).astype(np.float32)


@pytest.mark.parametrize(("radius", "iterations"), [(10.0, 1), (2.0, 3), (0.1, 2), (np.inf, 1)])
def test_five_steps(radius, iterations):
    steps = [gradients(seed, scale=1 + seed) for seed in range(5)]
    for got, expected in zip(run(steps, radius, iterations), reference(steps, radius, iterations), strict=True):
        np.testing.assert_allclose(got, expected, rtol=64 * EPS, atol=64 * EPS * 5)


def test_worked_example():
    """(3, 4) is clipped to (0.6, 0.8), (0, 1) is not: half of the sum is (0.3, 0.9)."""
    rule = aggregate.centered_clip(radius=1.0)
    out, _ = rule.update(jnp.array([[3.0, 4.0], [0.0, 1.0]]), rule.init(jnp.zeros(2)))
    np.testing.assert_allclose(out, [0.3, 0.9], **CLOSE)


@hypothesis.given(seed=st.integers(0, 1000), length=st.floats(-6, 18), iterations=st.integers(1, 3))
@hypothesis.settings(max_examples=20, deadline=None)
def test_one_worker_moves_the_aggregate_by_a_kth_of_the_radius_an_iteration(seed, length, iterations):
    """The others send the last aggregate, so that all of the move is that worker's."""
    center = gradients(seed)[0]
    rows = np.tile(center, (WORKERS, 1))
    rows[2] = gradients(seed + 1)[0] * np.float32(10.0**length)
    (out,) = run([rows], 0.5, iterations, center)
    assert np.linalg.norm(out - center) <= iterations * 0.5 / WORKERS * (1 + 1e-5)


def test_an_infinite_radius_is_the_mean_whatever_came_before():
    rows = gradients()
    (out,) = run([rows], np.inf, 1, 100 * gradients(1)[0])
    # The center comes and goes: an error of its own rounding.
    np.testing.assert_allclose(out, rows.mean(0), atol=8 * EPS * 300)


def test_constant_rows_within_the_radius_of_each_other_converge_to_their_mean():
    """From 30 away, in moves of about the radius 4; once all lie within it, the next aggregate is the mean."""
    far = np.zeros(SIZE, np.float32)
    far[0] = 30
    rows = far + gradients(scale=0.3)
    out = run([rows] * 12, 4.0)
    assert np.linalg.norm(out[3] - rows.mean(0)) > 4
    np.testing.assert_allclose(out[-1], rows.mean(0), rtol=1e-6, atol=1e-5)


@hypothesis.given(seed=st.integers(0, 1000))
@hypothesis.settings(max_examples=10, deadline=None)
def test_the_order_of_workers_does_not_matter(seed):
    rows = gradients(seed, scale=3)
    order = np.random.default_rng(seed).permutation(WORKERS)
    np.testing.assert_allclose(run([rows[order]], 2.0, 3)[0], run([rows], 2.0, 3)[0], **CLOSE)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_bad_rows_do_not_move_it_and_still_count(bad):
    rows = gradients()
    rows[3, 4] = bad
    (out,) = run([rows], np.inf)
    np.testing.assert_allclose(out, np.delete(rows, 3, axis=0).sum(0) / WORKERS, **CLOSE)
    np.testing.assert_allclose(run([rows], 2.0, 3)[0], reference([rows], 2.0, 3)[0], **CLOSE)


def test_rows_at_the_aggregate_do_not_divide_by_zero():
    rows = np.zeros((WORKERS, SIZE), np.float32)
    np.testing.assert_array_equal(run([rows], 2.0, 3)[0], 0)
    center = gradients()[0]
    np.testing.assert_array_equal(run([np.tile(center, (WORKERS, 1))], 2.0, 3, center)[0], center)


def test_one_worker_within_the_radius_is_the_gradient_itself():
    rows = gradients(count=1)
    np.testing.assert_array_equal(run([rows])[0], rows[0])


def test_half_precision_keeps_a_float32_center():
    """Moves of 2^-10 a step, which bfloat16 could not add to 1."""
    rule = aggregate.centered_clip(radius=2.0**-10)
    params = {"x": jnp.ones(1, jnp.bfloat16), "none": None}
    state = aggregate.CenteredClipState({"x": jnp.ones(1), "none": None})
    assert jax.tree.map(lambda x: x.dtype, rule.init(params).center) == {"x": jnp.float32, "none": None}
    for _ in range(4):
        update, state = rule.update({"x": 2 * jnp.ones((3, 1), jnp.bfloat16), "none": None}, state)
    assert update["none"] is None
    assert update["x"].dtype == jnp.bfloat16
    np.testing.assert_allclose(state.center["x"], 1 + 4 * 2.0**-10, rtol=EPS)


BAD = {
    "radius_zero": (lambda: aggregate.centered_clip(radius=0.0), r"radius=0.0 must lie in \(0, inf\]"),
    "radius_negative": (lambda: aggregate.centered_clip(radius=-1.0), r"radius=-1.0 must lie in \(0, inf\]"),
    "radius_nan": (lambda: aggregate.centered_clip(radius=np.nan), "radius=nan"),
    "iterations_zero": (lambda: aggregate.centered_clip(iterations=0), r"iterations=0 must lie in \[1, inf\)"),
    "iterations_half": (lambda: aggregate.centered_clip(iterations=1.5), "iterations=1.5 must be a whole number"),
    "workers_zero": (lambda: aggregate.worker_momentum(0), r"num_workers=0 must lie in \[1, inf\)"),
    "workers_half": (lambda: aggregate.worker_momentum(2.5), "num_workers=2.5 must be a whole number"),
    "decay_one": (lambda: aggregate.worker_momentum(3, decay=1.0), r"decay=1.0 must lie in \[0, 1\)"),
    "decay_negative": (lambda: aggregate.worker_momentum(3, decay=-0.1), "decay=-0.1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    make, text = BAD[name]
    with pytest.raises(ValueError, match=text):
        make()


# Momentum.


@pytest.mark.parametrize("ema", [True, False])
def test_momentum_is_each_workers_own_decayed_sum(ema):
    tx = aggregate.worker_momentum(WORKERS, decay=0.75, ema=ema)
    state, expected = tx.init(jnp.zeros(SIZE)), np.zeros((WORKERS, SIZE))
    for step in range(4):
        rows = gradients(step)
        out, state = tx.update(jnp.asarray(rows), state)
        expected = 0.75 * expected + (0.25 if ema else 1.0) * rows
        np.testing.assert_allclose(out, expected, **CLOSE)
        np.testing.assert_array_equal(out, state.momenta)


def test_a_constant_gradient_is_reached_without_a_correction():
    tx = aggregate.worker_momentum(2, decay=0.5)
    rows = jnp.array([[1.0], [-4.0]])
    state = tx.init(jnp.zeros(1))
    for step in range(1, 4):
        out, state = tx.update(rows, state)
        np.testing.assert_array_equal(out, (1 - 0.5**step) * rows)


def test_without_memory_it_passes_on_what_comes():
    tx = aggregate.worker_momentum(WORKERS, decay=0.0)
    rows = jnp.asarray(gradients())
    np.testing.assert_array_equal(tx.update(rows, tx.init(jnp.zeros(SIZE)))[0], rows)


def test_a_bad_gradient_is_seen_once_and_does_not_stay():
    tx = aggregate.worker_momentum(3, decay=0.5)
    state = tx.init(jnp.zeros(2))
    good = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    _, state = tx.update(good, state)
    out, state = tx.update(good.at[1, 0].set(jnp.nan), state)
    np.testing.assert_array_equal(aggregate.finite_rows(out), [True, False, True])
    np.testing.assert_array_equal(state.momenta[1], good[1] / 2)
    out, _ = tx.update(good, state)
    np.testing.assert_array_equal(out[1], 0.75 * good[1])


def test_momentum_of_another_number_of_workers():
    tx = aggregate.worker_momentum(3)
    with pytest.raises(ValueError, match="worker_momentum was made for 3 gradients, but there are 5"):
        tx.update(gradients(), tx.init(jnp.zeros(SIZE)))


def test_a_sum_needs_a_radius_as_many_times_larger():
    """All of the rule is homogeneous: momenta and radius times 4 give 4 times the aggregate."""

    def chain(ema, radius):
        return optax.chain(
            aggregate.worker_momentum(WORKERS, decay=0.75, ema=ema), aggregate.centered_clip(radius=radius)
        )

    averaged, summed = chain(True, 1.0), chain(False, 4.0)
    states = [tx.init(jnp.zeros(SIZE)) for tx in (averaged, summed)]
    for step in range(3):
        rows = jnp.asarray(gradients(step))
        small, states[0] = averaged.update(rows, states[0])
        large, states[1] = summed.update(rows, states[1])
        np.testing.assert_allclose(large, 4 * small, **CLOSE)


# On a mesh.


def mesh(name):
    return jax.make_mesh((8,), (name,), axis_types=(jax.sharding.AxisType.Auto,))


def chained():
    return optax.chain(aggregate.worker_momentum(8), aggregate.centered_clip(radius=0.5, iterations=2))


def two_updates(tx, grads, **extra):
    state = tx.init(jax.tree.map(lambda x: x[0], grads) if "stacked" in extra else grads)
    extra.pop("stacked", None)
    for _ in range(2):
        update, state = tx.update(grads, state, **extra)
    return update


def test_workers_that_are_devices():
    """Each has its own row; the traffic beyond that of a reduce-scatter is K numbers for the momentum's look at bad
    rows, K for that of the clipping, and K in each of its two iterations."""
    rows = {"kernel": gradients(count=8).reshape(8, 3, 4), "bias": gradients(1, count=8)[:, :5]}
    expected = two_updates(chained(), jax.tree.map(jnp.asarray, rows), stacked=True)

    def worker(rows):
        return two_updates(aggregate.over_workers(chained(), "worker"), jax.tree.map(lambda x: x[0], rows))

    fn = jax.jit(jax.shard_map(worker, mesh=mesh("worker"), in_specs=P("worker"), out_specs=P(), check_vma=False))
    program = fn.lower(rows).compile()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), program(rows), expected)
    assert hlo.collective_bytes(program.as_text())["all-reduce"] <= 2 * 4 * 4 * 8


def test_coordinates_that_are_split_over_a_mesh():
    rows = gradients(count=8)[:, :8]
    expected = two_updates(chained(), jnp.asarray(rows), stacked=True)
    where = {"mesh": mesh("part"), "specs": P(None, "part")}
    placed = jax.device_put(rows, jax.sharding.NamedSharding(where["mesh"], where["specs"]))
    out = jax.jit(lambda rows: two_updates(chained(), rows, stacked=True, **where))(placed)
    np.testing.assert_allclose(out, expected, **CLOSE)
