"""Batches: a pure function of the step, on any number of hosts, from memory or through reading threads."""

import dataclasses
import itertools
import threading
import time

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard.data import order, pipeline, source

INFO = source.Info(
    input="x", feature_shape=(2,), label="label", num_classes=3, description="", version="1", split="train"
)


def _decode(i):
    return {"x": np.array([i, -i], np.float32), "label": np.int32(i % 3)}


def _records(length, decode=_decode):
    return source.Records("toy", range(length), decode, INFO)


def _dataset(kind, length):
    records = _records(length)
    return source.materialize(records) if kind == "arrays" else records


def _assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(got[name], expected[name])


both_kinds = pytest.mark.parametrize("kind", ["arrays", "records"])


@both_kinds
def test_a_batch_holds_the_rows_that_the_order_names(kind):
    stream = pipeline.batches(_dataset(kind, 10), batch=4, seed=3, num_steps=7, threads=3)
    for expected_step, (step, batch) in enumerate(stream):
        index = order.epoch_rows(range(4 * step, 4 * step + 4), 10, seed=3)
        assert step == expected_step
        _assert_same(batch, {**source.stack([_decode(int(i)) for i in index], "toy"), "index": index})
    assert expected_step == 6


@both_kinds
@pytest.mark.parametrize("hosts", [1, 2, 4, 8])
def test_hosts_together_see_the_global_batch(kind, hosts):
    dataset, options = _dataset(kind, 21), {"batch": 8, "seed": 0, "num_steps": 6, "threads": 4}
    alone = pipeline.batches(dataset, **options)
    parts = [pipeline.batches(dataset, host=host, hosts=hosts, **options) for host in range(hosts)]
    for (step, whole), *shares in zip(alone, *parts, strict=True):
        assert {share_step for share_step, _ in shares} == {step}
        _assert_same(source.concatenate([share for _, share in shares]), whole)


@both_kinds
def test_a_resumed_stream_equals_the_uninterrupted_one(kind):
    dataset, options = _dataset(kind, 13), {"batch": 4, "seed": 9, "threads": 5, "prefetch": 3}
    whole = list(pipeline.batches(dataset, num_steps=12, **options))
    for start in (0, 3, 7, 11):
        rest = pipeline.batches(dataset, start_step=start, num_steps=12 - start, **options)
        for (step, got), (expected_step, expected) in zip(rest, whole[start:], strict=True):
            assert step == expected_step
            _assert_same(got, expected)


def test_resuming_on_other_hosts_continues_the_order():
    dataset = _dataset("arrays", 10)
    seen = [b["index"] for h in range(2) for _, b in pipeline.batches(dataset, batch=4, seed=1, num_steps=3, host=h,
                                                                     hosts=2)]  # fmt: skip
    seen += [b["index"] for _, b in pipeline.batches(dataset, batch=4, seed=1, start_step=3, num_steps=2)]
    assert sorted(np.concatenate(seen)) == sorted(list(range(10)) * 2)


@both_kinds
@settings(max_examples=20, deadline=None)
@given(length=st.integers(1, 12), batch=st.integers(1, 9), seed=st.integers(0, 100))
def test_every_example_once_per_epoch(kind, length, batch, seed):
    steps = -(-3 * length // batch)
    stream = pipeline.batches(_dataset(kind, length), batch=batch, seed=seed, num_steps=steps, threads=2)
    seen = np.concatenate([columns["index"] for _, columns in stream])
    for epoch in range(3):
        assert sorted(seen[epoch * length : (epoch + 1) * length]) == list(range(length))


@pytest.mark.parametrize(("prefetch", "threads"), [(0, 16), (2, 0), (1, 1), (1, 16), (2, 3), (5, 2), (16, 16)])
def test_reading_ahead_changes_nothing(prefetch, threads):
    options = {"batch": 5, "seed": 2, "num_steps": 6}
    got = pipeline.batches(_records(17), prefetch=prefetch, threads=threads, **options)
    expected = pipeline.batches(_dataset("arrays", 17), **options)
    for (step, read), (expected_step, indexed) in zip(got, expected, strict=True):
        assert step == expected_step
        _assert_same(read, indexed)


def test_slow_reads_of_one_batch_run_at_the_same_time():
    running, most, lock = 0, 0, threading.Lock()

    def decode(i):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.02)
        with lock:
            running -= 1
        return _decode(i)

    next(pipeline.batches(_records(64, decode), batch=16, seed=0, prefetch=1, threads=8))
    assert 2 <= most <= 8


def test_threads_end_with_the_iterator():
    before = set(threading.enumerate())  # streams of other tests may still be ending
    stream = pipeline.batches(_records(8), batch=4, seed=0, threads=3)
    next(stream)
    readers = set(threading.enumerate()) - before
    assert readers
    del stream
    for reader in readers:
        reader.join(timeout=10)
        assert not reader.is_alive()


def test_an_error_in_a_thread_reaches_the_caller():
    def decode(i):
        raise OSError("the shard is gone")

    with pytest.raises(OSError, match="the shard is gone"):
        next(pipeline.batches(_records(4, decode), batch=2, seed=0))


def test_a_stream_without_end():
    dataset = _dataset("records", 5)
    for step, _ in itertools.islice(pipeline.batches(dataset, batch=2, seed=0, start_step=10**12, threads=2), 3):
        assert step >= 10**12


@both_kinds
def test_no_steps_is_an_empty_stream(kind):
    assert list(pipeline.batches(_dataset(kind, 5), batch=2, seed=0, num_steps=0)) == []


def test_columns_on_request():
    options = {"batch": 4, "seed": 0, "start_step": 3, "num_steps": 1, "host": 1, "hosts": 2}
    ((_, batch),) = pipeline.batches(_dataset("arrays", 5), index=False, position=True, **options)
    assert set(batch) == {"x", "label", "position"}
    assert batch["position"].tolist() == [14, 15]


@both_kinds
def test_a_transform_sees_the_whole_batch(kind):
    def centre(batch):
        return {"x": batch["x"] - batch["x"].mean(axis=0), "index": batch["index"]}

    options = {"batch": 6, "seed": 0, "num_steps": 3, "threads": 4}
    plain = pipeline.batches(_dataset(kind, 9), **options)
    for (_, before), (_, after) in zip(
        plain, pipeline.batches(_dataset(kind, 9), transform=centre, **options), strict=True
    ):
        _assert_same(after, dict(centre(before)))


def test_grain_map_datasets_may_bring_their_own_order():
    shuffled = grain.MapDataset.range(20).seed(7).shuffle().repeat(None)
    dataset = source.Records("grain", shuffled, lambda i: {"x": np.int32(i)}, INFO)
    for step, batch in pipeline.batches(dataset, batch=8, seed=None, num_steps=6, threads=2):
        assert batch["x"].tolist() == [shuffled[step * 8 + i] for i in range(8)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch": 3, "hosts": 2}, "batch=3 over hosts=2"),
        ({"batch": 2, "start_step": -1}, "step=-1"),
        ({"batch": 2, "num_steps": -1}, "num_steps=-1"),
        ({"batch": 2, "seed": -1}, "seed=-1"),
        ({"batch": 2, "prefetch": -1}, "prefetch=-1"),
        ({"batch": 2, "threads": -1}, "threads=-1"),
    ],
)
def test_batches_refuses_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        pipeline.batches(_dataset("arrays", 4), **{"seed": 0, **arguments})


def test_an_empty_dataset_is_refused():
    with pytest.raises(ValueError, match="length=0"):
        pipeline.batches(_records(0), batch=1, seed=0)
    with pytest.raises(ValueError, match="without examples"):
        pipeline.evaluation(_records(0), batch=1)


@both_kinds
@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("length", [1, 8, 10, 17])
def test_evaluation_sees_every_example_once_in_batches_of_one_shape(kind, hosts, length):
    dataset = _dataset(kind, length)
    parts = [list(pipeline.evaluation(dataset, batch=8, host=h, hosts=hosts, threads=2)) for h in range(hosts)]
    assert {len(part) for part in parts} == {-(-length // 8)}
    rows = []
    for shares in zip(*parts, strict=True):
        assert {len(share["x"]) for share in shares} == {8 // hosts}
        rows.append(source.concatenate(shares))
    joined = source.concatenate(rows)
    real = joined["mask"]
    assert real.dtype == bool
    assert joined["index"][real].tolist() == list(range(length))
    np.testing.assert_array_equal(joined["x"][real, 0], np.arange(length))
    np.testing.assert_array_equal(joined["x"][~real, 0], length - 1)


def test_evaluation_transforms_too():
    def double(batch):
        return {"x": 2 * batch["x"], "mask": batch["mask"]}

    (batch,) = pipeline.evaluation(_dataset("arrays", 3), batch=4, transform=double)
    assert batch["x"][:, 0].tolist() == [0, 2, 4, 4]
    assert batch["mask"].tolist() == [True, True, True, False]


def test_evaluation_refuses_at_once():
    with pytest.raises(ValueError, match="batch=5 over hosts=2"):
        pipeline.evaluation(_dataset("arrays", 3), batch=5, hosts=2)


def test_strings_of_unequal_width_join():
    words = [b"a", b"bcd", b"ef", b"ghijk"]
    dataset = dataclasses.replace(_records(4), decode=lambda i: {"word": words[i]})
    (batch,) = pipeline.evaluation(dataset, batch=4, prefetch=1, threads=4)
    assert batch["word"].tolist() == words
