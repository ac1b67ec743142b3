"""Robust losses of the expected TD error, as saddle points: value functions against an estimate of their error.

The square, Huber loss or absolute value of the *expected* error delta(s) = E[td_error | s] cannot be had from one
sample, for two independent next states would be needed. Written with its conjugate it is linear in the error:

    squared:   delta^2 / 2      = max_h                     h delta - h^2 / 2
    huber:     Huber(delta)     = max_{|h| <= threshold}    h delta - h^2 / 2
    absolute:  |delta|          = max_{|h| <= 1}            h delta

and the maximum lies at h = delta, clipped to the threshold, or its sign. The dual network estimates delta(s) by least
squares; h is made of its output.

Source: Robust Losses for Learning Value Functions (2022, Patterson, Liao, White). That one regression serves the three
losses, and h clips it afterwards, is a reading: with a dual for each state of its own it is exact.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from steelyard import choices
from steelyard.losses import checks

Kind = Literal["squared", "huber", "absolute"]


class Saddle(NamedTuple):
    """The two losses of a saddle point, and its value; one number for each transition.

    Attributes:
      objective: what is minimised by the value and maximised by the dual; without gradient, for logging.
      primal: the loss of the value's parameters.
      dual: the loss of the dual's parameters.
    """

    objective: Float[Array, "*batch"]
    primal: Float[Array, "*batch"]
    dual: Float[Array, "*batch"]


def bellman_saddle(
    td_error: Float[Array, "*batch"],
    dual: Float[Array, "*batch"],
    *,
    kind: Kind = "huber",
    threshold: float = 1.0,
) -> Saddle:
    """Losses whose common minimum minimises the squared, Huber or absolute *expected* TD error.

        h          squared: dual,   huber: clip(dual, -threshold, threshold),   absolute: sign(dual)
        primal     stop_gradient(h) td_error
        dual       (stop_gradient(td_error) - dual)^2 / 2
        objective  h td_error - h^2 / 2,  absolute: h td_error

    The stops keep the two networks apart: primal + dual is one loss for one optimizer. The error must carry the
    gradient of the value of both states, `td_error(reward, discount, value, next_value)` without a stop; for control
    the next value is the largest, and the gradient passes through the maximum. Give the dual's parameters a weight
    decay for the regularised form. Off policy, multiply primal and dual by the importance ratio.

    A dual of zero gives the value no gradient: it first has to learn. The absolute loss needs only the dual's sign.

    Args:
      td_error: of each transition, in units of the reward.
      dual: the estimate of the expected error of its first state, in the same units.
      kind: which loss of the expected error.
      threshold: for "huber", where the loss becomes linear, positive; infinity is "squared".

    Returns:
      A `Saddle`, float32 at least.

    Raises:
      ValueError: an unknown kind, `threshold` not positive, or shapes that differ.

    Source: Robust Losses for Learning Value Functions (2022, Patterson, Liao, White).
    """
    td_error, dual = checks.alike("td_error", td_error, "dual", dual)
    h = jax.lax.stop_gradient(_derivative(dual, kind, threshold))
    primal = h * td_error
    penalty = 0 if kind == "absolute" else h**2 / 2
    residual = jax.lax.stop_gradient(td_error) - dual
    return Saddle(jax.lax.stop_gradient(primal - penalty), primal, residual**2 / 2)


def corrected_td(
    value: Float[Array, "*batch"],
    next_value: Float[Array, "*batch"],
    td_error: Float[Array, "*batch"],
    dual: Float[Array, "*batch"],
    *,
    discount: Float[Array, "..."] | float,
    kind: Kind = "huber",
    threshold: float = 1.0,
) -> Float[Array, "*batch"]:
    """The value's loss in gradient-correction form: the sampled error on the value, the dual on the next value only.

        -stop_gradient(c(td_error)) value + stop_gradient(h) discount next_value

    with c, as h, the identity, the clip or the sign. It takes the place of `Saddle.primal`, whose gradient uses the
    dual for both states; the dual is trained by `Saddle.dual` as before. The number itself means nothing: its gradient
    is what counts.

    Args:
      value: of the states that were left, with gradient.
      next_value: of the states that were reached, with gradient.
      td_error: of each transition, in units of the reward; its gradient is not used.
      dual: the estimate of the expected error of the first state; its gradient is not used.
      discount: 0 where the episode ends; a number, or of the shape of the others.
      kind: as in `bellman_saddle`.
      threshold: as there.

    Returns:
      One number for each transition, float32 at least.

    Raises:
      ValueError: as for `bellman_saddle`.

    Source: Robust Losses for Learning Value Functions (2022, Patterson, Liao, White).
    """
    value, next_value = checks.alike("value", value, "next_value", next_value)
    td_error, dual = checks.alike("td_error", td_error, "dual", dual)
    checks.alike("value", value, "td_error", td_error)
    discount = checks.number_or("discount", discount, value.shape).astype(value.dtype)
    sampled, expected = (jax.lax.stop_gradient(_derivative(x, kind, threshold)) for x in (td_error, dual))
    return expected * discount * next_value - sampled * value


def _derivative(error: Float[Array, "*batch"], kind: Kind, threshold: float) -> Float[Array, "*batch"]:
    """Of the loss at an expected error, which is also where the conjugate's maximum lies."""
    choices.require("kind", kind, ("squared", "huber", "absolute"))
    choices.require_within("threshold", threshold, "(0, inf]")
    if kind == "squared":
        return error
    if kind == "absolute":
        return jnp.sign(error)
    return jnp.clip(error, -threshold, threshold)
