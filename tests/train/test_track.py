"""Averages of the parameters."""

import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import train


def test_the_average_is_the_geometric_sum():
    track, decay = train.ema(0.9), 0.9
    values = np.random.default_rng(0).normal(size=(20, 3))
    references = {"ema": jnp.zeros(3), "other": jnp.ones(2)}
    for step, value in enumerate(values):
        references = track(references, jnp.asarray(value), step=step)
    weights = (1 - decay) * decay ** np.arange(len(values))[::-1]
    np.testing.assert_allclose(references["ema"], weights @ values, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(references["other"], 1.0)


def test_debias_forgets_the_start_sooner():
    track = train.ema(0.999, debias=True)
    references = track({"ema": jnp.zeros(())}, jnp.ones(()), step=0)
    # At step 0 the decay is 1 / 10.
    np.testing.assert_allclose(references["ema"], 0.9, rtol=1e-6)


@pytest.mark.parametrize("decay", [-0.1, 1.1, float("nan")])
def test_a_decay_outside_of_the_unit_interval_is_refused(decay):
    with pytest.raises(ValueError, match="decay="):
        train.ema(decay)


def test_a_reference_that_is_not_there_is_named():
    with pytest.raises(ValueError, match=r"'ema'.*\['teacher'\]"):
        train.ema(0.9)({"teacher": jnp.zeros(1)}, jnp.zeros(1), step=0)
