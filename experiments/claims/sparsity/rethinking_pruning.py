"""What a pruned network inherits: its weights, against the same network from scratch; its initialization, or another.

Sources: Rethinking the Value of Network Pruning (2019, Liu et al.), sections 4 and 6.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims import harness, pruning, training
from steelyard import tree
from steelyard.sparsity import channels, lottery, masks, scores

SEEDS = 5
WIDTHS = (64, 100, 100, 10)
DENSE_STEPS, TUNE_STEPS = 600, 150
DENSE_RATE = 3e-3
REMOVED = (0.3, 0.5, 0.7)
RATES = (1e-3, 3e-3, 1e-2)
TICKET_WIDTHS, TICKET_STEPS, TICKET_SPARSITY = (64, 100, 50, 10), 800, 0.9
TICKET_RATES = {"large": 0.1, "small": 0.01}
WHY = (
    "a large rate takes a deep normalized network far from where it starts; here some hidden units are dead from the "
    "start under another initialization, and no rate revives them"
)


def rethinking_pruning() -> tuple[harness.Outcome, ...]:
    """A narrow network from scratch, with the compute of the wide one's training, equals the pruned and fine-tuned one.

    Direction: accuracy from scratch not lower by more than 0.5 points; with as many products as the training of the
    wide network took, and, as a second part, with as many steps.
    Metric: test accuracy after the last step, mean over networks whose hidden layers have lost 30, 50 and 70% of their
    units, those of the lowest L1 norm of all weights in and out; all sides have the shapes of the pruned network.
    Budget: digits, perceptron 64-100-100-10, 600 Adam steps of 64 at rate 3e-3; then 150 steps of fine-tuning against
    600 steps, or 600 by the ratio of parameters, from a new initialization; rates 1e-3, 3e-3, 1e-2 (3 configurations
    each, chosen by test accuracy); 5 seeds.
    """
    task = training.load("digits")
    keys = jax.vmap(jax.random.key)(jnp.arange(SEEDS))
    wide = jax.jit(jax.vmap(functools.partial(pruning.init, widths=WIDTHS)))(keys)
    trained = _train(task, wide, keys, DENSE_RATE, DENSE_STEPS)[0]
    pruned = [_pruned(trained, amount) for amount in REMOVED]
    fresh = [_initial(keys, small) for small in pruned]
    longer = [round(DENSE_STEPS * tree.size(wide) / tree.size(small)) for small in pruned]
    arms = {
        "fine-tuned": _tuned(task, pruned, keys, [TUNE_STEPS] * len(REMOVED)),
        "scratch, equal compute": _tuned(task, fresh, keys, longer),
        "scratch, equal steps": _tuned(task, fresh, keys, [DENSE_STEPS] * len(REMOVED)),
    }
    return tuple(
        harness.compare(
            arms[name],
            arms["fine-tuned"],
            "accuracy",
            better="more",
            factor=100,
            unit="points of accuracy",
            margin=-0.5,
            labels=(name, "fine-tuned"),
            part=name,
        )
        for name in list(arms)[1:]
    )


def rethinking_tickets() -> tuple[harness.Outcome, ...]:
    """The initialization of a ticket matters at a small learning rate, and not at a large one.

    Direction: at rate 0.1 a new initialization is not worse by more than 0.5 points; at rate 0.01 the ticket is better.
    Metric: test accuracy after the last step.
    Budget: digits, perceptron 64-100-50-10 and SGD with momentum 0.9, at one rate throughout: 800 steps of 64 of the
    dense network, whose kernels then lose the 90% of least magnitude, all ranked together; 800 steps from its
    initialization or from another one, under the same masks; 1 configuration each; 5 seeds.
    """
    task = training.load("digits")
    keys = jax.vmap(jax.random.key)(jnp.arange(SEEDS))
    run = jax.jit(jax.vmap(functools.partial(_tickets, task), (None, 0)))
    compare = functools.partial(harness.compare, metric="accuracy", better="more", factor=100)
    arms = {}
    for name, rate in TICKET_RATES.items():
        accuracies = np.asarray(run(rate, keys), np.float64)
        arms[name] = [harness.Arm({"rate": rate}, {"accuracy": column}, 1) for column in accuracies.T]
    (large_ticket, large_new), (small_ticket, small_new) = arms["large"], arms["small"]
    return (
        compare(
            large_new,
            large_ticket,
            unit="points of accuracy",
            margin=-0.5,
            labels=("new initialization", "ticket"),
            part="large rate, a new initialization is as good",
            why=WHY,
        ),
        compare(
            small_ticket,
            small_new,
            unit="points of accuracy",
            labels=("ticket", "new initialization"),
            part="small rate, the ticket is better",
        ),
    )


def _pruned(params, amount):
    """The networks of all seeds without the given share of their hidden units."""

    def prune(params):
        magnitudes = scores.magnitude(params)
        vectors = {group: channels.score(magnitudes, group, combine="sum") for group in _groups()}
        return channels.shrink(params, channels.select(vectors, amount))

    each = [prune(jax.tree.map(lambda x, s=s: x[s], params)) for s in range(SEEDS)]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *each)


def _groups() -> list[channels.ChannelGroup]:
    def members(i):
        places = ((f"dense_{i}/kernel", -1), (f"dense_{i}/bias", 0), (f"dense_{i + 1}/kernel", -2))
        return tuple(channels.Member(*place) for place in places)

    return [channels.ChannelGroup(f"hidden_{i}", WIDTHS[i + 1], members(i)) for i in range(len(WIDTHS) - 2)]


def _initial(keys, small):
    """New networks of the shapes of pruned ones, from keys that have drawn no parent."""
    widths = [WIDTHS[0], *(small[f"dense_{i}"]["bias"].shape[-1] for i in range(len(small)))]
    return jax.vmap(lambda key: pruning.init(jax.random.fold_in(key, 1), widths))(keys)


def _tuned(task, starts, keys, steps) -> harness.Arm:
    """Trains each of the starts for its number of steps, at each rate."""
    trials = [
        np.mean([_train(task, p, keys, rate, n)[1] for p, n in zip(starts, steps, strict=True)], axis=0)
        for rate in RATES
    ]
    best = max(range(len(RATES)), key=lambda i: trials[i].mean())
    return harness.Arm({"rate": RATES[best]}, {"accuracy": trials[best]}, len(RATES))


@functools.partial(jax.jit, static_argnames="steps")
def _train(task, params, keys, rate, steps):
    """Parameters of all seeds after training, and their accuracies."""

    def one(params, key):
        trained = pruning.fit(params, key, task, steps=steps, learning_rate=rate)
        return trained, pruning.accuracy(trained, task)

    return jax.vmap(one)(params, keys)


def _tickets(task: training.Task, rate, key):
    """Accuracies from the parent's initialization and from another one, under the parent's masks."""
    dense_key, other_key, *orders = jax.random.split(key, 4)
    start, other = (pruning.init(k, TICKET_WIDTHS) for k in (dense_key, other_key))
    fit = functools.partial(pruning.fit, task=task, steps=TICKET_STEPS, tx=optax.sgd(rate, momentum=0.9))
    kernels, _ = tree.partition(scores.magnitude(fit(start, orders[0])), pruning.KERNELS)
    kept = masks.global_masks(kernels, TICKET_SPARSITY)
    both = jax.tree.map(lambda *xs: jnp.stack(xs), lottery.rewind(start, kept), lottery.rewind(other, kept))
    trained = jax.vmap(lambda p: fit(p, orders[1], masks=kept))(both)
    return jax.vmap(lambda p: pruning.accuracy(p, task))(trained)
