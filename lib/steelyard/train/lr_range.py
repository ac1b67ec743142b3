"""The learning-rate range test: one short run with a growing learning rate shows how large it may be.

Source: A disciplined approach to neural network hyper-parameters: Part 1 (2018, Smith).
"""

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from steelyard import choices

PyTree = Any

MODES = ("exponential", "linear")
_SKIPPED = 0.1  # part of the run, at its start, whose slope says nothing: the average holds few losses yet


class RangeTest(NamedTuple):
    """What a range test saw.

    Attributes:
      lrs: the learning rate of each step that was taken, float64 `[steps]`.
      losses: the loss that the step returned, as measured, float64 `[steps]`.
      suggestion: the learning rate at which the smoothed loss falls fastest.
      diverged_at: the last step, if the loss had grown too much or was not finite there; else `None`.
    """

    lrs: Float[np.ndarray, " steps"]
    losses: Float[np.ndarray, " steps"]
    suggestion: float
    diverged_at: int | None


def lr_range_test(
    step: Callable[[PyTree, Any, float], tuple[PyTree, Any]],
    state: PyTree,
    batches: Iterable[Any],
    *,
    min_lr: float = 1e-6,
    max_lr: float = 10.0,
    num_steps: int = 100,
    mode: str = "exponential",
    smoothing: float = 0.98,
    stop_factor: float = 4.0,
) -> RangeTest:
    """Trains for a few steps with a growing learning rate, until the loss does.

        lr_i = min (max / min)^(i / (N - 1))  (exponential)   or   min + (max - min) i / (N - 1)  (linear)
        m_i = smoothing m_{i-1} + (1 - smoothing) loss_i,   s_i = m_i / (1 - smoothing^(i + 1))
        stop when s_i > stop_factor min(s), or s_i is not finite
        suggestion = lr at the steepest fall of s against log lr, from 10% of the steps to the minimum of s

    A loop on the host, which waits for every loss. The suggestion is common practice; the paper reads the plot by eye.
    The smoothed loss lags behind: with the default only a very large loss shows at once. The rule for stopping is for
    losses that are not negative.

    Cost: one short run, and a copy of the state, so that a step that donates its buffers leaves the caller's alone.

    Args:
      step: `(state, batch, learning rate) -> (state, loss)`, jitted by the caller; the learning rate is a Python float.
      state: where training starts; it is not changed.
      batches: one a step; if there are too few, the test ends early.
      min_lr: the first learning rate.
      max_lr: the last.
      num_steps: N.
      mode: "exponential" or "linear".
      smoothing: decay rate of the average, in [0, 1).
      stop_factor: how many times the smallest smoothed loss counts as diverged.

    Returns:
      `RangeTest`. If the first loss is not finite, or there was no batch, the suggestion is `min_lr`.

    Raises:
      ValueError: an unknown `mode`, or a number out of its range.

    Source: A disciplined approach to neural network hyper-parameters: Part 1 (2018, Smith), section 4.1.
    """
    choices.require("mode", mode, MODES)
    choices.require_within("max_lr", max_lr, "(0, inf)")
    choices.require_within("min_lr", min_lr, f"(0, {max_lr})")
    choices.require_within("num_steps", num_steps, "[3, inf)")
    choices.require_within("smoothing", smoothing, "[0, 1)")
    choices.require_within("stop_factor", stop_factor, "(1, inf]")
    lrs = (np.geomspace if mode == "exponential" else np.linspace)(min_lr, max_lr, num_steps)
    state = jax.tree.map(lambda leaf: leaf.copy() if isinstance(leaf, jax.Array) else leaf, state)
    losses, smoothed, mean, diverged_at = [], [], 0.0, None
    for i, batch in enumerate(itertools.islice(batches, num_steps)):
        state, loss = step(state, batch, float(lrs[i]))
        losses.append(float(loss))
        mean = smoothing * mean + (1 - smoothing) * losses[-1]
        smoothed.append(mean / (1 - smoothing ** (i + 1)))
        if not math.isfinite(smoothed[-1]) or smoothed[-1] > stop_factor * min(smoothed):
            diverged_at = i
            break
    lrs = lrs[: len(losses)]
    finite = np.asarray([s for s in smoothed if math.isfinite(s)])
    suggestion = _steepest(lrs[: len(finite)], finite) if finite.size else min_lr
    return RangeTest(lrs, np.asarray(losses), suggestion, diverged_at)


def _steepest(lrs: Float[np.ndarray, " n"], smoothed: Float[np.ndarray, " n"]) -> float:
    low = int(np.argmin(smoothed))
    first = min(int(_SKIPPED * len(lrs)), low)
    if low == 0:
        return float(lrs[0])
    slopes = np.gradient(smoothed, np.log(lrs))
    return float(lrs[first + np.argmin(slopes[first : low + 1])])
