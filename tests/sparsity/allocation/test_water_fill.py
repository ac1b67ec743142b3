"""Water filling against bisection and against the loop that it replaces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard.sparsity.allocation import water_fill

traced = jax.jit(water_fill)


def bisected(weights, upper, total, lower):
    """clip(lower + c weights, lower, upper) for the c that gives the total, found by halving."""

    def shares(c):
        return [min(lo + c * w, up) for w, up, lo in zip(weights, upper, lower, strict=True)]

    low, high = 0.0, 1.0
    while sum(shares(high)) < total and high < 1e30:
        high *= 2
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if sum(shares(c)) < total else (low, c)
    return shares(high)


def shared_again(weights, upper, total):
    """Share what is left in proportion, cut what is too much, and share the rest again."""
    shares, is_open = np.zeros(len(weights)), np.ones(len(weights), bool)
    while is_open.any():
        rest = total - shares[~is_open].sum()
        trial = rest * weights / weights[is_open].sum()
        full = is_open & (trial > upper)
        if not full.any():
            return np.where(is_open, trial, shares)
        shares, is_open = np.where(full, upper, shares), is_open & ~full
    return shares


def problem(seed):
    rng = np.random.default_rng(seed)
    weights = rng.exponential(size=6) * (rng.random(6) > 0.2)
    lower = rng.random(6)
    upper = lower + rng.exponential(size=6)
    most = np.where(weights > 0, upper, lower).sum()
    return weights, upper, lower.sum() + rng.random() * (most - lower.sum()), lower


@pytest.mark.parametrize("seed", range(8))
def test_shares_are_those_of_bisection(seed):
    weights, upper, total, lower = problem(seed)
    shares = water_fill(weights, upper, total, lower)
    np.testing.assert_allclose(shares, bisected(weights, upper, total, lower), rtol=1e-12)
    np.testing.assert_allclose(shares.sum(), total, rtol=1e-12)
    np.testing.assert_array_equal(shares[weights == 0], lower[weights == 0])
    assert shares.dtype == np.float64
    # float32: sums of six numbers of order 1, and a quotient of such.
    np.testing.assert_allclose(traced(weights, upper, total, lower), shares, rtol=3e-6)


def test_it_is_where_sharing_again_comes_to_rest():
    weights, upper, *_ = problem(1)
    weights = weights + 0.1
    for share in (0.1, 0.5, 0.9, 0.99):
        total = share * upper.sum()
        np.testing.assert_allclose(water_fill(weights, upper, total), shared_again(weights, upper, total), rtol=1e-12)


def test_by_hand():
    """Of 7 the first gets no more than 1; the other 6 are shared as 1 to 2."""
    assert water_fill(np.array([1, 1, 2]), np.array([1, 9, 9]), 7).tolist() == [1, 2, 4]
    # With a lower bound of 1 each, 3 more are shared, of which the first takes none.
    assert water_fill(np.array([0, 1, 2]), np.array([9, 9, 9]), 6, np.ones(3)).tolist() == [1, 2, 3]


def test_both_ends():
    """All bounds are met exactly, whatever their sizes."""
    weights, upper = np.array([3e-20, 1.0, 7e20]), np.array([1e-9, 3.3e11, 0.1])
    lower = upper / 3
    np.testing.assert_array_equal(water_fill(weights, upper, upper.sum(), lower), upper)
    np.testing.assert_array_equal(water_fill(weights, upper, lower.sum(), lower), lower)
    np.testing.assert_array_equal(water_fill(np.zeros(3), upper, lower.sum(), lower), lower)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_scales_do_not_overflow_in_float32(scale):
    weights, upper = jnp.float32(scale) * jnp.array([1.0, 1.0, 2.0]), jnp.array([1e9, 9e9, 9e9])
    np.testing.assert_allclose(traced(weights, upper, 7e9), [1e9, 2e9, 4e9], rtol=1e-6)


def test_traced_totals_out_of_reach_are_filled_as_far_as_it_goes():
    weights, upper, lower = jnp.array([1.0, 0.0, 2.0]), jnp.array([3.0, 3.0, 3.0]), jnp.array([1.0, 1.0, 0.0])
    assert traced(weights, upper, 99.0, lower).tolist() == [3, 1, 3]
    assert traced(weights, upper, 0.0, lower).tolist() == [1, 1, 0]


def test_no_entries():
    assert water_fill(np.zeros(0), np.zeros(0), 0).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (([1.0, 1], [1, 1], 3), r"total=3 .* 0 to 2"),
        (([1.0, 0], [1, 1], 2), r"total=2 .* 0 to 1"),
        (([1.0, 1], [1, 1], 0.5, [0.5, 0.5]), r"total=0.5 .* 1 to 2"),
        (([1.0, 1], [1, 1], np.nan), r"total=nan"),
        (([-1.0, 1], [1, 1], 1), r"weights=-1.0 must lie in \[0, inf\)"),
        (([1.0, 1], [1, 1], 1, [0, 2]), r"upper - lower=-1.0"),
        (([1.0, 1], [1], 1), r"weights \(2,\), upper \(1,\)"),
        (([[1.0]], [[1]], 1), r"one vector length"),
    ],
)
def test_refuses(arguments, text):
    with pytest.raises(ValueError, match=text):
        water_fill(*map(np.asarray, arguments))
