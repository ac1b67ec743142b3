"""Dynamic weight average against loops over epochs in float64, and by hand."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import aggregate

# Means, a ratio, an exponential and a sum, each rounded to float32; the weights are K at most.
TOLERANCE = 32 * 2.0**-24


@functools.cache
def compiled(count, steps_per_epoch, temperature):
    rule = aggregate.dynamic_weight_average(count, steps_per_epoch=steps_per_epoch, temperature=temperature)
    run = jax.jit(lambda state, rows: jax.lax.scan(lambda s, row: rule.weights(row, s)[::-1], state, rows))
    return run, rule.init(None)


def weights_of(rows, steps_per_epoch=2, temperature=2.0):
    rows = np.asarray(rows, np.float32)
    run, start = compiled(rows.shape[1], steps_per_epoch, temperature)
    return np.asarray(run(start, rows)[1], np.float64)


def by_loops(rows, steps_per_epoch, temperature):
    rows, result = np.asarray(rows, np.float64), []
    count = rows.shape[1]
    for step in range(len(rows)):
        e = step // steps_per_epoch
        if e < 2:
            result.append([1.0] * count)
            continue
        last, before = (rows[i * steps_per_epoch : (i + 1) * steps_per_epoch].mean(0) for i in (e - 1, e - 2))
        rates = [a / b if b else 1.0 for a, b in zip(last, before, strict=True)]
        exponentials = [np.exp(r / temperature) for r in rates]
        result.append([count * x / sum(exponentials) for x in exponentials])
    return np.array(result)


def losses(steps, count=3, seed=0):
    return np.random.default_rng(seed).uniform(0.1, 5, (steps, count)).astype(np.float32)


@pytest.mark.parametrize("temperature", [2.0, 0.5])
@pytest.mark.parametrize("steps_per_epoch", [1, 3])
def test_weights_follow_the_definition(steps_per_epoch, temperature):
    """The last epoch is not finished."""
    rows = losses(5 * steps_per_epoch - 1)
    expected = by_loops(rows, steps_per_epoch, temperature)
    # An error of a ratio (at most 50 here) is divided by the temperature and becomes a relative error of the weight.
    np.testing.assert_allclose(weights_of(rows, steps_per_epoch, temperature), expected, rtol=100 * TOLERANCE)


def test_by_hand():
    """Means (4, 4), then (2, 4): rates (1/2, 1), and at temperature 2 the weights 2 softmax(1/4, 1/2)."""
    weights = weights_of([[3, 4], [5, 4], [1, 8], [3, 0], [9, 9], [1, 1]])
    np.testing.assert_array_equal(weights[:4], 1)
    second = 2 / (1 + np.exp(-0.25))
    np.testing.assert_allclose(weights[4:], [[2 - second, second]] * 2, rtol=TOLERANCE)


def test_equal_rates_give_ones():
    weights = weights_of(np.array([[1.0], [0.5], [0.25], [2.0]]) * [1e-3, 1.0, 70.0], steps_per_epoch=1)
    np.testing.assert_allclose(weights, 1, atol=TOLERANCE)


def test_a_high_temperature_gives_ones():
    """Ratios of at most 50, divided by 1e6."""
    np.testing.assert_allclose(weights_of(losses(4), steps_per_epoch=1, temperature=1e6), 1, atol=1e-4)


def test_an_epoch_without_loss_counts_as_no_progress():
    """Rates (1, 1/2) whatever task 0 does after."""
    weights = weights_of([[0, 4], [7, 2], [1, 1]], steps_per_epoch=1)
    np.testing.assert_allclose(weights[2], by_loops([[7, 4], [7, 2], [1, 1]], 1, 2.0)[2], rtol=TOLERANCE)


@hypothesis.given(st.lists(st.tuples(*[st.floats(0.0625, 1e4, width=32)] * 3), min_size=6, max_size=6))
@hypothesis.settings(max_examples=20, deadline=None)
def test_weights_sum_to_the_number_of_tasks(rows):
    weights = weights_of(rows)
    assert np.all(weights >= 0)
    np.testing.assert_allclose(weights.sum(1), 3, rtol=TOLERANCE)


def test_a_run_stopped_within_an_epoch_goes_on_as_if_it_had_not():
    rows = losses(9)
    run, start = compiled(3, 2, 2.0)
    _, whole = run(start, rows)
    state, first = run(start, rows[:5])
    _, second = run(jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state), rows[5:])
    np.testing.assert_allclose(np.concatenate([first, second]), whole, rtol=TOLERANCE)


def test_one_task_keeps_its_gradient():
    rule = aggregate.dynamic_weight_average(1, steps_per_epoch=1)
    state, row = rule.init(None), {"w": jnp.array([[1.0, -2.0]], jnp.bfloat16), "none": None}
    for loss in (3.0, 0.0, 1.0, 2.0):
        update, state = rule.update(row, state, losses=jnp.array([loss]))
        np.testing.assert_array_equal(update["w"].astype(jnp.float32), [1, -2])
        assert update["none"] is None


def test_the_weighted_sum_in_one_backward_pass():
    """L = (p^2, 4 - p) at p = 1, 2, then 3: rates (4, 2/3)."""
    rule = aggregate.dynamic_weight_average(2, steps_per_epoch=1)
    fn = jax.jit(aggregate.value_and_grad(lambda p: jnp.stack([p**2, 4 - p]), rule))
    state = rule.init(None)
    for p in (1.0, 2.0, 3.0):
        _, update, state = fn(jnp.float32(p), state)
    first = 2 / (1 + np.exp((2 / 3 - 4) / 2))
    np.testing.assert_allclose(update, first * 6 - (2 - first), rtol=TOLERANCE)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_tasks": 0}, r"num_tasks=0 must lie in \[1, inf\)"),
        ({"steps_per_epoch": 0}, r"steps_per_epoch=0 must lie in \[1, inf\)"),
        ({"temperature": 0.0}, r"temperature=0.0 must lie in \(0, inf\)"),
        ({"temperature": -1.0}, r"temperature=-1.0 must lie in \(0, inf\)"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        aggregate.dynamic_weight_average(**{"num_tasks": 2, "steps_per_epoch": 1, **options})


def test_losses_are_needed_and_must_be_as_many_as_tasks():
    rule = aggregate.dynamic_weight_average(2, steps_per_epoch=1)
    with pytest.raises(ValueError, match="dynamic_weight_average needs the losses"):
        rule.update(jnp.ones((2, 3)), rule.init(None))
    with pytest.raises(ValueError, match="dynamic_weight_average was made for 2"):
        rule.weights(jnp.ones(3), rule.init(None))
