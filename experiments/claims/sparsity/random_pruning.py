"""Random masks, static and moving, on perceptrons that read digits."""

import functools

import jax
import jax.numpy as jnp
import optax

from experiments.claims import harness, pruning, training
from steelyard import optim, reparam

SEEDS = 5
STEPS, BATCH = 500, 64
RATES = {"rate": (1e-3, 3e-3)}
NARROW, MIDDLE, WIDE = 32, 128, 256
EVERY, END = 25, 375


def random_pruning() -> tuple[harness.Outcome, ...]:
    """Random static masks cost less in wider networks, less with ERK than uniformly, and moving masks cost least.

    Direction: (a) the gap to dense is smaller at width 256 than at 32, at sparsity 0.9; (b) ERK is not worse than
    uniform by more than 0.5 points at 0.95; (c) at 0.97 RigL is not worse than SET, nor SET than a static mask, by more
    than 0.5 points.
    Metric: test accuracy after the last step; for (a) the difference of dense and sparse, each at its best rate.
    Budget: digits, perceptrons 64-w-w-10 of width 32 and 256 for (a), 128 for (b) and (c); 500 Adam steps of 64
    examples; masks drawn at random in every kernel, ERK where nothing else is said; RigL and SET move every 25 steps up
    to step 375, from a drop fraction of 0.3; rates 1e-3 and 3e-3 (2 configurations each), chosen by the test accuracy;
    5 seeds.
    """
    gaps = [_gap(width) for width in (WIDE, NARROW)]
    erk, uniform = (_tune(MIDDLE, allocation, sparsity=0.95) for allocation in ("erdos_renyi", "uniform"))
    moves = {"every": EVERY, "end": END, "drop_fraction": 0.3}
    static, at_random, rigl = (
        _tune(MIDDLE, "erdos_renyi", sparsity=0.97, grow=grow, **moves) for grow in (None, "random", "gradient")
    )
    compare = functools.partial(harness.compare, better="more", factor=100, unit="points of accuracy")
    not_worse = functools.partial(compare, metric="accuracy", margin=-0.5)
    return (
        compare(*gaps, "gap", better="less", labels=("gap at width 256", "gap at width 32"), part="(a) width"),
        not_worse(erk, uniform, labels=("ERK", "uniform"), part="(b) ERK, not lower by 0.5 points"),
        not_worse(rigl, at_random, labels=("RigL", "SET"), part="(c) RigL, not lower by 0.5 points"),
        not_worse(at_random, static, labels=("SET", "static"), part="(c) SET, not lower by 0.5 points"),
    )


def _gap(width: int) -> harness.Arm:
    dense, sparse = (_tune(width, "erdos_renyi", sparsity=sparsity) for sparsity in (0.0, 0.9))
    config = {"dense": dense.config["rate"], "sparse": sparse.config["rate"]}
    metrics = {"gap": dense.metrics["accuracy"] - sparse.metrics["accuracy"]}
    return harness.Arm(config, metrics, dense.tried + sparse.tried)


def _tune(width: int, allocation: str, **options) -> harness.Arm:
    link = reparam.dynamic_sparse(allocation, **options)
    # Static masks differ in their state alone, and so share a program for each width.
    moving = link if options.get("grow") else _STATIC
    run = functools.partial(_run, jax.jit(link.init), moving, width)
    return harness.tune(run, RATES, seeds=SEEDS, metric="accuracy", better="more", vectorize=False)


_STATIC = reparam.dynamic_sparse(sparsity=0.0)
_init = jax.jit(pruning.init, static_argnums=1)


def _run(init, link: reparam.Reparam, width: int, config, key):
    stored, state = init(_init(key, (64, width, width, 10)), jax.random.fold_in(key, 1))
    return {"accuracy": _trained(link, stored, state, config["rate"], _batches(key), key)}


@jax.jit
def _batches(key):
    return training.minibatches(key, len(pruning.load().x), BATCH, STEPS)


@functools.partial(jax.jit, static_argnums=0)
def _trained(link: reparam.Reparam, stored, state, rate, batches, key):
    """Test accuracy after training."""
    task = pruning.load()
    tx = optim.sparse(optax.adam(rate))

    def loss(stored, state, rows):
        seen = link.apply(stored, state, step=0, rng=None, train=True)
        return training.cross_entropy(pruning.forward(seen, task.x[rows]), task.y[rows])

    def step(carry, inputs):
        stored, state, opt_state = carry
        t, rows = inputs
        grads = jax.grad(loss)(stored, state, rows)
        masks = link.masks(stored, state, step=t)
        updates, opt_state = tx.update(grads, opt_state, stored, masks=masks)
        stored = link.project(optax.apply_updates(stored, updates), state)
        state = link.update(state, stored, grads, step=t, rng=jax.random.fold_in(key, t + 2))
        return (stored, state, opt_state), None

    start = stored, state, tx.init(stored)
    (stored, state, _), _ = jax.lax.scan(step, start, (jnp.arange(STEPS), batches))
    return pruning.accuracy(link.apply(stored, state, step=0, rng=None, train=False), task)
