"""Datasets: lengths, columns, reading by index, fingerprints, and what `check` refuses."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from steelyard.data import embedded, source

INFO = source.Info(
    input="x", feature_shape=(2,), label="label", num_classes=3, description="", version="1", split="train"
)


def _arrays(**columns):
    x = np.arange(10, dtype=np.float32).reshape(5, 2)
    return source.Arrays("toy", {"x": x, "label": np.array([0, 1, 2, 0, 1], np.int32), **columns}, INFO)


def _records(length=5):
    def decode(i):
        return {"x": np.full(2, i, np.float32), "label": np.int32(i % 3), "name": f"row {i}".encode()}

    return source.Records("toy", range(length), decode, INFO)


class Batched(list):
    """A source that counts its reads of several records at once."""

    calls = 0

    def __getitems__(self, indices):
        self.calls += 1
        return [self[i] for i in indices]


def test_arrays_take_rows_as_copies():
    arrays = _arrays()
    got = arrays.take(np.array([3, 0, 3]))
    np.testing.assert_array_equal(got["x"], [[6, 7], [0, 1], [6, 7]])
    got["x"][:] = -1
    assert arrays.columns["x"].min() == 0
    assert len(arrays) == 5


def test_records_take_decodes_and_stacks():
    got = _records().take(np.array([4, 1]))
    np.testing.assert_array_equal(got["x"], [[4, 4], [1, 1]])
    assert got["label"].dtype == np.int32
    assert got["name"].tolist() == [b"row 4", b"row 1"]


def test_several_records_are_read_at_once_where_the_source_can():
    kept = Batched({"x": np.float32(i)} for i in range(6))
    got = source.Records("toy", kept, source.as_mapping, INFO).take(np.array([5, 2, 0]))
    assert got["x"].tolist() == [5, 2, 0]
    assert kept.calls == 1


def test_materialize_reads_everything_in_order(monkeypatch):
    monkeypatch.setattr(source, "_CHUNK", 4)  # so that 11 records take three chunks
    records = _records(11)
    got = source.materialize(records)
    assert len(got) == 11
    for name, column in records.take(np.arange(11)).items():
        np.testing.assert_array_equal(got.columns[name], column)
    assert source.materialize(got) is got


def test_ragged_records_are_refused_with_their_shapes():
    ragged = source.Records("toy", range(3), lambda i: {"bag": np.zeros(i + 1)}, INFO)
    with pytest.raises(ValueError, match=r"toy: bag has rows of shapes \[\(1,\), \(2,\), \(3,\)\]"):
        ragged.take(np.arange(3))
    lists = dataclasses.replace(ragged, decode=lambda i: {"bag": [0] * (i + 1)})
    with pytest.raises(ValueError, match="bag has rows of shapes"):
        lists.take(np.arange(3))


@pytest.mark.parametrize("columns", [{}, {"a": np.zeros(3), "b": np.zeros(4)}])
def test_columns_must_have_one_length(columns):
    with pytest.raises(ValueError, match="one common length"):
        source.Arrays("toy", columns, INFO)


@pytest.mark.parametrize("name", source.RESERVED)
def test_reserved_names_are_refused(name):
    with pytest.raises(ValueError, match=name):
        _arrays(**{name: np.zeros(5)})
    with pytest.raises(ValueError, match=name):
        source.Records("toy", range(2), lambda i: {name: i}, INFO).take(np.arange(2))


def test_windows_do_not_overlap_and_drop_the_rest():
    corpus = bytes(range(250, 256)) + bytes(range(5))
    got = source.windows(corpus, 3)["tokens"]
    assert got.dtype == np.int32
    assert got.tolist() == [[250, 251, 252, 253], [254, 255, 0, 1]]


@pytest.mark.parametrize("length", [0, -2, 4])
def test_windows_refuses(length):
    with pytest.raises(ValueError, match=f"length={length}"):
        source.windows(b"abcd", length)


def test_fingerprint_is_a_hash_of_stated_facts():
    facts = ["toy", "train", "1", "", 5, 3, 4, {"a": 1}]
    expected = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=8).hexdigest()
    assert source.fingerprint(_arrays(), seed=3, batch=4, config={"a": 1}) == expected
    assert source.fingerprint(_arrays(), seed=np.int64(3), batch=np.int32(4), config={"a": 1}) == expected


def test_fingerprint_tells_streams_apart():
    arrays = _arrays()
    others = [dataclasses.replace(arrays, info=dataclasses.replace(INFO, **{field: "2"})) for field in
              ("version", "split", "options")]  # fmt: skip
    others += [dataclasses.replace(arrays, name="other"), _records(6)]
    prints = [source.fingerprint(other, seed=0, batch=2) for other in (arrays, *others)]
    prints += [source.fingerprint(arrays, seed=seed, batch=batch) for seed, batch in ((1, 2), (0, 3), (None, 2))]
    prints += [source.fingerprint(arrays, seed=0, batch=2, config={"crop": 2})]
    assert len(set(prints)) == len(prints)


def test_fingerprint_is_the_same_in_another_process():
    arguments = {"seed": 1, "batch": 8, "config": {"b": 1, "a": [2]}}
    here = source.fingerprint(embedded.digits(), **arguments)
    program = f"from steelyard import data; print(data.fingerprint(data.load('digits'), **{arguments!r}))"
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    there = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here


def test_check_passes_sound_data():
    source.check(_arrays())
    source.check(_arrays(), num_classes=3)
    source.check(_records())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_check_names_the_first_value_that_is_not_finite(value):
    x = np.zeros((5, 2), np.float32)
    x[3, 1], x[4, 0] = value, np.nan
    with pytest.raises(ValueError, match=rf"toy: column 'x', row 3, element \(1,\) holds {value}"):
        source.check(_arrays(x=x))


@pytest.mark.parametrize(("bad", "row"), [(3, 2), (-1, 0)])
def test_check_names_the_first_label_out_of_range(bad, row):
    label = np.array([0, 1, 2, 0, 1], np.int32)
    label[row] = bad
    with pytest.raises(ValueError, match=rf"column 'label', row {row} holds {bad}; labels must be in \[0, 3\)"):
        source.check(_arrays(label=label))


def test_check_takes_the_number_of_classes_of_the_model():
    with pytest.raises(ValueError, match=r"row 2 holds 2; labels must be in \[0, 2\)"):
        source.check(_arrays(), num_classes=2)


def test_check_refuses_labels_that_are_not_integers():
    with pytest.raises(ValueError, match="float32, but classes are integers"):
        source.check(_arrays(label=np.zeros(5, np.float32)))


def test_check_refuses_a_missing_label_column():
    arrays = _arrays()
    lost = dataclasses.replace(arrays, columns={"x": arrays.columns["x"]})
    with pytest.raises(ValueError, match="no column 'label', only x"):
        source.check(lost)


def test_check_reads_as_many_records_as_it_is_told():
    late = dataclasses.replace(_records(8), decode=lambda i: {"label": np.int32(9 if i == 6 else 0)})
    source.check(late, limit=6)
    with pytest.raises(ValueError, match="row 6 holds 9"):
        source.check(late, limit=None)
