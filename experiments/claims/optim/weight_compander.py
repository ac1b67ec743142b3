"""Few examples: the weight compander as a regularizer."""

import functools

import jax
import jax.numpy as jnp
import optax

from experiments.claims import harness, training
from steelyard import reparam

SEEDS = 10
EPOCHS = 300
EXAMPLES = 100
WIDTHS = (64, 128, 128, 10)
RATES = (3e-4, 1e-3, 3e-3)
SIZES = (0.1, 0.3, 1.0)


def weight_compander() -> tuple[harness.Outcome, ...]:
    """With the weight compander a network generalizes better from few examples, and its weights spread more evenly.

    Direction: test accuracy up; the largest |weight| down; the share of weights with |weight| below 1e-3 down.
    Metric: of the weights that the model sees, kernels alone, after the last step.
    Budget: 100 training digits drawn by the seed, perceptron with two hidden layers of 128, Adam, 300 epochs of one
    full batch; a = b in 0.1, 0.3, 1 at rate 1e-3 for the compander, which starts at v = w; rates 3e-4, 1e-3, 3e-3
    without it; chosen by the accuracy; 10 seeds.
    """
    task = training.load("digits")

    def run(config, key):
        link = _link(config)
        stored, state = link.init(training.mlp_init(key, WIDTHS), None)
        rows = jax.random.permutation(key, len(task.x))[:EXAMPLES]

        def see(stored):
            return link.apply(stored, state, step=0, rng=None, train=True)

        def loss(stored, batch):
            del batch
            return training.cross_entropy(training.mlp(see(stored), task.x[rows]), task.y[rows])

        stored, _, _ = training.fit(loss, stored, optax.adam(config.get("rate", 1e-3)), jnp.zeros(EPOCHS))
        sizes = jnp.concatenate([jnp.abs(layer["kernel"]).ravel() for layer in see(stored)])
        return {
            "accuracy": training.accuracy(training.mlp(see(stored), task.x_test), task.y_test),
            "largest": jnp.max(sizes),
            "small": jnp.mean(sizes < 1e-3),
        }

    tune = functools.partial(harness.tune, run, seeds=SEEDS, metric="accuracy", better="more")
    arms = tune({"size": SIZES}), tune({"rate": RATES})
    compare = functools.partial(harness.compare, *arms, labels=("compander", "plain"))
    return (
        compare(
            "accuracy",
            better="more",
            factor=100,
            unit="points of accuracy",
            part="accuracy",
            why="Which 100 digits a seed draws moves the accuracy by more than a point, five times the effect.",
        ),
        compare("largest", better="less", scale="percent", unit="% larger without", part="largest weight"),
        compare(
            "small",
            better="less",
            factor=100,
            unit="points of all weights",
            part="small weights",
            why="With a = b the curve has slope 1 at zero: it bounds large weights and leaves small ones alone.",
        ),
    )


def _link(config) -> reparam.Reparam:
    if "size" not in config:
        return reparam.identity()
    return reparam.weight_compander(a=config["size"], b=config["size"], preserve_init=False)
