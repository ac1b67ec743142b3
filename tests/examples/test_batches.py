"""Batches as indices: what is in them, by hand and by property."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import examples

LABELS = np.array([2, 0, 2, 1, 0, 2, 5, 2, 0, 5, 2], np.int32)  # 5, 3, 2 and 1 examples of 2, 0, 5 and 1


@functools.cache
def batches(keys=200):
    """Batches [keys, 2, 4] of two classes, over many keys at once."""

    def draw(seed, labels):
        return examples.pk_batch(jax.random.key(seed), labels, classes=2, per_class=4)

    drawn = jax.jit(jax.vmap(draw, (0, None)))(jnp.arange(keys), LABELS)
    assert drawn.shape == (keys, 8)
    return np.asarray(drawn).reshape(keys, 2, 4)


def test_binding_examples_are_the_first_of_each_class():
    labels = np.array([1, 1, 0, 3, 2, 0, 3])
    np.testing.assert_array_equal(examples.binding_examples(labels, 4), [2, 0, 4, 3])
    np.testing.assert_array_equal(jax.jit(examples.binding_examples, static_argnums=1)(labels, 4), [2, 0, 4, 3])


def test_the_same_examples_are_added_to_every_batch():
    rows, binding = np.arange(12).reshape(3, 4), np.array([5, 0])
    got = examples.bind_batches(rows, binding)
    np.testing.assert_array_equal(got, [[*row, 5, 0] for row in rows.tolist()])
    np.testing.assert_array_equal(examples.bind_batches(rows[0], binding), got[0])
    np.testing.assert_array_equal(examples.bind_batches(rows[None], binding), got[None])


def test_with_bound_batches_every_pair_of_classes_meets():
    """Batches of one class each; bound, every batch holds all classes, and all batches of a class share an example."""
    labels = np.array([0, 0, 1, 1, 2, 2])
    bound = np.asarray(examples.bind_batches(np.arange(6).reshape(3, 2), examples.binding_examples(labels, 3)))
    assert all(set(labels[row]) == {0, 1, 2} for row in bound)
    assert set.intersection(*map(set, bound.tolist())) == {0, 2, 4}


def test_a_batch_has_p_classes_with_k_examples():
    drawn = LABELS[batches()]
    assert np.all(drawn == drawn[..., :1])
    assert np.all(drawn[:, 0] != drawn[:, 1])


def test_examples_repeat_only_in_classes_that_are_too_small_and_then_equally():
    for row in batches().reshape(-1, 4):
        members = np.flatnonzero(LABELS[row[0]] == LABELS)
        counts = np.bincount(row, minlength=len(LABELS))[members]
        assert counts.sum() == 4
        assert counts.max() - (counts.min() if len(members) < 4 else 0) <= 1


def test_classes_and_examples_are_drawn_alike():
    """Each of 4 classes is in half of the batches; each of the 5 examples of class 2 in 4/5 of those with class 2.

    Counts of 200 and of about 100 batches, within four standard deviations.
    """
    classes = LABELS[batches()[..., 0]]
    for label in set(LABELS.tolist()):
        assert abs(np.sum(classes == label) - 100) < 4 * np.sqrt(200 / 4)
    times = np.bincount(batches().ravel(), minlength=len(LABELS))[LABELS == 2]
    n = np.sum(classes == 2)
    assert times.sum() == 4 * n
    assert np.all(np.abs(times - 0.8 * n) < 4 * np.sqrt(n * 0.8 * 0.2))


KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: examples.binding_examples(np.array([0, 2]), 3), "class 1 of num_classes=3 has no example"),
        (lambda: examples.binding_examples(np.array([0, 3]), 3), r"labels=3 must lie in \[0, 3\)"),
        (lambda: examples.binding_examples(np.array([0]), 0), r"num_classes=0 must lie in \[1, inf\)"),
        (lambda: examples.binding_examples(np.array([[0]]), 1), r"labels has shape \(1, 1\)"),
        (lambda: examples.bind_batches(np.ones((2, 2)), np.array([0])), "batches are float32; they must be integers"),
        (lambda: examples.bind_batches(np.array(1), np.array([0])), r"batches has shape \(\)"),
        (lambda: examples.bind_batches(np.array([1]), np.array(0)), r"binding has shape \(\)"),
        (lambda: examples.pk_batch(KEY, LABELS, classes=5, per_class=1), r"classes=5 must lie in \[1, 4\]"),
        (lambda: examples.pk_batch(KEY, LABELS, classes=1.5, per_class=1), "classes=1.5 must be a whole number"),
        (lambda: examples.pk_batch(KEY, LABELS, classes=1, per_class=0), r"per_class=0 must lie in \[1, inf\)"),
        (lambda: examples.pk_batch(KEY, LABELS[None], classes=1, per_class=1), r"labels has shape \(1, 11\)"),
        (lambda: examples.pk_batch(KEY, 1.0 * LABELS, classes=1, per_class=1), "labels are float32"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
