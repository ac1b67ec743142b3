"""What losses over pairs are made of: masked reductions, and tables of pairs that are never held as a whole."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial
import scipy.special

from steelyard.losses import pairs
from tests import contracts

RNG = np.random.default_rng(0)


def test_masked_reductions_follow_the_definition_and_are_zero_for_empty_rows():
    x = RNG.normal(size=(4, 6)).astype(np.float32)
    mask = RNG.random((4, 6)) < 0.5
    mask[1], mask[2] = False, True

    def reductions(x):
        mean, found = pairs.masked_mean(x, mask)
        return jnp.stack([pairs.masked_logsumexp(x, mask), mean]), found

    (values, found), gradient = jax.jit(lambda x: (reductions(x), jax.grad(lambda x: jnp.sum(reductions(x)[0]))(x)))(x)
    rows = [x[i].astype(np.float64)[mask[i]] for i in range(4)]
    expected = [[scipy.special.logsumexp(r), r.mean()] if r.size else [0, 0] for r in rows]
    np.testing.assert_allclose(values, np.transpose(expected), rtol=1e-6)
    np.testing.assert_array_equal(found, mask.any(1))
    np.testing.assert_array_equal(gradient[~mask], 0)
    softmax = np.zeros((4, 6))
    for i, r in enumerate(rows):
        softmax[i, mask[i]] = scipy.special.softmax(r) + 1 / r.size if r.size else 0
    np.testing.assert_allclose(gradient, softmax, rtol=1e-5)


@pytest.mark.parametrize("squared", [False, True])
def test_distances_far_from_the_origin_keep_their_digits(squared):
    """From inner products of rows of length 1e3; centred, they lose no more than 1e-6 of the spread."""
    a, b = (RNG.normal(size=(n, 3)) + 1000 for n in (5, 4))
    a, b = a.astype(np.float32), b.astype(np.float32)
    expected = scipy.spatial.distance.cdist(a.astype(np.float64), b.astype(np.float64))
    got = pairs.pairwise_distances(a, b, squared)
    np.testing.assert_allclose(got, expected**2 if squared else expected, rtol=2e-5)


def test_rows_that_coincide_are_at_distance_zero_with_zero_gradient():
    x = jnp.ones((3, 2))
    distances, gradient = jax.value_and_grad(lambda x: jnp.sum(pairs.pairwise_distances(x, x)))(x)
    assert distances <= 9 * 1.01e-6
    np.testing.assert_array_equal(gradient, 0)


def test_where_must_be_one_truth_value_for_each_row():
    np.testing.assert_array_equal(pairs.valid_rows(None, 3), True)
    with pytest.raises(ValueError, match=r"where has shape \(2,\): it must be \(3,\)"):
        pairs.valid_rows(jnp.ones(2, bool), 3)


@pytest.fixture
def small_parts(monkeypatch):
    """Tables of more than 8 entries are cut, into parts of at most 40."""
    monkeypatch.setattr(pairs, "_WHOLE", 8)
    monkeypatch.setattr(pairs, "_MOST", 40)


@pytest.mark.parametrize("n", [1, 7, 16, 23])
def test_by_rows_gives_what_the_whole_gives(small_parts, n):
    columns = jnp.asarray(RNG.normal(size=10), jnp.float32)
    rows = {"x": jnp.asarray(RNG.normal(size=n), jnp.float32), "i": jnp.arange(n)}

    def whole(rows, columns):
        table = jnp.sin(rows["x"][:, None] * columns) * (rows["i"][:, None] != 3)
        return jnp.sum(table, 1), jnp.max(table, 1)

    def parts(rows, columns):
        return pairs.by_rows(lambda rows: whole(rows, columns), rows, len(columns))

    def total(fn, x, columns):
        return jnp.sum(fn(rows | {"x": x}, columns)[0] * jnp.arange(n))

    for got, expected in zip(parts(rows, columns), whole(rows, columns), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    grads = [jax.jit(jax.grad(functools.partial(total, fn), (0, 1)))(rows["x"], columns) for fn in (parts, whole)]
    for got, expected in zip(*grads, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_by_rows_holds_a_part_of_a_large_table():
    n = 2048
    x = jax.ShapeDtypeStruct((n, 4), jnp.float32)

    def total(x):
        return jnp.sum(pairs.by_rows(lambda rows: jax.nn.logsumexp(pairs.products(rows, x), axis=1), x, n))

    used = jax.jit(jax.value_and_grad(total)).lower(x).compile().memory_analysis().temp_size_in_bytes
    assert used < 0.5 * 4 * n * n


@pytest.mark.parametrize("name", ["contrastive_pair_loss", "multi_similarity_loss"])
def test_losses_that_are_cut_are_the_same_losses(monkeypatch, name):
    """Those of a given table; for losses of a batch, the contract "shards" cuts theirs."""
    entry = next(entry for entry in contracts.ENTRIES if entry.name == f"losses.{name}")
    scores = jnp.asarray(RNG.normal(size=(13, 5)), jnp.float32)
    labels = jnp.asarray(RNG.integers(0, 2, (13, 5)))
    expected = jax.jit(contracts.summed(entry.make()))(scores, labels)
    monkeypatch.setattr(pairs, "_WHOLE", 8)
    got = jax.jit(contracts.summed(entry.make()))(scores, labels)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
