"""Balances between teachers against loops in float64, cases by hand, and in use."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard import aggregate, losses

# A step is a dozen float32 operations on weights of at most 1; it carries earlier errors on and does not enlarge them.
ROUNDING = 2.0**-24
STEP = 12 * ROUNDING


def transcribed(history, rate, power):
    """The weights of each step, by loops in float64."""
    count = len(history[0])
    weights, result = [1 / count] * count, []
    for row in history:
        ratios = [(loss / first) ** power if first else 1.0 for loss, first in zip(row, history[0], strict=True)]
        shares = [r / sum(ratios) if sum(ratios) else 1 / count for r in ratios]
        weights = [max(0.0, w + rate * (s - w)) for w, s in zip(weights, shares, strict=True)]
        weights = [w / sum(weights) for w in weights]
        result.append(weights)
    return np.array(result)


@functools.cache
def compiled(count, rate, power):
    """`losses [steps, K] -> weights [steps, K]`."""
    rule = aggregate.normalized_loss_balance(count, rate=rate, power=power)

    def step(state, row):
        weights, state = rule.weights(row, state)
        return state, weights

    return jax.jit(lambda history: jax.lax.scan(step, rule.init(None), history)[1])


def weights_of(history, rate=0.025, power=1.0):
    history = np.asarray(history, np.float32)
    return np.asarray(compiled(history.shape[1], rate, power)(history), np.float64)


@pytest.mark.parametrize(("rate", "power"), [(0.025, 1.0), (0.5, 2.0), (1.0, 0.5), (0.0, 1.0), (0.3, 0.0)])
def test_weights_follow_the_definition(rate, power):
    history = np.random.default_rng(0).uniform(0.1, 5, (6, 3)).astype(np.float32)
    expected = transcribed(history.astype(np.float64), rate, power)
    np.testing.assert_allclose(weights_of(history, rate, power), expected, atol=6 * STEP)


def test_two_teachers_by_hand():
    """r = (3, 1), shares (3/4, 1/4), w = 1/2 + 0.025 (+-1/4)."""
    np.testing.assert_allclose(weights_of([[1, 1], [3, 1]])[1], [0.50625, 0.49375], atol=2 * STEP)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_losses_proportional_to_the_first_keep_the_weights_equal(scale):
    first = np.array([0.5, 3.0, 100.0, 1e-4])
    history = first * np.array([[1.0], [0.25], [2.0]]) * scale
    np.testing.assert_allclose(weights_of(history, rate=0.5), 0.25, atol=3 * STEP)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(*[st.floats(0, 1e6, width=32, allow_subnormal=False)] * 3), min_size=4, max_size=4))
def test_weights_stay_on_the_simplex(history):
    weights = weights_of(history, rate=0.5)
    assert np.all(weights >= 0)
    np.testing.assert_allclose(weights.sum(1), 1, atol=3 * ROUNDING)


def test_a_first_loss_of_zero_counts_as_no_progress():
    """r = (1, 1/3) whatever loss 0 does later."""
    weights = weights_of([[0, 3], [7, 1]], rate=1.0)
    np.testing.assert_allclose(weights, [[1 / 2, 1 / 2], [3 / 4, 1 / 4]], atol=STEP)


def test_ratios_beyond_float32_share_the_weight():
    """r = (8 / 2^-126, 8 / 2^-126, 1) counts as (1e30, 1e30, 1)."""
    tiny = 2.0**-126
    weights = weights_of([[tiny, tiny, 1], [8, 8, 1]], rate=1.0)
    np.testing.assert_allclose(weights[1], [1 / 2, 1 / 2, 0], atol=STEP)


def test_losses_that_are_all_zero_give_equal_shares():
    np.testing.assert_allclose(
        weights_of([[1, 2], [1, 4], [0, 0]], rate=1.0), [[1 / 2] * 2, [1 / 3, 2 / 3], [1 / 2] * 2]
    )


def test_one_teacher_has_all_the_weight():
    np.testing.assert_array_equal(weights_of([[2.0], [0.0], [5.0]]), 1)
    rule = aggregate.normalized_loss_balance(1)
    row = {"w": jnp.array([[1.0, -2.0]]), "none": None}
    update, _ = rule.update(row, rule.init(None), losses=jnp.ones(1))
    np.testing.assert_array_equal(update["w"], row["w"][0])
    assert update["none"] is None


def test_the_updated_weights_are_used_in_the_same_step_with_one_backward_pass():
    """L = (p^2, 9 - p): from (1, 8) to (4, 7), shares (32/39, 7/39), and the gradient is w_0 2p - w_1."""
    rule = aggregate.normalized_loss_balance(2, rate=0.5)
    fn = jax.jit(aggregate.value_and_grad(lambda p: jnp.stack([p**2, 9 - p]), rule, mode="weights"))
    _, first, state = fn(jnp.float32(1), rule.init(None))
    np.testing.assert_allclose(first, (2 - 1) / 2, rtol=STEP)
    _, second, state = fn(jnp.float32(2), state)
    weights = 0.25 + np.array([32, 7]) / 39 / 2
    np.testing.assert_allclose(second, weights @ [4, -1], rtol=4 * STEP)
    np.testing.assert_allclose(state.weights, weights, atol=2 * STEP)
    np.testing.assert_array_equal(state.first, [1, 8])
    assert state.step == 2


def test_a_schedule_for_the_rate_is_injected():
    """Steps of rate 1, then 0: the weights of the first step stay."""
    make = optax.inject_hyperparams(aggregate.normalized_loss_balance, static_args="num_tasks")
    rule = make(num_tasks=2, rate=lambda count: jnp.where(count < 2, 1.0, 0.0))
    grads, state = jnp.eye(2), rule.init(jnp.zeros(2))
    for row in ([1, 1], [3, 1], [1, 9]):
        update, state = jax.jit(rule.update)(grads, state, losses=jnp.asarray(row, jnp.float32))
    np.testing.assert_allclose(update, [3 / 4, 1 / 4], atol=STEP)


def entropies_moved(temperatures, entropies, **options):
    moved = aggregate.balance_entropies(jnp.asarray(temperatures), jnp.asarray(entropies), **options)
    return np.asarray(moved)


def test_temperatures_follow_the_definition():
    temperatures, entropies = [2.0, 3.0, 9.95, 1.05], [0.5, 1.0, 0.1, 2.0]  # mean 0.9
    expected = [2.1, 2.9, 10.0, 1.0]
    np.testing.assert_allclose(entropies_moved(temperatures, entropies, rate=0.1), expected, rtol=4 * ROUNDING)


def test_two_teachers_move_as_the_ratio_of_their_entropies_says():
    """sign(H_a / H_b - 1) lowers a, raises b; at the start only the more certain one leaves `low`."""
    for a, b in ((0.3, 0.7), (0.7, 0.3)):
        sign = np.sign(a / b - 1)
        np.testing.assert_allclose(entropies_moved([5.0, 5.0], [a, b], rate=0.5), [5 - sign / 2, 5 + sign / 2])
    np.testing.assert_allclose(entropies_moved([1.0, 1.0], [0.3, 0.7]), [1.001, 1.0])


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_equal_entropies_move_nothing(count):
    """The float32 mean of 3 or 7 times 0.1 is not 0.1."""
    temperatures = np.linspace(2, 3, count, dtype=np.float32)
    np.testing.assert_array_equal(entropies_moved(temperatures, np.full(count, 0.1, np.float32)), temperatures)
    np.testing.assert_array_equal(entropies_moved(temperatures, np.zeros(count, np.float32)), temperatures)


def test_entropies_of_two_teachers_meet():
    """Steps of 0.02 end within one step of a temperature where the entropies are equal."""
    logits = jnp.array([[4.0, 0.0, -1.0], [1.0, 0.5, 0.0]])[:, None]

    def step(temperatures, _):
        entropies = jax.vmap(lambda z, t: losses.entropy(z, temperature=t).mean())(logits, temperatures)
        return aggregate.balance_entropies(temperatures, entropies, rate=0.02), entropies

    temperatures, entropies = jax.jit(lambda t: jax.lax.scan(step, t, length=400))(jnp.ones(2))
    assert abs(entropies[0, 0] - entropies[0, 1]) > 0.5
    assert abs(entropies[-1, 0] - entropies[-1, 1]) < 0.02
    assert temperatures[0] > temperatures[1] == 1


def test_temperatures_keep_their_dtype_and_are_constants():
    moved = jax.jit(aggregate.balance_entropies)(jnp.ones(2), jnp.array([1.0, 2.0], jnp.bfloat16))
    assert moved.dtype == jnp.float32
    assert entropies_moved(jnp.ones(2, jnp.bfloat16), [1.0, 2.0], rate=1.0).dtype == jnp.bfloat16
    through = jax.grad(lambda t: aggregate.balance_entropies(t, t).sum())(jnp.array([2.0, 3.0]))
    np.testing.assert_array_equal(through, 0)


TEMPERATURES = functools.partial(aggregate.balance_entropies, jnp.ones(2), jnp.ones(2))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: aggregate.normalized_loss_balance(0), r"num_tasks=0 must lie in \[1, inf\)"),
        (lambda: aggregate.normalized_loss_balance(2, rate=1.5), r"rate=1.5 must lie in \[0, 1\]"),
        (lambda: aggregate.normalized_loss_balance(2, rate=optax.constant_schedule(0.1)), "rate.*inject_hyperparams"),
        (lambda: aggregate.normalized_loss_balance(2, power=-1.0), r"power=-1.0 must lie in \[0, inf\)"),
        (lambda: TEMPERATURES(low=3.0, high=2.0), r"high=2.0 must lie in \[3.0, inf\)"),
        (lambda: TEMPERATURES(low=0.0), r"low=0.0 must lie in \(0, inf\)"),
        (lambda: TEMPERATURES(rate=-1e-3), r"rate=-0.001 must lie in \[0, inf\)"),
        (lambda: aggregate.balance_entropies(jnp.ones(2), jnp.ones(3)), r"\(2,\) and \(3,\)"),
        (lambda: aggregate.balance_entropies(jnp.ones((2, 2)), jnp.ones((2, 2))), r"\(2, 2\) and \(2, 2\)"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_losses_are_needed_and_must_be_as_many_as_teachers():
    rule = aggregate.normalized_loss_balance(2)
    with pytest.raises(ValueError, match="normalized_loss_balance"):
        rule.update(jnp.ones((2, 3)), rule.init(None))
    with pytest.raises(ValueError, match="normalized_loss_balance"):
        jax.eval_shape(lambda: rule.update(jnp.ones((3, 3)), rule.init(None), losses=jnp.ones(3)))
