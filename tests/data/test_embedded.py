"""Embedded datasets: shapes, scales, fixed splits, and a corpus that is the same wherever Python is."""

import pathlib
import sys
import sysconfig

import numpy as np
import pytest
from sklearn import datasets

from steelyard import data
from steelyard.data import embedded

TABLES = {"breast_cancer": datasets.load_breast_cancer, "wine": datasets.load_wine}


def _both(load, **options):
    return load(split="train", **options), load(split="test", **options)


def _pool(column, load, **options):
    """A column of both splits, as a sorted list of rows."""
    joined = np.concatenate([part.columns[column].reshape(len(part), -1) for part in _both(load, **options)])
    return sorted(map(tuple, joined.tolist()))


def test_digits():
    train, test = _both(embedded.digits)
    assert (len(train), len(test)) == (1797 - len(test), len(test))
    for part in (train, test):
        image, label = part.columns["image"], part.columns["label"]
        assert image.shape == (len(part), 8, 8, 1)
        assert (image.dtype, label.dtype) == (np.float32, np.int32)
        assert image.min() == 0
        assert image.max() == 1
        assert part.info.feature_shape == image.shape[1:]
        assert part.info.num_classes == 10
    raw = datasets.load_digits()
    # Sixteenths are exact in float32.
    assert _pool("image", embedded.digits) == sorted(map(tuple, (raw.data / 16).tolist()))


def test_noise_moves_a_share_of_the_training_labels_to_other_classes():
    clean, some, more = (embedded.digits(label_noise=share) for share in (0.0, 0.2, 0.4))
    wrong = [part.columns["label"] != clean.columns["label"] for part in (some, more)]
    assert [w.sum() for w in wrong] == [round(share * len(clean)) for share in (0.2, 0.4)]
    assert np.all(wrong[1][wrong[0]])  # those of the smaller share are among those of the greater
    assert set(more.columns["label"]) == set(range(10))
    np.testing.assert_array_equal(more.columns["image"], clean.columns["image"])
    assert some.info.version != clean.info.version
    noisy, test = (embedded.digits(split="test", label_noise=share).columns["label"] for share in (0.4, 0.0))
    np.testing.assert_array_equal(noisy, test)
    with pytest.raises(ValueError, match=r"label_noise=2 must lie in \[0, 1\]"):
        embedded.digits(label_noise=2)


@pytest.mark.parametrize("name", TABLES)
def test_tables_hold_the_rows_of_their_source_once(name):
    load, raw = getattr(embedded, name), TABLES[name]()
    expected = sorted(map(tuple, raw.data.astype(np.float32).tolist()))
    assert _pool("features", load, standardize=False) == expected
    assert load().info.num_classes == len(raw.target_names)


@pytest.mark.parametrize("name", ["digits", *TABLES])
def test_splits_are_stratified(name):
    train, test = _both(getattr(embedded, name))
    counts = [np.bincount(part.columns["label"]) for part in (train, test)]
    total = counts[0] + counts[1]
    np.testing.assert_array_equal(counts[1], [round(0.2 * count) for count in total])


def test_diabetes():
    train, test = _both(embedded.diabetes)
    assert (len(train), len(test)) == (354, 88)  # 88 = round(0.2 * 442)
    assert train.info.num_classes is None
    assert train.info.label == "target"
    assert _pool("target", embedded.diabetes) == sorted((t,) for t in datasets.load_diabetes().target)


@pytest.mark.parametrize("name", [*TABLES, "diabetes"])
def test_standardized_features_use_the_training_statistics(name):
    load = getattr(embedded, name)
    plain, scaled = _both(load, standardize=False), _both(load)
    mean = plain[0].columns["features"].mean(axis=0, dtype=np.float64)
    std = plain[0].columns["features"].std(axis=0, dtype=np.float64)
    for before, after in zip(plain, scaled, strict=True):
        # The reference starts from rounded inputs: a relative 6e-8 of values up to some 30 standard deviations from 0.
        expected = (before.columns["features"] - mean) / std
        np.testing.assert_allclose(after.columns["features"], expected, atol=2e-5)
    assert plain[0].info.version == scaled[0].info.version
    assert plain[0].info.options != scaled[0].info.options


@pytest.mark.parametrize("name", ["digits", "breast_cancer", "wine", "diabetes", "python_source"])
def test_loading_twice_gives_the_same(name):
    first, second = (getattr(embedded, name)(split="test") for _ in range(2))
    assert first.info == second.info
    for column in first.columns:
        np.testing.assert_array_equal(first.columns[column], second.columns[column])


@pytest.mark.parametrize("name", ["digits", "breast_cancer", "wine", "diabetes", "python_source"])
def test_embedded_data_are_sound(name):
    for part in _both(getattr(embedded, name)):
        data.check(part)
        column = part.columns[part.info.input]
        assert column.shape[1:] == part.info.feature_shape
        with pytest.raises(ValueError, match="split='validation'"):
            getattr(embedded, name)(split="validation")


def test_python_files_are_in_one_split_each():
    train, test = embedded.python_files("train"), embedded.python_files("test")
    assert not set(train) & set(test)
    assert train == sorted(set(train))
    assert train == embedded.python_files("train")
    for name in train + test:
        parts = pathlib.PurePosixPath(name).parts
        assert not {"site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"} & set(parts)
        assert not parts[-1].startswith("_sysconfigdata")


def test_membership_depends_on_the_name_alone(tmp_path, monkeypatch):
    names = embedded.python_files("train")[:6] + embedded.python_files("test")[:3]
    noise = ["site-packages/abc.py", "_sysconfigdata_x.py", "config-3-linux/ast.py", "test/ast.py", "lib2to3/pytree.py"]
    for name in [*names, *noise, "readme.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n" * 50)
    monkeypatch.setattr(sysconfig, "get_path", lambda key: str(tmp_path))
    assert embedded.python_files("train") == names[:6]
    assert embedded.python_files("test") == names[6:]
    assert len(embedded.python_source(split="test", length=9)) == 3 * 300 // 10


def test_no_source_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda key: str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="no Python source under"):
        embedded.python_source()


def test_python_source_is_its_files_cut_in_windows():
    got = embedded.python_source(split="test", length=31)
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    corpus = b"".join((root / name).read_bytes() for name in embedded.python_files("test"))
    assert got.columns["tokens"].shape == (len(corpus) // 32, 32)
    assert got.columns["tokens"].astype(np.uint8).tobytes() == corpus[: len(corpus) // 32 * 32]
    assert got.info.num_classes == 256


def test_python_source_has_a_sensible_size():
    sizes = [part.columns["tokens"].size for part in _both(embedded.python_source)]
    assert 2e6 < sum(sizes) < 8e6
    assert 0.1 < sizes[1] / sum(sizes) < 0.3


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'steelyard\[train\]'"):
        embedded.digits()
