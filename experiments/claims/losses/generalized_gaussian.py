"""Generalized Gaussian TD errors: values on a chain whose rewards are heavy-tailed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.stats

from experiments.claims import harness
from steelyard import losses

SEEDS = 20
STATES, TABLES, DISCOUNT = 19, 5, 0.9
# Student-t noise of 2.5 degrees of freedom and scale 1/2, drawn from its quantiles: rejection sampling takes longer.
NOISE = scipy.stats.t.ppf((np.arange(100_000) + 0.5) / 100_000, 2.5, scale=0.5).astype(np.float32)
STEPS, BATCH = 1200, 64
GRID = {"rate": (0.1, 0.3, 1.0, 3.0, 10.0)}
SHAPE_RATE = 1e-2
WHY = (
    "the noise of a reward is common to all tables, so that their spread does not show it, and weights by the spread "
    "of five errors only add noise: with equal weights the error is a third less"
)


def generalized_gaussian() -> tuple[harness.Outcome, ...]:
    """Under heavy-tailed rewards, values learned by generalized Gaussian likelihood come nearer to the truth.

    Direction: root mean squared error of the values down, against squared TD errors.
    Metric: of the mean over five tables, over the 19 states, averaged over the last 200 steps.
    Budget: random walk on 19 states, reward -1 at its left end and 1 at its right one, discount 0.9, Student-t noise
    of 2.5 degrees of freedom and scale 1/2 on every reward; 1200 steps of plain SGD on 64 transitions from random
    states, of which each table learns from a random half; values start at N(0, 1). The method: likelihood weighed by
    the tables' shapes, which start at 2, stay in [0.1, 10] and are learned by Adam at 1e-2, plus the squared errors
    weighed by their inverse variance with an effective batch of half. The baseline: half the squared error. Rates 0.1,
    0.3, 1, 3, 10 for the sum of the losses of a batch by its size (5 configurations each), chosen by the metric; 20
    seeds.

    Two earlier runs, where the claim did not hold either, had no discount, noise of scale 1 and half the batch; there
    the noise was so strong that for both sides the best of the rates (0.03 to 3, then 1 to 16) left the values near
    where they began. The part "likelihood alone" was added after them: it leaves the squared errors out.
    """
    method, baseline, alone = (
        harness.tune(functools.partial(_run, loss), GRID, seeds=SEEDS, metric="error", better="less")
        for loss in (_robust, _squared, _likelihood)
    )
    compare = functools.partial(
        harness.compare,
        baseline=baseline,
        metric="error",
        better="less",
        scale="percent",
        unit="% more error of squared TD",
    )
    return (
        compare(
            method, labels=("likelihood and weighed squares", "squared TD"), part="likelihood and squares", why=WHY
        ),
        compare(alone, labels=("likelihood", "squared TD"), part="likelihood alone"),
    )


def _run(loss, config, key):
    key_start, key_steps = jax.random.split(key)
    # softplus(log(e^2 - 1)) = 2: it begins with a normal distribution.
    tables = {
        "value": jax.random.normal(key_start, (TABLES, STATES)),
        "shape": jnp.full((TABLES, STATES), jnp.log(jnp.expm1(2.0))),
    }
    tx = optax.partition(
        {"value": optax.sgd(config["rate"]), "shape": optax.adam(SHAPE_RATE)}, {"value": "value", "shape": "shape"}
    )
    truth = _truth()

    def step(carry, key):
        tables, state = carry
        updates, state = tx.update(jax.grad(lambda tables: loss(tables, *_batch(key)))(tables), state)
        tables = optax.apply_updates(tables, updates)
        error = jnp.sqrt(jnp.mean((tables["value"].mean(0) - truth) ** 2))
        return (tables, state), error

    _, errors = jax.lax.scan(step, (tables, tx.init(tables)), jax.random.split(key_steps, STEPS))
    return {"error": jnp.mean(errors[-200:])}


def _truth():
    """Values without noise, which solve the Bellman equation."""
    moves = (np.eye(STATES, k=1) + np.eye(STATES, k=-1)) / 2
    reward = np.zeros(STATES)
    reward[[0, -1]] = -1 / 2, 1 / 2
    return jnp.asarray(np.linalg.solve(np.eye(STATES) - DISCOUNT * moves, reward), jnp.float32)


def _batch(key):
    """State, reward, next state (one beyond an end is the end of the episode), and which table learns from what."""
    keys = jax.random.split(key, 4)
    state = jax.random.randint(keys[0], (BATCH,), 0, STATES)
    following = state + jax.random.rademacher(keys[1], (BATCH,), int)
    reward = jnp.where(following < 0, -1.0, 0.0) + jnp.where(following == STATES, 1.0, 0.0)
    noisy = reward + jnp.asarray(NOISE)[jax.random.randint(keys[2], (BATCH,), 0, len(NOISE))]
    return state, noisy, following, jax.random.bernoulli(keys[3], 0.5, (TABLES, BATCH))


def _errors(tables, state, reward, following):
    ends = (following < 0) | (following == STATES)
    next_value = jnp.where(ends, 0, tables["value"][:, jnp.clip(following, 0, STATES - 1)])
    return losses.td_error(reward, DISCOUNT, tables["value"][:, state], jax.lax.stop_gradient(next_value))


def _squared(tables, state, reward, following, learns):
    errors = _errors(tables, state, reward, following)
    return jnp.sum(learns * losses.l2_loss(errors)) / BATCH


def _likelihood(tables, state, reward, following, learns):
    errors, shape = _errors(tables, state, reward, following), _shapes(tables)[:, state]
    return jnp.sum(learns * _trusted(errors, shape)) / BATCH


def _robust(tables, state, reward, following, learns):
    errors, shapes = _errors(tables, state, reward, following), _shapes(tables)
    kurtosis = jnp.mean(losses.generalized_gaussian_excess_kurtosis(shapes), axis=0)[state]
    spread = losses.best_biased_variance(errors, excess_kurtosis=kurtosis)
    weights = losses.inverse_variance_weights(spread, min_effective=BATCH / 2)
    return jnp.sum(learns * (_trusted(errors, shapes[:, state]) / BATCH + weights * errors**2))


def _shapes(tables):
    return jnp.clip(jax.nn.softplus(tables["shape"]), 0.1, 10)


def _trusted(errors, shape):
    return shape / jnp.sum(shape, axis=0) * losses.generalized_gaussian_nll(errors, shape)
