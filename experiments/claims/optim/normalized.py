"""The logistic gradient over the mean error probability: steps until all examples are classified."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims import harness
from steelyard import optim

STEPS = 50_000
GAMMAS = (1.0, 10.0, 100.0, 1e4)
SEEDS = 10


def normalized() -> tuple[harness.Outcome, ...]:
    """Divided by the mean error, gradient descent separates data that few examples keep it from separating.

    Direction: far fewer steps where one example in a thousand disagrees; on balanced Gaussian data, where all examples
    matter, plain descent with large steps needs at most 10% more. Plain descent separates faster with a larger step,
    at the price of a higher loss on the way.
    Metric: steps from w = 0 until all margins are positive (at most 50,000); the largest loss seen up to then.
    Budget: step sizes 1, 10, 100 and 1e4 on each side. Imbalanced: 999 copies of (1, 0.1) and one (-0.5, 1), no
    randomness. Gaussian: 200 examples in 20 dimensions, labels from a random direction, 10 seeds.
    """
    imbalanced = np.concatenate([np.tile([[1.0, 0.1]], (999, 1)), [[-0.5, 1.0]]]).astype(np.float32)
    hard = [_tune(lambda key: jnp.asarray(imbalanced), is_normalized, seeds=1) for is_normalized in (True, False)]
    plain, normal = (_tune(_gaussian, is_normalized, seeds=SEEDS) for is_normalized in (False, True))
    large, small = (_tune(_gaussian, False, seeds=SEEDS, gammas=(gamma,)) for gamma in (GAMMAS[-1], GAMMAS[0]))
    percent = dict(scale="percent", unit="% more steps by the baseline", better="less")
    sizes = ("step 1e4", "step 1")
    return (
        harness.compare(*hard, "steps", **percent, labels=("normalized", "plain"), part="imbalanced"),
        harness.compare(
            plain, normal, "steps", **percent, margin=-10.0, labels=("plain", "normalized"), part="Gaussian, plain"
        ),
        harness.compare(large, small, "steps", **percent, labels=sizes, part="Gaussian, large plain steps"),
        harness.compare(
            large,
            small,
            "peak",
            better="more",
            unit="nats higher largest loss",
            labels=sizes,
            part="Gaussian, loss on the way",
        ),
    )


def _tune(examples_of, is_normalized: bool, *, seeds: int, gammas=GAMMAS) -> harness.Arm:
    def run(config, key):
        return _separate(examples_of(key), config["gamma"], is_normalized)

    return harness.tune(run, {"gamma": gammas}, seeds=seeds, metric="steps", better="less")


def _gaussian(key):
    """Examples y_i a_i, all on one side of a random plane through 0."""
    k1, k2 = jax.random.split(key)
    a, direction = jax.random.normal(k1, (200, 20)), jax.random.normal(k2, (20,))
    return a * jnp.sign(a @ direction)[:, None]


def _separate(examples, gamma, is_normalized: bool):
    """Steps of gradient descent until every example y_i a_i has a positive margin."""

    def loss(w):
        return jnp.mean(jax.nn.softplus(-examples @ w))

    def unfinished(state):
        w, step, _ = state
        return (step < STEPS) & jnp.any(examples @ w <= 0)

    def descend(state):
        w, step, peak = state
        tx = optax.sgd(gamma)
        extra = {}
        if is_normalized:
            tx = optax.chain(optim.normalize_by_error(), tx)
            extra = {"error": jnp.mean(jax.nn.sigmoid(-examples @ w))}
        value, grads = jax.value_and_grad(loss)(w)
        updates, _ = tx.update(grads, tx.init(w), w, **extra)
        return w + updates, step + 1, jnp.maximum(peak, value)

    start = jnp.zeros(examples.shape[1]), 0, 0.0
    _, steps, peak = jax.lax.while_loop(unfinished, descend, start)
    return {"steps": steps, "peak": peak}
