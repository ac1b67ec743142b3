"""Robust implicit Q-learning and the plain one, on logs of a grid world of which three in ten entries are wrong."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims import harness
from steelyard import losses

SEEDS = 5
SIDE, SLIP, DISCOUNT = 8, 0.1, 0.95
STATES, ACTIONS, GOAL = SIDE * SIDE, 4, SIDE * SIDE - 1
TRANSITIONS, REWARD, CORRUPT, NOISE = 10_000, 10.0, 0.3, 30.0
STEPS, BATCH, POLYAK = 2000, 128, 0.005
ROBUST = {"rate": (1e-2, 3e-2), "sigma": (0.5, 1.0, 3.0)}
PLAIN = {"rate": (1e-2, 3e-2), "expectile": (0.5, 0.7, 0.9)}


def robust_iql() -> tuple[harness.Outcome, ...]:
    """From logs with 30% of the rewards, or of the next states, replaced, robust IQL returns more than IQL.

    Direction: discounted return of the learned policy up, for each of the two kinds of corruption.
    Metric: the return in the true world from a uniformly drawn state, solved exactly, in percent of the best policy's.
    Budget: 8 x 8 grid, goal in a corner with reward 10, discount 0.95, one move in ten goes in a random direction;
    10 000 transitions from random states by random actions; a corrupt reward is uniform in (-30, 30), a corrupt next
    state any state. Tables instead of networks, each critic with minibatches of its own; 2000 Adam steps of 128
    transitions; temperature 3, targets follow by 0.005, and are clipped to [-100, 1000]. Robust: 5 critics, quantile
    0.25, expectile 0.7, sigma 0.5, 1, 3; plain: squared loss, the lesser of 2 critics, expectile 0.5, 0.7, 0.9; rates
    1e-2 and 3e-2: 6 configurations each, chosen by the return; 5 seeds, which draw the logs.
    """
    outcomes = []
    for kind in ("rewards", "next states"):
        robust, plain = (
            harness.tune(functools.partial(_run, kind, is_robust), grid, seeds=SEEDS, metric="return", better="more")
            for is_robust, grid in ((True, ROBUST), (False, PLAIN))
        )
        compared = harness.compare(
            robust,
            plain,
            "return",
            better="more",
            factor=100,
            unit="points of the best return",
            labels=("robust IQL", "IQL"),
            part=f"corrupt {kind}",
        )
        outcomes.append(compared)
    return tuple(outcomes)


def _run(kind, is_robust, config, key):
    key_log, key_start, key_steps = jax.random.split(key, 3)
    log = _log(kind, key_log)
    critics = 5 if is_robust else 2
    tables = {
        "q": 0.1 * jax.random.normal(key_start, (critics, STATES, ACTIONS)),
        "value": jnp.zeros(STATES),
        "policy": jnp.zeros((STATES, ACTIONS)),
    }
    tx = optax.adam(config["rate"])

    def step(carry, key):
        tables, followers, state = carry
        rows = jax.random.randint(key, (critics, BATCH), 0, TRANSITIONS)
        grads = jax.grad(_loss)(tables, followers, is_robust, config, jax.tree.map(lambda x: x[rows], log))
        updates, state = tx.update(grads, state)
        tables = optax.apply_updates(tables, updates)
        return (tables, optax.incremental_update(tables["q"], followers, POLYAK), state), None

    start = tables, tables["q"], tx.init(tables)
    (tables, *_), _ = jax.lax.scan(step, start, jax.random.split(key_steps, STEPS))
    return {"return": _return(jax.nn.softmax(tables["policy"])) / _best_return()}


def _loss(tables, followers, is_robust, config, batch):
    """Of all critics on batches of their own, and of value and policy on the first one's."""
    state, action, reward, ends, following = batch
    target = jnp.clip(reward + DISCOUNT * jnp.where(ends, 0, tables["value"][following]), -100, 1000)
    q = jax.vmap(lambda table, s, a: table[s, a])(tables["q"], state, action)
    if is_robust:
        critic = jax.vmap(functools.partial(losses.riql_critic_loss, sigma=config["sigma"]))(q, target)
    else:
        critic = losses.l2_loss(q, jax.lax.stop_gradient(target))
    state, action = state[0], action[0]
    expectile = 0.7 if is_robust else config["expectile"]
    cautious = losses.ensemble_quantile(followers[:, state, action], 0.25 if is_robust else 0.0)
    advantage = cautious - tables["value"][state]
    log_p = jax.nn.log_softmax(tables["policy"][state])[jnp.arange(BATCH), action]
    parts = critic, losses.expectile_loss(advantage, expectile), -losses.advantage_weights(advantage) * log_p
    # Each table's entries meet few of the examples of a batch; Adam makes up for the scale.
    return sum(jnp.mean(jnp.sum(part.reshape(-1, BATCH), axis=0)) for part in parts)


@functools.cache
def _world():
    """Probabilities of the next state [state, action, state], by loops over the grid."""
    moves = ((-1, 0), (1, 0), (0, -1), (0, 1))
    direct = np.zeros((STATES, ACTIONS, STATES), np.float32)
    for state in range(STATES):
        for action, (down, right) in enumerate(moves):
            row, column = np.clip([state // SIDE + down, state % SIDE + right], 0, SIDE - 1)
            direct[state, action, row * SIDE + column] = 1
    return (1 - SLIP) * direct + SLIP * direct.mean(1, keepdims=True)


def _log(kind, key):
    """Transitions: state, action, reward, whether the episode ends, next state."""
    keys = jax.random.split(key, 6)
    state = jax.random.randint(keys[0], (TRANSITIONS,), 0, GOAL)
    action = jax.random.randint(keys[1], (TRANSITIONS,), 0, ACTIONS)
    following = jax.random.categorical(keys[2], jnp.log(_world())[state, action])
    ends = following == GOAL
    reward = jnp.where(ends, REWARD, 0.0)
    corrupt = jax.random.bernoulli(keys[3], CORRUPT, (TRANSITIONS,))
    if kind == "rewards":
        reward = jnp.where(corrupt, jax.random.uniform(keys[4], (TRANSITIONS,), minval=-NOISE, maxval=NOISE), reward)
    else:
        following = jnp.where(corrupt, jax.random.randint(keys[5], (TRANSITIONS,), 0, STATES), following)
    return state, action, reward, ends, following


def _return(policy):
    """Mean over all states but the goal of what the policy is worth there."""
    moves = jnp.einsum("sa,sat->st", policy, jnp.asarray(_world()))[:GOAL]
    value = jnp.linalg.solve(jnp.eye(GOAL) - DISCOUNT * moves[:, :GOAL], REWARD * moves[:, GOAL])
    return jnp.mean(value)


@functools.cache
def _best_return():
    """By value iteration, in NumPy."""
    value = np.zeros(STATES)
    for _ in range(500):
        arrived = np.where(np.arange(STATES) == GOAL, REWARD, DISCOUNT * value)
        value = (_world() @ arrived).max(1)
    return float(value[:GOAL].mean())
