"""Means over epochs as state, against a loop over a list of losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import aggregate

STEPS, TASKS = 3, 2


@pytest.mark.parametrize("base_epoch", [0, 1])
def test_means_are_those_of_the_epochs(base_epoch):
    losses = np.random.default_rng(0).uniform(0, 4, (4 * STEPS + 1, TASKS)).astype(np.float32)
    push = jax.jit(lambda state, row: aggregate.epoch_push(state, row, STEPS, base_epoch))
    state = aggregate.epoch_init(TASKS)
    for step, row in enumerate(losses, 1):
        state = push(state, row)
        finished = step // STEPS
        # Before the first epoch is over nothing is known.
        means = [np.zeros(TASKS)] * 2 + [losses[e * STEPS : (e + 1) * STEPS].mean(0) for e in range(finished)]
        assert state.step == step
        assert aggregate.epoch(state, STEPS) == finished
        np.testing.assert_allclose(state.previous, means[-1], rtol=1e-6)
        np.testing.assert_allclose(state.before, means[-2], rtol=1e-6)
        np.testing.assert_allclose(state.base, means[2 + base_epoch] if finished > base_epoch else 0, rtol=1e-6)
        np.testing.assert_allclose(state.total, losses[finished * STEPS : step].sum(0), rtol=1e-6)


def test_half_precision_losses_are_added_in_float32():
    state = aggregate.epoch_push(aggregate.epoch_init(1), jnp.ones(1, jnp.bfloat16), 1000)
    assert state.total.dtype == jnp.float32


def test_at_least_one_task():
    with pytest.raises(ValueError, match=r"num_tasks=0 must lie in \[1, inf\)"):
        aggregate.epoch_init(0)
