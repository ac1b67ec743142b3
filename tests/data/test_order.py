"""The global order: the same rows on any number of hosts, every example once per epoch."""

import threading

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
