"""Improvable gap balancing against loops in float64, and by the properties that it is for."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import aggregate

# A mean, a ratio, an exponential, a sum and a quotient, each rounded to float32.
TOLERANCE = 32 * 2.0**-24


@functools.cache
def compiled(count, steps_per_epoch=2, **options):
    rule = aggregate.improvable_gap(count, steps_per_epoch=steps_per_epoch, **options)
    run = jax.jit(lambda state, rows: jax.lax.scan(lambda s, row: rule.weights(row, s)[::-1], state, rows))
    return run, rule.init(None)


def weights_of(rows, **options):
    rows = np.asarray(rows, np.float32)
    run, start = compiled(rows.shape[1], **options)
    return np.asarray(run(start, rows)[1], np.float64)


def gaps_by_loops(rows, steps_per_epoch, base_epoch):
    """The gap weights v of every step."""
    rows, result = np.asarray(rows, np.float64), []
    count = rows.shape[1]
    base = rows[base_epoch * steps_per_epoch : (base_epoch + 1) * steps_per_epoch].mean(0)
    for step, losses in enumerate(rows):
        if step // steps_per_epoch <= base_epoch:
            result.append([1.0] * count)
            continue
        exponentials = [np.exp(loss / b if b else 1.0) for loss, b in zip(losses, base, strict=True)]
        result.append([count * x / sum(exponentials) for x in exponentials])
    return np.array(result)


def losses(steps, count=3, seed=0):
    return np.random.default_rng(seed).uniform(0.5, 4, (steps, count)).astype(np.float32)


@pytest.mark.parametrize("log_loss", [True, False])
@pytest.mark.parametrize(("steps_per_epoch", "base_epoch"), [(1, 0), (2, 1), (3, 2)])
def test_weights_follow_the_definition(steps_per_epoch, base_epoch, log_loss):
    rows = losses((base_epoch + 3) * steps_per_epoch - 1)
    gaps = gaps_by_loops(rows, steps_per_epoch, base_epoch)
    expected = gaps / rows if log_loss else gaps
    got = weights_of(rows, steps_per_epoch=steps_per_epoch, base_epoch=base_epoch, log_loss=log_loss)
    # An error of a ratio of losses (at most 8) becomes a relative error of its weight.
    np.testing.assert_allclose(got, expected, rtol=16 * TOLERANCE)


def test_by_hand():
    """Bases (2, 4) from epoch 1; then losses (1, 4) give v = 2 softmax(1/2, 1), and weights v / (1, 4)."""
    weights = weights_of([[9, 9], [9, 9], [1, 2], [3, 6], [1, 4]])
    second = 2 / (1 + np.exp(-0.5))
    np.testing.assert_allclose(weights[:4], 1 / np.array([[9, 9], [9, 9], [1, 2], [3, 6]]), rtol=TOLERANCE)
    np.testing.assert_allclose(weights[4], [2 - second, second / 4], rtol=TOLERANCE)


def test_losses_at_their_base_have_gap_weights_of_one():
    rows = np.broadcast_to(np.float32([1e-3, 1.0, 300.0]), (6, 3))
    np.testing.assert_allclose(weights_of(rows, log_loss=False), 1, atol=TOLERANCE)


@pytest.mark.parametrize("scale", [100.0, 1e-4])
def test_the_scale_of_a_loss_does_not_matter(scale):
    rows = losses(8)
    scaled = rows * np.float32([1, scale, 1])
    np.testing.assert_allclose(weights_of(scaled, log_loss=False), weights_of(rows, log_loss=False), rtol=TOLERANCE)
    expected = weights_of(rows) / [1, scale, 1]
    np.testing.assert_allclose(weights_of(scaled), expected, rtol=TOLERANCE)


@hypothesis.given(st.lists(st.tuples(*[st.floats(0.0625, 1e4, width=32)] * 3), min_size=6, max_size=6))
@hypothesis.settings(max_examples=20, deadline=None)
def test_gap_weights_sum_to_the_number_of_tasks(rows):
    gaps = weights_of(rows, log_loss=False)
    assert np.all(gaps >= 0)
    np.testing.assert_allclose(gaps.sum(1), 3, rtol=TOLERANCE)


def test_losses_of_zero_are_finite():
    """In the logarithm a loss counts as 1e-12 at least; a base of zero counts as the loss itself."""
    weights = weights_of([[0, 1], [5, 1]], steps_per_epoch=1, base_epoch=0)
    np.testing.assert_allclose(weights, [[1e12, 1], [1 / 5, 1]], rtol=TOLERANCE)


def test_a_run_stopped_within_the_base_epoch_goes_on_as_if_it_had_not():
    rows = losses(8)
    run, start = compiled(3)
    _, whole = run(start, rows)
    state, first = run(start, rows[:3])
    _, second = run(jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), state), rows[3:])
    np.testing.assert_allclose(np.concatenate([first, second]), whole, rtol=TOLERANCE)


def test_the_update_is_the_gradient_of_the_weighted_logarithms():
    """On L = (p^2 + 1, 100 (p - 3)^2), at the third step, by automatic differentiation of sum_k v_k log L_k."""
    rule = aggregate.improvable_gap(2, steps_per_epoch=1)

    def losses_of(p):
        return jnp.stack([p**2 + 1, 100 * (p - 3) ** 2])

    fn = jax.jit(aggregate.value_and_grad(losses_of, rule))
    state, points = rule.init(None), (0.5, 1.0, 2.0)
    for p in points:
        _, update, state = fn(jnp.float32(p), state)
    gaps = gaps_by_loops(np.array([losses_of(p) for p in points]), 1, 1)[-1]
    expected = jax.grad(lambda p: jnp.asarray(gaps) @ jnp.log(losses_of(p)))(2.0)
    np.testing.assert_allclose(update, expected, rtol=TOLERANCE)


def test_one_task_without_logarithm_keeps_its_gradient():
    rule = aggregate.improvable_gap(1, steps_per_epoch=1, base_epoch=0, log_loss=False)
    state, row = rule.init(None), {"w": jnp.array([[1.0, -2.0]], jnp.bfloat16), "none": None}
    for loss in (3.0, 0.0, 1.0):
        update, state = rule.update(row, state, losses=jnp.array([loss]))
        np.testing.assert_array_equal(update["w"].astype(jnp.float32), [1, -2])
        assert update["none"] is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_tasks": 0}, r"num_tasks=0 must lie in \[1, inf\)"),
        ({"steps_per_epoch": 0}, r"steps_per_epoch=0 must lie in \[1, inf\)"),
        ({"base_epoch": -1}, r"base_epoch=-1 must lie in \[0, inf\)"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        aggregate.improvable_gap(**{"num_tasks": 2, "steps_per_epoch": 1, **options})


def test_losses_are_needed_and_must_be_as_many_as_tasks():
    rule = aggregate.improvable_gap(2, steps_per_epoch=1)
    with pytest.raises(ValueError, match="improvable_gap needs the losses"):
        rule.update(jnp.ones((2, 3)), rule.init(None))
    with pytest.raises(ValueError, match="improvable_gap was made for 2"):
        rule.weights(jnp.ones(3), rule.init(None))
