"""The top eigenvalue of the Hessian at the start, the largest stable learning rate, and what warm-up does to both."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from experiments.claims import harness, training
from steelyard import train

SEEDS = 5
EXAMPLES = 256
PHASE = 100  # steps; the first phase is the warm-up, where there is one
WIDTHS = (64, *(32,) * 5, 10)
RATES = 0.03 * 2 ** (np.arange(19) / 2)


def curvature() -> tuple[harness.Outcome, ...]:
    """Rates above 2 / curvature diverge; warm-up leads to flatter regions and doubles the largest stable rate.

    Direction: runs whose rate is above 2 / (top Hessian eigenvalue at the start) diverge more often than runs below;
    100 steps of warm-up raise the largest stable rate at least twofold, and at that rate the top eigenvalue is lower
    after the warm-up than at the start; layer normalization, and kernels of a quarter of the variance, lower the top
    eigenvalue at the start.
    Metric: share of diverged runs (the mean loss of the last 10 steps is above the first loss, or not a number); the
    largest rate of the grid up to which no run diverges; top Ritz value of 20 Lanczos steps.
    Budget: gradient descent on 256 digits, perceptron of 6 layers (5 hidden of 32, He initialization), 200 steps with a
    constant rate, or with a linear warm-up for the first 100; 19 rates from 0.03 to 15.4, each sqrt(2) times the one
    before, with and without warm-up; 5 seeds.
    """
    task = training.load("digits")
    x, y = task.x[:EXAMPLES], task.y[:EXAMPLES]
    keys = jax.vmap(jax.random.key)(jnp.arange(SEEDS))

    def top(params, key, norm=None):
        return train.hessian_top_eigenvalue(
            lambda p: training.cross_entropy(training.mlp(p, x, norm=norm), y), params, rng=key
        )

    def loss(params, _):
        return training.cross_entropy(training.mlp(params, x), y)

    def run(rate, key, has_warmup):
        params = training.mlp_init(key, WIDTHS)
        warmup = optax.linear_schedule(rate / PHASE, rate, PHASE - 1)
        params, first, _ = training.fit(loss, params, optax.sgd(warmup if has_warmup else rate), jnp.arange(PHASE))
        _, last, _ = training.fit(loss, params, optax.sgd(rate), jnp.arange(PHASE))
        return jnp.mean(last[-10:]) <= first[0], top(params, key)

    def run_all(has_warmup):
        over_rates = jax.vmap(lambda rate, key: run(rate, key, has_warmup), (0, None))
        results = jax.jit(jax.vmap(over_rates, (None, 0)))(jnp.asarray(RATES, jnp.float32), keys)
        return tuple(np.asarray(result) for result in results)

    def start(norm, gain):
        params = jax.vmap(lambda key: training.mlp_init(key, WIDTHS, gain=gain, norm=norm is not None))(keys)
        return _arm(jax.jit(jax.vmap(lambda p, key: top(p, key, norm)))(params, keys))

    plain, layer_norm, smaller = start(None, 2.0), start("layer", 2.0), start(None, 0.5)
    (is_stable, _), (is_stable_warm, top_warm) = run_all(False), run_all(True)
    initial = plain.metrics["value"]
    is_above = RATES * initial[:, None] > 2
    largest, largest_warm = _last_stable(is_stable), _last_stable(is_stable_warm)
    return (
        harness.compare(
            _arm(np.sum(is_above & ~is_stable, 1) / np.sum(is_above, 1)),
            _arm(np.sum(~is_above & ~is_stable, 1) / np.sum(~is_above, 1)),
            "value",
            better="more",
            factor=100,
            unit="points of diverged runs",
            labels=("above 2 / curvature", "below"),
            part="divergence",
        ),
        harness.compare(
            _arm(RATES[largest_warm]),
            _arm(RATES[largest]),
            "value",
            better="more",
            scale="percent",
            unit="% larger stable rate",
            # A little below twofold: the grid has steps of sqrt(2), so that exactly twofold is likely.
            margin=99.0,
            labels=("warm-up", "none"),
            part="stable rate",
            why="A run whose hidden units all die ends at a loss of ln 10, below that of most starts, and so counts as "
            "stable: the limit found is that of dying without overflow, and differs much between seeds.",
        ),
        _lower(_arm(top_warm[np.arange(SEEDS), largest_warm]), plain, ("after warm-up", "at the start"), "warm-up"),
        _lower(
            layer_norm,
            plain,
            ("layer norm", "none"),
            "layer norm",
            "The He start of so small a network is well scaled already; layer normalization only brings smaller "
            "activations up to size, and the logits and their curvature with them.",
        ),
        _lower(smaller, plain, ("gain 0.5", "gain 2"), "smaller weights"),
    )


def _last_stable(is_stable) -> Array:
    """Place of the largest rate up to which every run is stable, for each seed; the first rate must be."""
    if not np.all(is_stable[:, 0]):
        raise ValueError("the smallest rate of the grid diverges")
    return np.sum(np.logical_and.accumulate(is_stable, axis=1), axis=1) - 1


def _arm(values: Float[Array, "seeds"]) -> harness.Arm:
    return harness.Arm({}, {"value": np.asarray(values, np.float64)}, len(RATES))


def _lower(
    method: harness.Arm, baseline: harness.Arm, labels: tuple[str, str], part: str, why: str = ""
) -> harness.Outcome:
    percent = dict(better="less", scale="percent", unit="% more curvature without")
    return harness.compare(method, baseline, "value", labels=labels, part=part, why=why, **percent)
