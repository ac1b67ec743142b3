"""ECoFLaP: sparsities of layers from forward passes, then activation-aware pruning inside them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims import harness, pruning, training
from steelyard import tree
from steelyard.sparsity import allocation, calibration, masks, scores

SEEDS = 5
WIDTHS = (64, 64, 64, 64, 64, 10)
STEPS, CALIBRATION = 1000, 256
NOISE, EPS = 32, 1e-3
SPARSITIES = (0.6, 0.7)
WHY = "the hidden layers are of one size and importance, so that the shares move by less than the seeds scatter"


def coarse_to_fine() -> tuple[harness.Outcome, ...]:
    """Layers pruned by their forward-only scores stay better than equally pruned ones, without retraining.

    Direction: accuracy up, at 60% and at 70%.
    Metric: test accuracy after pruning; both sides prune each output unit by Wanda, all layers together to the same
    sparsity.
    Budget: digits, perceptron with four hidden layers of 64, 1000 Adam steps of 64 examples at rate 1e-3; scores and
    activations from 256 training examples, 32 directions of step 1e-3 for each layer, no layer more than 10 points
    sparser than the whole, as in the library's default; nothing is tuned, 1 configuration each; 5 seeds, which draw the
    network, the order, the examples and the directions.
    """
    task = pruning.load("digits")
    keys = jax.vmap(jax.random.key)(jnp.arange(SEEDS))
    params, importance, norms = jax.jit(jax.vmap(functools.partial(_train_and_score, task)))(keys)
    sizes = np.multiply(WIDTHS[:-1], WIDTHS[1:])
    prune = jax.jit(jax.vmap(functools.partial(_accuracy, task)))

    def outcome(sparsity):
        shares = np.stack([allocation.coarse_to_fine(row, sizes, sparsity) for row in np.asarray(importance)])
        coarse, uniform = (
            harness.Arm({}, {"accuracy": np.asarray(prune(params, norms, x), np.float64)}, 1)
            for x in (shares, np.full_like(shares, sparsity))
        )
        return harness.compare(
            coarse,
            uniform,
            "accuracy",
            better="more",
            factor=100,
            unit="points of accuracy",
            labels=("coarse to fine", "uniform"),
            part=f"{100 * sparsity:.0f}%",
            why=WHY,
        )

    return tuple(outcome(sparsity) for sparsity in SPARSITIES)


def _train_and_score(task: training.Task, key):
    """A trained network, the scores of its layers [L] and the norms of their inputs."""
    keys = jax.random.split(key, 4)
    params = pruning.fit(pruning.init(keys[0], WIDTHS), keys[1], task, steps=STEPS)
    rows = jax.random.choice(keys[2], len(task.x), (CALIBRATION,), replace=False)
    kernels, biases = tree.partition(params, pruning.KERNELS)

    def loss(kernels):
        return training.cross_entropy(pruning.forward(tree.combine(kernels, biases), task.x[rows]), task.y[rows])

    importance = scores.zeroth_order(loss, kernels, keys[3], eps=EPS, num_noise=NOISE)
    inputs = _inputs(params, task.x[rows])
    statistics = calibration.update(calibration.init(params, inputs), inputs)
    return params, jnp.stack(jax.tree.leaves(importance)), calibration.input_norm(statistics)


def _inputs(params, x):
    """What each layer multiplies."""
    inputs = {}
    for name, layer in params.items():
        inputs[name] = {"inputs": x}
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return inputs


def _accuracy(task: training.Task, params, norms, sparsities):
    kept = calibration.map_kernels(scores.wanda, params, norms)
    leaves, structure = jax.tree.flatten(kept)
    kept = structure.unflatten([masks.topk_mask_along(x, s) for x, s in zip(leaves, sparsities, strict=True)])
    return pruning.accuracy(masks.apply(params, kept), task)
