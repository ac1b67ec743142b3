"""From a dataset to batches: the batch is a pure function of (dataset, seed, step, batch size).

There is no state to save but the step, and no state per host: to resume, start at the next step, on as many hosts as
there are. Datasets in memory are batched by array indexing; records are read ahead by Grain's threads.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from steelyard.data import order
from steelyard.data import source as source_lib

Batch = dict[str, np.ndarray]
Transform = Callable[[Batch], Mapping[str, np.ndarray]]
_Plan = Callable[[int], np.ndarray]
_ENDLESS = 2**62


def batches(
    source: source_lib.Source,
    *,
    batch: int,
    seed: int | None,
    start_step: int = 0,
    host: int = 0,
    hosts: int = 1,
    num_steps: int | None = None,
    prefetch: int = 2,
    threads: int = 16,
    index: bool = True,
    position: bool = False,
    transform: Transform | None = None,
) -> Iterator[tuple[int, Batch]]:
    """Training batches in a shuffled order, a new one every epoch, from any step on.

    Args:
      source: the dataset.
      batch: examples in a global batch.
      seed: decides the order (`order.EpochOrder`); `None` keeps the dataset's own.
      start_step: the first step to yield: the step count of the checkpoint that is resumed.
      host: the number of this process; it gets its contiguous part of every global batch (`order.rows`).
      hosts: how many processes read.
      num_steps: how many steps to yield; `None` for no end.
      prefetch: for records: batches to read ahead. 0 reads when asked.
      threads: for records: threads that read and decode; a batch is cut in pieces so that they all have work.
      index: adds the column `index`, int32: the example's place in the dataset.
      position: adds the column `position`, int64: its place in the global order. Randomness of a transform should
        depend on it (`jax.random.fold_in(key, position)`), and then does not on hosts, threads or resumes.
      transform: batch -> batch, on this host's part, in the calling thread. What concerns single examples is faster in
        `Records.decode`, which runs in the reading threads.

    Returns:
      An iterator of (step, batch), the batch a dict of arrays with batch / hosts rows.

    Raises:
      ValueError: an argument out of range; at once, not at the first batch.
    """
    order.rows(start_step, batch=batch, host=host, hosts=hosts)
    if num_steps is not None and num_steps < 0:
        raise ValueError(f"num_steps={num_steps} must not be negative")
    indices = order.EpochOrder(len(source), seed)

    def positions(step: int) -> range:
        return order.rows(step, batch=batch, host=host, hosts=hosts)

    def finish(step: int, columns: Batch) -> tuple[int, Batch]:
        if position:
            columns["position"] = np.asarray(positions(step), np.int64)
        if not index:
            del columns["index"]
        return step, columns if transform is None else dict(transform(columns))

    steps = itertools.count(start_step) if num_steps is None else range(start_step, start_step + num_steps)
    stream = _read(source, lambda step: indices(positions(step)), steps, batch // hosts, prefetch, threads)
    return itertools.starmap(finish, stream)


def evaluation(
    source: source_lib.Source,
    *,
    batch: int,
    host: int = 0,
    hosts: int = 1,
    prefetch: int = 2,
    threads: int = 16,
    transform: Transform | None = None,
) -> Iterator[Batch]:
    """Every example once, in the order of the dataset, in batches of one shape.

    The last batch is filled up with copies of the last example. The column `mask` (bool) is true for real examples, so
    a mean over the dataset is sum(mask * value) / sum(mask) over all batches. `index` is added too.

    Args:
      source: the dataset.
      batch: examples in a global batch.
      host: the number of this process; it gets its contiguous part of every batch.
      hosts: how many processes read. All of them get the same number of batches.
      prefetch: as in `batches`.
      threads: as in `batches`.
      transform: as in `batches`; it sees `mask`.

    Returns:
      An iterator of ceil(length / batch) batches.

    Raises:
      ValueError: an argument out of range, or an empty dataset; at once.
    """
    order.rows(0, batch=batch, host=host, hosts=hosts)
    length = len(source)
    if length == 0:
        raise ValueError(f"{source.name}: a dataset without examples cannot be evaluated on")

    def positions(step: int) -> np.ndarray:
        return np.asarray(order.rows(step, batch=batch, host=host, hosts=hosts))

    own_order = order.EpochOrder(length, seed=None)

    def indices(step: int) -> np.ndarray:
        return own_order(np.minimum(positions(step), length - 1))

    def finish(step: int, columns: Batch) -> Batch:
        columns["mask"] = positions(step) < length
        return columns if transform is None else dict(transform(columns))

    stream = _read(source, indices, range(math.ceil(length / batch)), batch // hosts, prefetch, threads)
    return itertools.starmap(finish, stream)


def _read(
    source: source_lib.Source, plan: _Plan, steps: Iterable[int], rows: int, prefetch: int, threads: int
) -> Iterator[tuple[int, Batch]]:
    """Steps and their columns, `index` among them."""
    if prefetch < 0 or threads < 0:
        raise ValueError(f"prefetch={prefetch} and threads={threads} must not be negative")
    if isinstance(source, source_lib.Arrays) or prefetch == 0 or threads == 0:
        return ((step, _take(source, plan(step))) for step in steps)
    return _read_ahead(source, plan, steps, rows, prefetch, threads)


def _take(source: source_lib.Source, indices: np.ndarray) -> Batch:
    return {**source.take(indices), "index": indices}


class _Pieces:
    """Grain's view of the stream: element k is piece k % pieces of the batch of step first + k // pieces.

    Grain then needs no shuffling, batching or state of its own, and its threads share the reading of one batch.
    """

    def __init__(self, source: source_lib.Records, plan: _Plan, first: int, count: int, pieces: int):
        self._source = source
        self._plan = plan
        self._first = first
        self._count = count
        self._pieces = pieces

    def __len__(self) -> int:
        return self._count * self._pieces

    def __getitem__(self, k: int) -> Batch:
        step, piece = divmod(k, self._pieces)
        indices = np.array_split(self._plan(self._first + step), self._pieces)[piece]
        return _take(self._source, indices)


def _read_ahead(
    source: source_lib.Records, plan: _Plan, steps: Iterable[int], rows: int, prefetch: int, threads: int
) -> Iterator[tuple[int, Batch]]:
    import grain

    pieces = min(rows, math.ceil(threads / prefetch))
    first, count = (steps.start, len(steps)) if isinstance(steps, range) else (next(iter(steps)), _ENDLESS // pieces)
    view = grain.MapDataset.source(_Pieces(source, plan, first, count, pieces))
    ahead = prefetch * pieces
    options = grain.ReadOptions(num_threads=min(threads, ahead), prefetch_buffer_size=ahead)
    parts = iter(view.to_iter_dataset(options))
    for step in range(first, first + count):
        yield step, source_lib.concatenate(list(itertools.islice(parts, pieces)))
