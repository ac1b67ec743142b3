"""Sparse soups against means in float64, and rounds whose trainings are formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard.sparsity import masks as masks_lib
from steelyard.sparsity import soup

KEY = jax.random.key(0)
average = jax.jit(soup.sparse_average)


def masked_members(count=3):
    rng = np.random.default_rng(0)
    mask = {"kernel": rng.random((6, 4)) > 0.5, "bias": None, "steps": None, "none": None}
    trees = [
        {"kernel": np.where(mask["kernel"], w, 0), "bias": w[0], "steps": np.int32(i), "none": None}
        for i, w in enumerate(rng.standard_normal((count, 6, 4)).astype(np.float32))
    ]
    return trees, mask


def test_it_is_the_mean_and_as_sparse():
    trees, mask = masked_members()
    for weights in (None, np.float32([0.5, 0.2, 0.3])):
        got = average(trees, mask, weights=weights)
        shares = np.full(3, 1 / 3) if weights is None else weights
        for name in ("kernel", "bias"):
            expected = sum(w * tree[name].astype(np.float64) for w, tree in zip(shares, trees, strict=True))
            np.testing.assert_allclose(got[name], expected, rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(got["kernel"][~mask["kernel"]], 0)
        assert got["steps"] == 0
        assert got["steps"].dtype == jnp.int32


def test_the_order_of_members_does_not_matter():
    """But for the rounding of three products and two sums of numbers below 3."""
    trees, mask = masked_members()
    for a, b in zip(*(jax.tree.leaves(average(t, mask) | {"steps": 0}) for t in (trees, trees[::-1])), strict=True):
        np.testing.assert_allclose(a, b, atol=5 * 3 * 2.0**-24)


def test_equal_members_are_their_average():
    trees, mask = masked_members(1)
    np.testing.assert_array_equal(average(trees, mask)["kernel"], trees[0]["kernel"])
    got = average(trees * 3, mask)
    np.testing.assert_allclose(got["kernel"], trees[0]["kernel"], rtol=4 * 2.0**-24)


def params():
    rng = np.random.default_rng(1)
    return {
        "a": jnp.asarray(rng.standard_normal((6, 5)), jnp.float32),
        "b": jnp.asarray(rng.standard_normal((5, 4)), jnp.float32),
        "bias": jnp.ones(4),
    }


@jax.jit
def train(start, masks, rng):
    moved = jax.tree.map(lambda w: w + jax.random.normal(jax.random.fold_in(rng, w.size), w.shape), start)
    return masks_lib.apply(moved, masks)


def kernels(tree):
    return np.concatenate([np.ravel(tree[name]) for name in "ab"])


def test_rounds_prune_the_average_and_go_on_from_it():
    """Of 50 weights 0.6^r: 30, 18, 11 (of 10.8)."""
    soups = soup.sparse_soups(train, params(), rounds=3, rate=0.4, rng=KEY)
    before, kept = params(), np.ones(50, bool)
    for r, (made, count) in enumerate(zip(soups, (30, 18, 11), strict=True)):
        magnitudes = np.where(kept, abs(kernels(before)), -1)
        kept = magnitudes > np.sort(magnitudes)[50 - count - 1]
        np.testing.assert_array_equal(kernels(made.masks), kept)
        assert made.masks["bias"] is None
        start, key = masks_lib.apply(before, made.masks), jax.random.fold_in(KEY, r)
        trained = [train(start, made.masks, jax.random.fold_in(key, i)) for i in range(3)]
        expected = np.mean([kernels(w) for w in trained], axis=0, dtype=np.float64)
        np.testing.assert_allclose(kernels(made.params), expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(made.sparsity, 1 - count / 50)
        before = made.params


def test_one_member_is_iterative_pruning():
    made = soup.sparse_soups(train, params(), rounds=1, rate=0.4, members=1, rng=KEY)[0]
    alone = train(masks_lib.apply(params(), made.masks), made.masks, jax.random.fold_in(jax.random.fold_in(KEY, 0), 0))
    np.testing.assert_array_equal(kernels(made.params), kernels(alone))
    assert made.scores is None


@pytest.mark.parametrize(
    ("values", "taken"),
    [
        ([4.0, 9.0, 6.0], [1]),  # the best alone: any other lowers the mean
        ([6.0, 6.0, 6.0], [0, 1, 2]),  # none makes it fall
    ],
)
def test_greedy_takes_members_while_the_score_does_not_fall(values, taken):
    members = iter(values)

    def constant(start, masks, rng):
        return jnp.full_like(start, next(members))

    made = soup.sparse_soups(
        constant,
        jnp.ones((2, 2)),
        rounds=1,
        rate=0.1,
        members=3,
        rng=KEY,
        greedy=True,
        evaluate=lambda w: w[0, 0],
    )[0]
    np.testing.assert_array_equal(made.scores, values)
    np.testing.assert_allclose(made.weights, np.isin(np.arange(3), taken) / len(taken))
    np.testing.assert_allclose(made.params, np.mean([values[i] for i in taken]), rtol=1e-6)


def test_greedy_skips_a_member_that_hurts_and_goes_on():
    """The score is minus the distance from 5: 6 is best; with 7 the mean is 6.5, which is worse, with 2 it is 4."""
    members = iter([2.0, 6.0, 7.0])
    made = soup.sparse_soups(
        lambda start, masks, rng: jnp.full_like(start, next(members)),
        jnp.ones((2, 2)),
        rounds=1,
        rate=0.1,
        rng=KEY,
        greedy=True,
        evaluate=lambda w: -jnp.abs(w[0, 0] - 5),
    )[0]
    np.testing.assert_allclose(made.weights, [0.5, 0.5, 0])


def test_seeds_can_be_mapped_over():
    @jax.jit
    def draw(start, masks, rng):
        return jnp.where(masks, jax.random.normal(rng, start.shape), 0)

    def last(key):
        made = soup.sparse_soups(draw, jnp.ones((3, 4)), rounds=1, rate=0.4, members=2, rng=key, evaluate=jnp.max)[-1]
        return made.params, made.scores

    keys = jax.random.split(KEY, 2)
    mapped = jax.vmap(last)(keys)
    for i, key in enumerate(keys):
        for many, one in zip(mapped, last(key), strict=True):
            np.testing.assert_allclose(many[i], one, rtol=1e-6)


soups = functools.partial(soup.sparse_soups, train, params(), rounds=1, rate=0.5, rng=KEY)


def with_odd(**leaves):
    trees, mask = masked_members(2)
    trees[1] |= leaves
    return soup.sparse_average(trees, mask)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: with_odd(kernel=np.ones((6, 4))), "kernel of member 1 is not zero outside masks"),
        (lambda: with_odd(bias=np.ones(3)), r"bias has shape \(4,\) in member 0, \(3,\) in member 1"),
        (
            lambda: soup.sparse_average([{"a": jnp.ones(3)}], {"a": jnp.ones(2, bool)}),
            r"a has shape \(3,\), but its mask \(2,\)",
        ),
        (lambda: soup.sparse_average([], {}), "params_list is empty"),
        (lambda: soup.sparse_average(*masked_members(), weights=np.ones(2)), r"weights has shape \(2,\): .* \(3,\)"),
        (lambda: soup.sparse_average(*masked_members(), weights=[0.5, 0.5, 0.1]), "the sum of weights=1.1 must lie in"),
        (lambda: soups(rate=1.0), r"rate=1.0 must lie in \(0, 1\)"),
        (lambda: soups(rounds=0), r"rounds=0 must lie in \[1, inf\)"),
        (lambda: soups(members=0), r"members=0 must lie in \[1, inf\)"),
        (lambda: soups(greedy=True), "greedy=True needs evaluate"),
        (lambda: soups(where="c"), "where='c' matches none"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
