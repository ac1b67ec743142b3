"""The order in which examples are read, as a pure function of the step: the state of the data is one integer.

The *global order* is an endless sequence of example indices: a permutation of all of them for epoch 0, another for
epoch 1, and so on. A *position* is a place in that sequence. Step s reads the positions
`[s * batch, (s + 1) * batch)`, whatever the number of hosts, so a run resumes from its step alone, on any number of
them. When the batch does not divide the number of examples, a batch runs on into the next epoch, and every example
still comes exactly once per epoch.

`EpochOrder` and `epoch_rows` are that sequence for a pipeline, in NumPy on the host. `epoch_order` is one epoch of such
a sequence for a program that keeps its examples on the device: it may be traced, and its permutations are of
`jax.random`, so they are others than the pipeline's for the same seed.

Source: the adaptive data sharding of "Self-healing Nodes with Adaptive Data-Sharding" (2023), reduced to what training
needs.
"""

import threading
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from steelyard import choices

ORDERS = ("single", "reshuffle", "none")
_EPOCHS_KEPT = 2  # a batch and the reads ahead of it touch at most two epochs, unless the dataset is tiny


def rows(step: int, *, batch: int, host: int = 0, hosts: int = 1) -> range:
    """Positions of the global order that one host reads at one step.

      n = batch / hosts,   rows = [step * batch + host * n, step * batch + (host + 1) * n)

    Joined over the hosts, in their order, these are the rows of a single host.

    Args:
      step: the training step, from 0.
      batch: examples in a global batch.
      host: the number of this process, from 0.
      hosts: how many processes read.

    Returns:
      A `range` of batch / hosts positions.

    Raises:
      ValueError: the batch is not a whole number of examples per host, or an argument is out of range.

    >>> rows(3, batch=8), rows(3, batch=8, host=1, hosts=2)
    (range(24, 32), range(28, 32))
    """
    if batch < 1 or hosts < 1 or batch % hosts:
        raise ValueError(
            f"batch={batch} over hosts={hosts}: both must be positive and the batch divisible by the hosts"
        )
    if not 0 <= host < hosts:
        raise ValueError(f"host={host} must be at least 0 and below hosts={hosts}")
    if step < 0:
        raise ValueError(f"step={step} must not be negative")
    share = batch // hosts
    start = step * batch + host * share
    return range(start, start + share)


class EpochOrder:
    """Maps positions to example indices, remembering the permutations of the last epochs.

      index = permutation_e[p - e * length],   e = floor(p / length),
      permutation_e = numpy.random.default_rng((seed, e)).permutation(length)

    The memory is only a cache: two objects with the same length and seed are the same function. Calls may come from
    several threads.

    Args:
      length: number of examples.
      seed: any integer from 0. With `None` every epoch is in the dataset's own order, for datasets that shuffle, repeat
        or mix by themselves, as Grain's map datasets do.
    """

    def __init__(self, length: int, seed: int | None):
        if length < 1:
            raise ValueError(f"length={length}: a dataset without examples has no order")
        if seed is not None and seed < 0:
            raise ValueError(f"seed={seed} must not be negative")
        self.length = int(length)
        self.seed = None if seed is None else int(seed)
        self._lock = threading.Lock()
        self._permutations: dict[int, np.ndarray] = {}

    def __call__(self, positions: Sequence[int] | Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Example indices at these positions, int32 (int64 from 2**31 examples), the caller's own copy."""
        first, last = _ends(positions)
        if first < 0:
            raise ValueError(f"position {first} must not be negative")
        if self.seed is None:
            return np.mod(np.asarray(positions, np.int64), self.length).astype(self._dtype())
        epoch = first // self.length
        if isinstance(positions, range) and positions.step == 1 and last < (epoch + 1) * self.length:
            start = first - epoch * self.length
            return self._permutation(epoch)[start : start + len(positions)].copy()
        return self._gather(np.asarray(positions, np.int64))

    def _gather(self, positions: np.ndarray) -> np.ndarray:
        epochs, places = np.divmod(positions, self.length)
        indices = np.empty(positions.shape, self._dtype())
        for epoch in np.unique(epochs):
            here = epochs == epoch
            indices[here] = self._permutation(int(epoch))[places[here]]
        return indices

    def _permutation(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._permutations:
                while len(self._permutations) >= _EPOCHS_KEPT:
                    self._permutations.pop(next(iter(self._permutations)))
                rng = np.random.default_rng((self.seed, epoch))
                self._permutations[epoch] = rng.permutation(self.length).astype(self._dtype(), copy=False)
            return self._permutations[epoch]

    def _dtype(self) -> type:
        return np.int32 if self.length <= np.iinfo(np.int32).max else np.int64


def _ends(positions: Sequence[int] | np.ndarray) -> tuple[int, int]:
    """The smallest and the largest position (0, -1 if there are none)."""
    if len(positions) == 0:
        return 0, -1
    if isinstance(positions, range):
        return min(positions[0], positions[-1]), max(positions[0], positions[-1])
    return int(np.min(positions)), int(np.max(positions))


def epoch_rows(
    positions: Sequence[int] | Int[np.ndarray, " n"], length: int, seed: int | None
) -> Int[np.ndarray, " n"]:
    """Example indices at positions of the global order: each epoch its own permutation of `range(length)`.

    The pure form of `EpochOrder`, which a loop should prefer: it keeps the permutations between calls.

    >>> sorted(epoch_rows(range(5, 10), 5, seed=0).tolist())
    [0, 1, 2, 3, 4]
    """
    return EpochOrder(length, seed)(positions)


def epoch_order(
    num_examples: int, epoch: int | Int[Array, ""], rng: PRNGKeyArray, *, mode: str = "reshuffle"
) -> Int[Array, "num_examples"]:
    """Example indices in the order of one epoch, for examples that are on the device: jit, scan and vmap work.

      single:      permutation(rng)                      the same in every epoch
      reshuffle:   permutation(fold_in(rng, epoch))
      none:        0, 1, 2, ...

    With batch normalization a single shuffle trains another problem than the full batch does, because the examples of
    a batch always meet the same others; reshuffling repairs it. The last batch, where the batch size does not divide
    the examples, is the caller's to keep or drop. `EpochOrder` is the host's form, for pipelines.

    Args:
      num_examples: how many there are, 0 or more.
      epoch: from 0; may be traced.
      rng: a key of the run, the same in every epoch.
      mode: "single", "reshuffle" or "none".

    Raises:
      ValueError: an unknown `mode`, or a negative number of examples.

    Source: On the Training Instability of Shuffling SGD with Batch Normalization (2023, Wu et al.).
    """
    choices.require("mode", mode, ORDERS)
    choices.require_within("num_examples", num_examples, "[0, inf)")
    if mode == "none":
        return jnp.arange(num_examples)
    return jax.random.permutation(rng if mode == "single" else jax.random.fold_in(rng, epoch), num_examples)
