"""Random search over nodes: the best of a hundred subnetworks at initialization, against the first of them."""

import functools

import jax
import jax.numpy as jnp
import optax

from experiments.claims import harness, pruning, training
from steelyard.sparsity import channels, lottery, masks

SEEDS = 10
WIDTHS = (64, 64, 32, 10)
DENSITIES = (0.05, 0.1, 0.2, 0.5)
TRIALS = 100
STEPS, BATCH, SEARCH_BATCH = 400, 64, 256
GRID = {"rate": (3e-3, 1e-2)}
WHY = (
    "at 5%, with 3 and 2 nodes left, the few that are not dead decide a run: there accuracy has a standard deviation "
    "of 13 to 22 points between seeds, which 10 seeds do not resolve"
)


def random_search() -> tuple[harness.Outcome, ...]:
    """A ticket found by random search starts at a lower loss than a random one, but ends no better and no sooner.

    Direction: the initial loss lower; final accuracy not higher by more than 1 point; mean loss of the run not lower by
    more than 5%.
    Metric: loss of a fixed batch of 256 training examples at initialization; test accuracy after the last step; mean of
    the training loss over all steps, which is lower if a run converges sooner. Each is the mean (of the two losses the
    geometric mean) over densities of 5, 10, 20 and 50% of the nodes of each hidden layer.
    Budget: digits, perceptron 64-64-32-10; the best of 100 draws against the first of them; 400 Adam steps of 64; rates
    3e-3, 1e-2 (2 configurations each, chosen by the mean training loss); 10 seeds.
    """
    task = training.load("digits")
    searched, random = (
        harness.tune(functools.partial(_run, task, trials), GRID, seeds=SEEDS, metric="mean_loss", better="less")
        for trials in (TRIALS, 1)
    )
    compare = functools.partial(harness.compare, better="less", scale="percent")
    labels = ("random", "searched")
    return (
        compare(searched, random, "initial_loss", unit="% higher", labels=labels[::-1], part="initial loss"),
        harness.compare(
            random,
            searched,
            "accuracy",
            better="more",
            factor=100,
            unit="points of accuracy",
            margin=-1.0,
            labels=labels,
            part="the search gains no more than 1 point",
            why=WHY,
        ),
        compare(
            random,
            searched,
            "mean_loss",
            unit="% higher loss of the searched",
            margin=-5.0,
            labels=labels,
            part="the search saves no more than 5% of the mean loss",
            why=WHY,
        ),
    )


def _groups() -> list[channels.ChannelGroup]:
    return [
        channels.ChannelGroup(
            f"hidden_{i}",
            WIDTHS[i + 1],
            (
                channels.Member(f"dense_{i}/kernel", -1),
                channels.Member(f"dense_{i}/bias", 0),
                channels.Member(f"dense_{i + 1}/kernel", -2),
            ),
        )
        for i in range(len(WIDTHS) - 2)
    ]


def _run(task: training.Task, trials, config, key):
    init_key, batch_key, search_key, order_key = jax.random.split(key, 4)
    params = pruning.init(init_key, WIDTHS)
    fixed = jax.random.choice(batch_key, len(task.x), (SEARCH_BATCH,), replace=False)

    def initial_loss(p):
        return training.cross_entropy(pruning.forward(p, task.x[fixed]), task.y[fixed])

    def search(density):
        kept, losses = lottery.random_search(
            initial_loss, params, _groups(), density=density, trials=trials, rng=search_key, batch_size=TRIALS
        )
        alive = {group: jnp.zeros(group.size, bool).at[index].set(True) for group, index in kept.items()}
        return channels.mask_tree(params, alive), jnp.min(losses)

    tickets, initial = zip(*map(search, DENSITIES), strict=True)
    trained = jax.vmap(functools.partial(_train, task, params, order_key, config["rate"]))
    accuracy, mean_loss = trained(jax.tree.map(lambda *xs: jnp.stack(xs), *tickets))
    return {
        "initial_loss": _geometric_mean(jnp.stack(initial)),
        "accuracy": jnp.mean(accuracy),
        "mean_loss": _geometric_mean(mean_loss),
    }


def _train(task: training.Task, params, key, rate, ticket):
    """Masked inside the loss: a removed node gets no gradient, and Adam leaves it alone."""

    def loss(p, rows):
        return training.cross_entropy(pruning.forward(masks.apply(p, ticket), task.x[rows]), task.y[rows])

    order = training.minibatches(key, len(task.x), BATCH, STEPS)
    params, losses, _ = training.fit(loss, masks.apply(params, ticket), optax.adam(rate), order)
    return pruning.accuracy(params, task), jnp.mean(losses)


def _geometric_mean(values):
    return jnp.exp(jnp.mean(jnp.log(values)))
