"""What a dataset is: columns in memory, or records that can be read in any order.

Both kinds have a length and `take(indices)`, which gives a dict of arrays with one row per index. That is all the
pipeline needs to know of them.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int

RESERVED = ("index", "mask", "position")
"""Column names that the pipeline adds; a dataset must not have them."""

_CHUNK = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class Info:
    """What a model and a trainer must know about a dataset.

    Attributes:
      input: the column that a model reads; `None` where there are several.
      feature_shape: the shape of one example of that column.
      label: the column of classes, targets or tokens to predict; `None` where there is none.
      num_classes: classes of the label (the vocabulary, for tokens); `None` for regression.
      description: a sentence or two.
      version: changes whenever the examples do.
      split: which part of the dataset this is.
      options: how it was loaded, as text, where that changes the examples.
    """

    input: str | None
    feature_shape: tuple[int | None, ...]
    label: str | None
    num_classes: int | None
    description: str
    version: str
    split: str
    options: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """A dataset in memory: columns of equal length, batched by array indexing.

    Attributes:
      name: as given to `load`.
      columns: column name -> array `[length, ...]`.
      info: see `Info`.

    Raises:
      ValueError: no columns, unequal lengths, or a reserved column name.
    """

    name: str
    columns: Mapping[str, np.ndarray]
    info: Info

    def __post_init__(self):
        if len({len(column) for column in self.columns.values()}) != 1:
            shapes = {name: np.shape(column) for name, column in self.columns.items()}
            raise ValueError(f"{self.name}: the columns must have one common length; their shapes are {shapes}")
        _refuse_reserved(self.name, self.columns)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def take(self, indices: Int[np.ndarray, " n"]) -> dict[str, np.ndarray]:
        """The rows at these indices, copied."""
        return {name: column.take(indices, axis=0) for name, column in self.columns.items()}


class RandomAccess(Protocol):
    """What Grain calls a random-access source: a length, and records by index. Reads may come from many threads."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


def as_mapping(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The decoder of records that are dicts of arrays already."""
    return record


@dataclasses.dataclass(frozen=True, eq=False)
class Records:
    """A dataset read record by record: TFDS data sources, Grain map datasets, any random-access sequence.

    Attributes:
      name: as given to `load`.
      source: the records. If it has `__getitems__(indices)`, that reads several at once.
      decode: record -> dict of arrays or scalars; it runs in the reading threads. Work on a single example (decoding,
        cropping, tokenizing) belongs here: `dataclasses.replace(dataset, decode=...)`.
      info: see `Info`.
    """

    name: str
    source: RandomAccess
    decode: Callable[[Any], Mapping[str, Any]]
    info: Info

    def __len__(self) -> int:
        return len(self.source)

    def take(self, indices: Int[np.ndarray, " n"]) -> dict[str, np.ndarray]:
        """Reads, decodes and stacks the records at these indices."""
        return stack([self.decode(record) for record in self._read(np.asarray(indices).tolist())], self.name)

    def _read(self, indices: list[int]) -> Sequence[Any]:
        if hasattr(self.source, "__getitems__"):
            return self.source.__getitems__(indices)
        return [self.source[i] for i in indices]


Source = Arrays | Records


def stack(examples: Sequence[Mapping[str, Any]], name: str) -> dict[str, np.ndarray]:
    """One array per column; byte strings become arrays of dtype `S`, text of dtype `U`.

    Raises:
      ValueError: the rows of a column differ in shape, or a column has a reserved name.
    """
    _refuse_reserved(name, examples[0])
    return {key: _stack_column([example[key] for example in examples], f"{name}: {key}") for key in examples[0]}


def _stack_column(values: list[Any], name: str) -> np.ndarray:
    try:
        return np.stack(values) if isinstance(values[0], np.ndarray) else np.asarray(values)
    except ValueError as error:
        shapes = sorted({np.shape(value) for value in values})
        raise ValueError(
            f"column {name} has rows of shapes {shapes[:4]}; a batch needs one shape. "
            "Pad or crop in `decode`: dataclasses.replace(dataset, decode=...)."
        ) from error


def materialize(source: Source) -> Arrays:
    """Reads a whole dataset into memory, in order, so that it is batched by indexing. Arrays come back as they are."""
    if isinstance(source, Arrays):
        return source
    chunks = [source.take(np.arange(i, min(i + _CHUNK, len(source)))) for i in range(0, len(source), _CHUNK)]
    return Arrays(source.name, concatenate(chunks), source.info)


def concatenate(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Joins batches of the same columns along their rows."""
    return dict(parts[0]) if len(parts) == 1 else {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}


def windows(corpus: bytes, length: int) -> dict[str, Int[np.ndarray, "n length+1"]]:
    """Cuts a text into rows of `length` inputs and one byte more, so that inputs and targets are both slices.

    Row i holds bytes `[i * (length + 1), (i + 1) * (length + 1))`; the rest at the end is dropped.

    Raises:
      ValueError: a length below 1, or a text shorter than one row.

    >>> windows(b"abcdefg", 2)["tokens"].tolist()
    [[97, 98, 99], [100, 101, 102]]
    """
    count = len(corpus) // (length + 1) if length >= 1 else 0
    if count == 0:
        raise ValueError(f"length={length} must be at least 1 and leave a whole row in a text of {len(corpus)} bytes")
    used = np.frombuffer(corpus, np.uint8, count * (length + 1))
    # int32: uint8 would be smaller, but arithmetic on token ids would wrap around.
    return {"tokens": used.reshape(count, length + 1).astype(np.int32)}


def fingerprint(source: Source, *, seed: int | None, batch: int, config: Any = None) -> str:
    """A short name for the stream of batches, to be kept with a checkpoint and compared at resume.

      hash(name, split, version, options, length, seed, batch, config)

    The same in every process and on every machine; the number of hosts is not part of it.

    Args:
      source: the dataset.
      seed: the seed of its order.
      batch: the global batch size.
      config: whatever else shapes the batches (the settings of transformations), as JSON.

    Returns:
      16 hexadecimal digits.
    """
    info = source.info
    seed, batch = (None if number is None else int(number) for number in (seed, batch))
    facts = [source.name, info.split, info.version, info.options, len(source), seed, batch, config]
    return digest(json.dumps(facts, sort_keys=True).encode())


def digest(*parts: bytes | np.ndarray) -> str:
    """16 hexadecimal digits of the BLAKE2b hash of some bytes and arrays."""
    state = hashlib.blake2b(digest_size=8)
    for part in parts:
        state.update(part if isinstance(part, bytes) else np.ascontiguousarray(part).tobytes())
    return state.hexdigest()


def check(source: Source, *, num_classes: int | None = None, limit: int | None = 1024) -> None:
    """Refuses labels out of range and numbers that are not finite, naming the first bad row.

    Args:
      source: the dataset. Arrays are looked at whole.
      num_classes: labels must be in `[0, num_classes)`; by default what `source.info` says.
      limit: of Records, how many to read, from the first (`None`: all of them, in memory).

    Raises:
      ValueError: names the dataset, the column, the first bad row and its value.
    """
    if isinstance(source, Arrays):
        columns = source.columns
    else:
        columns = source.take(np.arange(len(source) if limit is None else min(limit, len(source))))
    for name, column in columns.items():
        if np.issubdtype(column.dtype, np.inexact):
            _refuse(source.name, name, column, ~np.isfinite(column), "every value must be finite")
    classes = source.info.num_classes if num_classes is None else num_classes
    if source.info.label is None or classes is None:
        return
    if source.info.label not in columns:
        raise ValueError(f"{source.name}: no column {source.info.label!r}, only {', '.join(columns)}")
    label = columns[source.info.label]
    if not np.issubdtype(label.dtype, np.integer):
        raise ValueError(f"{source.name}: column {source.info.label!r} is {label.dtype}, but classes are integers")
    outside = (label < 0) | (label >= classes)
    _refuse(source.name, source.info.label, label, outside, f"labels must be in [0, {classes})")


def _refuse(dataset: str, name: str, column: np.ndarray, bad: np.ndarray, rule: str) -> None:
    if bad.any():
        place = tuple(int(i) for i in np.unravel_index(np.argmax(bad), bad.shape))
        where = f"row {place[0]}" + (f", element {place[1:]}" if place[1:] else "")
        raise ValueError(f"{dataset}: column {name!r}, {where} holds {column[place]}; {rule}")


def _refuse_reserved(dataset: str, columns: Mapping[str, Any]) -> None:
    taken = [name for name in columns if name in RESERVED]
    if taken:
        raise ValueError(
            f"{dataset}: column {taken[0]!r} has a name that batches use themselves ({', '.join(RESERVED)})"
        )
