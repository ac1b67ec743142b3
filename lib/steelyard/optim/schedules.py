"""Learning rates and momentum over the steps of a run: refined, rewarmed, without an end, in one cycle.

A schedule is optax's: a function of the count, from 0 at the first step, which may be a Python int, traced, or an array
of counts. Pieces meet exactly: at a joint the value is the number that was given, without rounding. Steps are
subtracted as integers, so late counts lose nothing.

For a linear decay after a short warm-up, which is what constant gradient norms refine to, optax has the pieces:
`optax.join_schedules([optax.linear_schedule(0, p, k), optax.linear_schedule(p, 0, T - k)], [k])`.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from steelyard import choices

Count = int | Int[Array, "*counts"]
Values = Float[Array, "*counts"]

WEIGHTS = ("inverse_square", "inverse")
COOLDOWNS = ("inverse_sqrt", "cosine")


def refined_schedule_values(
    grad_norms: Sequence[float] | Float[np.ndarray, " steps"],
    *,
    weights: str = "inverse_square",
    smoothing: float = 0.1,
) -> Float[np.ndarray, " steps"]:
    """The learning rates that a finished run's gradient norms recommend for the next run of the same kind.

        w_t = G_t^-2 (inverse_square) or G_t^-1 (inverse),   eta_t = w_t sum_{p > t} w_p,   divided by the largest

    The rates start small where norms are first large (a warm-up) and end at 0. Constant norms give a linear decay.
    Norms are first smoothed by a running median over 2 floor(floor(smoothing T) / 2) + 1 steps; the series is continued
    past its end by reflection and before its start by its first value. For a run of another length resample the
    result: `np.interp(np.linspace(0, 1, new), np.linspace(0, 1, len(values)), values)`. Runs on the host in float64.

    Cost: one norm per step, recorded in the first run.

    Args:
      grad_norms: G, one norm of the gradient per step.
      weights: "inverse_square" for l2 norms and SGD, "inverse" for l1 norms and rules like Adam.
      smoothing: part of the run that the median spans, in [0, 1]; 0 takes the norms as they are.

    Returns:
      One factor per step, the largest 1 and the last 0, float64.

    Raises:
      ValueError: norms that are not one series of at least two positive numbers, an unknown `weights`, or a `smoothing`
        outside of its range.

    Source: When, Why and How Much? Adaptive Learning Rate Scheduling by Refinement (2023, Defazio et al.),
    algorithm 1.

    >>> refined_schedule_values([1.0, 1.0, 2.0], smoothing=0.0).tolist()
    [1.0, 0.2, 0.0]
    """
    choices.require("weights", weights, WEIGHTS)
    choices.require_within("smoothing", smoothing, "[0, 1]")
    norms = np.asarray(grad_norms, np.float64)
    if norms.ndim != 1 or norms.size < 2:
        raise ValueError(f"grad_norms has shape {norms.shape}; it must be one axis of at least two steps")
    wrong = ~((norms > 0) & np.isfinite(norms))
    if wrong.any():
        step = int(np.argmax(wrong))
        raise ValueError(f"grad_norms[{step}]={norms[step]} must lie in (0, inf)")
    norms = _smooth(norms, smoothing)
    # Relative to the smallest norm no weight overflows; what underflows would not have counted.
    relative = norms.min() / norms
    importance = relative**2 if weights == "inverse_square" else relative
    later = np.append(np.cumsum(importance[:0:-1])[::-1], 0.0)
    values = importance * later
    return values / values.max()


def refined_schedule(
    grad_norms: Sequence[float] | Float[np.ndarray, " steps"],
    *,
    peak_value: float | Float[Array, ""] = 1.0,
    weights: str = "inverse_square",
    smoothing: float = 0.1,
) -> optax.Schedule:
    """`refined_schedule_values` times the peak value, as a schedule; 0 after the last step.

    Args:
      grad_norms, weights, smoothing: as in `refined_schedule_values`.
      peak_value: the largest learning rate, a number or a (traced) scalar.

    Raises:
      ValueError: a negative `peak_value`; the rest as `refined_schedule_values`.
    """
    choices.require_within("peak_value", peak_value, "[0, inf)")
    values = refined_schedule_values(grad_norms, weights=weights, smoothing=smoothing)

    def schedule(count: Count) -> Values:
        step = jnp.clip(jnp.asarray(count), 0, len(values) - 1)
        return peak_value * jnp.asarray(values)[step]

    return schedule


def rewarmed_cosine_schedule(
    peak_value: float | Sequence[float],
    end_value: float,
    *,
    phase_steps: Sequence[int],
    warmup_steps: int | Sequence[int] = 0,
    init_value: float = 0.0,
) -> optax.Schedule:
    """One cosine cycle for each dataset that arrives, each warming up from where the last one ended.

    At step k of a phase of N steps, W of them warm-up, from r = `init_value` in the first phase and `end_value` after:

        k < W:  r + (peak - r) k / W,     else  end + (peak - end) (1 + cos(pi (k - W) / (N - W))) / 2

    The last phase is followed by `end_value`. Keep the optimizer's state from phase to phase. Usual are a peak of 3e-4,
    a tenth of it at the end, and a warm-up of at most 2% of the phase, whose length matters little.

    Args:
      peak_value: the largest value of each phase, or one for all.
      end_value: the value at the end of every phase.
      phase_steps: the number of steps of each phase, N.
      warmup_steps: steps of warm-up in each phase, or one number for all, W < N; 0 jumps to the peak.
      init_value: the value at the very first step, where that one warms up.

    Raises:
      ValueError: no phases, a phase of no steps, a warm-up as long as its phase, a sequence that has not one entry a
        phase, or a negative value.

    Source: Continual Pre-Training of Large Language Models: How to (re)warm your model? (2023, Gupta et al.).
    """
    if not len(phase_steps):
        raise ValueError(f"phase_steps={phase_steps} must name at least one phase")
    for steps in phase_steps:
        choices.require_within("phase_steps", steps, "[1, inf)")
    peaks = _per_phase("peak_value", peak_value, len(phase_steps))
    warmups = _per_phase("warmup_steps", warmup_steps, len(phase_steps))
    for name, value in [("end_value", end_value), ("init_value", init_value), *(("peak_value", p) for p in peaks)]:
        choices.require_within(name, value, "[0, inf)")
    for steps, warmup in zip(phase_steps, warmups, strict=True):
        choices.require_within("warmup_steps", warmup, f"[0, {steps})")
    starts = np.cumsum([0, *phase_steps[:-1]])
    firsts = [init_value, *[end_value] * (len(phase_steps) - 1)]

    def schedule(count: Count) -> Values:
        count = jnp.asarray(count)
        phase = jnp.clip(jnp.searchsorted(starts, count, side="right") - 1, 0, len(phase_steps) - 1)
        length, warmup, peak, first = (jnp.asarray(x)[phase] for x in (phase_steps, warmups, peaks, firsts))
        k = count - jnp.asarray(starts)[phase]
        up = _mix(first, peak, k / jnp.maximum(warmup, 1))
        return jnp.where(k < warmup, up, _cosine(peak, end_value, jnp.minimum((k - warmup) / (length - warmup), 1)))

    return schedule


def infinite_schedule(
    peak_value: float,
    constant_value: float,
    end_value: float,
    *,
    warmup_steps: int,
    cooldown_steps: int,
    anneal_start: int | None = None,
    anneal_steps: int = 0,
    cooldown: str = "inverse_sqrt",
    steepness: float = 10.0,
    init_value: float = 0.0,
) -> optax.Schedule:
    """Warms up, cools down to a constant for as long as data comes, and anneals when a model must be delivered.

        t < W:            init + (peak - init) t / W
        x = (t - W) / C < 1:  inverse_sqrt  peak + (constant - peak) h(x) / h(1),  h(x) = 1 / sqrt(1 + steepness x) - 1
                          cosine        constant + (peak - constant) (1 + cos(pi x)) / 2
        then              constant
        t >= anneal_start:    constant (end / constant)^(min(t - anneal_start, A) / A)

    Training goes on later from the checkpoint before the annealing, without warming up again.

    Args:
      peak_value: the value after the warm-up.
      constant_value: the value of the long middle.
      end_value: the value after the annealing.
      warmup_steps: W; 0 starts at the peak.
      cooldown_steps: C; 0 jumps to the constant.
      anneal_start: the first step of the annealing, not before W + C; `None` is never.
      anneal_steps: A, at least 1 where there is an `anneal_start`.
      cooldown: "inverse_sqrt" or "cosine".
      steepness: how much faster "inverse_sqrt" falls at first; near 0 it is a line.
      init_value: the value at the first step.

    Raises:
      ValueError: a value or a number of steps out of its range, or an unknown `cooldown`.

    Source: Simple and Scalable Strategies to Continually Pre-train Large Language Models (2024, Ibrahim et al.),
    infinite learning rate schedules.
    """
    choices.require("cooldown", cooldown, COOLDOWNS)
    for name, value in dict(constant_value=constant_value, end_value=end_value, steepness=steepness).items():
        choices.require_within(name, value, "(0, inf)")
    counts = dict(warmup_steps=warmup_steps, cooldown_steps=cooldown_steps)
    for name, value in dict(peak_value=peak_value, init_value=init_value, **counts).items():
        choices.require_within(name, value, "[0, inf)")
    cold = warmup_steps + cooldown_steps
    if anneal_start is not None:
        choices.require_within("anneal_start", anneal_start, f"[{cold}, inf)")
        choices.require_within("anneal_steps", anneal_steps, "[1, inf)")

    def schedule(count: Count) -> Values:
        count = jnp.asarray(count)
        x = jnp.clip((count - warmup_steps) / max(cooldown_steps, 1), 0, 1)
        if cooldown == "cosine":
            cooling = _cosine(peak_value, constant_value, x)
        else:
            cooling = _mix(peak_value, constant_value, _inverse_sqrt(x, steepness))
        value = jnp.where(count < cold, cooling, constant_value)
        value = jnp.where(count < warmup_steps, _mix(init_value, peak_value, count / max(warmup_steps, 1)), value)
        if anneal_start is None:
            return value
        y = jnp.clip((count - anneal_start) / anneal_steps, 0, 1)
        annealing = constant_value * (end_value / constant_value) ** y
        value = jnp.where(count < anneal_start, value, annealing)
        return jnp.where(count < anneal_start + anneal_steps, value, end_value)

    return schedule


def one_cycle_momentum_schedule(
    transition_steps: int,
    *,
    peak_value: float = 0.95,
    valley_value: float = 0.85,
    pct_start: float = 0.3,
    pct_final: float = 0.85,
) -> optax.Schedule:
    """Momentum that falls while the learning rate of `optax.linear_onecycle_schedule` rises, and the other way round.

    Linear from the peak to the valley at step floor(pct_start T), back to the peak at step floor(pct_final T), and
    constant from there. Both are driven by
    `optax.inject_hyperparams(optax.sgd)(learning_rate=rates, momentum=momenta)`.

    Args:
      transition_steps: T, the steps of the run.
      peak_value: momentum at the beginning and the end, in [0, 1).
      valley_value: momentum where the learning rate is largest, in [0, 1).
      pct_start: part of the run in which the learning rate rises.
      pct_final: part of the run after which the cycle is closed.

    Raises:
      ValueError: fewer than two steps, a momentum out of its range, or not 0 <= pct_start < pct_final <= 1.

    Source: A disciplined approach to neural network hyper-parameters: Part 1 (2018, Smith), section 4.3.
    """
    choices.require_within("transition_steps", transition_steps, "[2, inf)")
    choices.require_within("peak_value", peak_value, "[0, 1)")
    choices.require_within("valley_value", valley_value, "[0, 1)")
    choices.require_within("pct_final", pct_final, "(0, 1]")
    choices.require_within("pct_start", pct_start, f"[0, {pct_final})")
    bottom, top = int(pct_start * transition_steps), int(pct_final * transition_steps)

    def schedule(count: Count) -> Values:
        count = jnp.asarray(count)
        down = _mix(peak_value, valley_value, count / max(bottom, 1))
        up = _mix(valley_value, peak_value, jnp.minimum((count - bottom) / max(top - bottom, 1), 1))
        # With few steps both floors may be equal; the cycle is then closed as soon as it begins to, as in optax.
        return jnp.where(count < bottom, down, jnp.where(count < top, up, peak_value))

    return schedule


def adapt_regime(
    learning_rate: float,
    boundaries: Sequence[float],
    *,
    batch_size: int,
    base_batch_size: int,
    adapt_updates: bool = True,
) -> tuple[float, tuple[float, ...]]:
    """The learning rate and the epochs of its drops for another batch size: equal gradient noise, as many updates.

        learning rate * sqrt(batch / base),   boundaries * batch / base

    The published runs also clip gradients to a global norm of 5 (`optax.clip_by_global_norm(5.0)`).

    Args:
      learning_rate: the one tuned at the base batch size.
      boundaries: the epochs at which it drops.
      batch_size: examples in a batch now.
      base_batch_size: examples in a batch when it was tuned.
      adapt_updates: whether the boundaries are stretched, so that the number of updates stays the same.

    Returns:
      The learning rate and the boundaries, in epochs.

    Raises:
      ValueError: a batch without examples, or a negative learning rate or boundary.

    Source: Train longer, generalize better: closing the generalization gap in large batch training of neural networks
    (2017, Hoffer et al.), sections 4 and 5.

    >>> adapt_regime(0.1, [80, 120], batch_size=512, base_batch_size=128)
    (0.2, (320.0, 480.0))
    """
    choices.require_within("learning_rate", learning_rate, "[0, inf)")
    choices.require_within("batch_size", batch_size, "[1, inf)")
    choices.require_within("base_batch_size", base_batch_size, "[1, inf)")
    for boundary in boundaries:
        choices.require_within("boundaries", boundary, "[0, inf)")
    ratio = batch_size / base_batch_size
    stretch = ratio if adapt_updates else 1.0
    return learning_rate * math.sqrt(ratio), tuple(boundary * stretch for boundary in boundaries)


def _smooth(norms: Float[np.ndarray, " steps"], smoothing: float) -> Float[np.ndarray, " steps"]:
    width = 2 * (int(smoothing * len(norms)) // 2) + 1
    if width == 1:
        return norms
    from scipy import ndimage

    padded = np.pad(norms, (0, 2 * width), mode="reflect")
    return ndimage.median_filter(padded, size=width, mode="nearest")[: len(norms)]


def _per_phase(name: str, value, phases: int) -> list:
    # np.ndim of a list would look into its entries, which may be traced.
    is_one_each = isinstance(value, Sequence) or np.ndim(value)
    values = list(value) if is_one_each else [value] * phases
    if len(values) != phases:
        raise ValueError(f"{name}={value} has {len(values)} entries for {phases} phases; give one a phase, or a number")
    return values


def _mix(a, b, x):
    """a at x = 0 and b at x = 1, both exactly, which a + (b - a) x is not."""
    return a * (1 - x) + b * x


def _cosine(a, b, x):
    """From a to b along half a cosine: (1 + cos(pi x)) / 2 = sin^2(pi (1 - x) / 2) keeps its digits near the end."""
    return _mix(b, a, jnp.sin(jnp.pi / 2 * (1 - x)) ** 2)


def _inverse_sqrt(x, steepness):
    """h(x) / h(1), h(x) = 1 / sqrt(1 + s x) - 1 = -s x / (r (1 + r)) with r = sqrt(1 + s x): exact for small s too."""
    root, last = jnp.sqrt(1 + steepness * x), math.sqrt(1 + steepness)
    return x * (last * (1 + last)) / (root * (1 + root))
