"""Digits learned by ten workers of whom some are bad: what the claims on robust rules train."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from experiments.claims import training
from steelyard import aggregate

PyTree = Any
Attack = Callable[[PyTree, jax.Array], PyTree]

WORKERS, BATCH = 10, 16
WIDTHS = (64, 32, 10)


def accuracy(
    rule: optax.GradientTransformationExtraArgs,
    attack: Attack,
    rate: jax.Array,
    key: jax.Array,
    *,
    steps: int,
    momentum: float = 0.0,
) -> jax.Array:
    """Test accuracy after training by gradient descent on what the rule makes of the workers' gradients.

    Args:
      rule: from ten rows to one update.
      attack: `(stacked, key) -> stacked`; the rows that it gets have been through the workers' momentum.
      rate: of the descent.
      key: of initialisation, batches and attack.
      steps: how many, of 16 examples for each worker.
      momentum: decay of the workers' momentum; 0 is none.
    """
    task = training.load("digits")
    momenta = aggregate.worker_momentum(WORKERS, decay=momentum)
    tx = optax.chain(rule, optax.sgd(rate))

    def loss(params, rows):
        return training.cross_entropy(training.mlp(params, task.x[rows]), task.y[rows])

    def step(carry, batch):
        params, momentum_state, state = carry
        rows, index = batch
        grads = jax.vmap(jax.grad(loss), (None, 0))(params, rows)
        sent, momentum_state = momenta.update(grads, momentum_state)
        sent = attack(sent, jax.random.fold_in(key, index))
        updates, state = tx.update(sent, state, params)
        return (optax.apply_updates(params, updates), momentum_state, state), None

    params = training.mlp_init(key, WIDTHS)
    rows = training.minibatches(key, len(task.x), WORKERS * BATCH, steps).reshape(steps, WORKERS, BATCH)
    carry = (params, momenta.init(params), tx.init(params))
    (params, *_), _ = jax.lax.scan(step, carry, (rows, jnp.arange(steps)))
    return training.accuracy(training.mlp(params, task.x_test), task.y_test)
