"""Whom to target: scores trained by the profit that the decisions they lead to would lose.

A customer is sent an offer iff the score is positive. The value of doing so differs from customer to customer, and may
be negative. Accuracy counts all customers alike; a regret counts what a wrong decision costs.

Values are in money, and often very unequal: divide them by their mean size, so that scores of size 1 suit them. That
leaves every decision as it is.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from steelyard import choices
from steelyard.losses import checks

PerCustomer = Float[Array, "*batch"]
Amount = float | Float[Array, "*batch"]


def targeting_value(
    churn: PerCustomer, lifetime_value: PerCustomer, *, incentive: Amount, contact: Amount, acceptance: Amount = 0.3
) -> PerCustomer:
    """What an offer to stay is worth: kept lifetimes, less offers that were accepted or given away, less contacts.

        churn (acceptance (lifetime_value - incentive) - contact) - (1 - churn) (incentive + contact)

    A customer who would leave accepts with probability `acceptance`, and one who would stay always.

    Args:
      churn: 1 for a customer who would leave, 0 for one who would stay; or the probability, for an expected value.
      lifetime_value: what the customer is worth if kept, in money; of the same shape.
      incentive: cost of an accepted offer, in money, at least 0; a number, or one for each customer.
      contact: cost of making an offer, likewise.
      acceptance: in [0, 1]; a number, or one for each customer.

    Returns:
      Money; float32 at least.

    Raises:
      ValueError: shapes that do not match; churn or acceptance outside [0, 1], or a negative cost, unless traced.

    Source: A predict-and-optimize approach to profit-driven churn prevention (2023, Gomez-Vargas, Maldonado, Vairetti).
    """
    choices.require_within("churn", churn, "[0, 1]")
    churn, lifetime_value = checks.alike("churn", churn, "lifetime_value", lifetime_value)
    incentive = _amount("incentive", incentive, "[0, inf)", churn.shape)
    contact = _amount("contact", contact, "[0, inf)", churn.shape)
    acceptance = _amount("acceptance", acceptance, "[0, 1]", churn.shape)
    leaving = acceptance * (lifetime_value - incentive) - contact
    return churn * leaving - (1 - churn) * (incentive + contact)


def targeting_regret(score: PerCustomer, value: PerCustomer) -> PerCustomer:
    """The profit that is lost against targeting exactly those of positive value, `max(value, 0) - value [score > 0]`.

    A metric: its gradient with respect to the score is zero.

    Args:
      score: a customer is targeted iff it is positive.
      value: of targeting, as `targeting_value` gives it; of the same shape.

    Returns:
      Not negative, in the unit of the values; float32 at least.

    Raises:
      ValueError: the shapes differ.

    Source: as for `targeting_value`.
    """
    score, value = checks.alike("score", score, "value", value)
    return jnp.where((score > 0) == (value > 0), 0, jnp.abs(value))


def targeting_regret_smooth(score: PerCustomer, value: PerCustomer, *, temperature: Amount = 1.0) -> PerCustomer:
    """The expected regret if a customer is targeted with probability `sigmoid(score / temperature)`.

        max(value, 0) - value sigmoid(score / temperature)  =  |value| sigmoid(-+ score / temperature)

    with minus for a positive value. It tends to `targeting_regret` as the temperature falls; customers whose score is
    large against it hardly move.

    Args:
      score: as in `targeting_regret`.
      value: as in `targeting_regret`.
      temperature: in the unit of the scores, positive; a number, or one for each customer.

    Returns:
      Not negative, in the unit of the values; float32 at least.

    Raises:
      ValueError: shapes that do not match; a temperature that is not positive, unless traced.

    Source: as for `targeting_value`; the surrogate is a reading of it.
    """
    score, value = checks.alike("score", score, "value", value)
    temperature = _amount("temperature", temperature, "(0, inf)", score.shape)
    # The difference would lose the digits of a small regret.
    wrong = jax.nn.sigmoid(jnp.where(value > 0, -score, score) / temperature)
    return jnp.abs(value) * wrong


def spo_plus_targeting(score: PerCustomer, value: PerCustomer) -> PerCustomer:
    """A convex upper bound of the regret, `max(0, |value| - 2 sign(value) score)` with sign(0) = -1.

    The SPO+ loss of the problem `max_{z in {0, 1}} value z`, whose solution is `z* = [value > 0]`:

        max_z (2 score - value) z - 2 score z* + value z*

    It is a hinge whose margin is the money at stake. The score is an estimate of the value, in its unit, and half of
    the value is enough for a loss of 0. Where values scatter symmetrically about their mean, its minimum gives the best
    decision; else it may not: of customers alike, of whom one in four brings a gain of 9 and the others a loss of 1, it
    targets none, as does the majority. So train it on expected values rather than on those of observed churn, or take
    `targeting_regret_smooth`, which has no such bias.

    Args:
      score: as in `targeting_regret`.
      value: as in `targeting_regret`.

    Returns:
      At least `targeting_regret`, in the unit of the values; float32 at least.

    Raises:
      ValueError: the shapes differ.

    Source: Smart "Predict, then Optimize" (2017, Elmachtoub, Grigas), the SPO+ loss, for the decision of
    `targeting_value`; that the paper on churn trains this one is a reading of it.
    """
    score, value = checks.alike("score", score, "value", value)
    return jax.nn.relu(jnp.abs(value) - 2 * jnp.where(value > 0, score, -score))


def _amount(name: str, value: Amount, interval: str, shape: tuple[int, ...]) -> Float[Array, "*#batch"]:
    choices.require_within(name, value, interval)
    return checks.number_or(name, value, shape)
