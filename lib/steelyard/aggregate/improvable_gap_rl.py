"""Improvable gap balancing whose weights a soft actor-critic chooses, its second form (2023, Dai et al.).

The agent's words: a *state* is the K losses of a step, an *action* its K gap weights, and the *reward* what the least
improved task gained by it. Source of the agent: Soft Actor-Critic Algorithms and Applications (2018, Haarnoja et al.).
"""

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Bool, Float, Int, Key

from steelyard import choices
from steelyard.aggregate import epochs
from steelyard.aggregate import stacked as stacked_lib
from steelyard.aggregate.improvable_gap import check_epochs, of_log_losses

PyTree = Any
_ENTROPY_WEIGHT, _RATE = 0.2, 3e-4


class Agent(NamedTuple):
    """What the agent has learned.

    Attributes:
      actor: perceptron from a state to mean and log standard deviation of u, in `v = K softmax(u)`.
      critics: two perceptrons from a state and an action to the expected return, stacked.
      log_alpha: logarithm of the entropy's weight, float32.
      targets: running mean of `critics`.
      optimizer: of the first three together.
    """

    actor: PyTree
    critics: PyTree
    log_alpha: Float[Array, ""]
    targets: PyTree
    optimizer: optax.OptState


class ImprovableGapRLState(NamedTuple):
    """State of `improvable_gap_rl`.

    Attributes:
      means: of the losses, for the base.
      losses, action: of the last step, float32.
      replay: rows of state, action, next state and reward, float32.
      stored: how many rows were written, int32; number i is in row i modulo the capacity.
      agent: its networks and their optimizer.
      key: of the coming draws.
    """

    means: epochs.EpochMeans
    losses: Float[Array, "K"]
    action: Float[Array, "K"]
    replay: Float[Array, "capacity 3*K+1"]
    stored: Int[Array, ""]
    agent: Agent
    key: Key[Array, ""]


def improvable_gap_rl(
    num_tasks: int,
    *,
    steps_per_epoch: int,
    base_epoch: int = 1,
    seed: int = 0,
    log_loss: bool = True,
    learning_rate: optax.Schedule | None = None,
    optimizer: optax.GradientTransformation | None = None,
    random_epochs: int = 5,
    idle_epochs: int = 3,
    update_every: int = 50,
    batch_size: int = 256,
    capacity: int = 10_000,
    width: int = 128,
    discount: float = 0.99,
    target_rate: float = 0.005,
) -> stacked_lib.Aggregator:
    """Descends `sum_k v_k log L_k` with gap weights v that an agent chooses, step by step.

        v = K softmax(u),    u ~ Normal(mu(L), exp(clip(log_std(L), -20, 2)))
        reward of step t = min_k (L_k[t] - L_k[t + 1]) / base_k  lr(0) / lr(t)

    `base_k` is the mean of loss k over epoch `base_epoch`, and transitions are kept from the next epoch on; a base of
    zero is taken for 1. In the first `random_epochs` epochs u is standard normal. After `idle_epochs` epochs the agent
    learns at every `update_every`-th step, once it has acted: with f = 1 + the filled fraction of the memory, it makes
    floor(update_every f / 2) updates, each on floor(batch_size f / 2) transitions drawn with replacement, of

        critics:   (Q(L, v) - reward - discount (min Q_target(L', v') - alpha log p(u'|L')))^2
        actor:     alpha log p(u|L) - min Q(L, v)
        alpha:     log(alpha) (K - log p(u|L)), towards the entropy -K; alpha starts at 0.2
        targets:   Q_target <- (1 - target_rate) Q_target + target_rate Q

    where p is the density of u, because v has one dimension less. The weights of the gradients are
    `v_k / max(L_k, 1e-12)`, or `v_k` without `log_loss`.

    The state is capacity (3 K + 1) numbers and five networks, three with moments. One backward pass of the model is
    enough. A learning step adds up to `update_every` updates of the networks; under `jax.vmap` every step is one.

    Args:
      num_tasks: K.
      steps_per_epoch: steps over which a mean is taken.
      base_epoch: the epoch that improvements are compared with, counted from 0.
      seed: of everything that is drawn.
      log_loss: whether the losses' logarithms are descended, or the losses.
      learning_rate: lr, of the model, so that rewards do not fade with it; constant if `None`. Where it is 0 so is the
        reward.
      optimizer: of the agent, learning rate included; `optax.adam(3e-4)` if `None`.
      random_epochs, idle_epochs, update_every, batch_size, discount, target_rate: as above.
      capacity, width: transitions in the memory; units in both hidden layers of each perceptron.

    Returns:
      An aggregator with an `ImprovableGapRLState`. If K is 1, its update is the gradient of log L, or of L.

    Raises:
      ValueError: an argument out of its range; no losses, or not `num_tasks` of them.

    Source: Improvable Gap Balancing for Multi-Task Learning (2023, Dai et al.), IGBv2.
    """
    check_epochs(num_tasks, steps_per_epoch, base_epoch)
    limits = {
        # Half of the first two must be 1 at least, and their products with the capacity must fit in 32 bits.
        "[2, 1e3]": {"update_every": update_every, "batch_size": batch_size},
        "[1, 1e6]": {"capacity": capacity, "width": width},
        "[0, inf)": {"random_epochs": random_epochs, "idle_epochs": idle_epochs},
        "[0, 1]": {"discount": discount, "target_rate": target_rate},
        "(0, inf)": {} if learning_rate is None else {"learning_rate(0)": learning_rate(0)},
    }
    for interval, values in limits.items():
        for name, value in values.items():
            choices.require_within(name, value, interval)
    optimizer = optax.adam(_RATE) if optimizer is None else optimizer
    options = {**limits["[2, 1e3]"], **limits["[0, 1]"], "optimizer": optimizer}

    def init():
        agent_key, key = jax.random.split(jax.random.key(seed))
        means = epochs.epoch_init(num_tasks)
        replay = jnp.zeros((capacity, 3 * num_tasks + 1), jnp.float32)
        losses, action = (jnp.zeros((num_tasks,), jnp.float32) for _ in range(2))
        agent = _init_agent(agent_key, num_tasks, width, optimizer)
        return ImprovableGapRLState(means, losses, action, replay, jnp.zeros((), jnp.int32), agent, key)

    def rule(losses, state):
        losses = losses.astype(jnp.float32)
        step, epoch = state.means.step, epochs.epoch(state.means, steps_per_epoch)
        act_key, learn_key, key = jax.random.split(state.key, 3)
        replay, stored = _store(state, losses, _rate_ratio(learning_rate, step - 1), epoch > base_epoch)
        # The action does not wait for what is learned here: who asks for the weights alone does not pay for it.
        action, _ = _act(state.agent.actor, losses, act_key, epoch < random_epochs)
        learns = (epoch >= idle_epochs) & (step % update_every == 0) & (stored > 0)
        learn = functools.partial(_learn, replay=replay, stored=stored, key=learn_key, **options)
        agent = jax.lax.cond(learns, learn, lambda agent: agent, state.agent)
        weights = of_log_losses(action, losses) if log_loss else action
        means = epochs.epoch_push(state.means, losses, steps_per_epoch, base_epoch)
        return weights, ImprovableGapRLState(means, losses, action, replay, stored, agent, key)

    return stacked_lib.from_losses(rule, init, num_tasks=num_tasks)


def _init_agent(key, num_tasks: int, width: int, optimizer: optax.GradientTransformation) -> Agent:
    actor_key, critic_key = jax.random.split(key)
    actor = _init_perceptron(actor_key, (num_tasks, width, width, 2 * num_tasks))
    critics = jax.vmap(lambda k: _init_perceptron(k, (2 * num_tasks, width, width, 1)))(jax.random.split(critic_key))
    learned = actor, critics, jnp.full((), math.log(_ENTROPY_WEIGHT), jnp.float32)
    return Agent(*learned, jax.tree.map(jnp.copy, critics), optimizer.init(learned))


def _init_perceptron(key, widths):
    """He's normal kernels, drawn at once, and zero biases."""
    shapes = list(itertools.pairwise(widths))
    *ends, total = itertools.accumulate(map(math.prod, shapes))
    parts = jnp.split(jax.random.normal(key, (total,), jnp.float32), ends)
    return [(math.sqrt(2 / s[0]) * x.reshape(s), jnp.zeros(s[1], x.dtype)) for s, x in zip(shapes, parts, strict=True)]


def _perceptron(layers, x: Float[Array, "... d"]) -> Float[Array, "... out"]:
    *hidden, (kernel, bias) = layers
    for inner, offset in hidden:
        x = jax.nn.relu(x @ inner + offset)
    return x @ kernel + bias


def _act(actor, losses, key, is_random: Bool[ArrayLike, ""] = False) -> tuple[Float[Array, "... K"], Array]:
    """Gap weights, and the log density of their u."""
    mean, log_std = jnp.split(_perceptron(actor, losses), 2, axis=-1)
    log_std = jnp.clip(log_std, -20, 2)
    noise = jax.random.normal(key, mean.shape, jnp.float32)
    action = losses.shape[-1] * jax.nn.softmax(jnp.where(is_random, noise, mean + jnp.exp(log_std) * noise))
    return action, jnp.sum(jax.scipy.stats.norm.logpdf(noise) - log_std, axis=-1)


def _returns(critics, losses, actions) -> Float[Array, "2 batch"]:
    return jax.vmap(_perceptron, (0, None))(critics, jnp.concatenate([losses, actions], axis=-1))[..., 0]


def _rate_ratio(learning_rate: optax.Schedule | None, step) -> Float[ArrayLike, ""]:
    if learning_rate is None:
        return 1.0
    first, rate = (jnp.asarray(learning_rate(count), jnp.float32) for count in (0, step))
    return jnp.where(rate == 0, 0, first / jnp.where(rate == 0, 1, rate))


def _store(state: ImprovableGapRLState, losses, rate_ratio, is_kept) -> tuple[Array, Int[Array, ""]]:
    """The memory with the transition from the last step to these losses, if it is kept."""
    gains = (state.losses - losses) / jnp.where(state.means.base == 0, 1, state.means.base)
    row = jnp.concatenate([state.losses, state.action, losses, jnp.min(gains, keepdims=True) * rate_ratio])
    place = state.stored % len(state.replay)
    row = jnp.where(is_kept, row, state.replay[place])
    return state.replay.at[place].set(row), state.stored + is_kept.astype(jnp.int32)


def _learn(agent: Agent, *, replay, stored, key, update_every: int, batch_size: int, **options) -> Agent:
    filled = jnp.minimum(stored, capacity := len(replay))
    updates, size = (n * (capacity + filled) // (2 * capacity) for n in (update_every, batch_size))

    def update(i, agent):
        rows_key, noise_key = jax.random.split(jax.random.fold_in(key, i))
        rows = replay[jax.random.randint(rows_key, (batch_size,), 0, filled)]
        return _update(agent, rows, (jnp.arange(batch_size) < size) / size, noise_key, **options)

    return jax.lax.fori_loop(
        0, update_every, lambda i, a: jax.lax.cond(i < updates, update, lambda _, a: a, i, a), agent
    )


def _update(agent: Agent, rows, shares, key, *, optimizer, discount: float, target_rate: float) -> Agent:
    learned = agent[:3]
    grads = jax.grad(_objective)(learned, agent.targets, rows, shares, key, discount)
    updates, state = optimizer.update(grads, agent.optimizer, learned)
    learned = optax.apply_updates(learned, updates)
    return Agent(*learned, optax.incremental_update(learned[1], agent.targets, target_rate), state)


def _objective(learned, targets, rows, shares, key, discount) -> Float[Array, ""]:
    """The sum of the three objectives; each has a gradient with respect to its own part only."""
    actor, critics, log_alpha = learned
    fixed_actor, fixed_critics, alpha = jax.lax.stop_gradient((actor, critics, jnp.exp(log_alpha)))
    K = rows.shape[-1] // 3
    losses, actions, next_losses, reward = rows[:, :K], rows[:, K : 2 * K], rows[:, 2 * K : 3 * K], rows[:, -1]
    act_key, next_key = jax.random.split(key)
    next_actions, next_log_density = _act(fixed_actor, next_losses, next_key)
    later = jnp.min(_returns(targets, next_losses, next_actions), axis=0) - alpha * next_log_density
    errors = jnp.sum((_returns(critics, losses, actions) - reward - discount * later) ** 2, axis=0)
    new_actions, log_density = _act(actor, losses, act_key)
    costs = alpha * log_density - jnp.min(_returns(fixed_critics, losses, new_actions), axis=0)
    return jnp.sum(shares * (errors + costs + log_alpha * (K - jax.lax.stop_gradient(log_density))))
