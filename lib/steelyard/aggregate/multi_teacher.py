"""Balance between several teachers: of the losses to them, and of how certain they are (2023, Zhao et al.).

Mitigating the Accuracy-Robustness Trade-off via Multi-Teacher Adversarial Distillation.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from steelyard import choices, precision
from steelyard.aggregate import stacked as stacked_lib


class NormalizedLossBalanceState(NamedTuple):
    """State of `normalized_loss_balance`.

    Attributes:
      step: how many updates there were, int32.
      first: the losses of the first of them, float32; zeros before it.
      weights: the current weights, float32, on the simplex.
    """

    step: Int[Array, ""]
    first: Float[Array, "K"]
    weights: Float[Array, "K"]


def normalized_loss_balance(num_tasks: int, *, rate: float = 0.025, power: float = 1.0) -> stacked_lib.Aggregator:
    """Moves weight to the losses that have fallen least since the first step, so that all progress alike.

    With `L0` the losses of the first step and `w = 1 / K` before it, each step does

        r_k = (L_k / L0_k)^power
        w_k <- max(0, w_k + rate (r_k / sum_j r_j - w_k)),  then  w <- w / sum(w)

    and uses the new w. Where `L0_k = 0`, `r_k = 1`; where all of r is zero its shares are equal. Ratios above
    1e30 count as 1e30. The scale of a loss does not matter. Meant for losses that are never negative, such as
    `steelyard.losses.forward_kl` to each teacher. The state is 2 K numbers, and one backward pass suffices.

    Args:
      num_tasks: K.
      rate: share of the way to `r / sum(r)` that a step goes, in [0, 1]. The paper lowers it together with the learning
        rate: `optax.inject_hyperparams(normalized_loss_balance, static_args="num_tasks")` takes a schedule.
      power: above 1, losses that lag behind count more; 0 keeps the weights equal.

    Returns:
      An aggregator with a `NormalizedLossBalanceState`.

    Raises:
      ValueError: an argument out of its range; while tracing, the number of losses is not `num_tasks`.

    Source: Mitigating the Accuracy-Robustness Trade-off via Multi-Teacher Adversarial Distillation (2023, Zhao et al.),
    normalization loss balance.
    """
    choices.require_within("num_tasks", num_tasks, "[1, inf)")
    choices.require_within("rate", rate, "[0, 1]")
    choices.require_within("power", power, "[0, inf)")

    def init():
        zeros = jnp.zeros((num_tasks,), jnp.float32)
        return NormalizedLossBalanceState(jnp.zeros((), jnp.int32), zeros, jnp.full_like(zeros, 1 / num_tasks))

    def rule(losses, state):
        losses = losses.astype(jnp.float32)
        first = jnp.where(state.step == 0, losses, state.first)
        moved = state.weights + rate * (_shares(losses, first, power) - state.weights)
        weights = jnp.maximum(moved, 0)
        weights = (weights / jnp.sum(weights)).astype(jnp.float32)
        return weights, NormalizedLossBalanceState(state.step + 1, first, weights)

    return stacked_lib.from_losses(rule, init, num_tasks=num_tasks)


def _shares(losses: Float[Array, "K"], first: Float[Array, "K"], power: float) -> Float[Array, "K"]:
    ratios = jnp.where(first == 0, 1, losses / jnp.where(first == 0, 1, first)) ** power
    ratios = jnp.minimum(ratios, 1e30)  # no overflow, and a sum whose reciprocal is not lost either
    total = jnp.sum(ratios)
    return jnp.where(total == 0, 1 / len(losses), ratios / jnp.where(total == 0, 1, total))


def balance_entropies(
    temperatures: Float[Array, "K"],
    entropies: Float[Array, "K"],
    *,
    rate: float = 1e-3,
    low: float = 1.0,
    high: float = 10.0,
) -> Float[Array, "K"]:
    """One step of the teachers' temperatures towards equal entropies of their outputs.

        tau_k <- clip(tau_k - rate sign(H_k - mean_j H_j), low, high)

    A teacher that is more certain than the mean is softened, one that is less so is sharpened. Entropies that are equal
    up to the rounding of their mean move nothing. The student's own temperature stays 1.

    Args:
      temperatures: tau, one for each teacher; use float32, half precision does not resolve `rate`.
      entropies: H, in nats: of teacher k the batch mean of `steelyard.losses.entropy(logits_k, temperature=tau_k)`.
      rate: length of a step. The paper lowers it together with the learning rate.
      low: least temperature.
      high: greatest temperature.

    Returns:
      The next temperatures, in the dtype of `temperatures`. Nothing differentiates through them.

    Raises:
      ValueError: a number out of its range, `low` above `high`, or two different shapes.

    Source: Mitigating the Accuracy-Robustness Trade-off via Multi-Teacher Adversarial Distillation (2023, Zhao et al.),
    entropy-based balance; for two teachers its `sign(H_1 / H_2 - 1)`.
    """
    choices.require_within("rate", rate, "[0, inf)")
    choices.require_within("low", low, "(0, inf)")
    choices.require_within("high", high, f"[{low}, inf)")
    temperatures = jnp.asarray(temperatures)
    if temperatures.ndim != 1 or temperatures.shape != jnp.shape(entropies):
        raise ValueError(
            "temperatures and entropies must be vectors with one number per teacher: "
            f"their shapes are {temperatures.shape} and {jnp.shape(entropies)}"
        )
    entropies = precision.wide(entropies)
    gaps = entropies - jnp.mean(entropies)
    # The mean of K equal numbers may differ from them by its rounding, whose sign would move the temperatures.
    rounding = len(entropies) * jnp.finfo(entropies.dtype).eps * jnp.max(jnp.abs(entropies))
    signs = jnp.where(jnp.abs(gaps) <= rounding, 0, jnp.sign(gaps))
    moved = jnp.clip(precision.wide(temperatures) - rate * signs, low, high)
    return jax.lax.stop_gradient(moved.astype(temperatures.dtype))
