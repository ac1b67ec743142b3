"""Any dataset that TFDS has prepared for random access, read without TensorFlow.

Columns keep their TFDS names and types: images stay uint8, strings stay bytes (which JAX does not take: drop or encode
them in a transform), nested features are joined by slashes; class labels become int32. Nothing is ever downloaded.
"""

import contextlib
import dataclasses
import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np

from steelyard import tree
from steelyard.data import source as source_lib

PREFIX = "tfds:"

_NO_RANDOM_ACCESS = (
    "{name}: no files under data_dir={root!r} that allow random access. "
    "Prepare the dataset again, in another folder, with `tfds build {name} --file_format=array_record`."
)


def open_tfds(
    name: str,
    *,
    split: str = "train",
    data_dir: str | os.PathLike | None = None,
    in_memory: bool = False,
    text: str | None = None,
    length: int | None = None,
) -> source_lib.Source:
    """Opens a TFDS dataset.

    Args:
      name: as in TFDS: "mnist", "name/config", "name:1.0.0".
      split: as in TFDS: "train", "train[:80%]".
      data_dir: the folder of prepared datasets; by default `TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
      in_memory: read everything now; for sets that fit, this is much the fastest.
      text: for language models, the text column; by default the only one. Needs `length`.
      length: cut all texts, joined by newlines, into rows of `length + 1` bytes: `tokens` int32, in memory.

    Returns:
      `Records`, or `Arrays` with `in_memory` or `length`.

    Raises:
      FileNotFoundError: no such dataset there; the message lists those that are.
      ValueError: a split, a column or a file format that cannot be read.
      ModuleNotFoundError: TFDS is not installed.
    """
    if text is not None and length is None:
        raise ValueError(f"text={text!r} needs length=, the number of input tokens per row")
    tfds = _import_tfds()
    with _quiet():
        records = _data_source(tfds, name, split, data_dir)
    features = dict(_flatten(records.dataset_info.features))
    info = _info(records.dataset_info, features, split)
    source = source_lib.Records(PREFIX + name, records, _decoder(features), info)
    if length is not None:
        texts = [name for name, feature in features.items() if isinstance(feature, tfds.features.Text)]
        return _text_windows(source, _text_column(texts, text), length)
    return source_lib.materialize(source) if in_memory else source


def to_unit(*columns: str) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """A transform for `batches`: uint8 columns to float32 in [0, 1], x / 255. By default the column `image`.

    Images are kept as bytes until they are batched: a quarter of the memory.

    >>> to_unit()({"image": np.array([0, 51, 255], np.uint8)})["image"].tolist()
    [0.0, 0.20000000298023224, 1.0]
    """
    columns = columns or ("image",)

    def transform(batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        scaled = {}
        for name in columns:
            if name not in batch:
                raise ValueError(f"to_unit: no column {name!r}, only {', '.join(batch)}")
            if batch[name].dtype != np.uint8:
                raise ValueError(f"to_unit: column {name!r} is {batch[name].dtype}, not uint8")
            scaled[name] = batch[name].astype(np.float32) / np.float32(255)
        return {**batch, **scaled}

    return transform


def _data_source(tfds: ModuleType, name: str, split: str, data_dir: str | os.PathLike | None) -> Any:
    root = os.path.expanduser(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets")
    # TFDS itself would answer with the names of all the datasets it knows, and may make folders.
    if not _path(root, name.split(":")[0]).is_dir():
        raise FileNotFoundError(_absent(name, root))
    try:
        return tfds.data_source(name, split=split, data_dir=root, download=False)
    except tfds.core.DatasetNotFoundError:
        raise FileNotFoundError(_absent(name, root)) from None
    except NotImplementedError as error:
        raise ValueError(PREFIX + _NO_RANDOM_ACCESS.format(name=name, root=root)) from error


def _absent(name: str, root: str) -> str:
    found = sorted(path.name for path in _path(root).iterdir() if path.is_dir()) if _path(root).is_dir() else []
    near = tree.nearest(name, found, 1)
    hint = f" Did you mean {PREFIX}{near[0]}?" if near else ""
    return (
        f"no dataset {PREFIX}{name} in data_dir={root!r}; found there: {', '.join(found) or 'nothing'}.{hint} "
        "Point data_dir (or TFDS_DATA_DIR) at the folder that holds it, or prepare it there with "
        f"`tfds build {name} --file_format=array_record --data_dir={root}` (which may need TensorFlow)."
    )


def _info(dataset_info: Any, features: Mapping[str, Any], split: str) -> source_lib.Info:
    label = _label(dataset_info, features)
    inputs = [name for name in features if name != label]
    if dataset_info.supervised_keys:
        inputs = [dataset_info.supervised_keys[0]]
    is_known = len(inputs) == 1 and isinstance(inputs[0], str) and inputs[0] in features
    return source_lib.Info(
        input=inputs[0] if is_known else None,
        feature_shape=tuple(features[inputs[0]].shape) if is_known else (),
        label=label,
        num_classes=getattr(features[label], "num_classes", None) if label is not None else None,
        description=" ".join(dataset_info.description.split()),
        version=dataset_info.full_name,
        split=split,
    )


def _label(dataset_info: Any, features: Mapping[str, Any]) -> str | None:
    """The second supervised key, or else the only class label."""
    keys = dataset_info.supervised_keys
    if keys and isinstance(keys[1], str) and keys[1] in features:
        return keys[1]
    labels = [name for name, feature in features.items() if hasattr(feature, "num_classes")]
    return labels[0] if len(labels) == 1 else None


def _flatten(record: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested names joined by slashes, for records and for features alike; lists are values, not structure."""
    for name, value in record.items():
        if hasattr(value, "items"):
            yield from _flatten(value, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", value


def _decoder(features: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    casts = {name: _scalar_type(feature) for name, feature in features.items()}

    def decode(record: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value if casts[name] is None else casts[name](value) for name, value in _flatten(record)}

    return decode


def _scalar_type(feature: Any) -> type | None:
    """What a number of this feature becomes: TFDS hands out Python numbers, which forget their width."""
    if hasattr(feature, "num_classes"):
        return np.int32
    dtype = np.dtype(feature.np_dtype)
    return dtype.type if dtype.kind in "biuf" and feature.shape == () else None


def _text_column(texts: list[str], text: str | None) -> str:
    if text in texts or (text is None and len(texts) == 1):
        return text or texts[0]
    raise ValueError(f"text={text!r} must be a text column; there are: {', '.join(texts) or 'none'}")


def _text_windows(source: source_lib.Records, column: str, length: int) -> source_lib.Arrays:
    corpus = b"\n".join(source.decode(source.source[i])[column] for i in range(len(source)))
    info = dataclasses.replace(
        source.info,
        input="tokens",
        feature_shape=(length + 1,),
        label="tokens",
        num_classes=256,
        options=f"text={column}, length={length}",
    )
    return source_lib.Arrays(source.name, source_lib.windows(corpus, length), info)


def _path(*parts: str) -> Any:
    """A path that may also be in an object store; etils comes with TFDS."""
    return importlib.import_module("etils.epath").Path(parts[0]).joinpath(*parts[1:])


def _import_tfds() -> ModuleType:
    try:
        return importlib.import_module("tensorflow_datasets")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"{PREFIX} datasets need TFDS: pip install 'steelyard[train]'") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps TFDS's notes on opening a dataset out of the log; warnings stay."""
    logging = importlib.import_module("absl.logging")
    before = logging.get_verbosity()
    logging.set_verbosity(min(before, logging.WARNING))
    try:
        yield
    finally:
        logging.set_verbosity(before)
