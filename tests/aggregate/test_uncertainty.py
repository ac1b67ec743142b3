"""Learned loss weights against loops in float64, automatic derivatives of their objectives, and cases by hand."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import aggregate

# A step is a dozen float32 operations on numbers of at most 4; earlier errors are carried on, not enlarged.
STEP = 48 * 2.0**-24
RULES = {"uncertainty": aggregate.uncertainty_weighting, "softmax": aggregate.softmax_weighting}


@functools.cache
def compiled(name, count, rate, steps=None, adam=False, **options):
    """`losses -> weights of each step`: the losses of each step, or of all steps if there is a number of these."""
    optimizer = optax.adam(rate) if adam else optax.sgd(rate)
    rule = RULES[name](count, optimizer=optimizer, **options)

    def run(losses):
        rows = losses if steps is None else jnp.broadcast_to(losses, (steps, count))
        state, weights = jax.lax.scan(lambda state, row: rule.weights(row, state)[::-1], rule.init(None), rows)
        return weights, state

    return jax.jit(run)


def weights_of(name, losses, rate=0.1, **options):
    losses = np.asarray(losses, np.float32)
    return np.asarray(compiled(name, losses.shape[-1], rate, **options)(losses)[0], np.float64)


def uncertainty_by_loops(history, rate, start):
    """Weights before each step of descent of `sum_k L_k exp(-s_k) / 2 + s_k / 2`."""
    s, result = [start] * len(history[0]), []
    for losses in history:
        result.append([np.exp(-x) / 2 for x in s])
        s = [x - rate * (-loss * np.exp(-x) / 2 + 1 / 2) for x, loss in zip(s, losses, strict=True)]
        s = [min(max(x, -20.0), 20.0) for x in s]
    return np.array(result)


def softmax_by_loops(history, rate, prior):
    """Weights before each step of descent of `sum_k w_k L_k`, by the Jacobian of the softmax."""
    s, result = [np.log(p) for p in prior], []
    for losses in history:
        w = [np.exp(x) / sum(np.exp(s)) for x in s]
        result.append(w)
        for k in range(len(s)):
            jacobian = [w[j] * ((j == k) - w[k]) for j in range(len(s))]
            s[k] -= rate * sum(d * loss for d, loss in zip(jacobian, losses, strict=True))
    return np.array(result)


def history(seed=0, steps=6, count=3):
    return np.random.default_rng(seed).uniform(0.1, 4, (steps, count)).astype(np.float32)


@pytest.mark.parametrize("start", [0.0, -0.5])
def test_uncertainty_follows_its_definition(start):
    expected = uncertainty_by_loops(history().astype(np.float64), 0.1, start)
    np.testing.assert_allclose(weights_of("uncertainty", history(), init_log_variance=start), expected, rtol=6 * STEP)


@pytest.mark.parametrize("prior", [(1.0, 1.0, 1.0), (0.2, 3.0, 1.0)])
def test_softmax_follows_its_definition(prior):
    expected = softmax_by_loops(history().astype(np.float64), 0.1, prior)
    np.testing.assert_allclose(weights_of("softmax", history(), prior=prior), expected, rtol=6 * STEP)


def test_with_sgd_uncertainty_is_the_same_as_having_s_among_the_parameters():
    """L(p) = (p^2, (p - 2)^2): both ways of training, with the one learning rate, pass through the same points."""
    rate, steps = 0.05, 30

    def losses(p):
        return jnp.stack([p**2, (p - 2) ** 2])

    def total(both):
        p, s = both
        return jnp.sum(losses(p) * jnp.exp(-s) / 2 + s / 2)

    def plain(both, _):
        both = jax.tree.map(lambda x, g: x - rate * g, both, jax.grad(total)(both))
        return both, both

    rule = aggregate.uncertainty_weighting(2, optimizer=optax.sgd(rate))
    gradient = aggregate.value_and_grad(losses, rule, mode="weights")

    def ours(carry, _):
        p, state = carry
        _, update, state = gradient(p, state)
        p = p - rate * update
        return (p, state), (p, state.log_variances)

    start = jnp.float32(0.5)
    _, expected = jax.jit(lambda: jax.lax.scan(plain, (start, jnp.zeros(2)), length=steps))()
    _, got = jax.jit(lambda: jax.lax.scan(ours, (start, rule.init(None)), length=steps))()
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=steps * STEP)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e3])
def test_constant_losses_end_at_a_weighted_loss_of_a_half(scale):
    """s ends at log L, so the scale cancels.

    Far below it one step of descent at rate 0.02 goes beyond, to 20 at most; from above s falls by 0.01 a step, and at
    the end the distance shrinks by 1% a step: 3000 steps are enough.
    """
    losses = np.float32([1.0, 3.0]) * np.float32(scale)
    weights = weights_of("uncertainty", losses, 0.02, steps=3000)
    np.testing.assert_allclose(weights[-1] * losses, 0.5, rtol=1e-3)


def test_log_variances_are_clipped():
    """Steps of 10 on the gradients 1/2 (no loss) and (1 - 1e6) / 2 (a huge one): to -20 in 4, to 20 in 1, and on."""
    weights, state = compiled("uncertainty", 2, 10.0, steps=6)(np.float32([0.0, 1e6]))
    np.testing.assert_allclose(weights[1], [np.exp(5) / 2, np.exp(-20) / 2], rtol=STEP)
    np.testing.assert_allclose(weights[-1, 0], np.exp(20) / 2, rtol=STEP)
    assert state.log_variances[0] == -20
    assert np.all(np.isfinite(weights))


def test_softmax_by_hand():
    """s = 0, L = (1, 3): gradient (1/2 (1 - 2), 1/2 (3 - 2)), and a step of 0.1 gives s = (0.05, -0.05)."""
    _, state = compiled("softmax", 2, 0.1)(np.float32([[1, 3]]))
    np.testing.assert_allclose(state.logits, [0.05, -0.05], rtol=STEP)


@pytest.mark.parametrize("prior", [(1.0, 1.0, 1.0), (0.2, 3.0, 1.0)])
def test_equal_losses_leave_softmax_at_its_prior(prior):
    """Adam turns a gradient of one rounding into a step of 1e-3 at most, so plain descent is what stays."""
    weights = weights_of("softmax", [0.7] * 3, steps=50, prior=prior)
    np.testing.assert_allclose(weights, np.broadcast_to(prior, (50, 3)) / np.sum(prior), atol=STEP)


@hypothesis.given(st.lists(st.tuples(*[st.floats(-1e3, 1e3, width=32)] * 3), min_size=4, max_size=4))
@hypothesis.settings(max_examples=20, deadline=None)
def test_softmax_weights_stay_on_the_simplex(rows):
    weights = weights_of("softmax", rows, rate=1.0)
    assert np.all(weights >= 0)
    np.testing.assert_allclose(weights.sum(1), 1, atol=STEP)


def test_softmax_collapses_onto_the_smallest_loss():
    weights = weights_of("softmax", [1.0, 2.0], 0.02, steps=1500, adam=True)
    assert np.all(np.diff(weights[:, 0]) >= 0)
    assert weights[-1, 0] > 0.99


@pytest.mark.parametrize("name", RULES)
def test_the_default_optimizer_is_adam_at_a_thousandth(name):
    """Adam's first step is its rate, against the sign of the gradient."""
    rule = RULES[name](2)
    _, state = rule.weights(jnp.array([0.5, 4.0]), rule.init(None))
    sign = np.array([-1, 1]) if name == "uncertainty" else np.array([1, -1])
    np.testing.assert_allclose(state[0], 1e-3 * sign, rtol=1e-3)  # its epsilon is 1e-8 of gradients above 1e-5


@pytest.mark.parametrize("name", RULES)
def test_weights_are_those_before_the_update_in_every_driver(name):
    """Rows are weighted by 1/2 in the first step of both rules, and the gradient is not differentiated through them."""
    rule = RULES[name](2, optimizer=optax.sgd(0.1))
    stacked = {"w": jnp.array([[1.0, -2.0], [3.0, 4.0]], jnp.bfloat16), "none": None, "s": jnp.array([1.0, 5.0])}
    update, state = jax.jit(rule.update)(stacked, rule.init(None), losses=jnp.array([1.0, 3.0]))
    np.testing.assert_array_equal(update["w"].astype(jnp.float32), [2, 1])
    assert (update["w"].dtype, update["none"], float(update["s"])) == (jnp.bfloat16, None, 3.0)
    through = jax.grad(lambda losses: jnp.sum(rule.weights(losses, state)[0]))(jnp.ones(2))
    np.testing.assert_array_equal(through, 0)


def test_one_task():
    """Softmax has no choice; a log-variance is learned all the same."""
    np.testing.assert_array_equal(weights_of("softmax", [[2.0], [0.0], [-5.0]]), 1)
    expected = uncertainty_by_loops([[2.0], [0.0], [5.0]], 0.1, 0.0)
    np.testing.assert_allclose(weights_of("uncertainty", [[2.0], [0.0], [5.0]]), expected, rtol=3 * STEP)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: aggregate.uncertainty_weighting(0), r"num_tasks=0 must lie in \[1, inf\)"),
        (
            lambda: aggregate.uncertainty_weighting(2, init_log_variance=21.0),
            r"init_log_variance=21.0.*-20.0, 20.0",
        ),
        (lambda: aggregate.softmax_weighting(0), r"num_tasks=0 must lie in \[1, inf\)"),
        (lambda: aggregate.softmax_weighting(2, prior=(1.0, 2.0, 3.0)), r"prior.*\(2,\).*\(3,\)"),
        (lambda: aggregate.softmax_weighting(2, prior=(1.0, 0.0)), r"prior=.*must lie in \(0, inf\)"),
        (lambda: aggregate.softmax_weighting(2, prior=(1.0, np.nan)), r"prior=.*must lie in \(0, inf\)"),
        (lambda: aggregate.softmax_weighting(2, prior=(1.0, np.inf)), r"prior=.*must lie in \(0, inf\)"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("name", RULES)
def test_losses_are_needed_and_must_be_as_many_as_tasks(name):
    rule = RULES[name](2)
    with pytest.raises(ValueError, match=f"{name}_weighting needs the losses"):
        rule.update(jnp.ones((2, 3)), rule.init(None))
    with pytest.raises(ValueError, match=f"{name}_weighting was made for 2"):
        rule.weights(jnp.ones(3), rule.init(None))
