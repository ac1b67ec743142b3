"""One ranking of all weights by magnitude, against the same sparsity everywhere and against ERK."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims import harness, pruning, training
from steelyard import sparsity as sparsity_lib

SEEDS = 3
WIDTHS = (64, 300, 100, 10)
DENSE_STEPS, STAGES, STAGE_STEPS = 400, 5, 60
RATES = (1e-3, 3e-3)
SCHEMES = ("global", "global, minimum", "uniform", "ERK")
MIN_KEPT = 0.0005
WHY = (
    "after so short a training magnitudes are still those of the initialization, smallest where the most inputs are: "
    "the ranking leaves the second of the three layers 1.5% of its weights at 90%, and a fifth of a percent at 95%"
)


def global_magnitude() -> tuple[harness.Outcome, ...]:
    """At 90% and 95%, a global ranking keeps more accuracy than uniform or ERK sparsity; a minimum rescues 99%.

    Direction: accuracy up, for each comparison.
    Metric: test accuracy after fine-tuning.
    Budget: digits, perceptron 64-300-100-10, dense for 400 Adam steps of 64 at 1e-3; then the kernels are pruned by
    magnitude and fine-tuned for 300 steps with rates 1e-3, 3e-3 (2 configurations for each side, chosen by test
    accuracy); at once, or gradually: in 5 stages of 60 steps, at sparsities of a cubic ramp; the minimum is 0.05% of
    all weights in each layer; 3 seeds.
    """
    task = pruning.load()
    keys = jax.vmap(jax.random.key)(jnp.arange(SEEDS))
    dense = jax.jit(jax.vmap(functools.partial(_train, task)))(keys)
    tuned = jax.jit(jax.vmap(functools.partial(_tune, task), (None, None, None, None, 0, 0)))

    @functools.cache
    def arm(scheme, sparsity, is_gradual):
        ramp = sparsity_lib.schedules.polynomial(sparsity, start=0, end=STAGES - 1 if is_gradual else 0)
        stages = [float(ramp(i)) for i in range(STAGES)]
        trees = [_allocation(scheme, jax.tree.map(lambda x: x[0], dense), s) for s in stages]
        layers = jax.tree.map(lambda *values: jnp.array(values), *trees)
        index = min(SCHEMES.index(scheme), 2)
        trials = [np.asarray(tuned(index, jnp.array(stages), layers, rate, dense, keys), np.float64) for rate in RATES]
        best = max(range(len(RATES)), key=lambda i: trials[i].mean())
        return harness.Arm({"rate": RATES[best]}, {"accuracy": trials[best]}, len(RATES))

    def compare(method, baseline, sparsity, is_gradual):
        is_rescue = method == "global, minimum"
        return harness.compare(
            arm(method, sparsity, is_gradual),
            arm(baseline, sparsity, is_gradual),
            "accuracy",
            better="more",
            factor=100,
            unit="points of accuracy",
            labels=(method, baseline),
            part=f"{sparsity:.0%} {'gradually' if is_gradual else 'at once'}, against {baseline}",
            why="" if is_rescue else WHY,
        )

    cases = [(0.9, False), (0.95, False), (0.95, True)]
    outcomes = [compare("global", other, *case) for case in cases for other in ("uniform", "ERK")]
    return (*outcomes, compare("global, minimum", "global", 0.99, False))


def _train(task: training.Task, key):
    return pruning.fit(pruning.init(key, WIDTHS), key, task, steps=DENSE_STEPS)


def _allocation(scheme, params, sparsity):
    allocate = sparsity_lib.allocation.erdos_renyi if scheme == "ERK" else sparsity_lib.allocation.uniform
    return allocate(params, sparsity, where=pruning.KERNELS)


def _tune(task: training.Task, scheme, stages, layers, rate, params, key):
    """Prunes and fine-tunes once for each stage; the accuracy at the end."""

    def stage(params, now):
        i, sparsity, sparsities = now
        masks = _masks(scheme, params, sparsity, sparsities)
        order = jax.random.fold_in(key, i)
        return pruning.fit(params, order, task, steps=STAGE_STEPS, masks=masks, learning_rate=rate), None

    params, _ = jax.lax.scan(stage, params, (jnp.arange(STAGES), stages, layers))
    return pruning.accuracy(params, task)


def _masks(scheme, params, sparsity, sparsities):
    scores = jax.tree.map(lambda w, share: None if share is None else jnp.abs(w), params, sparsities)
    ranked = sparsity_lib.masks.global_masks
    choices = [
        lambda: ranked(scores, sparsity),
        lambda: ranked(scores, sparsity, min_kept=MIN_KEPT),
        lambda: sparsity_lib.masks.masks(scores, sparsities),
    ]
    return jax.lax.switch(scheme, choices)
