"""Saddle points against the losses whose conjugates they are, closed forms, and fixed points of a small chain."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import losses

KINDS = ("squared", "huber", "absolute")
THRESHOLD = 0.5
# Errors on both sides of the threshold; doubles of them are exact, and so is everything below.
EXPECTED = np.array([-2.0, -0.25, 0.0, 0.125, 0.5, 3.0])


def robust(kind, error, threshold=THRESHOLD):
    """The loss itself, by cases."""
    if kind == "absolute":
        return abs(error)
    if kind == "squared" or abs(error) <= threshold:
        return error**2 / 2
    return threshold * abs(error) - threshold**2 / 2


def slope(kind, error, threshold=THRESHOLD):
    if kind == "absolute":
        return np.sign(error)
    return error if kind == "squared" else min(max(error, -threshold), threshold)


@functools.cache
def compiled(kind):
    return jax.jit(functools.partial(losses.bellman_saddle, kind=kind, threshold=THRESHOLD))


@functools.cache
def gradients(kind):
    """Of primal + dual, by the error and by the dual."""

    def total(td_error, dual):
        saddle = losses.bellman_saddle(td_error, dual, kind=kind, threshold=THRESHOLD)
        return jnp.sum(saddle.primal + saddle.dual)

    return jax.jit(jax.grad(total, argnums=(0, 1)))


@pytest.mark.parametrize("kind", KINDS)
def test_at_a_perfect_dual_the_objective_is_the_loss_of_the_expected_error(kind):
    """Two samples of each error average to what is expected; the objective is linear in them."""
    noise = np.array([[1.0], [-1.0]])
    dual = jnp.asarray(EXPECTED + 0 * noise, jnp.float32)
    objective = compiled(kind)(jnp.asarray(EXPECTED + noise, jnp.float32), dual).objective
    np.testing.assert_allclose(objective.mean(0), [robust(kind, e) for e in EXPECTED], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_no_other_dual_makes_the_objective_larger(kind):
    duals = np.linspace(-4, 4, 65)
    td_error = np.repeat(EXPECTED[:, None], len(duals), axis=1)
    objective = compiled(kind)(*(jnp.asarray(x, jnp.float32) for x in (td_error, duals + 0 * td_error))).objective
    best = np.array([robust(kind, e) for e in EXPECTED])
    assert np.all(objective <= best[:, None] + 1e-6)
    np.testing.assert_allclose(objective.max(1), best, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradients_are_the_slope_of_the_dual_and_its_residual(kind):
    td_error = np.array([1.0, -3.0, 0.5, 2.0, 0.0, 1.0])
    by_error, by_dual = gradients(kind)(jnp.asarray(td_error, jnp.float32), jnp.asarray(EXPECTED, jnp.float32))
    np.testing.assert_allclose(by_error, [slope(kind, e) for e in EXPECTED])
    np.testing.assert_allclose(by_dual, EXPECTED - td_error)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dual_of_zero_moves_no_value_and_the_objective_has_no_gradient(kind):
    by_error, _ = gradients(kind)(jnp.ones(6), jnp.zeros(6))
    np.testing.assert_array_equal(by_error, 0)
    objective = jax.jit(jax.grad(lambda e, d: losses.bellman_saddle(e, d, kind=kind).objective.sum(), argnums=(0, 1)))
    for gradient in objective(jnp.ones(6), jnp.ones(6)):
        np.testing.assert_array_equal(gradient, 0)


def test_an_infinite_threshold_is_the_square_and_a_threshold_may_be_traced():
    td_error, dual = jnp.asarray(EXPECTED[::-1], jnp.float32), jnp.asarray(EXPECTED, jnp.float32)
    fn = jax.jit(lambda threshold: losses.bellman_saddle(td_error, dual, threshold=threshold))
    for got, expected in zip(fn(jnp.inf), compiled("squared")(td_error, dual), strict=True):
        np.testing.assert_array_equal(got, expected)
    for got, expected in zip(fn(THRESHOLD), compiled("huber")(td_error, dual), strict=True):
        np.testing.assert_array_equal(got, expected)
    for got, expected in zip(losses.bellman_saddle(td_error, dual), fn(1.0), strict=True):
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_the_correction_uses_the_error_for_the_value_and_the_dual_for_the_next(kind):
    td_error, discount = np.array([1.0, -3.0, 0.25, 2.0, 0.0, -0.5]), np.array([0.5, 0, 1, 1, 1, 1])

    def total(value, following, td_error, dual):
        fn = functools.partial(losses.corrected_td, kind=kind, threshold=THRESHOLD)
        return jnp.sum(fn(value, following, td_error, dual, discount=jnp.asarray(discount)))

    args = [jnp.asarray(x, jnp.float32) for x in (EXPECTED, EXPECTED, td_error, EXPECTED)]
    of_value, of_next, of_error, of_dual = jax.jit(jax.grad(total, argnums=(0, 1, 2, 3)))(*args)
    np.testing.assert_allclose(of_value, [-slope(kind, e) for e in td_error])
    np.testing.assert_allclose(of_next, discount * [slope(kind, e) for e in EXPECTED])
    np.testing.assert_array_equal(of_error, 0)
    np.testing.assert_array_equal(of_dual, 0)


def test_with_the_error_as_dual_the_correction_has_the_gradient_of_the_loss():
    """A deterministic chain: what is sampled is what is expected, and both forms are the robust loss of the error."""
    value, following = jnp.array([0.3, -2.0, 1.0]), jnp.array([1.0, 0.5, 4.0])

    def error(value, following):
        return losses.td_error(jnp.ones(3), 0.5, value, following)

    def corrected(value, following):
        td = error(value, following)
        return losses.corrected_td(value, following, td, td, discount=0.5, threshold=THRESHOLD).sum()

    got = jax.jit(jax.grad(corrected, argnums=(0, 1)))(value, following)
    huber = jax.jit(jax.grad(lambda v, f: optax.huber_loss(error(v, f), delta=THRESHOLD).sum(), argnums=(0, 1)))
    for a, b in zip(got, huber(value, following), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(("kind", "fixed_point"), [("squared", 1.5), ("absolute", 1.0), ("huber", 1.0 + 0.5 / 4)])
def test_one_weight_for_three_states_takes_their_mean_or_their_median(kind, fixed_point):
    """Expected errors 1 - w, 1 - w, 2.5 - w: w is the mean 1.5, the median 1; Huber: 2 (w - 1) = 1/4 outweighs 1/4."""
    rewards = jnp.array([1.0, 1.0, 2.5])
    tx = optax.sgd(0.02)

    def loss(params):
        w, dual = params
        saddle = losses.bellman_saddle(rewards - w, dual, kind=kind, threshold=0.25)
        return jnp.sum(saddle.primal + 10 * saddle.dual)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state)
        params = optax.apply_updates(params, updates)
        return (params, state), params[0]

    params = (jnp.float32(0), jnp.zeros(3))
    _, path = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=600))(params)
    # Around a kink the sign of the dual alternates, by steps of 0.02 times three signs.
    np.testing.assert_allclose(path[-100:].mean(), fixed_point, atol=0.06 if kind == "absolute" else 1e-3)


ONES = np.ones(3, np.float32)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: losses.bellman_saddle(ONES, ONES, kind="hubert"), "kind='hubert' is not one of.*'huber'"),
        (lambda: losses.bellman_saddle(ONES, ONES, threshold=0.0), r"threshold=0.0 must lie in \(0, inf\]"),
        (lambda: losses.bellman_saddle(ONES, np.ones(4)), r"td_error has shape \(3,\) and dual \(4,\)"),
        (lambda: losses.corrected_td(ONES, ONES, ONES, ONES, discount=1.0, kind="abs"), "kind='abs' is not one of"),
        (lambda: losses.corrected_td(ONES, ONES, ONES, ONES, discount=1.0, threshold=-1.0), "threshold=-1.0"),
        (lambda: losses.corrected_td(ONES, np.ones(4), ONES, ONES, discount=1.0), r"\(3,\) and next_value \(4,\)"),
        (lambda: losses.corrected_td(ONES, ONES, ONES, np.ones(4), discount=1.0), r"\(3,\) and dual \(4,\)"),
        (lambda: losses.corrected_td(ONES, ONES, *2 * [np.ones(4)], discount=1.0), r"\(3,\) and td_error \(4,\)"),
        (lambda: losses.corrected_td(ONES, ONES, ONES, ONES, discount=np.ones(4)), r"discount has shape \(4,\)"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
