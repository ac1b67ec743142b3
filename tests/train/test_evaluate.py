"""Means over a data set do not depend on how it is cut into batches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import train


def forward(params, batch, *, rng, train):
    assert rng is None
    assert not train
    return params * batch["x"]


def measure(outputs, batch):
    return {"error": (outputs - batch["y"]) ** 2, "positive": outputs > 0}


@pytest.mark.parametrize("size", [1, 4, 7, 10])
def test_padding_counts_nothing(size):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 10)).astype(np.float32)
    evaluate = jax.jit(train.make_evaluate(forward, measure))
    parts = []
    for start in range(0, 10, size):
        rows = np.minimum(np.arange(start, start + size), 9)
        batch = {"x": x[rows], "y": y[rows], "mask": np.arange(start, start + size) < 10}
        parts.append(evaluate(jnp.float32(2.0), None, batch))
    means = train.means(parts)
    np.testing.assert_allclose(means["error"], np.mean((2.0 * x - y) ** 2), rtol=1e-6)
    np.testing.assert_allclose(means["positive"], np.mean(x > 0), rtol=1e-6)


def test_values_of_several_numbers_an_example_are_averaged_over_all():
    def tokens(outputs, batch):
        return {"bits": jnp.broadcast_to(outputs[:, None], (outputs.shape[0], 3)) + jnp.arange(3.0)}

    batch = {"x": jnp.array([1.0, 5.0]), "mask": jnp.array([True, False])}
    means = train.means([train.make_evaluate(forward, tokens)(jnp.float32(1.0), None, batch)])
    assert means == {"bits": 2.0}


def test_a_model_state_is_read_and_not_changed():
    def stateful(params, batch, *, rng, train, model_state):
        return params * batch["x"] + model_state, model_state + 1.0

    result = train.make_evaluate(stateful, lambda o, b: {"o": o})(1.0, 10.0, {"x": jnp.array([1.0, 3.0])})
    assert train.means([result]) == {"o": 12.0}
