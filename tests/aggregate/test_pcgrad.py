"""PCGrad against loops in float64, cases by hand, and the randomness of its orders."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import aggregate

EPS = 2.0**-23


@functools.cache
def compiled(shuffle, eps):
    rule = aggregate.pcgrad(shuffle=shuffle, eps=eps)
    return jax.jit(lambda x, state: rule.update(x, state))


def run(x, eps=1e-8):
    return np.asarray(compiled(False, eps)(jnp.asarray(x, jnp.float32), optax.EmptyState())[0], np.float64)


def draws(x, steps, seed=0):
    """The updates of some steps with random orders."""
    state = aggregate.pcgrad(seed=seed).init(None)
    for _ in range(steps):
        out, state = compiled(True, 1e-8)(jnp.asarray(x, jnp.float32), state)
        yield np.asarray(out, np.float64)


def reference(x, orders, eps=1e-8):
    """The definition on the vectors themselves."""
    x, total = np.asarray(x, np.float64), 0
    for i, order in enumerate(orders):
        h = x[i].copy()
        for j in order:
            if j != i and h @ x[j] < 0:
                h -= h @ x[j] / (x[j] @ x[j] + eps) * x[j]
        total = total + h
    return total


def gradients(count, seed=0, size=6):
    rng = np.random.default_rng([seed, count])
    return rng.standard_normal((count, size)) - 0.5 * rng.standard_normal(size) * (np.arange(count)[:, None] % 2)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(3))
def test_ascending_order_against_loops(count, seed):
    """K projections of coefficients that each may multiply earlier errors by the quotient of two lengths."""
    x = gradients(count, seed).astype(np.float32)
    expected = reference(x, [range(count)] * count)
    np.testing.assert_allclose(run(x), expected, atol=64 * count * EPS * np.linalg.norm(x))


def test_worked_example():
    """(1, 0), (-1, 1): h_1 = (1, 0) + (-1, 1) / 2 = (.5, .5), h_2 = (-1, 1) + (1, 0) = (0, 1)."""
    np.testing.assert_allclose(run([[1.0, 0.0], [-1.0, 1.0]]), [0.5, 1.5], atol=1e-7)


def test_without_conflicts_it_is_the_sum():
    x = np.abs(gradients(4))
    np.testing.assert_allclose(run(x), x.sum(axis=0), rtol=8 * EPS)


@pytest.mark.parametrize("factor", [1.0, 4.0])
def test_two_opposite_gradients_give_zero(factor):
    """Each is projected off the other up to the share eps / |g|^2."""
    g = np.array([1.0, -2.0, 2.0])
    np.testing.assert_allclose(run([g, -factor * g]), 0, atol=2e-8 * factor)


def test_no_gradient_is_left_in_conflict_with_two_tasks():
    x = gradients(2, seed=7)
    x[1] -= 2 * x[0]
    assert x[0] @ x[1] < 0
    assert np.all(x @ run(x) >= -16 * EPS * np.linalg.norm(x) ** 2)


def test_a_zero_gradient_changes_nothing():
    x = gradients(3)
    without = run(x)
    for eps in (0.0, 1e-8):
        np.testing.assert_allclose(run([*x, np.zeros(6)], eps), without, atol=64 * EPS * np.linalg.norm(x))
        np.testing.assert_array_equal(run(np.zeros((3, 4)), eps), 0)


def test_short_gradients_are_projected_if_eps_allows():
    """At |g|^2 = 2e-12, eps = 1e-8 leaves all but 1e-4 of the conflict; eps = 0 removes it."""
    x = 1e-6 * np.array([[1.0, 0.0], [-1.0, 1.0]])
    np.testing.assert_allclose(run(x, 0.0), [0.5e-6, 1.5e-6], rtol=16 * EPS)
    np.testing.assert_allclose(run(x), x.sum(axis=0), atol=1e-6 * 3e-4)


def test_random_orders_are_all_drawn_and_are_what_the_definition_allows():
    """Three gradients on the plane, 120 degrees apart: each row has 2 different orders, so there are 8 updates."""
    angles = np.array([0.0, 2.0, 4.1])
    x = np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.array([[1.0], [2.0], [0.7]])
    orders = itertools.product(*[[(a, b), (b, a)] for a, b in ((1, 2), (0, 2), (0, 1))])
    allowed = np.array([reference(x, chosen) for chosen in orders])
    seen = set()
    for out in draws(x, 100):
        distances = np.linalg.norm(allowed - out, axis=1)
        assert distances.min() < 64 * EPS
        seen.add(tuple(np.round(allowed[distances.argmin()], 4)))
    assert len(seen) == len({tuple(np.round(row, 4)) for row in allowed}) > 2


def test_the_seed_fixes_the_orders():
    x = gradients(5)
    first, again, other = (np.array(list(draws(x, 6, seed=seed))) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_two_gradients_do_not_depend_on_the_order():
    x = gradients(2)
    for out in draws(x, 3):
        np.testing.assert_allclose(out, run(x), atol=8 * EPS * np.linalg.norm(x))


def test_the_state_is_a_key_and_without_shuffling_nothing():
    assert isinstance(aggregate.pcgrad().init(None), aggregate.PCGradState)
    assert aggregate.pcgrad(shuffle=False).init(None) == optax.EmptyState()


def test_gradients_that_are_not_finite_stay_visible():
    x = gradients(3)
    x[1, 2] = np.nan
    assert np.isnan(run(x)).all()


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"eps=-1e-08 must lie in \[0, inf\)"):
        aggregate.pcgrad(eps=-1e-8)
