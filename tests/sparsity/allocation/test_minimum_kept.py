"""The repair of a global ranking that leaves a layer too little, against the published loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard.sparsity.allocation import minimum_kept

SIZES = np.array([100, 2000, 5000, 40, 900])
RANKED = np.array([0.999, 0.97, 0.9, 0.5, 0.95])  # a global ranking to 0.92, about


def repeated(sparsities, sizes, sparsity, least):
    """Scales all sparsities to the total, cuts those that leave too little, and repeats."""
    room = np.maximum(sizes - least, 0)
    pruned = np.where(sizes < least, 0.0, sparsities * sizes)
    for _ in range(10_000):
        pruned = np.minimum(pruned * sparsity * sizes.sum() / pruned.sum(), room)
    return pruned / sizes


@pytest.mark.parametrize("least", [0, 1, 40, 50, 99])
def test_it_is_where_the_published_loop_comes_to_rest(least):
    repaired = minimum_kept(RANKED, SIZES, 0.9, least)
    np.testing.assert_allclose(repaired, repeated(RANKED, SIZES, 0.9, least), rtol=1e-9)
    np.testing.assert_allclose((repaired * SIZES).sum(), 0.9 * SIZES.sum(), rtol=1e-12)
    kept = SIZES * (1 - repaired)
    assert (kept >= np.minimum(SIZES, least) - 1e-9).all()


def test_by_hand():
    """90 and 10 of 100 are to go, but each keeps 30: 70 go from the first, so that 30 go from the second."""
    np.testing.assert_allclose(minimum_kept(np.array([0.9, 0.1]), np.array([100, 100]), 0.5, 30), [0.7, 0.3])
    # A layer smaller than the minimum, or just as large, is kept whole; so is one that was dense.
    repaired = minimum_kept(np.array([0.9, 0.9, 0.9, 0.0]), np.array([29, 30, 100, 100]), 0.1, 30)
    np.testing.assert_allclose(repaired, [0, 0, 0.259, 0], rtol=1e-12)


def test_without_a_minimum_nothing_changes():
    met = float(RANKED @ SIZES / SIZES.sum())
    np.testing.assert_allclose(minimum_kept(RANKED, SIZES, met, 0), RANKED, rtol=1e-12)
    np.testing.assert_array_equal(minimum_kept(RANKED, SIZES, 0.0, 10), np.zeros(5))


def test_a_fraction_is_of_all_weights():
    """0.01 of 8040 weights are 80.4: each keeps 81 at least."""
    by_fraction = minimum_kept(RANKED, SIZES, 0.9, 0.01)
    np.testing.assert_array_equal(by_fraction, minimum_kept(RANKED, SIZES, 0.9, 81))


def test_traced_sparsities_give_the_same():
    repair = jax.jit(functools.partial(minimum_kept, sizes=SIZES, min_kept=50))
    for sparsity in (0.0, 0.5, 0.9):
        # float32: sums of five numbers.
        np.testing.assert_allclose(
            repair(jnp.asarray(RANKED), sparsity=sparsity), minimum_kept(RANKED, SIZES, sparsity, 50), rtol=2e-6
        )
    # What cannot be had is filled as far as it goes.
    np.testing.assert_allclose(repair(jnp.asarray(RANKED), sparsity=1.0), np.maximum(SIZES - 50, 0) / SIZES, rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"sparsity": 0.99}, r"sparsity=0.99 of 8040 .*min_kept=50.* at most 7800"),
        ({"sparsities": np.zeros(5)}, r"at most 0 can be pruned"),
        ({"sparsity": 1.5}, r"sparsity=1.5 must lie in \[0, 1\]"),
        ({"sparsities": np.array([2.0, 0, 0, 0, 0])}, r"sparsities=2.0 must lie"),
        ({"min_kept": -1}, r"min_kept=-1 must lie in \[0, inf\)"),
        ({"min_kept": 1.5}, r"min_kept=1.5 must be a whole number"),
        ({"sparsities": np.ones(2)}, r"\(2,\), but sizes \(5,\)"),
    ],
)
def test_refuses(changes, text):
    arguments = {"sparsities": RANKED, "sizes": SIZES, "sparsity": 0.9, "min_kept": 50}
    with pytest.raises(ValueError, match=text):
        minimum_kept(**(arguments | changes))
