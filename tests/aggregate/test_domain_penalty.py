"""Domain penalisation against loops in float64, cases by hand, and GroupDRO."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import aggregate

ROUNDING = 2.0**-24


def transcribed(history, steps_per_epoch):
    """The weights of each step, by loops in float64."""
    count = len(history[0])
    weights, result, epoch = [1.0] * count, [], []
    for row in history:
        result.append(weights)
        epoch.append(row)
        if len(epoch) == steps_per_epoch:
            means = [sum(column) / steps_per_epoch for column in zip(*epoch, strict=True)]
            powers = [math.exp(mean) for mean in means]
            weights, epoch = [power / sum(powers) for power in powers], []
    return np.array(result)


@functools.cache
def compiled(count, steps_per_epoch):
    """`losses [steps, K] -> weights [steps, K]`."""
    rule = aggregate.domain_penalty(count, steps_per_epoch=steps_per_epoch)

    def step(state, row):
        weights, state = rule.weights(row, state)
        return state, weights

    return jax.jit(lambda history: jax.lax.scan(step, rule.init(None), history)[1])


def weights_of(history, steps_per_epoch):
    history = np.asarray(history, np.float32)
    return np.asarray(compiled(history.shape[1], steps_per_epoch)(history), np.float64)


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 4, 20])
def test_weights_follow_the_definition(steps_per_epoch):
    history = np.random.default_rng(0).uniform(0, 4, (13, 3)).astype(np.float32)
    expected = transcribed(history.astype(np.float64), steps_per_epoch)
    # Means of up to 4 from 4 sums, rounded by at most 4 times 16 2^-24, which is relative in the exponential.
    np.testing.assert_allclose(weights_of(history, steps_per_epoch), expected, rtol=64 * ROUNDING)


def test_two_domains_by_hand():
    """Means (log 3, 0) give 3 : 1, from the step after the epoch on, however the next one begins."""
    history = np.array([[2 * math.log(3), 1], [0, -1], [9, 0], [0, 9]])
    weights = weights_of(history, steps_per_epoch=2)
    np.testing.assert_allclose(weights, [[1, 1], [1, 1], [3 / 4, 1 / 4], [3 / 4, 1 / 4]], rtol=8 * ROUNDING)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_equal_means_weigh_each_domain_by_its_share_after_the_first_epoch(count):
    history = np.repeat([[1.0], [3.0], [2.0], [0.0], [5.0]], count, axis=1)
    weights = weights_of(history, steps_per_epoch=2)
    np.testing.assert_array_equal(weights[:2], 1)
    np.testing.assert_allclose(weights[2:], 1 / count, rtol=4 * ROUNDING)


def test_is_group_dro_restarted_each_epoch_on_the_epoch_means():
    history = np.random.default_rng(1).uniform(0, 3, (4, 5, 3)).astype(np.float32)
    rule = aggregate.group_dro(3, step_size=1.0)
    expected = [rule.weights(jnp.asarray(epoch.mean(0)), rule.init(None))[0] for epoch in history[:-1]]
    weights = weights_of(history.reshape(-1, 3), steps_per_epoch=5).reshape(4, 5, 3)
    np.testing.assert_array_equal(weights[0], 1)
    np.testing.assert_allclose(weights[1:], np.repeat(np.stack(expected)[:, None], 5, axis=1), rtol=64 * ROUNDING)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_epoch_that_is_not_finite_leaves_the_weights(bad):
    """Epochs (log 3, 0), not finite, (0, log 3): the second has no effect, and spoils nothing later."""
    third = math.log(3)
    weights = weights_of([[third, 0], [1, bad], [0, third], [0, 0]], steps_per_epoch=1)
    np.testing.assert_allclose(weights, [[1, 1], [3 / 4, 1 / 4], [3 / 4, 1 / 4], [1 / 4, 3 / 4]], rtol=8 * ROUNDING)


def test_a_first_epoch_that_is_not_finite_leaves_the_ones():
    weights = weights_of([[np.inf, 0], [math.log(3), 0], [0, 0]], steps_per_epoch=1)
    np.testing.assert_allclose(weights, [[1, 1], [1, 1], [3 / 4, 1 / 4]], rtol=8 * ROUNDING)


def test_large_losses_do_not_overflow():
    np.testing.assert_array_equal(weights_of([[1e6, 0], [0, 0]], steps_per_epoch=1)[1], [1, 0])


def test_an_absent_domain_lowers_its_mean():
    """Domain 1 has loss log 9 in one of two steps and is absent in the other: its mean is log 3."""
    history = np.log(9) * np.array([[1, 1], [1, 0], [0, 0]])
    np.testing.assert_allclose(weights_of(history, steps_per_epoch=2)[2], [3 / 4, 1 / 4], rtol=16 * ROUNDING)


def test_a_run_resumed_in_the_middle_of_an_epoch_goes_on():
    history = jnp.asarray(np.random.default_rng(2).uniform(0, 3, (7, 2)), jnp.float32)
    rule = aggregate.domain_penalty(2, steps_per_epoch=3)
    step, state, weights = jax.jit(rule.weights), rule.init(None), []
    for row in history:
        used, state = step(row, jax.tree.map(np.asarray, state))
        weights.append(used)
    np.testing.assert_allclose(weights, weights_of(history, steps_per_epoch=3), rtol=4 * ROUNDING)
    assert state.means.step == 7


def test_the_update_falls_from_the_sum_to_a_mean():
    """With losses that stay equal, the first epoch adds the gradients and later ones average them."""
    rule = aggregate.domain_penalty(2, steps_per_epoch=1)
    grads = {"w": jnp.array([[1.0, -2.0], [3.0, 0.0]]), "none": None}
    state, step, found = rule.init(None), jax.jit(rule.update), []
    for _ in range(2):
        update, state = step(grads, state, losses=jnp.ones(2))
        assert update["none"] is None
        found.append(update["w"])
    np.testing.assert_array_equal(found, [[4, -2], [2, -1]])


def test_one_backward_pass_gives_the_weighted_gradient():
    """L = (p^2, p) at p = 1 is equal, then at p = 3 the weights are 1/2 each: (2p + 1) / 2."""
    rule = aggregate.domain_penalty(2, steps_per_epoch=1)
    fn = jax.jit(aggregate.value_and_grad(lambda p: jnp.stack([p**2, p]), rule, mode="weights"))
    _, first, state = fn(jnp.float32(1), rule.init(None))
    _, second, _ = fn(jnp.float32(3), state)
    np.testing.assert_allclose([first, second], [3, 7 / 2], rtol=4 * ROUNDING)


def test_losses_are_constants_and_may_be_of_half_precision():
    rule = aggregate.domain_penalty(2, steps_per_epoch=1)

    def second(losses):
        _, state = rule.update(jnp.eye(2), rule.init(None), losses=losses)
        return rule.update(jnp.eye(2), state, losses=losses)[0]

    np.testing.assert_array_equal(jax.jacrev(second)(jnp.array([2.0, 1.0])), 0)
    weights = second(jnp.array([2, 1], jnp.bfloat16))
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, np.array([math.e, 1]) / (math.e + 1), rtol=8 * ROUNDING)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: aggregate.domain_penalty(0, steps_per_epoch=1), r"num_domains=0 must lie in \[1, inf\)"),
        (lambda: aggregate.domain_penalty(2, steps_per_epoch=0), r"steps_per_epoch=0 must lie in \[1, inf\)"),
        (lambda: aggregate.domain_penalty(2, steps_per_epoch=optax.constant_schedule(1)), "steps_per_epoch"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_losses_are_needed_and_must_be_as_many_as_domains():
    rule = aggregate.domain_penalty(2, steps_per_epoch=1)
    with pytest.raises(ValueError, match="domain_penalty"):
        rule.update(jnp.ones((2, 3)), rule.init(None))
    with pytest.raises(ValueError, match="domain_penalty"):
        jax.eval_shape(lambda: rule.update(jnp.ones((3, 3)), rule.init(None), losses=jnp.ones(3)))
