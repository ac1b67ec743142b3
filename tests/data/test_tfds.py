"""TFDS datasets without TensorFlow: a tiny one made here, and the prepared ones where their folder is present."""

import os
import pathlib
import shutil
import sys

import numpy as np
import pytest

from steelyard import data

tfds = pytest.importorskip("tensorflow_datasets")

_PREPARED = pathlib.Path(
    os.environ.get("STEELYARD_DATA_DIR") or pathlib.Path(__file__).parents[2] / "../shared/data/tfds"
)


def _prepared(name):
    return pytest.mark.skipif(
        not (_PREPARED / name).is_dir(), reason=f"no {name} in {_PREPARED}; set STEELYARD_DATA_DIR to its folder"
    )


def _features(i):
    return {
        "image": np.full((2, 2, 1), i, np.uint8),
        "kind": i % 3,
        "place": {"x": i / 4, "id": 2**40 + i},
        "pair": np.array([i, -i], np.int32),
        "note": f"note {i}",
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with one prepared dataset, `tiny`: 10 examples to train and 4 to test."""

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.2.0")
        code_path = None  # found through importlib_resources otherwise, which TFDS does not install by itself

        def _info(self):
            features = {
                "image": tfds.features.Tensor(shape=(2, 2, 1), dtype=np.uint8),
                "kind": tfds.features.ClassLabel(num_classes=3),
                "place": {"x": np.float32, "id": np.int64},
                "pair": tfds.features.Sequence(np.int32),
                "note": tfds.features.Text(),
            }
            return tfds.core.DatasetInfo(
                builder=self,
                description="Tiny.",
                features=tfds.features.FeaturesDict(features),
                supervised_keys=("image", "kind"),
                disable_shuffling=True,
            )

        def _split_generators(self, dl_manager):
            del dl_manager
            return {"train": self._generate_examples(10), "test": self._generate_examples(4)}

        def _generate_examples(self, count):
            yield from ((i, _features(i)) for i in range(count))

    path = tmp_path_factory.mktemp("tfds")
    Tiny(data_dir=path, file_format="array_record").download_and_prepare()
    return path


def test_records_decode_to_flat_columns_of_the_declared_types(folder):
    source = data.load("tfds:tiny", data_dir=folder)
    assert isinstance(source, data.Records)
    assert len(source) == 10
    got = source.take(np.array([7, 2]))
    expected = {
        "image": np.stack([np.full((2, 2, 1), i, np.uint8) for i in (7, 2)]),
        "kind": np.array([1, 2], np.int32),
        "place/x": np.array([7 / 4, 2 / 4], np.float32),
        "place/id": np.array([2**40 + 7, 2**40 + 2], np.int64),
        "pair": np.array([[7, -7], [2, -2]], np.int32),
        "note": np.array([b"note 7", b"note 2"]),
    }
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name].dtype == expected[name].dtype
        np.testing.assert_array_equal(got[name], expected[name])


def test_info_says_what_the_supervised_keys_say(folder):
    info = data.load("tfds:tiny", split="test", data_dir=folder).info
    assert (info.input, info.feature_shape, info.label, info.num_classes) == ("image", (2, 2, 1), "kind", 3)
    assert (info.version, info.split, info.description) == ("tiny/1.2.0", "test", "Tiny.")


def test_tensorflow_is_not_imported(folder):
    data.load("tfds:tiny", data_dir=folder).take(np.array([0]))
    assert "tensorflow" not in sys.modules


@pytest.mark.parametrize("split", ["train", "test", "train[:30%]", "train[4:]"])
def test_memory_and_threads_give_the_same_batches(folder, split):
    records = data.load("tfds:tiny", split=split, data_dir=str(folder))
    arrays = data.load("tfds:tiny", split=split, data_dir=folder, in_memory=True)
    assert isinstance(arrays, data.Arrays)
    assert len(arrays) == len(records) == {"train": 10, "test": 4, "train[:30%]": 3, "train[4:]": 6}[split]
    options = {"batch": 4, "seed": 0, "num_steps": 4}
    read = data.batches(records, threads=3, **options)
    for (_, got), (_, expected) in zip(read, data.batches(arrays, **options), strict=True):
        for name in expected:
            np.testing.assert_array_equal(got[name], expected[name])
    assert data.fingerprint(records, seed=0, batch=4) == data.fingerprint(arrays, seed=0, batch=4)


def test_images_become_float_in_a_transform(folder):
    source = data.load("tfds:tiny", split="test", data_dir=folder)
    (batch,) = data.evaluation(source, batch=4, transform=data.to_unit())
    assert batch["image"].dtype == np.float32
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], (np.arange(4) / 255).astype(np.float32))
    assert batch["kind"].dtype == np.int32


@pytest.mark.parametrize(
    ("column", "message"),
    [(np.zeros(2, np.float32), "column 'image' is float32, not uint8"), (None, "no column 'image', only label")],
)
def test_only_bytes_are_scaled(column, message):
    batch = {"label": np.zeros(2)} if column is None else {"image": column}
    with pytest.raises(ValueError, match=message):
        data.to_unit()(batch)


def test_texts_become_windows(folder):
    got = data.load("tfds:tiny", split="test", data_dir=folder, length=4)
    corpus = b"note 0\nnote 1\nnote 2\nnote 3"
    rows = [list(corpus[i : i + 5]) for i in range(0, 25, 5)]
    assert got.columns["tokens"].tolist() == rows
    assert (got.info.input, got.info.num_classes, got.info.feature_shape) == ("tokens", 256, (5,))
    assert got.info.options == "text=note, length=4"


@pytest.mark.parametrize(
    ("options", "message"),
    [({"text": "note"}, "needs length="), ({"text": "image", "length": 4}, "text='image' must be a text column.*note")],
)
def test_bad_text_options(folder, options, message):
    with pytest.raises(ValueError, match=message):
        data.load("tfds:tiny", data_dir=folder, **options)


def test_without_tfds_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'steelyard\[train\]'"):
        data.load("tfds:tiny")


@pytest.mark.parametrize("name", ["tine", "tiny:9.9.9", "tiny/blue"])
def test_an_absent_dataset_lists_what_is_there(folder, name):
    with pytest.raises(FileNotFoundError, match=f"no dataset tfds:{name} in data_dir=.*tiny.*tfds build {name}"):
        data.load(f"tfds:{name}", data_dir=folder)


def test_an_absent_folder_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"nowhere'; found there: nothing\. Point data_dir"):
        data.load("tfds:tiny", data_dir=tmp_path / "nowhere")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "from_environment"))
    with pytest.raises(FileNotFoundError, match="from_environment'; found there: nothing"):
        data.load("tfds:tiny")


def test_an_unknown_split_lists_those_that_exist(folder):
    with pytest.raises(ValueError, match=r"Unknown split 'trian'.*train"):
        data.load("tfds:tiny", split="trian", data_dir=folder)


def test_files_without_random_access_are_refused_with_the_way_out(folder, tmp_path):
    shutil.copytree(folder / "tiny", tmp_path / "tiny")
    facts = tmp_path / "tiny/1.2.0/dataset_info.json"
    facts.write_text(facts.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"tfds:tiny: .*random access.*tfds build tiny --file_format=array_record"):
        data.load("tfds:tiny", data_dir=tmp_path)


def test_opening_leaves_the_log_level_alone(folder, capfd):
    from absl import logging

    logging.set_verbosity(logging.INFO)
    try:
        data.load("tfds:tiny", data_dir=folder)
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(logging.WARNING)
    assert capfd.readouterr().out == ""


@_prepared("mnist_10k")
def test_mnist_10k():
    source = data.load("tfds:mnist_10k", data_dir=_PREPARED)
    assert len(source) == 8000
    assert (source.info.input, source.info.feature_shape, source.info.num_classes) == ("image", (28, 28, 1), 10)
    data.check(source, limit=64)
    arrays = data.load("tfds:mnist_10k", data_dir=_PREPARED, split="test", in_memory=True)
    data.check(arrays)
    assert arrays.columns["image"].shape == (2000, 28, 28, 1)
    assert arrays.columns["image"].dtype == np.uint8


@_prepared("adult_30k")
def test_adult_30k():
    source = data.load("tfds:adult_30k", data_dir=_PREPARED, split="test[:64]")
    assert (source.info.input, source.info.label, source.info.num_classes) == (None, "income", 2)
    _, batch = next(data.batches(source, batch=32, seed=0, threads=2))
    kinds = {name: column.dtype.kind for name, column in batch.items()}
    assert sorted(kinds.values()) == sorted("f" * 5 + "S" * 8 + "ii")  # 5 numbers, 8 strings, income and index
    assert kinds["sex"] == "S"
    data.check(source)


@_prepared("tiny_shakespeare_bytes")
def test_tiny_shakespeare_bytes():
    source = data.load("tfds:tiny_shakespeare_bytes", data_dir=_PREPARED, length=63)
    assert source.columns["tokens"].shape[1] == 64
    assert len(source) > 15_000  # 90% of 1.1 MB in rows of 64 bytes
    data.check(source)
    assert b"Citizen" in source.columns["tokens"].astype(np.uint8).tobytes()
