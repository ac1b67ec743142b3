"""The train step against one written by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments import tasks
from experiments.bench import timing
from steelyard import data, models, train

PyTree = Any


def bench() -> None:
    """`make_step` with everything off against a step written by hand, on the quickstart's ViT and the transformer."""
    vit = models.ViT(10, width=64, depth=3, heads=4, mlp_width=128)
    images = next(data.batches(data.load("digits"), batch=128, seed=0))[1]
    transformer = models.Transformer(256, width=128, depth=2, heads=4, mlp_width=344)
    text = next(data.batches(data.load("python_source", length=128), batch=32, seed=0))[1]
    for name, task, model, batch in (
        ("ViT", tasks.classify(vit), vit, images),
        ("transformer", tasks.predict_next(transformer), transformer, text),
    ):
        tx = optax.adam(1e-3)
        batch = jax.tree.map(jnp.asarray, batch)
        params = jax.jit(lambda m=model, t=task, b=batch: m.init(jax.random.key(0), t.inputs(b), train=False))()[
            "params"
        ]
        steps = {
            "by hand": _hand_written(task, tx, params),
            "make_step, everything off": _made(task, tx, params, skip_nonfinite=False),
            "make_step, as it comes": _made(task, tx, params),
        }
        timing.print_ratios(name, {label: timing.stepper(*step, batch) for label, step in steps.items()})


def _hand_written(task: tasks.Task, tx, params: PyTree):
    """What one would write with Flax and optax, with the two metrics that any loop logs."""

    def step(state, batch):
        params, opt_state, rng, count = state

        def loss(params):
            key = jax.random.fold_in(rng, count)
            terms = task.losses(task.forward(params, batch, rng=key, train=True), batch)
            return sum(jnp.mean(term) for term in terms.values())

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads)}
        return (optax.apply_updates(params, updates), opt_state, rng, count + 1), metrics

    return jax.jit(step, donate_argnums=0), (params, tx.init(params), jax.random.key(1), jnp.zeros((), jnp.int32))


def _made(task: tasks.Task, tx, params: PyTree, **options):
    step = jax.jit(train.make_step(task.forward, task.losses, tx, **options), donate_argnums=0)
    return step, train.init_state(params, tx, rng=jax.random.key(1))
