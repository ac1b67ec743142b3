"""Times as ratios: all candidates take turns, so that a drift of the machine meets all alike."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import tqdm

PyTree = Any
Steps = Callable[[int], None]


class Timing(NamedTuple):
    """Median over the rounds of the time for a step: as a ratio to the first candidate's, and in seconds, here."""

    ratio: float
    seconds: float


def stepper(step: Callable[[PyTree, PyTree], tuple[PyTree, Any]], state: PyTree, batch: PyTree) -> Steps:
    """A function that runs so many steps; the state is its own copy, because steps donate it."""
    holder = [jax.tree.map(jax.numpy.copy, state)]

    def steps(count: int) -> None:
        for _ in range(count):
            holder[0], _ = step(holder[0], batch)
        jax.block_until_ready(holder[0])

    return steps


def ratios(candidates: dict[str, Steps], *, rounds: int = 15, seconds: float = 0.1) -> dict[str, Timing]:
    """Times each candidate in every round for about so many seconds, against the first of the same round."""
    counts = {}
    for name, run in tqdm.tqdm(candidates.items(), desc="compile", disable=None, leave=False):
        run(2)  # compiles, and lets the state reach its steady types
        counts[name] = max(1, min(50, round(seconds / _time(run, 1))))
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in tqdm.trange(rounds, desc="time", disable=None, leave=False):
        for name, run in candidates.items():
            times[name].append(_time(run, counts[name]))
    first = times[next(iter(times))]
    return {
        name: Timing(
            statistics.median(mine / base for mine, base in zip(own, first, strict=True)), statistics.median(own)
        )
        for name, own in times.items()
    }


def _time(run: Steps, count: int) -> float:
    start = time.perf_counter()
    run(count)
    return (time.perf_counter() - start) / count


def print_ratios(title: str, candidates: dict[str, Steps], **options: Any) -> dict[str, Timing]:
    """Measures and prints a line for each candidate."""
    timings = ratios(candidates, **options)
    for name, timing in timings.items():
        print(f"  {title}, {name}: {timing.ratio:.3f} x ({1e3 * timing.seconds:.2f} ms here)", flush=True)
    return timings
