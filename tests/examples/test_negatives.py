"""Windows of negatives move on when they have become stale: cases worked by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import examples

refresh = jax.jit(functools.partial(examples.refresh_negatives, window=4, num_candidates=10))


def state(cursor, initial):
    return examples.NegativeState(jnp.array(cursor, jnp.int32), jnp.array(initial, jnp.float32))


def test_the_first_score_is_the_initial_one():
    start = state([0, 0], [-np.inf, -np.inf])
    after = refresh(start, jnp.array([0.5, -0.3]))
    np.testing.assert_array_equal(after.cursor, 0)
    np.testing.assert_array_equal(after.initial, jnp.array([0.5, -0.3]))


def test_only_stale_windows_move():
    """1.15 * 0.5 < 0.6 moves; 1.15 * 0.55 > 0.6 does not; nor does a window that scores 0.8 or more."""
    after = refresh(state([0, 4, 0], [0.6, 0.6, 1.0]), jnp.array([0.5, 0.55, 0.85]))
    assert after.cursor.tolist() == [4, 4, 0]
    np.testing.assert_array_equal(after.initial, jnp.array([-jnp.inf, 0.6, 1.0]))


def test_at_the_end_of_the_list_the_last_window_stays():
    """Of ten candidates, windows of four begin at 0, 4 and 6."""
    now, cursors = state([0], [0.9]), []
    for _ in range(4):
        now = refresh(now, jnp.array([0.1]))
        cursors.append(int(now.cursor[0]))
        now = now._replace(initial=jnp.array([0.9], jnp.float32))
    assert cursors == [4, 6, 6, 6]


def test_the_last_window_keeps_its_initial_score():
    after = refresh(state([6], [0.9]), jnp.array([0.1]))
    np.testing.assert_array_equal(after.initial, jnp.array([0.9], jnp.float32))


def test_a_second_call_measures_the_new_windows_and_moves_none():
    """Random scores: those of windows that did not move are given again."""
    rng = np.random.default_rng(0)
    before = state([0] * 20, rng.uniform(0, 1, 20))
    scores = jnp.asarray(rng.uniform(0, 1, 20), jnp.float32)
    moved = refresh(before, scores)
    is_new = np.asarray(moved.cursor) > 0
    assert 0 < is_new.sum() < 20
    new_scores = jnp.where(is_new, jnp.asarray(rng.uniform(0, 1, 20), jnp.float32), scores)
    again = refresh(moved, new_scores)
    np.testing.assert_array_equal(again.cursor, moved.cursor)
    np.testing.assert_array_equal(again.initial, jnp.where(is_new, new_scores, before.initial))


def test_thresholds_are_the_callers():
    before, score = state([0], [0.6]), jnp.array([0.5])
    sizes = {"window": 1, "num_candidates": 3}
    assert examples.refresh_negatives(before, score, **sizes, ratio=1.3).cursor == 0
    assert examples.refresh_negatives(before, score, **sizes, ceiling=0.4).cursor == 0
    assert examples.refresh_negatives(before, score, **sizes).cursor == 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"window": 0}, r"window=0 must lie in \[1, inf\)"),
        ({"window": 1.5}, "window=1.5 must be a whole number"),
        ({"window": 4, "num_candidates": 3}, r"num_candidates=3 must lie in \[4, inf\)"),
        ({"ratio": 0}, r"ratio=0 must lie in \(0, inf\)"),
        ({"ceiling": -1}, r"ceiling=-1 must lie in \(0, inf\)"),
        ({"score": jnp.ones(3)}, r"score has shape \(3,\) and state.initial \(2,\)"),
        ({"state": state([0], [0.5, 0.5])}, r"score has shape \(2,\) and state.cursor \(1,\)"),
    ],
)
def test_bad_arguments(options, match):
    usual = {"state": state([0, 0], [0.5, 0.5]), "score": jnp.ones(2), "window": 2, "num_candidates": 4}
    with pytest.raises(ValueError, match=match):
        examples.refresh_negatives(**{**usual, **options})
