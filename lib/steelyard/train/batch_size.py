"""How many steps each batch size needs for the same goal, and how noisy its gradients are.

Sources: Measuring the Effects of Data Parallelism on Neural Network Training (2019, Shallue et al.); An Empirical Model
of Large-Batch Training (2018, McCandlish et al.) for the fit and the noise scale.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from steelyard import choices, precision

MODES = ("min", "max")


class CriticalBatch(NamedTuple):
    """steps = min_steps (1 + critical / B).

    Attributes:
      min_steps: the steps that no batch size can do without.
      critical: the batch size that needs twice as many. Well below, twice the batch halves the steps (perfect scaling);
        well above, it changes nothing.
    """

    min_steps: float
    critical: float


class NoiseScale(NamedTuple):
    """Estimates from the squared norms of gradients at two batch sizes; each may be an array.

    Attributes:
      grad_sq: squared norm of the true gradient.
      noise: trace of the covariance of one example's gradient.
      scale: noise / grad_sq, a batch size: the one at which both weigh the same.
    """

    grad_sq: Float[Array, "..."]
    noise: Float[Array, "..."]
    scale: Float[Array, "..."]


def steps_to_target(
    values: Sequence[float] | Float[np.ndarray, " n"],
    target: float,
    *,
    steps: Sequence[int] | None = None,
    mode: str = "min",
) -> int | None:
    """The first step at which a metric has reached its target, or `None`.

    Args:
      values: the metric at each evaluation; NaN has never reached anything.
      target: reached at `value <= target` (or `>=`).
      steps: the step of each evaluation; by default they are numbered from 0.
      mode: "min" for metrics that fall, "max" for those that rise.

    Raises:
      ValueError: an unknown `mode`, or not one step a value.

    Source: Measuring the Effects of Data Parallelism on Neural Network Training (2019, Shallue et al.).

    >>> steps_to_target([0.9, 0.4, 0.6], 0.5, steps=[10, 20, 30])
    20
    """
    choices.require("mode", mode, MODES)
    values = np.asarray(values)
    if values.ndim != 1 or (steps is not None and len(steps) != len(values)):
        given = "" if steps is None else f" and steps {np.shape(steps)}"
        raise ValueError(f"values has shape {values.shape}{given}; both must be one axis of equal length")
    reached = np.flatnonzero(values <= target if mode == "min" else values >= target)
    if not reached.size:
        return None
    return int(reached[0]) if steps is None else int(steps[reached[0]])


def critical_batch_size(batch_sizes: Sequence[int], steps: Sequence[int | None]) -> CriticalBatch:
    """Fits steps to a target against batch size, by least squares of steps = a + b / B.

        min_steps = a,   critical = b / a

    The paper fits no curve; this is the usual model of its three regimes: perfect scaling (B far below the critical
    size), diminishing returns (near it), and none (far above). Tune the learning rate at every batch size first.

    Args:
      batch_sizes: B.
      steps: what `steps_to_target` gave at each; sizes with `None` are left out.

    Returns:
      `CriticalBatch`; the critical size is infinite if a <= 0 (perfect scaling as far as the sizes go).

    Raises:
      ValueError: not one number of steps a size, a size below 1, or fewer than two different sizes that got there.

    Source: An Empirical Model of Large-Batch Training (2018, McCandlish et al.), equation 2.11.
    """
    if len(batch_sizes) != len(steps):
        raise ValueError(f"batch_sizes has {len(batch_sizes)} entries and steps {len(steps)}; they must be equal")
    for size in batch_sizes:
        choices.require_within("batch_sizes", size, "[1, inf)")
    pairs = [(size, count) for size, count in zip(batch_sizes, steps, strict=True) if count is not None]
    if len({size for size, _ in pairs}) < 2:
        raise ValueError(f"steps={list(steps)} at batch_sizes={list(batch_sizes)}: two different sizes must get there")
    sizes, counts = np.asarray(pairs, np.float64).T
    (least, slope), *_ = np.linalg.lstsq(np.stack([np.ones_like(sizes), 1 / sizes], 1), counts, rcond=None)
    return CriticalBatch(float(least), float(slope / least) if least > 0 else float("inf"))


def gradient_noise_scale(
    *,
    small_sq: float | Float[Array, "..."],
    big_sq: float | Float[Array, "..."],
    small_batch: int,
    big_batch: int,
) -> NoiseScale:
    """The noise of gradients, from the squared norms of two mean gradients over b and B > b examples.

        |G|^2 = (B big - b small) / (B - b),   noise = (small - big) / (1 / b - 1 / B),   scale = noise / |G|^2

    The first two are unbiased, so average the squared norms over many batches before calling this; their ratio is not.
    On N devices the squared norms of the local gradients and of their mean cost nothing extra.

    Args:
      small_sq: squared norm of the gradient over `small_batch` examples (may be traced).
      big_sq: the same over `big_batch` examples.
      small_batch: b.
      big_batch: B.

    Returns:
      `NoiseScale`, in float32 at least. The estimate of |G|^2 may come out at 0 or below: it is returned as it is, and
      the scale is then infinite, or NaN if the noise is not positive either.

    Raises:
      ValueError: a batch without examples, or `big_batch` not above `small_batch`.

    Source: An Empirical Model of Large-Batch Training (2018, McCandlish et al.), appendix A.1.
    """
    choices.require_within("small_batch", small_batch, "[1, inf)")
    choices.require_within("big_batch", big_batch, f"({small_batch}, inf)")
    small, big = (precision.wide(jnp.asarray(x, jnp.result_type(x, float))) for x in (small_sq, big_sq))
    grad_sq = (big_batch * big - small_batch * small) / (big_batch - small_batch)
    noise = (small - big) / (1 / small_batch - 1 / big_batch)
    nowhere = jnp.where(noise > 0, jnp.inf, jnp.nan)
    return NoiseScale(grad_sq, noise, jnp.where(grad_sq > 0, noise / grad_sq, nowhere))
