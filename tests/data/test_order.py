"""The global order: the same rows on any number of hosts, every example once per epoch."""

import itertools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.data import order

MANY = settings(max_examples=30, deadline=None)


@MANY
@given(step=st.integers(0, 10**9), share=st.integers(1, 5))
def test_hosts_together_read_what_one_host_reads(step, share):
    batch = 8 * share
    alone = list(order.rows(step, batch=batch))
    assert alone == list(range(step * batch, (step + 1) * batch))
    for hosts in (1, 2, 4, 8):
        parts = [order.rows(step, batch=batch, host=host, hosts=hosts) for host in range(hosts)]
        assert [position for part in parts for position in part] == alone
        assert {len(part) for part in parts} == {batch // hosts}


def test_rows_of_consecutive_steps_follow_each_other():
    assert [p for step in range(5) for p in order.rows(step, batch=3)] == list(range(15))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"step": 0, "batch": 8, "hosts": 3}, "batch=8 over hosts=3"),
        ({"step": 0, "batch": 0}, "batch=0"),
        ({"step": 0, "batch": 4, "hosts": 0}, "hosts=0"),
        ({"step": 0, "batch": 4, "host": 2, "hosts": 2}, "host=2"),
        ({"step": 0, "batch": 4, "host": -1}, "host=-1"),
        ({"step": -1, "batch": 4}, "step=-1"),
    ],
)
def test_rows_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        order.rows(**arguments)


def _definition(positions, length, seed):
    """The order written out: one permutation after the other."""
    epochs = 1 + max(positions, default=0) // length
    whole = np.concatenate([np.random.default_rng((seed, e)).permutation(length) for e in range(epochs)])
    return whole[list(positions)]


@MANY
@given(length=st.integers(1, 12), start=st.integers(0, 40), count=st.integers(0, 40), seed=st.integers(0, 2**40))
def test_epoch_rows_is_the_concatenation_of_permutations(length, start, count, seed):
    positions = range(start, start + count)
    got = order.epoch_rows(positions, length, seed)
    assert got.dtype == np.int32
    np.testing.assert_array_equal(got, _definition(positions, length, seed))


@MANY
@given(st.lists(st.integers(0, 60), max_size=20))
def test_positions_may_come_in_any_order(positions):
    np.testing.assert_array_equal(order.epoch_rows(positions, 7, seed=3), _definition(positions, 7, 3))
    as_array = np.asarray(positions, np.int64)
    np.testing.assert_array_equal(order.epoch_rows(as_array, 7, seed=3), _definition(positions, 7, 3))


@pytest.mark.parametrize("step", [2, -1])
def test_ranges_with_a_stride(step):
    positions = range(20, 3, step) if step < 0 else range(3, 20, step)
    np.testing.assert_array_equal(order.epoch_rows(positions, 30, seed=0), _definition(positions, 30, 0))


@pytest.mark.parametrize(("length", "batch"), [(10, 4), (7, 3), (5, 8), (12, 4), (1, 3)])
def test_every_example_once_per_epoch(length, batch):
    epochs = order.EpochOrder(length, seed=1)
    steps = -(-3 * length // batch)
    stream = np.concatenate([epochs(order.rows(step, batch=batch)) for step in range(steps)])
    for epoch in range(3):
        assert sorted(stream[epoch * length : (epoch + 1) * length]) == list(range(length))


def test_epochs_and_seeds_differ():
    first, second = order.epoch_rows(range(200), 100, seed=0).reshape(2, 100)
    other = order.epoch_rows(range(100), 100, seed=1)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_the_memory_changes_nothing_and_stays_small():
    kept = order.EpochOrder(11, seed=5)
    for start in (0, 100, 30, 4, 1000, 0):
        positions = range(start, start + 25)
        got = kept(positions)
        np.testing.assert_array_equal(got, order.epoch_rows(positions, 11, seed=5))
        got[:] = -1  # the caller's own copy
        np.testing.assert_array_equal(kept(positions), order.epoch_rows(positions, 11, seed=5))
    assert len(kept._permutations) <= 2


def test_threads_see_one_order():
    shared, got = order.EpochOrder(50, seed=2), {}

    def read(worker):
        got[worker] = np.concatenate([shared(range(i, i + 20)) for i in range(0, 400, 20)])

    threads = [threading.Thread(target=read, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for worker in range(8):
        np.testing.assert_array_equal(got[worker], _definition(range(400), 50, 2))


def test_without_a_seed_the_order_is_the_datasets_own():
    assert order.epoch_rows(range(3, 12), 5, seed=None).tolist() == [3, 4, 0, 1, 2, 3, 4, 0, 1]


@pytest.mark.parametrize(
    ("positions", "length", "seed", "message"),
    [(range(3), 0, 0, "length=0"), (range(3), 4, -1, "seed=-1"), ([2, -3], 4, 0, "position -3")],
)
def test_epoch_rows_refuses(positions, length, seed, message):
    with pytest.raises(ValueError, match=message):
        order.epoch_rows(positions, length, seed)


@pytest.mark.parametrize("mode", order.ORDERS)
@pytest.mark.parametrize("num_examples", [0, 1, 23])
def test_epoch_order_is_a_permutation_and_may_be_traced(mode, num_examples):
    key = jax.random.key(3)
    traced = jax.jit(jax.vmap(lambda epoch: order.epoch_order(num_examples, epoch, key, mode=mode)))(jnp.arange(4))
    for epoch in range(4):
        plain = order.epoch_order(num_examples, epoch, key, mode=mode)
        assert plain.dtype == jnp.int32
        assert sorted(plain.tolist()) == list(range(num_examples))
        np.testing.assert_array_equal(traced[epoch], plain)


def test_epoch_order_depends_on_the_epoch_only_when_reshuffled():
    key = jax.random.key(0)
    orders = {mode: np.stack([order.epoch_order(50, e, key, mode=mode) for e in range(3)]) for mode in order.ORDERS}
    np.testing.assert_array_equal(orders["single"], np.tile(jax.random.permutation(key, 50), (3, 1)))
    np.testing.assert_array_equal(orders["none"], np.tile(np.arange(50), (3, 1)))
    again = [jax.random.permutation(jax.random.fold_in(key, e), 50) for e in range(3)]
    np.testing.assert_array_equal(orders["reshuffle"], again)
    assert len({row.tobytes() for row in orders["reshuffle"]}) == 3
    assert not np.array_equal(orders["single"][0], order.epoch_order(50, 0, jax.random.key(1), mode="single"))


def _normalized_pair(x):
    """Batch normalization of two numbers, without an epsilon: -1 for the smaller, 1 for the larger."""
    return (x - jnp.mean(x)) / jnp.std(x)


def test_a_single_shuffle_with_batch_normalization_trains_another_problem():
    """Fit y by gamma BN(x) with batches of two: the optimum is a mean of (y_larger - y_smaller) / 2 over pairs.

    Over the fixed pairs of a single shuffle, over all pairs when reshuffled; both differ from the full batch's.
    """
    rng = np.random.default_rng(1)
    x = rng.permutation(8).astype(float)
    y = x / 4 + rng.normal(size=8)

    def optimum(pairs):
        return np.mean([(y[i] - y[j]) / 2 * (1 if x[i] > x[j] else -1) for i, j in pairs])

    key = jax.random.key(5)
    expected = {
        "single": optimum(np.asarray(order.epoch_order(8, 0, key, mode="single")).reshape(4, 2)),
        "reshuffle": optimum(list(itertools.combinations(range(8), 2))),
        "full batch": np.mean(y * (x - x.mean()) / x.std()),
    }
    assert min(abs(a - b) for a, b in itertools.combinations(expected.values(), 2)) > 0.01

    def train(mode, epochs):
        """SGD on (gamma BN(x) - y)^2 / 2, at the rate 1 / (1 + step), which makes gamma the mean of the optima."""
        features, labels = jnp.asarray(x), jnp.asarray(y)

        def step(gamma, batch_and_count):
            batch, count = batch_and_count
            grad = jax.grad(lambda g: jnp.mean((g * _normalized_pair(features[batch]) - labels[batch]) ** 2) / 2)
            return gamma - grad(gamma) / (1 + count), None

        orders = jax.vmap(lambda e: order.epoch_order(8, e, key, mode=mode))(jnp.arange(epochs))
        batches = orders.reshape(-1, 2)
        return jax.lax.scan(step, jnp.zeros(()), (batches, jnp.arange(len(batches))))[0]

    # The gradient is gamma - target of the pair, so at these rates gamma is exactly the running mean of the targets:
    # after whole epochs the single shuffle's own mean, up to float32; the other's is a sample mean over random pairs.
    np.testing.assert_allclose(jax.jit(train, static_argnums=(0, 1))("single", 50), expected["single"], atol=1e-5)
    epochs = 20_000
    spread = np.std([(y[i] - y[j]) / 2 * (1 if x[i] > x[j] else -1) for i, j in itertools.combinations(range(8), 2)])
    got = jax.jit(train, static_argnums=(0, 1))("reshuffle", epochs)
    assert abs(got - expected["reshuffle"]) < 4 * spread / np.sqrt(4 * epochs)
    assert abs(got - expected["single"]) > 0.01


@pytest.mark.parametrize(
    ("num_examples", "mode", "message"),
    [(4, "reshufle", "did you mean 'reshuffle'"), (-1, "single", r"num_examples=-1 must lie in \[0, inf\)")],
)
def test_epoch_order_refuses(num_examples, mode, message):
    with pytest.raises(ValueError, match=message):
        order.epoch_order(num_examples, 0, jax.random.key(0), mode=mode)
