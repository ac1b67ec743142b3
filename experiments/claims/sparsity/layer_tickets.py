"""Layer tickets: residual blocks removed before training, against all blocks and against narrower blocks."""

import functools

import jax
import jax.numpy as jnp

from experiments.claims import harness, pruning, training
from steelyard import selection
from steelyard.sparsity import layers

SEEDS = 5
WIDTH, DEPTH = 32, 8
REMOVED = (1, 2, 3, 4)
STEPS, SCORE_BATCH = 300, 256
GRID = {"rate": (1e-3, 3e-3)}


def layer_tickets() -> tuple[harness.Outcome, ...]:
    """Without 1 to 4 of its 8 residual blocks, chosen at initialization, a network learns as well as with all of them.

    Direction: accuracy of layer tickets not more than 1 point below the dense network's; above that of filter tickets
    with as many parameters.
    Metric: test accuracy after the last step, the mean over tickets of 1, 2, 3 and 4 blocks less; in products these
    save 11, 22, 33 and 44%, so that training is 1.1 to 1.8 times as fast.
    Budget: digits, 64-32, 8 blocks x + W relu(V norm(x)) of width 32, 32-10; blocks, or as many hidden units of all
    blocks together, are removed in ascending order of the mean of weight times gradient over one batch of 256; 300 Adam
    steps of 64; rates 1e-3, 3e-3 (2 configurations each, chosen by test accuracy); 5 seeds.
    """
    task = training.load("digits")
    blocks, filters, dense = (
        harness.tune(functools.partial(_run, task, ticket), GRID, seeds=SEEDS, metric="accuracy", better="more")
        for ticket in (_without_blocks, _without_filters, _dense)
    )
    compare = functools.partial(harness.compare, better="more", factor=100, unit="points of accuracy")
    return (
        compare(blocks, dense, "accuracy", margin=-1.0, labels=("layer tickets", "dense"), part="against dense"),
        compare(blocks, filters, "accuracy", labels=("layer tickets", "filter tickets"), part="against filters"),
    )


def _init(key):
    keys = jax.random.split(key, 4)
    shapes = {"stem": (64, WIDTH), "up": (DEPTH, WIDTH, WIDTH), "down": (DEPTH, WIDTH, WIDTH), "head": (WIDTH, 10)}
    drawn = {
        name: jax.random.normal(k, shape) * jnp.sqrt(2 / shape[-2])
        for k, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    blocks = {"up": drawn["up"], "bias": jnp.zeros((DEPTH, WIDTH)), "down": drawn["down"] / jnp.sqrt(DEPTH)}
    return {"stem": drawn["stem"], "blocks": blocks, "head": drawn["head"]}


def _forward(params, x, alive):
    """`alive` [blocks, hidden]: a block without any of its units is one that has been removed."""

    def block(x, now):
        weights, alive = now
        hidden = jax.nn.relu(jax.nn.standardize(x, epsilon=1e-5) @ weights["up"] + weights["bias"])
        return x + (hidden * alive) @ weights["down"], None

    x, _ = jax.lax.scan(block, x @ params["stem"], (params["blocks"], alive))
    return jax.nn.standardize(x, epsilon=1e-5) @ params["head"]


def _dense(products, removed):
    del products, removed
    return jnp.ones((DEPTH, WIDTH), bool)


def _without_blocks(products, removed):
    kept = selection.keep_largest(layers.score_blocks(products, "blocks/.*"), DEPTH - removed)
    return jnp.broadcast_to(kept[:, None], (DEPTH, WIDTH))


def _without_filters(products, removed):
    of = products["blocks"]
    scores = jnp.sum(of["up"], axis=1) + of["bias"] + jnp.sum(of["down"], axis=2)
    return selection.keep_largest(scores, (DEPTH - removed) * WIDTH)


def _run(task: training.Task, ticket, config, key):
    init_key, order_key = jax.random.split(key)
    params = _init(init_key)
    batch = jax.random.choice(order_key, len(task.x), (SCORE_BATCH,), replace=False)

    def loss(p):
        logits = _forward(p, task.x[batch], jnp.ones((DEPTH, WIDTH), bool))
        return training.cross_entropy(logits, task.y[batch])

    products = jax.tree.map(jnp.multiply, params, jax.grad(loss)(params))

    def accuracy(removed):
        apply = functools.partial(_forward, alive=ticket(products, removed))
        trained = pruning.fit(params, order_key, task, steps=STEPS, learning_rate=config["rate"], apply=apply)
        return pruning.accuracy(trained, task, apply)

    # All tickets of the dense network are one.
    removed = (0,) if ticket is _dense else REMOVED
    return {"accuracy": jnp.mean(jax.vmap(accuracy)(jnp.asarray(removed)))}
