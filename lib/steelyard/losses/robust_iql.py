"""Implicit Q-learning from data of which a part is corrupt: Huber critics and a low quantile over an ensemble.

With n critics, target networks that follow by a Polyak average of rate 0.005, and observations standardised by the data
set's mean and its standard deviation + 1e-3:

    target     = clip(reward + discount * value(next), -100, 1000)
    critics    = riql_critic_loss(q, target)
    value      = expectile_loss(ensemble_quantile(target_q) - value)
    policy     = advantage_weights(ensemble_quantile(target_q) - value) * negative log-likelihood of the action

The value learns an upper expectile of what the logged actions are worth, so that no action outside of the data is asked
about.

Source: Towards Robust Offline Reinforcement Learning under Diverse Data Corruption (2023, Yang et al.).
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from steelyard import choices, precision


def riql_critic_loss(
    q: Float[Array, "*critics batch"], target: Float[Array, "batch"], *, sigma: float = 1.0
) -> Float[Array, "*critics batch"]:
    """Huber loss of an ensemble of critics, of slope 1 for large errors.

        beta = 1 / sigma^2
        d^2 / (2 beta)    for |d| = |q - target| below beta
        |d| - beta / 2    elsewhere

    A large sigma is nearly the absolute error and ignores how wrong a corrupt target is; a small one is a square, whose
    size then falls as sigma^2.

    Args:
      q: values of the logged actions, in units of the return; critics on leading axes.
      target: reward + discount * value of the next state, common to all critics; held constant.
      sigma: positive; 0.1 to 3, by the kind of corruption.

    Returns:
      One number for each critic and transition, float32 at least.

    Raises:
      ValueError: `sigma` not positive, or a target that has not the shape of one critic's values.

    Source: Towards Robust Offline Reinforcement Learning under Diverse Data Corruption (2023, Yang et al.).
    """
    choices.require_within("sigma", sigma, "(0, inf)")
    q, target = precision.wide(q), jax.lax.stop_gradient(precision.wide(target))
    if target.shape != q.shape[-1:]:
        raise ValueError(f"target has shape {target.shape} and q {q.shape}: targets must be of shape {q.shape[-1:]}")
    beta = 1 / sigma**2
    return optax.huber_loss(q, target, delta=beta) / beta


def expectile_loss(difference: Float[Array, "*batch"], expectile: float = 0.7) -> Float[Array, "*batch"]:
    """Squared difference, weighed by its sign: `|expectile - [u < 0]| u^2`; 1/2 is half the square.

    The estimate that minimises it over many targets is their expectile, as their mean minimises the square.

    Args:
      difference: u, target minus estimate.
      expectile: in (0, 1); near 1 it tends to the maximum.

    Returns:
      Float32 at least.

    Raises:
      ValueError: `expectile` is out of its range.

    Source: Offline Reinforcement Learning with Implicit Q-Learning (2021, Kostrikov et al.), section 4.1.
    """
    choices.require_within("expectile", expectile, "(0, 1)")
    difference = precision.wide(difference)
    return jnp.where(difference < 0, 1 - expectile, expectile) * difference**2


def ensemble_quantile(q: Float[Array, "critics *batch"], quantile: float = 0.25) -> Float[Array, "*batch"]:
    """A quantile over critics, interpolated linearly between them, and held constant.

    A low one is cautious as the minimum is, which is quantile 0, but one critic that went wrong does not decide it.
    Costs a sort over the critics.

    Args:
      q: values, critics on the first axis; at least one.
      quantile: in [0, 1]; 0.1 to 0.5, by the kind of corruption.

    Returns:
      Without the first axis, float32 at least.

    Raises:
      ValueError: `quantile` is out of its range.

    Source: Towards Robust Offline Reinforcement Learning under Diverse Data Corruption (2023, Yang et al.).
    """
    choices.require_within("quantile", quantile, "[0, 1]")
    q = jax.lax.stop_gradient(precision.wide(q))
    return jnp.quantile(q, jnp.asarray(quantile, q.dtype), axis=0)


def advantage_weights(
    advantage: Float[Array, "*batch"], *, temperature: float = 3.0, maximum: float = 100.0
) -> Float[Array, "*batch"]:
    """Weights of logged actions for imitation, `min(exp(temperature advantage), maximum)`, held constant.

    Args:
      advantage: value of the action minus value of the state.
      temperature: in 1 / unit of the advantage, at least 0; 0 imitates all actions alike.
      maximum: of a weight, positive.

    Returns:
      One number for each action, float32 at least.

    Raises:
      ValueError: a number out of its range.

    Source: Offline Reinforcement Learning with Implicit Q-Learning (2021, Kostrikov et al.), section 4.3.
    """
    choices.require_within("temperature", temperature, "[0, inf)")
    choices.require_within("maximum", maximum, "(0, inf)")
    advantage = jax.lax.stop_gradient(precision.wide(advantage))
    # The minimum is taken of the exponents, which do not overflow.
    return jnp.exp(jnp.minimum(temperature * advantage, jnp.log(jnp.asarray(maximum, advantage.dtype))))
