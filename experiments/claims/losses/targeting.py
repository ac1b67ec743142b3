"""Whom to make an offer to stay: trained by profit, and by likelihood with a threshold."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Key

from experiments.claims import harness, training
from steelyard import losses

SEEDS = 10
CUSTOMERS, HELD_OUT, FEATURES = 2000, 20_000, 12
STEPS, RATE = 500, 0.03
COSTS = {"incentive": 20.0, "contact": 1.0, "acceptance": 0.3}
DECAYS = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
# The features by which customers leave, and those that tell what they are worth.
MASKS = np.array([[2 <= i < 8 for i in range(FEATURES)], [i < 4 for i in range(FEATURES)]])

WHY = (
    "a customer stays or leaves, so that values are many small losses and few large gains: SPO+ then follows the "
    "majority, and targets nobody"
)

Method = Callable[[Array, Array, Array, dict[str, float]], Array]


class Customers(NamedTuple):
    """Features, probability of leaving, whether they leave, and lifetime value in money."""

    x: Float[Array, "n d"]
    probability: Float[Array, "n"]
    leaves: Float[Array, "n"]
    lifetime: Float[Array, "n"]


def targeting() -> tuple[harness.Outcome, ...]:
    """Scores trained by the profit of the decision earn more than those of a churn model with a threshold.

    Direction: profit up, for SPO+ and for the smooth regret, against logistic regression that targets from the
    probability on at which a customer of average lifetime value pays for the offer.
    Metric: expected profit per customer on 20 000 unseen customers, each with the own lifetime value.
    Budget: 12 normal features, churn logistic in features 3-8 (about 23% leave); lifetime values log-normal, median
    200, about 1 in the logarithm, higher with features 1-4 and lower for those likely to leave; offers cost 20 and
    contacts 1, 30% accept. Linear scores, 2000 customers with observed churn, 500 Adam steps of 0.03 on all of them;
    weight decays 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1 for logistic regression and for SPO+, decays 1e-3 and 1e-2 with
    temperatures 0.1, 0.3, 1 (of the mean size of a value) for the smooth regret: 6 configurations each, chosen by the
    profit on 2000 other customers with observed churn; 10 seeds.
    """
    likelihood, spo, smooth = (
        harness.tune(
            # Not vectorized: the customers are then drawn by one program for all methods.
            lambda config, key, method=method: _run(method, config, _draw(key)),
            grid,
            seeds=SEEDS,
            metric="valid",
            better="more",
            vectorize=False,
        )
        for method, grid in (
            (_likelihood, {"decay": DECAYS}),
            (_spo_plus, {"decay": DECAYS}),
            (_smooth, {"decay": (1e-3, 1e-2), "temperature": (0.1, 0.3, 1.0)}),
        )
    )
    return tuple(
        harness.compare(
            arm,
            likelihood,
            "profit",
            better="more",
            unit="of money per customer",
            labels=(label, "logistic regression"),
            part=label,
            why=why,
        )
        for arm, label, why in ((spo, "SPO+", WHY), (smooth, "smooth regret", ""))
    )


def _likelihood(score, value, leaves, config):
    del value, config
    return losses.sigmoid_binary_cross_entropy(score, leaves)


def _spo_plus(score, value, leaves, config):
    del leaves, config
    return losses.spo_plus_targeting(score, value)


def _smooth(score, value, leaves, config):
    del leaves
    return losses.targeting_regret_smooth(score, value, temperature=config["temperature"])


@functools.partial(jax.jit, static_argnums=0)
def _run(method: Method, config: dict[str, float], data: list[Customers]):
    fit, valid, test = data
    value = losses.targeting_value(fit.leaves, fit.lifetime, **COSTS)
    value = value / jnp.mean(jnp.abs(value))

    def loss(params, _):
        score = fit.x @ params["w"] + params["b"]
        return jnp.mean(method(score, value, fit.leaves, config)) + config["decay"] * jnp.sum(params["w"] ** 2)

    start = {"w": jnp.zeros(FEATURES), "b": jnp.zeros(())}
    params, *_ = training.fit(loss, start, optax.adam(RATE), jnp.arange(STEPS))
    threshold = _break_even(jnp.mean(fit.lifetime)) if method is _likelihood else 0.0

    def profit(customers, churn):
        chosen = customers.x @ params["w"] + params["b"] > threshold
        return jnp.mean(chosen * losses.targeting_value(churn, customers.lifetime, **COSTS))

    return {"valid": profit(valid, valid.leaves), "profit": profit(test, test.probability)}


def _break_even(lifetime: Float[Array, ""]) -> Float[Array, ""]:
    """The logit of the probability of leaving at which an offer is worth 0: the value is linear in it."""
    stays, leaves = (losses.targeting_value(jnp.float32(churn), lifetime, **COSTS) for churn in (0, 1))
    return jnp.log(-stays / leaves)


@jax.jit
def _draw(key: Key[Array, ""]) -> list[Customers]:
    """Customers to train on, to choose by and to report."""
    keys = jax.random.split(key, 4)
    size = 2 * CUSTOMERS + HELD_OUT
    directions = losses.normalize(jax.random.normal(keys[0], (2, FEATURES)) * MASKS)
    x = jax.random.normal(keys[1], (size, FEATURES))
    leaving, worth = directions @ x.T
    probability = jax.nn.sigmoid(1.2 * leaving - 1.5)
    leaves = jax.random.bernoulli(keys[2], probability).astype(jnp.float32)
    lifetime = 200 * jnp.exp(0.6 * worth - 0.4 * leaving + 0.7 * jax.random.normal(keys[3], (size,)))
    parts = [jnp.split(a, (CUSTOMERS, 2 * CUSTOMERS)) for a in (x, probability, leaves, lifetime)]
    return [Customers(*part) for part in zip(*parts, strict=True)]
