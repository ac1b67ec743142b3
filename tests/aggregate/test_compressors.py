"""Compressors against a loop, and their draws."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import aggregate
from tests.aggregate.helpers import compress, flat_one


def test_top_k_keeps_the_largest_of_the_whole_tree():
    tree = {"b": jnp.array([[1.0, -5.0], [0.5, 3.0]]), "a": jnp.array(-4.0), "c": None}
    out = aggregate.top_k(2)(tree)
    np.testing.assert_array_equal(out["b"], [[0, -5], [0, 0]])
    np.testing.assert_array_equal(out["a"], -4)
    assert out["c"] is None


def test_of_equal_magnitudes_top_k_keeps_the_first():
    tree = {"b": jnp.array([[2.0, -2.0], [2.0, 3.0]]), "a": jnp.array([1.0, -2.0])}
    for k, kept in enumerate(([0, 0, 0, 0, 0, 3], [0, -2, 0, 0, 0, 3], [0, -2, 2, 0, 0, 3], [0, -2, 2, -2, 0, 3]), 1):
        np.testing.assert_array_equal(flat_one(aggregate.top_k(k)(tree)), kept)


@hypothesis.given(seed=st.integers(0, 1000), k=st.integers(1, 12))
@hypothesis.settings(max_examples=20, deadline=None)
def test_top_k_contracts(seed, k):
    """Few different values, so that there are ties; what is left is at most 1 - k / P of the square."""
    x = np.random.default_rng(seed).integers(-3, 4, 12).astype(np.float32)
    out = np.asarray(aggregate.top_k(k)(jnp.asarray(x)))
    np.testing.assert_array_equal(out, compress(x, k))
    assert np.sum((out - x) ** 2) <= (1 - k / 12) * np.sum(x**2) + 1e-5


def test_compressors_keep_dtypes_and_bits():
    tree = {"half": jnp.array([1 / 3, 2.0], jnp.bfloat16), "full": jnp.array([1 / 3, 1e-3])}
    out = aggregate.top_k(3)(tree)
    np.testing.assert_array_equal(out["half"], tree["half"])
    np.testing.assert_array_equal(out["full"], np.float32([1 / 3, 0]))
    assert jax.tree.map(lambda x: x.dtype, out) == jax.tree.map(lambda x: x.dtype, tree)


@pytest.mark.parametrize("k", [6, 7, 1000])
def test_keeping_all_is_the_identity(k):
    tree = {"x": jnp.array([1.0, jnp.nan, 0.0]), "y": jnp.ones((1, 3))}
    for compressor in (aggregate.top_k(k), aggregate.random_k(k, jax.random.key(0))):
        jax.tree.map(np.testing.assert_array_equal, compressor(tree), tree)


def test_random_k_draws_k_entries_anew_for_each_step_and_worker():
    compressor = aggregate.random_k(3, jax.random.key(1))
    x = 1 + jnp.arange(20.0)
    steps, workers = (a.ravel() for a in np.meshgrid(np.arange(20), np.arange(20)))
    out = np.asarray(jax.jit(jax.vmap(lambda step, worker: compressor(x, step, worker)))(steps, workers))
    kept = out != 0
    np.testing.assert_array_equal(out, np.where(kept, x, 0))
    np.testing.assert_array_equal(kept.sum(1), 3)
    # Each entry is in 3 of 20 draws: 60 +- 7 of 400.
    assert np.all(np.abs(kept.sum(0) - 60) < 5 * np.sqrt(400 * 0.15 * 0.85))
    assert len(np.unique(kept, axis=0)) > 300  # of 1140 choices, 400 draws meet about 335
    np.testing.assert_array_equal(compressor(x, 3, 4), compressor(x, 3, 4))


BAD = {
    "k_zero": (lambda: aggregate.top_k(0), r"k=0 must lie in \[1, inf\)"),
    "k_half": (lambda: aggregate.top_k(1.5), "k=1.5 must be a whole number"),
    "random_k": (lambda: aggregate.random_k(0, jax.random.key(0)), r"k=0 must lie in \[1, inf\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    make, text = BAD[name]
    with pytest.raises(ValueError, match=text):
        make()
