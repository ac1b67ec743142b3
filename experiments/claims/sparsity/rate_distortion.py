"""Distortions of single layers: whether they add up, and whether the sparsities chosen by their sum are good ones."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims import harness, pruning, training
from steelyard.sparsity import allocation, masks

SEEDS = 5
WIDTHS = (64, 128, 128, 128, 128, 10)
STEPS, CALIBRATION = 400, 256
AMOUNTS = np.linspace(0, 1, 101)
JOINT, SMALL = 64, 31  # joint prunings, each layer by one of the first 31 amounts: up to 30%
SPARSITIES = (0.8, 0.9)
BOUND = 0.9
WHY_SUM = "the prunings of five layers interact"
WHY = {
    "LAMP": "the sum is near the joint distortion for small prunings only, and here every layer loses most weights",
    "uniform": "without fine-tuning too little is left, by any allocation, and the seeds scatter by more than the gain",
}


def rate_distortion() -> tuple[harness.Outcome, ...]:
    """The distortion of joint prunings is about the sum of those of the layers; its best sum beats LAMP and uniform.

    Direction: correlation of joint distortion and sum above 0.9; accuracy without fine-tuning higher by rate-distortion
    than by LAMP, and by LAMP than by uniform sparsity, at 80% and at 90%.
    Metric: correlation over 64 joint prunings, in which each layer loses 0 to 30% of its weights at random; test
    accuracy of the pruned network.
    Budget: digits, perceptron with 4 hidden layers of 128, 400 Adam steps of 64 at rate 1e-3; kernels pruned by
    magnitude; curves of 101 amounts on 256 training examples; nothing is tuned; 5 seeds.
    """
    arm = harness.tune(
        functools.partial(_run, pruning.load()), {}, seeds=SEEDS, metric="correlation", better="more", vectorize=False
    )

    def side(name):
        return harness.Arm({}, {"value": arm.metrics[name]}, 1)

    bound = harness.Arm({}, {"value": np.full(SEEDS, BOUND)}, 1)
    gap = 100 * np.median(arm.metrics["gap"])
    points = functools.partial(harness.compare, metric="value", better="more", factor=100, unit="points of accuracy")
    outcomes = [
        harness.compare(
            side("correlation"),
            bound,
            "value",
            better="more",
            unit="correlation",
            labels=(f"joint and sum, median gap {gap:.0f}%:", "bound"),
            part="additivity",
            why=WHY_SUM,
        )
    ]
    for sparsity in SPARSITIES:
        arms = [(name, side(f"{name} {sparsity}")) for name in ("rate-distortion", "LAMP", "uniform")]
        for (name, method), (other, baseline) in itertools.pairwise(arms):
            part = f"{sparsity:.0%}, {name} against {other}"
            outcomes.append(points(method, baseline, labels=(name, other), part=part, why=WHY[other]))
    return tuple(outcomes)


def _run(task: training.Task, config, key):
    del config
    params = _train(task, key)
    x = task.x[:CALIBRATION]
    curves = np.asarray(_curves(params, x), np.float64)
    drawn = np.asarray(jax.random.randint(key, (JOINT, len(curves)), 0, SMALL))
    joint = np.asarray(_joint(params, x, jnp.asarray(AMOUNTS[drawn])), np.float64)
    sums = curves[np.arange(len(curves)), drawn].sum(axis=1)
    results = {"correlation": np.corrcoef(joint, sums)[0, 1], "gap": np.median(np.abs(joint - sums) / joint)}
    sizes = [layer["kernel"].size for layer in params.values()]
    for sparsity in SPARSITIES:
        chosen = AMOUNTS[allocation.rate_distortion(curves, AMOUNTS, sizes, sparsity)]
        trees = (
            allocate(params, sparsity, where=pruning.KERNELS) for allocate in (allocation.lamp, allocation.uniform)
        )
        lamp, uniform = (np.array(jax.tree.leaves(tree)) for tree in trees)
        for name, shares in (("rate-distortion", chosen), ("LAMP", lamp), ("uniform", uniform)):
            results[f"{name} {sparsity}"] = _accuracy(params, task, jnp.asarray(shares))
    return results


@jax.jit
def _train(task, key):
    return pruning.fit(pruning.init(key, WIDTHS), key, task, steps=STEPS)


@jax.jit
def _curves(params, x):
    return allocation.distortion_curves(pruning.forward, params, x, AMOUNTS, where=pruning.KERNELS)


@jax.jit
def _joint(params, x, draws):
    outputs = pruning.forward(params, x)
    return jax.lax.map(lambda shares: jnp.mean((pruning.forward(_pruned(params, shares), x) - outputs) ** 2), draws)


@jax.jit
def _accuracy(params, task, shares):
    return pruning.accuracy(_pruned(params, shares), task)


def _pruned(params, shares):
    """With these sparsities of the kernels, by magnitude."""
    scores = {name: {"bias": None, "kernel": jnp.abs(layer["kernel"])} for name, layer in params.items()}
    kept = masks.masks(scores, jax.tree.unflatten(jax.tree.structure(scores), list(shares)))
    return masks.apply(params, kept)
