"""The loop in one process: stopped anywhere and started again, it computes the same bits, the table included."""

import types

import jax
import numpy as np
import pytest

from configs import noisy_digits
from experiments import experiment as experiment_lib
from experiments import loop

STEPS = 14


class StopsAfter:
    """A preemption that is requested once so many steps have been taken."""

    def __init__(self, steps):
        self.left = steps

    @property
    def requested(self):
        self.left -= 0.5  # it is asked twice a step
        return self.left < 0


@pytest.fixture(scope="module")
def noisy():
    config = noisy_digits.get_config()
    config.steps, config.batch, config.eval_every = STEPS, 256, 0  # two epochs and a half
    experiment = experiment_lib.build(config)
    return experiment, experiment_lib.programs(experiment)["dense"]


def fit(noisy, folder, preemption):
    experiment, program = noisy
    meta = {"config": {}, "fingerprint": experiment.fingerprint}
    return loop.fit(experiment, program, folder, label="dense", meta=meta, preemption=preemption)


def test_a_run_with_an_example_table_resumes_exactly(noisy, tmp_path):
    whole = fit(noisy, tmp_path / "whole", types.SimpleNamespace(requested=False))
    with pytest.raises(loop.Preempted, match=f"of {STEPS}"):
        fit(noisy, tmp_path / "parts", StopsAfter(5))
    resumed = fit(noisy, tmp_path / "parts", types.SimpleNamespace(requested=False))
    temperatures = np.asarray(whole.example_state)
    assert temperatures.shape == (len(noisy[0].train_data),)
    assert np.mean(temperatures != 10.0) > 0.95  # 1,280 of the 1,438 examples have been seen twice
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        a, b = (jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x for x in (a, b))
        np.testing.assert_array_equal(a, b)
