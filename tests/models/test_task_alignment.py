"""The alignment of tasks against NumPy, and the arguments it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import models
from tests.models.helpers import apply, init, normal

MODEL = models.TaskAlignment(3, 4)


def test_new_maps_are_the_identity():
    x = normal(2, 4)
    variables = MODEL.init(jax.random.key(0), x, 0)
    assert variables["params"]["kernel"].shape == (3, 4, 4)
    for task in range(3):
        np.testing.assert_array_equal(apply(MODEL, variables, x, task), x)


def test_equals_numpy():
    """Whether the task is a Python number, a traced one or one for each input."""
    x = normal(2, 3, 4)
    variables = init(MODEL, x, 0)
    kernel = np.asarray(variables["params"]["kernel"], np.float64)
    tasks = np.array([[0, 2, 1], [1, 1, 2]])
    expected = np.array([[x[i, j] @ kernel[tasks[i, j]] for j in range(3)] for i in range(2)])
    # Dot products of 4 terms of order 1 in float32.
    np.testing.assert_allclose(apply(MODEL, variables, x, jnp.asarray(tasks)), expected, rtol=1e-6, atol=1e-6)
    for task in range(3):
        for given in (task, jnp.int32(task)):
            np.testing.assert_allclose(apply(MODEL, variables, x, given), x @ kernel[task], rtol=1e-6, atol=1e-6)
    static = jax.jit(lambda x: MODEL.apply(variables, x, 2))
    np.testing.assert_allclose(static(x), x @ kernel[2], rtol=1e-6, atol=1e-6)


def test_only_the_map_of_the_task_gets_a_gradient():
    x = normal(2, 4)
    variables = init(MODEL, x, 0)
    grad = jax.jit(jax.grad(lambda v: jnp.sum(MODEL.apply(v, x, 1) ** 2)))(variables)["params"]["kernel"]
    assert [bool(np.any(g)) for g in grad] == [False, True, False]


def test_dtypes():
    x = normal(2, 4)
    half = models.TaskAlignment(3, 4, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    variables = half.init(jax.random.key(0), x, 0)
    assert variables["params"]["kernel"].dtype == jnp.bfloat16
    y = apply(half, variables, x, 0)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y, x.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_tasks": 0, "features": 2}, "num_tasks must be at least 1, got 0"),
        ({"num_tasks": 2, "features": 0}, "features must be at least 1, got 0"),
    ],
)
def test_refuses_bad_arguments(options, text):
    with pytest.raises(ValueError, match=text):
        models.TaskAlignment(**options)


@pytest.mark.parametrize(
    ("shape", "task", "text"),
    [
        ((2, 5), 0, r"4 features, got shape \(2, 5\)"),
        ((2, 4), 3, r"task=3 must lie in 0\.\.2"),
        ((2, 4), -1, r"task=-1 must lie in 0\.\.2"),
        ((2, 4), np.zeros(3, int), r"shape \(2,\), got \(3,\)"),
    ],
)
def test_refuses_bad_inputs(shape, task, text):
    with pytest.raises(ValueError, match=text):
        MODEL.init(jax.random.key(0), jnp.ones(shape), task)
