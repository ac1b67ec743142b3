"""Dropping and growing against a definition in NumPy with sorts."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from steelyard.sparsity import dynamic

moved = jax.jit(dynamic.prune_and_grow)
# Few different values, so that ties are the rule.
SCORES = hnp.arrays(np.float32, (3, 4), elements=st.sampled_from([-1.0, 0.0, 0.5, 2.0, np.nan, -np.inf]))


def expected(mask, worth, hope, fraction):
    """Both rankings as lists of flat indices, the best first."""

    def rank(scores, among):
        finite = np.nan_to_num(scores.ravel(), nan=-1e30, neginf=-1e30)
        return sorted(np.flatnonzero(among), key=lambda i: (-finite[i], i))

    count = int(mask.sum())
    kept = rank(worth, mask.ravel())[: round(count * (1 - fraction))]
    free = np.ones(mask.size, bool)
    free[kept] = False
    grown = rank(hope, free)[: count - len(kept)]
    result = np.zeros(mask.size, bool)
    result[[*kept, *grown]] = True
    return result.reshape(mask.shape), kept


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(hnp.arrays(bool, (3, 4)), SCORES, SCORES, st.sampled_from([0.0, 0.25, 0.5, 1.0]))
def test_against_sorts(mask, worth, hope, fraction):
    new = np.asarray(moved(mask, worth, hope, fraction))
    definition, kept = expected(mask, worth, hope, fraction)
    np.testing.assert_array_equal(new, definition)
    assert new.sum() == mask.sum()
    assert new.ravel()[kept].all()
    if fraction == 0 or not mask.any() or mask.all():
        np.testing.assert_array_equal(new, mask)


def test_all_may_be_replaced():
    """With a fraction of 1 the mask is that of the best grow scores, whatever was there."""
    mask, hope = jnp.arange(6) < 3, jnp.array([0.0, 0, 5, 9, 8, 0])
    assert moved(mask, jnp.ones(6), hope, 1.0).tolist() == [False, False, True, True, True, False]


def test_without_a_grow_score_the_lowest_inactive_indices_grow():
    mask = jnp.array([False, False, True, True, False, True])
    worth = jnp.array([9.0, 9, 1, 3, 9, 2])
    # 2 of 3 stay (3 and 5); of the rest, 0 comes first.
    assert moved(mask, worth, jnp.zeros(6), 1 / 3).tolist() == [True, False, False, True, False, True]


def test_leaves_of_a_tree_compete():
    masks = {"a": jnp.array([True, True]), "b": jnp.array([True, False, False]), "none": None}
    worth = {"a": jnp.array([1.0, 5.0]), "b": jnp.array([4.0, 9.0, 9.0]), "none": None}
    hope = {"a": jnp.array([1.0, 1.0]), "b": jnp.array([2.0, 2.0, 7.0]), "none": None}
    new = moved(masks, worth, hope, 1 / 3)
    assert (new["a"].tolist(), new["b"].tolist()) == ([False, True], [True, False, True])
    assert new["none"] is None


def test_integer_scores():
    mask = jnp.array([True, True, False])
    assert moved(mask, jnp.array([1, 2, 9]), jnp.array([0, 0, 1]), 0.5).tolist() == [False, True, True]


@pytest.mark.parametrize("fraction", [-0.1, 1.1])
def test_refuses(fraction):
    with pytest.raises(ValueError, match=rf"drop_fraction={fraction} must lie in \[0, 1\]"):
        dynamic.prune_and_grow(jnp.ones(2, bool), jnp.ones(2), jnp.ones(2), fraction)
