"""Workers that are devices: each rule gives what it gives on a stack, at the traffic of a reduce-scatter."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from launch import hlo
from steelyard import aggregate

P = jax.sharding.PartitionSpec
REPLICATED = P()
WORKERS = 8
# Another order of sums over 40 coordinates, of rows of norm about 6, then a solve of condition below 30.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@functools.cache
def mesh():
    return jax.make_mesh((WORKERS,), ("worker",), axis_types=(jax.sharding.AxisType.Auto,))


def make_rows(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (5, 3), "bias": (16,), "gain": ()}
    return {name: rng.standard_normal((WORKERS, *shape)).astype(np.float32) for name, shape in shapes.items()}


def program(tx, out_specs=REPLICATED, steps=1):
    """`rows -> update` after some steps, each worker with its own row; compiled."""

    def worker(rows):
        grads = jax.tree.map(lambda x: x[0], rows)
        state = tx.init(grads)
        for _ in range(steps):
            update, state = tx.update(grads, state, grads)
        return update

    return jax.jit(jax.shard_map(worker, mesh=mesh(), in_specs=P("worker"), out_specs=out_specs, check_vma=False))


def on_stack(rule, rows, steps=1):
    params = jax.tree.map(lambda x: x[0], rows)
    state = rule.init(params)
    for _ in range(steps):
        update, state = rule.update(rows, state, params)
    return update


RULES = {
    "mean": aggregate.mean,
    "static": lambda: aggregate.static(jnp.arange(1.0, 9.0)),
    "conflict_free": aggregate.conflict_free,
    "distances": lambda: aggregate.from_distances(
        lambda gram, valid: jnp.argsort(jnp.sum(aggregate.pairwise_sqdist(gram, valid), axis=0)) / 8.0
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_over_workers_is_the_rule_on_the_stack(name):
    rule, rows = RULES[name](), make_rows()
    update = program(aggregate.over_workers(rule, "worker"), steps=2)(rows)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **CLOSE), update, on_stack(rule, rows, steps=2))


def test_a_bad_worker_is_left_out_on_all_devices():
    """Its bad entry is in one device's part alone, but every device must drop the whole row."""
    rows = make_rows()
    rows["bias"][3, 0] = np.nan
    rule = aggregate.from_distances(lambda gram, valid: valid / jnp.sum(valid))
    update = program(aggregate.over_workers(rule, "worker"))(rows)
    good = np.arange(WORKERS) != 3
    jax.tree.map(lambda u, x: np.testing.assert_allclose(u, x[good].mean(0), **CLOSE), update, rows)


def test_the_parts_of_a_chain_stay_where_they_are():
    """`gather=False` leaves flat parts, padded to a multiple of the workers."""
    rows = make_rows()
    tx = aggregate.over_workers(optax.chain(aggregate.mean(), optax.scale(-1.0)), "worker", gather=False)
    update = program(tx, P("worker"))(rows)
    for name, x in rows.items():
        flat = -x.mean(0).ravel()
        assert update[name].shape == (-(-flat.size // WORKERS) * WORKERS,)
        np.testing.assert_allclose(update[name][: flat.size], flat, **CLOSE)
        assert not np.any(update[name][flat.size :])


@pytest.mark.parametrize("name", ["conflict_free", "distances"])
def test_traffic_is_that_of_a_reduce_scatter_plus_the_gram_matrix(name):
    size = 64 * 32
    rows = {"kernel": np.ones((WORKERS, 64, 32), np.float32)}
    tx = aggregate.over_workers(RULES[name](), "worker", gather=False)
    moved = hlo.collective_bytes(program(tx, P("worker")).lower(rows).compile().as_text())
    assert set(moved) <= {"all-to-all", "all-reduce"}
    assert moved["all-to-all"] == 4 * size
    # The Gram matrix, and for rules on distances the norms, by which bad rows are found.
    assert moved["all-reduce"] == 4 * (WORKERS**2 + (WORKERS if name == "distances" else 0))


def test_transpose_workers_gives_each_device_its_part_of_every_row():
    x = np.arange(WORKERS * 16 * 3, dtype=np.float32).reshape(WORKERS, 16, 3)
    fn = jax.shard_map(
        lambda x: aggregate.transpose_workers(x[0], "worker")[None],
        mesh=mesh(),
        in_specs=P("worker"),
        out_specs=P("worker"),
    )
    parts = jax.jit(fn)(x)
    for device in range(WORKERS):
        np.testing.assert_array_equal(parts[device], x[:, 2 * device : 2 * device + 2])


@pytest.mark.parametrize("shape", [(), (9, 2)])
def test_transpose_workers_needs_a_leading_axis_that_divides(shape):
    with pytest.raises(ValueError, match=r"divides into 4 parts, got shape \("):
        jax.vmap(lambda x: aggregate.transpose_workers(x, "worker"), axis_name="worker")(jnp.ones((4, *shape)))
