"""A small language model whose optimizer state is a fraction of Adam's."""

import functools

import jax
import jax.numpy as jnp
import optax

from experiments.claims import harness, language, training
from steelyard import models, optim
from steelyard import tree as tree_lib

SEEDS = 3
STEPS = 300
RATES = (3e-3, 1e-2, 3e-2)
RANK = 8
UPDATE_EVERY = 50
MODEL = models.transformer.Transformer(256, width=32, depth=2, heads=2, mlp_width=64)
_ROWS, _BATCH, _HELD_OUT = 8000, 4, 64


def low_rank() -> tuple[harness.Outcome, ...]:
    """In a subspace of a quarter of the width, with magnitudes apart, Adam needs less state for about the same loss.

    Direction: bytes of optimizer state down; loss at most 5% above Adam's; loss at most 1% above GaLore's.
    Metric: bytes as stored, exactly; loss on 64 held-out rows after the last step, nats a byte.
    Budget: bytes of the standard library's source, rows of 64; transformer of width 32 with two blocks; 300 steps of
    4 rows; rank 8 and a new subspace every 50 steps for both low-rank rules, scale 0.25; rates 3e-3, 1e-2, 3e-2 for
    all three; 3 seeds.
    """
    train, held_out = map(jnp.asarray, language.source(_HELD_OUT))
    rows = train[:_ROWS]

    def loss(params, tokens):
        return training.cross_entropy(MODEL.apply({"params": params}, tokens[:, :-1]), tokens[:, 1:])

    def run(make, config, key):
        params = MODEL.init(key, rows[:1, :-1])["params"]
        batches = training.minibatches(key, _ROWS, _BATCH, STEPS)
        params, _, _ = training.fit(lambda p, batch: loss(p, rows[batch]), params, make(config["rate"]), batches)
        return {"loss": loss(params, held_out)}

    names = ("grad_norm_low_rank", "Adam", "GaLore")
    makers = dict(zip(names, (_low_rank, optax.adam, _galore), strict=True))
    tune = functools.partial(harness.tune, grid={"rate": RATES}, seeds=SEEDS, metric="loss", better="less")
    ours, adam, galore = (tune(functools.partial(run, makers[name])) for name in names)
    params = jax.eval_shape(MODEL.init, jax.random.key(0), rows[:1, :-1])["params"]
    sizes = [tree_lib.nbytes(jax.eval_shape(makers[name](0.1).init, params)) for name in names[:2]]
    compare = functools.partial(
        harness.compare, ours, metric="loss", better="less", scale="percent", unit="% more loss"
    )
    return (
        harness.exact(*sizes, better="less", scale="percent", unit="% more bytes", labels=names[:2], part="state"),
        compare(
            adam,
            margin=-5.0,
            labels=names[:2],
            part="loss against Adam",
            why="300 steps in a quarter of the directions, at a quarter of the step, are behind: the best rate of both "
            "low-rank rules is the largest that all three were given.",
        ),
        compare(galore, margin=-1.0, labels=(names[0], names[2]), part="loss against GaLore"),
    )


def _low_rank(rate) -> optax.GradientTransformation:
    return optim.grad_norm_low_rank(rate, rank=RANK, update_every=UPDATE_EVERY)


def _galore(rate) -> optax.GradientTransformation:
    return optax.contrib.galore(rate, rank=RANK, update_proj_gap=UPDATE_EVERY, scale=0.25)
