"""The scheduled pseudo-Huber loss: diffusion on two moons, of which a tenth was replaced by outliers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims import harness, training
from steelyard import losses

SEEDS = 5
POINTS, OUTLIERS, NEAR, FAR = 1000, 0.1, 4.0, 8.0
LEVELS, STEPS, BATCH = 60, 1000, 128
SAMPLES, PROJECTIONS = 1000, 64
RATES = (3e-3, 1e-2)
DELTAS = (0.01, 0.1)
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-3, 0.15, LEVELS))
FREQUENCIES = np.arange(1, 4)
WHY_CONSTANT = (
    "two moons have no fine detail that small noise must get right, so that a small delta costs nothing there and the "
    "schedule only gives up robustness"
)
WHY_CLEAN = "the distances differ by less than their spread over five seeds"
WIDTHS = (2 + 2 * len(FREQUENCIES), 64, 2)


def pseudo_huber() -> tuple[harness.Outcome, ...]:
    """Trained on data with outliers, diffusion by the scheduled pseudo-Huber loss samples nearer to the clean data.

    Direction: sliced Wasserstein distance down, against squared loss and against a constant delta; on clean data, no
    more than 10% above that of squared loss.
    Metric: mean over 64 directions of the distance between 1000 samples and 1000 new clean points.
    Budget: two moons of unit scale, 1000 points, 10% replaced by points at a distance of 4 to 8 from the centre; noise
    is predicted by a perceptron of 64 hidden units from the point and 6 Fourier features of the level, 60 levels,
    ancestral sampling; 1000 Adam steps of 128, rate decayed to 0 by a cosine; delta^(t / T) or a constant delta of 0.01
    and 0.1, each with rates 3e-3 and 1e-2, squared loss with rates 1e-3, 3e-3, 1e-2, 3e-2 (4 configurations each),
    chosen by the distance to other clean points; on clean data anew; 5 seeds, which draw data, network and noise.

    A first run, of 128 hidden units, 1500 steps and 1500 samples, took twice the time that there is for a claim; its
    verdicts were: holds, does not hold, inconclusive.
    """
    grid = {"delta": DELTAS, "rate": RATES}
    arms = {
        (name, share): harness.tune(
            functools.partial(_run, delta_of, share),
            grid_of,
            seeds=SEEDS,
            metric="valid",
            better="less",
            vectorize=False,
        )
        for name, delta_of, grid_of, shares in (
            ("scheduled", _scheduled, grid, (OUTLIERS, 0.0)),
            ("constant", _constant, grid, (OUTLIERS,)),
            ("squared", _infinite, {"rate": (1e-3, 3e-3, 1e-2, 3e-2)}, (OUTLIERS, 0.0)),
        )
        for share in shares
    }

    def compare(baseline, share, **options):
        return harness.compare(
            arms["scheduled", share],
            arms[baseline, share],
            "distance",
            better="less",
            scale="percent",
            unit="% more distance without it",
            labels=("scheduled", baseline),
            **options,
        )

    return (
        compare("squared", OUTLIERS, part="with outliers, against squared loss"),
        compare("constant", OUTLIERS, part="with outliers, against a constant delta", why=WHY_CONSTANT),
        # A method that is 10% above the baseline makes the baseline 9.1% less.
        compare("squared", 0.0, margin=100 * (1 / 1.1 - 1), part="on clean data, not 10% worse", why=WHY_CLEAN),
    )


def _scheduled(level, config):
    return losses.pseudo_huber_delta(level, LEVELS, delta=config["delta"])


def _constant(level, config):
    return jnp.full(level.shape, config["delta"])


def _infinite(level, config):
    """Half the squared error."""
    del config
    return jnp.full(level.shape, jnp.inf)


def _run(delta_of, share, config, key):
    """Not traced as a whole, so that one program serves all arms."""
    return _fit(delta_of(jnp.arange(LEVELS + 1), config), share, config["rate"], key)


@jax.jit
def _fit(deltas, share, rate, key):
    keys = jax.random.split(key, 6)
    data = _corrupt(keys[0], _moons(keys[1], POINTS), share)

    def loss(params, batch):
        rows, key = batch
        key_level, key_noise = jax.random.split(key)
        level = jax.random.randint(key_level, (BATCH,), 1, LEVELS + 1)
        noise = jax.random.normal(key_noise, (BATCH, 2))
        signal = jnp.asarray(ALPHA_BAR, jnp.float32)[level - 1][:, None]
        noisy = jnp.sqrt(signal) * data[rows] + jnp.sqrt(1 - signal) * noise
        errors = _denoise(params, noisy, level) - noise
        return jnp.mean(losses.pseudo_huber(errors, deltas[level], axis=-1))

    batches = training.minibatches(keys[2], POINTS, BATCH, STEPS), jax.random.split(keys[3], STEPS)
    tx = optax.adam(optax.cosine_decay_schedule(rate, STEPS))
    params, *_ = training.fit(loss, training.mlp_init(key, WIDTHS), tx, batches)
    samples = _sample(params, keys[4])
    valid, test = jax.vmap(lambda key: _distance(key, samples, _moons(key, SAMPLES)))(jax.random.split(keys[5]))
    return {"valid": valid, "distance": test}


def _moons(key, count):
    keys = jax.random.split(key, 3)
    angle = jax.random.uniform(keys[0], (count,), maxval=jnp.pi)
    upper = jax.random.bernoulli(keys[1], shape=(count,))
    x = jnp.where(upper, jnp.cos(angle), 1 - jnp.cos(angle))
    y = jnp.where(upper, jnp.sin(angle), 0.5 - jnp.sin(angle))
    points = jnp.stack([x - 0.5, y - 0.25], axis=1) + 0.05 * jax.random.normal(keys[2], (count, 2))
    return points / 0.7


def _corrupt(key, points, share):
    keys = jax.random.split(key)
    angle = jax.random.uniform(keys[0], (POINTS,), maxval=2 * jnp.pi)
    radius = jax.random.uniform(keys[1], (POINTS,), minval=NEAR, maxval=FAR)
    far = radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=1)
    return jnp.where(jnp.arange(POINTS)[:, None] < share * POINTS, far, points)


def _denoise(params, x, level):
    phase = jnp.pi * FREQUENCIES * (level / LEVELS)[:, None]
    features = jnp.concatenate([x, jnp.sin(phase), jnp.cos(phase)], axis=1)
    return training.mlp(params, features, activation=jax.nn.silu)


def _sample(params, key):
    """Ancestral sampling, whose variance is that of the forward process."""
    alpha_bar = jnp.asarray(ALPHA_BAR, jnp.float32)
    alpha = alpha_bar / jnp.append(1.0, alpha_bar[:-1])

    def step(x, level_and_key):
        level, key = level_and_key
        a, total = alpha[level - 1], alpha_bar[level - 1]
        noise = _denoise(params, x, jnp.full(SAMPLES, level))
        mean = (x - (1 - a) / jnp.sqrt(1 - total) * noise) / jnp.sqrt(a)
        return mean + jnp.where(level > 1, jnp.sqrt(1 - a), 0) * jax.random.normal(key, x.shape), None

    start = jax.random.normal(key, (SAMPLES, 2))
    levels = jnp.arange(LEVELS, 0, -1), jax.random.split(jax.random.fold_in(key, 1), LEVELS)
    return jax.lax.scan(step, start, levels)[0]


def _distance(key, a, b):
    """Sliced Wasserstein distance of order 1."""
    angle = jnp.pi * (jnp.arange(PROJECTIONS) + jax.random.uniform(key)) / PROJECTIONS
    directions = jnp.stack([jnp.cos(angle), jnp.sin(angle)])
    return jnp.mean(jnp.abs(jnp.sort(a @ directions, axis=0) - jnp.sort(b @ directions, axis=0)))
