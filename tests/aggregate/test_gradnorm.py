"""GradNorm against its definition in float64, with a numerical derivative, and by what its weights converge to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import aggregate

EPS = 2.0**-23
RATE = 0.01


@functools.cache
def compiled(count, alpha, optimizer="sgd", first=None):
    """`norms [steps, K], losses [steps, K] -> weights [steps, K]`."""
    tx = {"sgd": optax.sgd(RATE), "adam": None}[optimizer]
    rule = aggregate.gradnorm(count, alpha=alpha, optimizer=tx, initial_losses=first)

    def step(state, row):
        norms, losses = row
        weights, state = rule.gram_weights(jnp.diag(norms**2), losses, state)
        return state, weights

    return jax.jit(lambda *rows: jax.lax.scan(step, rule.init(None), rows)[1])


def weights_of(norms, losses, alpha=1.5, optimizer="sgd", first=None):
    norms, losses = np.broadcast_arrays(np.asarray(norms, np.float32), np.asarray(losses, np.float32))
    return np.asarray(compiled(norms.shape[1], alpha, optimizer, first)(norms, losses), np.float64)


def softmax(v):
    e = np.exp(v - v.max())
    return e / e.sum()


def transcribed(norms, losses, alpha):
    """The definition with SGD; the gradient of the sum of distances by central differences, targets held fixed."""
    count = norms.shape[1]
    v, result = np.zeros(count), []
    for n, current in zip(norms.astype(np.float64), losses.astype(np.float64), strict=True):
        weights = count * softmax(v)
        ratios = current / losses[0]
        targets = np.mean(weights * n) * (ratios / ratios.mean()) ** alpha
        slope = np.zeros(count)
        for k in range(count):
            shift = 1e-6 * (np.arange(count) == k)
            up, down = (np.abs(count * softmax(v + s) * n - targets).sum() for s in (shift, -shift))
            slope[k] = (up - down) / 2e-6
        result.append(weights)
        v = v - RATE * slope
    return np.array(result)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_weights_follow_the_definition(alpha):
    """Steps of 0.01 times differences that are good to 1e-9; float32 rounding of 6 steps."""
    rng = np.random.default_rng(0)
    norms, losses = rng.uniform(0.1, 5, (2, 6, 3)).astype(np.float32)
    np.testing.assert_allclose(weights_of(norms, losses, alpha), transcribed(norms, losses, alpha), atol=6 * 16 * EPS)


def test_two_tasks_by_hand():
    """n = (3, 1), w = (1, 1), alpha 0: t = 2, signs (+, -), c = (3, -1), slope w (c - mean c) = (2, -2)."""
    weights = weights_of([[3.0, 1.0]] * 2, [[1.0, 1.0]], alpha=0.0)
    np.testing.assert_array_equal(weights[0], [1, 1])
    expected = 2 * softmax(np.array([-2 * RATE, 2 * RATE]))
    np.testing.assert_allclose(weights[1], expected, rtol=4 * EPS)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_identical_tasks_keep_equal_weights(count, optimizer):
    norms = np.random.default_rng(1).uniform(0.1, 3, (20, 1)) * np.ones(count)
    np.testing.assert_allclose(weights_of(norms, norms**2, optimizer=optimizer), 1, rtol=4 * EPS)


def test_weights_sum_to_their_number():
    norms, losses = np.random.default_rng(2).uniform(0.1, 5, (2, 50, 4))
    weights = weights_of(norms, losses, optimizer="adam")
    assert np.ptp(weights[-1]) > 0.1
    np.testing.assert_allclose(weights.sum(axis=1), 4, rtol=8 * EPS)


def test_without_alpha_gradients_get_equal_lengths():
    """SGD on a sum of distances ends within a step of the solution: |dv| <= 0.01 w n, and w n is about 1 there."""
    norms = np.tile([2.0, 1.0, 0.5], (600, 1))
    lengths = weights_of(norms, np.ones((1, 3)), alpha=0.0)[-1] * norms[-1]
    np.testing.assert_allclose(lengths, lengths.mean(), rtol=4 * RATE)


def test_a_task_that_lags_behind_gets_a_longer_gradient():
    """Loss ratios 0.5 and 1: r = (2/3, 4/3), so lengths go to (2/3)^alpha : (4/3)^alpha of their common mean.

    The targets sum to more than the lengths (alpha > 1), so that a task reaches its own only within that gap.
    """
    losses = np.concatenate([[[2.0, 2.0]], np.tile([1.0, 2.0], (400, 1))])
    weights = weights_of(np.ones((401, 2)), losses, alpha=1.0)
    np.testing.assert_allclose(weights[-1], [2 / 3, 4 / 3], rtol=4 * RATE)


def test_scales_of_losses_do_not_matter_to_the_rates():
    norms, losses = np.random.default_rng(3).uniform(0.1, 5, (2, 8, 3))
    scaled = weights_of(norms, losses * np.array([1.0, 1e3, 1e-3]))
    np.testing.assert_allclose(scaled, weights_of(norms, losses), rtol=64 * EPS)


def test_given_initial_losses_replace_those_of_the_first_step():
    """Losses (1, 2) of equal norms: relative to themselves nothing moves, relative to (1, 1) r = (2/3, 4/3).

    Then t = ((2/3)^1.5, (4/3)^1.5) lies on either side of 1, and the slope is (1, -1).
    """
    norms, losses = np.ones((2, 2)), np.tile([1.0, 2.0], (2, 1))
    np.testing.assert_allclose(weights_of(norms, losses), 1, rtol=4 * EPS)
    given = weights_of(norms, losses, first=(1.0, 1.0))
    np.testing.assert_allclose(given[1], 2 * softmax(np.array([-RATE, RATE])), rtol=4 * EPS)


def test_a_first_loss_of_zero_stands_for_one():
    """Losses (0, 1) at first: r = (0, 2), slope (1, -1). Then (1, 1): r = (1, 1), and the weights turn back."""
    weights = weights_of(np.ones((3, 2)), [[0.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    np.testing.assert_allclose(weights[1], 2 * softmax(np.array([-RATE, RATE])), rtol=4 * EPS)
    np.testing.assert_allclose(weights[2], 1, atol=2 * RATE**2)


def test_zeros_do_no_harm():
    np.testing.assert_array_equal(weights_of(np.zeros((3, 2)), np.zeros((3, 2))), 1)
    np.testing.assert_array_equal(weights_of(np.ones((3, 2)), -np.ones((3, 2)), first=(1.0, 1.0))[0], 1)


def test_the_update_is_the_weighted_sum_and_one_gradient_is_itself():
    x = jnp.array([[1.0, 2.0], [3.0, -1.0]])
    rule = aggregate.gradnorm(2)
    out, state = rule.update(x, rule.init(None), losses=jnp.ones(2))
    np.testing.assert_allclose(out, [4, 1], rtol=4 * EPS)
    assert state.is_known
    np.testing.assert_array_equal(state.first, 1)
    one = aggregate.gradnorm(1)
    np.testing.assert_allclose(one.update(x[:1], one.init(None), losses=jnp.ones(1))[0], x[0], rtol=4 * EPS)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_tasks": 0}, r"num_tasks=0 must lie in \[1, inf\)"),
        ({"num_tasks": 2, "alpha": -1.0}, r"alpha=-1.0 must lie in \[0, inf\)"),
        ({"num_tasks": 2, "initial_losses": [1.0]}, r"initial_losses must have shape \(2,\), got \(1,\)"),
    ],
)
def test_bad_arguments(options, text):
    with pytest.raises(ValueError, match=text):
        aggregate.gradnorm(**options)


def test_losses_that_are_missing_or_of_another_number():
    rule = aggregate.gradnorm(2)
    with pytest.raises(ValueError, match="gradnorm needs the losses"):
        rule.update(jnp.ones((2, 3)), rule.init(None))
    with pytest.raises(ValueError, match="gradnorm was made for 2 gradients, but there are 3"):
        rule.update(jnp.ones((3, 3)), rule.init(None), losses=jnp.ones(3))
