"""Datasets that need no download: four of scikit-learn's, and the source code of Python's standard library.

Every set has a fixed split, 80% `train` and 20% `test`, drawn within each class where there are classes. The split
does not depend on any seed of a run.

Sources: "Optical Recognition of Handwritten Digits", "Breast Cancer Wisconsin (Diagnostic)" and "Wine" (UCI Machine
Learning Repository); "Least Angle Regression" (2004) for the diabetes data.
"""

import hashlib
import importlib
import os
import pathlib
import platform
import sysconfig
from collections.abc import Iterator
from types import ModuleType

import numpy as np
from jaxtyping import Float, Int

from steelyard import choices
from steelyard.data import source as source_lib

SPLITS = ("train", "test")
_TEST_SHARE = 0.2
_SPLIT_SEED = 0

# Hash values in [0, 1): below the first a file is for training, between the two for testing, and above it is left
# out. Half of the files, about 4 MB, load in a moment.
_TRAIN_FILES, _CORPUS_FILES = 0.4, 0.5
# Tests and idlelib are missing from many installations, lib2to3 from new ones; the other two are tables that a
# program wrote.
_LEFT_OUT = frozenset({"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "__pycache__"})
_MACHINE_MADE = ("_sysconfigdata", "sitecustomize", "usercustomize")


def digits(*, split: str = "train", label_noise: float = 0.0) -> source_lib.Arrays:
    """Handwritten digits: `image` float32 [n, 8, 8, 1] in [0, 1], `label` int32 in [0, 10). 1,797 in all.

    Args:
      split: "train" or "test".
      label_noise: share of the training labels, chosen once and for all, that are replaced by one of the nine others;
        in [0, 1]. The test split stays clean.
    """
    choices.require_within("label_noise", label_noise, "[0, 1]")
    raw = _sklearn().load_digits()
    columns = {"image": (raw.images[..., None] / 16).astype(np.float32), "label": raw.target.astype(np.int32)}
    chosen = _split_rows(len(raw.target), raw.target, split)
    if split == "train":
        columns["label"] = _relabelled(columns["label"], chosen, label_noise)
    info = source_lib.Info(
        input="image",
        feature_shape=(8, 8, 1),
        label="label",
        num_classes=10,
        description="8 x 8 handwritten digits (UCI), pixels divided by 16.",
        version=source_lib.digest(columns["image"], columns["label"]),
        split=split,
        options=f"label_noise={label_noise}" if label_noise else "",
    )
    return source_lib.Arrays("digits", {name: column[chosen] for name, column in columns.items()}, info)


def breast_cancer(*, split: str = "train", standardize: bool = True) -> source_lib.Arrays:
    """Tumours: `features` float32 [n, 30], `label` int32 in [0, 2) (0: malignant). 569 in all.

    Args:
      split: "train" or "test".
      standardize: subtract the mean and divide by the standard deviation of the training split, in both splits.
    """
    raw = _sklearn().load_breast_cancer()
    description = "30 measurements of cell nuclei (UCI, diagnostic); label 0 is malignant, 1 benign."
    return _table("breast_cancer", raw.data, raw.target, split, standardize, description)


def wine(*, split: str = "train", standardize: bool = True) -> source_lib.Arrays:
    """Wines: `features` float32 [n, 13], `label` int32 in [0, 3). 178 in all. Options as in `breast_cancer`."""
    raw = _sklearn().load_wine()
    return _table("wine", raw.data, raw.target, split, standardize, "Chemical analysis of three wines (UCI).")


def diabetes(*, split: str = "train", standardize: bool = True) -> source_lib.Arrays:
    """Patients: `features` float32 [n, 10], `target` float32 (25 to 346), progression after a year. 442 in all.

    Options as in `breast_cancer`; the target is never scaled.
    """
    raw = _sklearn().load_diabetes(scaled=False)
    description = "Ten baseline variables of diabetes patients; the target is the progression of the disease."
    return _table("diabetes", raw.data, raw.target, split, standardize, description)


def _table(
    name: str,
    features: Float[np.ndarray, "n features"],
    target: Int[np.ndarray, " n"] | Float[np.ndarray, " n"],
    split: str,
    standardize: bool,
    description: str,
) -> source_lib.Arrays:
    is_classes = np.issubdtype(target.dtype, np.integer)
    classes = target if is_classes else None
    # Of the data as delivered: a mean may differ in its last bit between machines.
    version = source_lib.digest(features.astype(np.float64), target.astype(np.float64))
    if standardize:
        train = features[_split_rows(len(features), classes, "train")]
        features = (features - train.mean(axis=0)) / train.std(axis=0)
    chosen = _split_rows(len(features), classes, split)
    label = "label" if is_classes else "target"
    columns = {
        "features": features[chosen].astype(np.float32),
        label: target[chosen].astype(np.int32 if is_classes else np.float32),
    }
    info = source_lib.Info(
        input="features",
        feature_shape=features.shape[1:],
        label=label,
        num_classes=int(target.max()) + 1 if is_classes else None,
        description=description,
        version=version,
        split=split,
        options=f"standardize={bool(standardize)}",
    )
    return source_lib.Arrays(name, columns, info)


def python_source(*, split: str = "train", length: int = 128) -> source_lib.Arrays:
    """The bytes of the standard library's own source: `tokens` int32 [n, length + 1] in [0, 256), about 4 MB in all.

    Rows are the windows of `source.windows` over the files of the split, joined in the order of their names. Whether
    a file belongs to the split depends on its name alone (`python_files`), so it is the same on every machine with
    the same version of Python.

    Args:
      split: "train" or "test"; no file is in both.
      length: input tokens per row.

    Raises:
      FileNotFoundError: this Python comes without its source.
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    corpus = b"".join((root / name).read_bytes() for name in python_files(split))
    info = source_lib.Info(
        input="tokens",
        feature_shape=(length + 1,),
        label="tokens",
        num_classes=256,
        description="Bytes of half of the standard library's pure Python modules, split by file.",
        version=f"{platform.python_version()}-{source_lib.digest(corpus)}",
        split=split,
        options=f"length={length}",
    )
    return source_lib.Arrays("python_source", source_lib.windows(corpus, length), info)


def python_files(split: str) -> list[str]:
    """Names of the files of `python_source`, relative to the standard library's folder, sorted.

      u = blake2b(name, digest_size=8) / 2**64 (big-endian);   train: u < 0.4;   test: 0.4 <= u < 0.5

    Only modules are considered: every part of the path is a Python name, which leaves out `site-packages` and build
    folders. So are not tests, idlelib, lib2to3, generated tables and files that an installation writes for itself.
    """
    low, high = {"train": (0.0, _TRAIN_FILES), "test": (_TRAIN_FILES, _CORPUS_FILES)}[_known_split(split)]
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    chosen = [name for name in sorted(_library_modules(root)) if low <= _unit_hash(name) < high]
    if not chosen:
        raise FileNotFoundError(
            f"python_source: no Python source under {root}; install Python with its library's source"
        )
    return chosen


def _library_modules(root: pathlib.Path) -> Iterator[str]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name.isidentifier() and name not in _LEFT_OUT]
        for name in files:
            module = name.removesuffix(".py")
            if module != name and module.isidentifier() and not module.startswith(_MACHINE_MADE):
                yield (pathlib.Path(folder) / name).relative_to(root).as_posix()


def _unit_hash(name: str) -> float:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64


def _split_rows(length: int, classes: Int[np.ndarray, " n"] | None, split: str) -> Int[np.ndarray, " rows"]:
    """Rows of a split, sorted: the test split takes round(0.2 n_c) rows of each class c."""
    strata = np.zeros(length, np.int32) if classes is None else classes
    is_test = np.zeros(length, bool)
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        rng = np.random.default_rng((_SPLIT_SEED, int(stratum)))
        is_test[rng.permutation(members)[: round(_TEST_SHARE * len(members))]] = True
    return np.flatnonzero(is_test if _known_split(split) == "test" else ~is_test)


def _relabelled(labels: Int[np.ndarray, " n"], rows: Int[np.ndarray, " rows"], share: float) -> Int[np.ndarray, " n"]:
    """Moves a share of the labels in these rows to another of the ten classes; more of them for a greater share."""
    rng = np.random.default_rng(_SPLIT_SEED)
    wrong = rng.permutation(rows)[: round(share * len(rows))]
    moves = rng.integers(1, 10, len(labels), dtype=labels.dtype)
    return np.where(np.isin(np.arange(len(labels)), wrong), (labels + moves) % 10, labels)


def _known_split(split: str) -> str:
    if split not in SPLITS:
        raise ValueError(f"split={split!r}; embedded datasets have the splits {', '.join(SPLITS)}")
    return split


def _sklearn() -> ModuleType:
    try:
        return importlib.import_module("sklearn.datasets")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("this dataset comes with scikit-learn: pip install 'steelyard[train]'") from error
