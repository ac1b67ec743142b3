"""GroupDRO against loops in float64, cases by hand, and by property."""

import functools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import aggregate

# A step rounds log weights of magnitude m by a few m 2^-24; that is the relative error of the weights.
ROUNDING = 2.0**-24


def transcribed(history, step_size=0.01, adjustment=0.0, counts=None):
    """The weights of each step, by loops in float64, without logarithms."""
    count = len(history[0])
    counts = [1.0] * count if counts is None else counts
    weights, result = [1 / count] * count, []
    for row in history:
        adjusted = [loss + adjustment / math.sqrt(n) for loss, n in zip(row, counts, strict=True)]
        weights = [q * math.exp(step_size * loss) for q, loss in zip(weights, adjusted, strict=True)]
        weights = [q / sum(weights) for q in weights]
        result.append(weights)
    return np.array(result)


@functools.cache
def compiled(count, **options):
    """`losses [steps, K] -> weights [steps, K]`."""
    rule = aggregate.group_dro(count, **options)

    def step(state, row):
        weights, state = rule.weights(row, state)
        return state, weights

    return jax.jit(lambda history: jax.lax.scan(step, rule.init(None), history)[1])


def weights_of(history, **options):
    history = np.asarray(history, np.float32)
    return np.asarray(compiled(history.shape[1], **options)(history), np.float64)


@pytest.mark.parametrize(
    "options", [{}, {"step_size": 0.5}, {"step_size": 2.0, "adjustment": 3.0, "counts": (4.0, 100.0, 9.0)}]
)
def test_weights_follow_the_definition(options):
    history = np.random.default_rng(0).uniform(0, 2, (8, 3)).astype(np.float32)
    expected = transcribed(history.astype(np.float64), **options)
    np.testing.assert_allclose(weights_of(history, **options), expected, rtol=8 * 4 * 32 * ROUNDING)


def test_the_new_weights_are_used_in_the_same_step():
    """exp(log 3) : exp(0) = 3 : 1, then 3 exp(log 3) : exp(2 log 3) = 9 : 9."""
    history = np.log(3) * np.array([[1, 0], [1, 2]])
    np.testing.assert_allclose(weights_of(history, step_size=1.0), [[3 / 4, 1 / 4], [1 / 2, 1 / 2]], rtol=8 * ROUNDING)


def test_small_groups_are_adjusted_for():
    """2 log 2 / sqrt(1, 4) = (log 4, log 2), so that equal losses give 4 : 2."""
    weights = weights_of([[5, 5]], step_size=1.0, adjustment=2 * math.log(2), counts=(1.0, 4.0))
    np.testing.assert_allclose(weights, [[2 / 3, 1 / 3]], rtol=32 * ROUNDING)


def test_equal_losses_keep_the_weights():
    history = [[2, 0, 1], [3, 3, 3], [0, 0, 0], [-1, -1, -1]]
    weights = weights_of(history, step_size=0.5)
    np.testing.assert_allclose(weights[1:], np.tile(weights[0], (3, 1)), rtol=16 * ROUNDING)


def test_a_step_size_of_zero_is_the_mean():
    rows, losses = jnp.asarray(np.random.default_rng(0).standard_normal((3, 5)), jnp.float32), jnp.array([1.0, 9, 0])
    rule = aggregate.group_dro(3, step_size=0.0)
    update, _ = rule.update(rows, rule.init(None), losses=losses)
    np.testing.assert_allclose(update, aggregate.mean().update(rows, None)[0], atol=16 * ROUNDING)


@hypothesis.given(
    history=st.lists(st.tuples(*[st.floats(-10, 10, width=32)] * 3), min_size=4, max_size=4),
    shift=st.floats(-10, 10, width=32),
)
@hypothesis.settings(max_examples=20, deadline=None)
def test_weights_stay_on_the_simplex_and_a_common_shift_does_not_matter(history, shift):
    weights = weights_of(history, step_size=0.5)
    assert np.all(weights >= 0)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=8 * ROUNDING)
    shifted = weights_of(np.asarray(history) + shift, step_size=0.5)
    # Losses of up to 20 are rounded by 2^-20; half of that enters, in each of four steps; log weights reach -40.
    np.testing.assert_allclose(shifted, weights, rtol=4 * 2.0**-18, atol=1e-30)


def test_a_large_step_leaves_the_worst_group_alone():
    np.testing.assert_array_equal(weights_of([[1, 3, 2]], step_size=1e6), [[0, 1, 0]])


def test_a_weight_that_has_vanished_comes_back():
    """exp(-1000) is not a float32 number, but 1000 is: after the opposite losses the weights are equal again."""
    weights = weights_of([[1000, 0], [0, 1000]], step_size=1.0)
    np.testing.assert_array_equal(weights, [[1, 0], [1 / 2, 1 / 2]])


def test_a_group_that_is_absent_falls_relative_to_the_others():
    weights = weights_of([[1, 1, 0]], step_size=1.0)[0]
    np.testing.assert_allclose(weights[0], weights[1])
    np.testing.assert_allclose(weights[0] / weights[2], math.e, rtol=16 * ROUNDING)


def test_one_group_keeps_its_gradient():
    rule = aggregate.group_dro(1, step_size=3.0)
    row = {"w": jnp.array([[1.0, -2.0]]), "none": None}
    update, _ = jax.jit(rule.update)(row, rule.init(None), losses=jnp.array([7.0]))
    np.testing.assert_array_equal(update["w"], row["w"][0])
    assert update["none"] is None


def test_one_backward_pass_gives_the_weighted_gradient():
    """L = (p^2, 9 - p) at p = 1, step size log(2) / 7: weights 2^(1/7) : 2^(8/7) = 1 : 2."""
    rule = aggregate.group_dro(2, step_size=math.log(2) / 7)
    fn = jax.jit(aggregate.value_and_grad(lambda p: jnp.stack([p**2, 9 - p]), rule, mode="weights"))
    _, update, state = fn(jnp.float32(1), rule.init(None))
    np.testing.assert_allclose(update, 2 * 1 / 3 - 1 * 2 / 3, atol=16 * ROUNDING)
    np.testing.assert_allclose(np.exp(state.log_weights), [1 / 3, 2 / 3], rtol=16 * ROUNDING)


def test_finds_the_minimax_of_two_quadratics():
    """max((p - 1)^2, 2 (p + 1)^2) is least where they meet: |p - 1| = sqrt(2) |p + 1|, p = -3 + 2 sqrt(2)."""
    tx = optax.chain(aggregate.group_dro(2, step_size=0.1), optax.sgd(0.05))

    def losses(p):
        return jnp.stack([(p - 1) ** 2, 2 * (p + 1) ** 2])

    def step(carry, _):
        p, state = carry
        updates, state = tx.update(jax.jacrev(losses)(p), state, p, losses=losses(p))
        return (optax.apply_updates(p, updates), state), None

    start = jnp.float32(0.9)
    (p, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=1000))(start)
    np.testing.assert_allclose(p, 2 * math.sqrt(2) - 3, atol=1e-3)


def test_a_schedule_for_the_step_size_is_injected():
    """Steps of size 1, then 0: the weights of the first step stay."""
    make = optax.inject_hyperparams(aggregate.group_dro, static_args=("num_groups", "adjustment"))
    rule = make(num_groups=2, step_size=lambda count: jnp.where(count < 1, 1.0, 0.0))
    state, step = rule.init(jnp.zeros(2)), jax.jit(rule.update)
    for row in ([math.log(3), 0], [0, 9]):
        update, state = step(jnp.eye(2), state, losses=jnp.asarray(row, jnp.float32))
    np.testing.assert_allclose(update, [3 / 4, 1 / 4], rtol=16 * ROUNDING)


def test_losses_are_constants_and_may_be_of_half_precision():
    rule = aggregate.group_dro(2, step_size=1.0)
    through = jax.grad(lambda losses: rule.update(jnp.eye(2), rule.init(None), losses=losses)[0][0])(jnp.ones(2))
    np.testing.assert_array_equal(through, 0)
    weights, state = rule.weights(jnp.array([2, 1], jnp.bfloat16), rule.init(None))
    assert weights.dtype == state.log_weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, np.array([math.e, 1]) / (math.e + 1), rtol=8 * ROUNDING)


def test_a_loss_that_is_not_finite_stays_visible():
    assert np.isnan(weights_of([[1, np.nan]])).all()


def traced_adjustment(value):
    return aggregate.group_dro(2, adjustment=value).init(None)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: aggregate.group_dro(0), r"num_groups=0 must lie in \[1, inf\)"),
        (lambda: aggregate.group_dro(2, step_size=-0.1), r"step_size=-0.1 must lie in \[0, inf\)"),
        (lambda: aggregate.group_dro(2, step_size=optax.constant_schedule(0.1)), "step_size.*inject_hyperparams"),
        (lambda: aggregate.group_dro(2, adjustment=-1.0), r"adjustment=-1.0 must lie in \[0, inf\)"),
        (lambda: aggregate.group_dro(2, adjustment=1.0), "adjustment=1.0 needs counts"),
        (lambda: jax.eval_shape(traced_adjustment, 0.0), "needs counts"),
        (lambda: aggregate.group_dro(2, counts=[1.0, 2.0, 3.0]), "counts must be 2 positive numbers"),
        (lambda: aggregate.group_dro(2, counts=[1.0, 0.0]), "counts must be 2 positive numbers"),
        (lambda: aggregate.group_dro(2, counts=[1.0, np.inf]), "counts must be 2 positive numbers"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_losses_are_needed_and_must_be_as_many_as_groups():
    rule = aggregate.group_dro(2)
    with pytest.raises(ValueError, match="group_dro"):
        rule.update(jnp.ones((2, 3)), rule.init(None))
    with pytest.raises(ValueError, match="group_dro"):
        jax.eval_shape(lambda: rule.update(jnp.ones((3, 3)), rule.init(None), losses=jnp.ones(3)))
