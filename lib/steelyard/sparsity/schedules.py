"""Schedules of sparsity: functions of the step, which may be traced.

The cubic ramp: To prune, or not to prune: exploring the efficacy of pruning for model compression (2017), section 3.
The alternation: AC/DC: alternating compressed/decompressed training of deep neural networks (2021, Peste et al.).
The decays and the sequences of patterns: Progressive gradient flow for robust N:M sparsity training in transformers
(2024).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from steelyard import choices
from steelyard.sparsity import patterns

__all__ = [
    "Frame",
    "alternating",
    "every",
    "exponential_decay",
    "iterative",
    "linear_decay",
    "polynomial",
    "structure_frames",
]

Step = int | Int[Array, ""]
Schedule = Callable[[Step], Float[Array, ""]]

FRAME_KINDS = ("stepwise", "geometric", "densify")


class Frame(NamedTuple):
    """From step `start` on, until the next frame, n of every m consecutive entries are kept."""

    start: int
    n: int
    m: int


def polynomial(target: float, *, start: int, end: int, initial: float = 0.0, power: float = 3) -> Schedule:
    """A sparsity that rises fast at first and then ever more slowly.

    s(t) = target + (initial - target) * (1 - clip((t - start) / (end - start), 0, 1))^power. With `end == start` it
    jumps from `initial` to `target` at `start`.

    Args:
      target: the value from step `end` on.
      start: the last step at the value `initial`.
      end: the first step at the value `target`.
      initial: the value up to `start`.
      power: of the polynomial; 1 is linear, 3 is the published one.

    Raises:
      ValueError: `start` is negative, or `end` comes before it.
    """
    if start < 0 or end < start:
        raise ValueError(f"start={start}, end={end}: 0 <= start <= end is needed")
    if end == start:
        return lambda step: jnp.where(jnp.asarray(step) >= start, target, initial)
    return optax.polynomial_schedule(initial, target, power, end - start, start)


def linear_decay(rate: float, start: int = 0) -> Schedule:
    """clip(1 - rate * max(t - start, 0), 0, 1); an infinite rate gives 0 from `start` on.

    Raises:
      ValueError: `rate` is negative, where it is not traced.
    """
    return _decay(rate, start, lambda spent: jnp.clip(1 - spent, 0, 1))


def exponential_decay(rate: float, start: int = 0) -> Schedule:
    """exp(-rate * max(t - start, 0)); an infinite rate gives 0 from `start` on.

    Raises:
      ValueError: `rate` is negative, where it is not traced.
    """
    return _decay(rate, start, lambda spent: jnp.exp(-spent))


def every(n: int, start: int, end: int) -> Callable[[Step], Bool[Array, ""]]:
    """Whether to update at a step: start <= t <= end and t mod n == 0.

    Raises:
      ValueError: `n` is not positive, or `end` comes before `start`.
    """
    if n < 1:
        raise ValueError(f"n={n}: an interval of at least one step is needed")
    if end < start:
        raise ValueError(f"start={start}, end={end}: start <= end is needed")

    def due(step: Step) -> Bool[Array, ""]:
        step = jnp.asarray(step)
        return (step >= start) & (step <= end) & (step % n == 0)

    return due


def iterative(rate: float) -> Schedule:
    """The sparsity after rounds that each remove the same share of what is left: 1 - (1 - rate)^round.

    Args:
      rate: removed in a round, in [0, 1]; 0.2 is usual for lottery tickets.

    Returns:
      A function of the round, which starts at 0, where everything is there.

    Raises:
      ValueError: `rate` is outside.
    """
    choices.require_within("rate", rate, "[0, 1]")
    return lambda count: 1 - (1.0 - rate) ** jnp.asarray(count)


def alternating(*, sparse_steps: int, dense_steps: int, start: int, end: int) -> Callable[[Step], Bool[Array, ""]]:
    """Whether a step is sparse, where sparse and dense phases take turns and the last phase is sparse.

    False before `start`; in [start, end) True iff (t - start) mod (sparse_steps + dense_steps) < sparse_steps; True
    from `end` on.

    Args:
      sparse_steps: of a sparse phase.
      dense_steps: of a dense phase.
      start: the first step of the first sparse phase.
      end: the first step of the last one.

    Raises:
      ValueError: a phase has no step, `start` is negative, or `end` comes before it.
    """
    sparse_steps = choices.require_count("sparse_steps", sparse_steps, "[1, inf)")
    dense_steps = choices.require_count("dense_steps", dense_steps, "[1, inf)")
    start = choices.require_count("start", start, "[0, inf)")
    end = choices.require_count("end", end, f"[{start}, inf)")

    def is_sparse(step: Step) -> Bool[Array, ""]:
        step = jnp.asarray(step)
        in_turn = (step - start) % (sparse_steps + dense_steps) < sparse_steps
        return (step >= start) & (in_turn | (step >= end))

    return is_sparse


def structure_frames(
    n: int, m: int, *, kind: str, total_steps: int, dense_steps: int = 0, fine_tune_steps: int = 0, frames: int = 4
) -> list[Frame]:
    """A sequence of N:M patterns that ends with n:m.

    stepwise: m-1 : m, then floor(m / 2^i) : m down to n : m, ceil(log2(m / n)) + 1 frames;
    geometric: n 2^j : m 2^j for j = frames-1, ..., 0 (the same density, ever tighter groups);
    densify: n : m 2^j for j = frames-1, ..., 0 (sparser than n:m at first).
    Frame i starts at dense_steps + floor(i * (total_steps - dense_steps - fine_tune_steps) / F); the last one lasts
    to the end. The pattern n = m removes nothing, and is then the only frame.

    Args:
      n: entries kept in a group, at last.
      m: entries in a group, at last.
      kind: "stepwise", "geometric" or "densify".
      total_steps: of the whole training.
      dense_steps: before the first frame.
      fine_tune_steps: at the end, all in the last frame.
      frames: how many; not for "stepwise".

    Raises:
      ValueError: an unknown `kind`, an impossible pattern, or step counts that leave no room for the frames.

    >>> [tuple(frame) for frame in structure_frames(1, 8, kind="stepwise", total_steps=100)]
    [(0, 7, 8), (25, 4, 8), (50, 2, 8), (75, 1, 8)]
    """
    choices.require("kind", kind, FRAME_KINDS)
    patterns.check_nm(n, m)
    if n < 1:
        raise ValueError(f"n={n}: a sequence of patterns needs at least one kept entry in a group")
    if frames < 1:
        raise ValueError(f"frames={frames}: at least one frame is needed")
    room = total_steps - dense_steps - fine_tune_steps
    if dense_steps < 0 or fine_tune_steps < 0 or room <= 0:
        raise ValueError(
            f"dense_steps={dense_steps} and fine_tune_steps={fine_tune_steps} must be at least 0, and their sum less "
            f"than total_steps={total_steps}"
        )
    sequence = _patterns(n, m, kind, frames)
    return [Frame(dense_steps + i * room // len(sequence), *pattern) for i, pattern in enumerate(sequence)]


def _patterns(n: int, m: int, kind: str, frames: int) -> list[tuple[int, int]]:
    if n == m:
        return [(n, m)]
    if kind == "stepwise":
        halvings = (-(-m // n) - 1).bit_length()  # ceil(log2(m / n)), without rounding
        return [(max(n, m - 1 if i == 0 else m >> i), m) for i in range(halvings + 1)]
    return [(n << j if kind == "geometric" else n, m << j) for j in reversed(range(frames))]


def _decay(rate: float, start: int, shape: Callable[[Float[Array, ""]], Float[Array, ""]]) -> Schedule:
    choices.require_within("rate", rate, "[0, inf]")

    def decay(step: Step) -> Float[Array, ""]:
        since = (jnp.asarray(step) - start).astype(float)
        spent = jnp.where(since > 0, rate * since, 0)
        return jnp.where((since >= 0) & jnp.isinf(rate), 0.0, shape(spent))

    return decay
