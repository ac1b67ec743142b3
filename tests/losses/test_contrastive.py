"""Contrastive losses against loops in float64, on orthogonal classes, and by property."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import losses

ROWS = 12
LABELS = np.array([0, 1, 0, 2, 2, 0, 1, 2, 2, 0, 7, 2], np.int32)  # 7 has one row only
SUBCLASSES = np.array([0, 3, 1, 0, 1, 0, 3, 1, 0, 1, 5, 2], np.int32)
INSTANCES = np.array([0, 1, 2, 3, 4, 0, 5, 4, 3, 6, 7, 8], np.int32)
# Inner products of at most 1 are divided by a temperature of at least 0.1, and a dozen of their exponentials summed.
TOLERANCE = 32 * 10 * 2.0**-24


def unit_rows(seed=0, rows=ROWS, features=4):
    x = np.random.default_rng(seed).standard_normal((rows, features)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def contrast(x, i, positives, denominator, temperature):
    """One anchor's term, by loops in float64."""
    if not positives:
        return 0.0
    score = {j: sum(a * b for a, b in zip(x[i], x[j], strict=True)) / temperature for j in range(len(x))}
    top = max(score[j] for j in denominator)
    lse = top + math.log(sum(math.exp(score[j] - top) for j in denominator))
    return lse - sum(score[j] for j in positives) / len(positives)


def supervised(x, labels, temperature=0.1):
    x, result = np.asarray(x, np.float64).tolist(), []
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        result.append(contrast(x, i, [j for j in others if labels[j] == labels[i]], others, temperature))
    return np.array(result)


def subclass(x, labels, subclasses, instances, temperature=0.1, class_temperature=None, class_weight=0.25):
    x, result = np.asarray(x, np.float64).tolist(), []
    class_temperature = np.broadcast_to(temperature if class_temperature is None else class_temperature, len(x))
    for i in range(len(x)):
        others = [j for j in range(len(x)) if j != i]
        family = [j for j in others if labels[j] == labels[i]]
        alike = [j for j in family if subclasses[j] == subclasses[i]]
        views = [j for j in others if instances[j] == instances[i]]
        positives = sorted({*views, *(j for j in family if j not in alike)})
        denominator = sorted({*views, *(j for j in others if j not in alike)})
        fine = contrast(x, i, alike, others, temperature)
        result.append(fine + class_weight * contrast(x, i, positives, denominator, class_temperature[i]))
    return np.array(result)


@functools.cache
def compiled(fn):
    return jax.jit(fn)


def supervised_of(x, labels, temperature=0.1):
    return compiled(losses.supervised_contrastive)(x, labels, temperature=temperature)


def subclass_of(*args, temperature=0.1, class_temperature=None, class_weight=0.25):
    options = {"temperature": temperature, "class_temperature": class_temperature, "class_weight": class_weight}
    return compiled(losses.subclass_contrastive)(*args, **options)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_supervised_contrastive_follows_the_definition(temperature):
    x = unit_rows()
    expected = supervised(x, LABELS, temperature)
    got = supervised_of(x, LABELS, temperature)
    np.testing.assert_allclose(got, expected, atol=TOLERANCE)
    assert got[10] == expected[10] == 0


def test_embeddings_are_taken_as_they_are():
    x = 2 * unit_rows()
    np.testing.assert_allclose(supervised_of(x, LABELS, 4.0), supervised(x, LABELS, 4.0), atol=TOLERANCE)


def test_orthogonal_classes_attain_the_bound():
    x = np.eye(8, dtype=np.float32)[LABELS]
    for temperature in (0.1, 1.0):
        bound = losses.supervised_contrastive_bound(LABELS, temperature=temperature)
        sizes = [sum(label == LABELS) for label in LABELS]
        by_hand = [math.log(n - 1 + (ROWS - n) * math.exp(-1 / temperature)) if n > 1 else 0.0 for n in sizes]
        np.testing.assert_allclose(bound, by_hand, atol=1e-6)
        np.testing.assert_allclose(supervised_of(x, LABELS, temperature), bound, atol=TOLERANCE)


def test_nothing_without_negative_entries_is_below_the_bound():
    bound = losses.supervised_contrastive_bound(LABELS, temperature=0.5)
    for seed in range(20):
        x = losses.relu_normalize(unit_rows(seed))
        assert np.all(supervised_of(x, LABELS, 0.5) >= bound - TOLERANCE)


def test_the_order_of_the_rows_does_not_matter():
    x, order = unit_rows(), np.random.default_rng(1).permutation(ROWS)
    got = supervised_of(x[order], LABELS[order], 0.1)
    np.testing.assert_allclose(got, supervised_of(x, LABELS, 0.1)[order], atol=TOLERANCE)
    args = (x, LABELS, SUBCLASSES, INSTANCES)
    got = subclass_of(*[a[order] for a in args])
    np.testing.assert_allclose(got, subclass_of(*args)[order], atol=TOLERANCE)


def test_with_one_positive_each_the_mean_is_that_of_ntxent():
    x, labels = unit_rows(), np.arange(ROWS, dtype=np.int32) // 2
    expected = jax.jit(lambda x: optax.losses.ntxent(x, labels, temperature=0.1))(x)
    np.testing.assert_allclose(supervised_of(x, labels, 0.1).mean(), expected, atol=1e-4)


def test_an_anchor_without_a_positive_has_no_loss_and_no_gradient():
    x, labels = unit_rows(rows=4), jnp.arange(4)
    for fn in (losses.supervised_contrastive, lambda x, y: losses.subclass_contrastive(x, y, y, y)):
        value, grads = jax.jit(jax.value_and_grad(lambda x, fn=fn: fn(x, labels).sum()))(x)
        assert value == 0
        np.testing.assert_array_equal(grads, 0)


def test_what_is_in_rows_that_do_not_count_does_not_matter_even_if_it_is_not_finite():
    x, where = unit_rows(), np.arange(ROWS) % 3 != 1
    x[~where] = np.nan
    value_and_grad = jax.jit(
        jax.value_and_grad(
            lambda x: losses.subclass_contrastive(x, LABELS, SUBCLASSES, INSTANCES, where=jnp.asarray(where)).sum()
        )
    )
    value, grads = value_and_grad(x)
    kept = [a[where] for a in (x, LABELS, SUBCLASSES, INSTANCES)]
    np.testing.assert_allclose(value, subclass(*kept).sum(), atol=ROWS * TOLERANCE)
    assert np.all(np.isfinite(grads))


def test_relu_normalize_gives_unit_vectors_without_negative_entries():
    x = jnp.array([[3.0, -1, 4], [-1, -2, -3], [0, 0, 0]])

    @jax.jit
    def both(x):
        rows, pull = jax.vjp(losses.relu_normalize, x)
        return rows, losses.relu_normalize(x.T, axis=0).T, pull(jnp.ones_like(rows))[0]

    rows, columns, grads = both(x)
    np.testing.assert_allclose(rows, [[0.6, 0, 0.8], [0, 0, 0], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_allclose(columns, rows, rtol=1e-6)
    assert np.all(np.isfinite(grads))


@pytest.mark.parametrize(
    "options", [{}, {"class_weight": 2.0, "class_temperature": 0.3}, {"class_temperature": np.linspace(0.2, 1, ROWS)}]
)
def test_subclass_contrastive_follows_the_definition(options):
    args, options = (unit_rows(), LABELS, SUBCLASSES, INSTANCES), {"temperature": 0.2, **options}
    np.testing.assert_allclose(subclass_of(*args, **options), subclass(*args, **options), atol=TOLERANCE)


def test_subclasses_may_be_counted_in_each_class_or_over_all():
    args = (unit_rows(), LABELS)
    everywhere = 8 * LABELS + SUBCLASSES
    got = subclass_of(*args, everywhere, INSTANCES)
    np.testing.assert_array_equal(got, subclass_of(*args, SUBCLASSES, INSTANCES))


def test_one_subclass_a_class_without_the_contrast_of_classes_is_supervised_contrastive():
    x = unit_rows()
    got = subclass_of(x, LABELS, 0 * LABELS, INSTANCES, class_weight=0.0)
    np.testing.assert_allclose(got, supervised_of(x, LABELS, 0.1), atol=TOLERANCE)


def test_a_term_without_positives_is_zero():
    """With one subclass a class and one view an instance nothing is positive between subclasses of a class."""
    args = (unit_rows(), LABELS, 0 * LABELS, np.arange(ROWS, dtype=np.int32))
    np.testing.assert_array_equal(subclass_of(*args, class_weight=9.0), subclass_of(*args, class_weight=0.0))


X, Y = jnp.ones((3, 2)), jnp.arange(3)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: losses.relu_normalize(X, eps=0.0), r"eps=0.0 must lie in \(0, inf\)"),
        (lambda: losses.supervised_contrastive(X, Y, temperature=0.0), r"temperature=0.0 must lie in \(0, inf\)"),
        (lambda: losses.supervised_contrastive(X, Y[:2]), r"labels has shape \(2,\) and embeddings \(3, 2\)"),
        (lambda: losses.supervised_contrastive(X[0], Y), r"embeddings has shape \(2,\)"),
        (lambda: losses.supervised_contrastive(X, 1.0 * Y), "labels are float32; they must be integers"),
        (lambda: losses.supervised_contrastive(X, Y, where=Y[:2] > 0), r"where has shape \(2,\): it must be \(3,\)"),
        (lambda: losses.supervised_contrastive_bound(Y, temperature=-1.0), r"temperature=-1.0 must lie in \(0, inf\)"),
        (lambda: losses.supervised_contrastive_bound(Y[None]), r"labels has shape \(1, 3\)"),
        (lambda: losses.subclass_contrastive(X, Y, Y[:1], Y), r"subclasses has shape \(1,\) and embeddings"),
        (lambda: losses.subclass_contrastive(X, Y, Y, X), r"instances has shape \(3, 2\) and embeddings"),
        (lambda: losses.subclass_contrastive(X, Y, Y, Y, temperature=-1.0), r"temperature=-1.0 must lie in \(0, inf\)"),
        (
            lambda: losses.subclass_contrastive(X, Y, Y, Y, class_weight=-1.0),
            r"class_weight=-1.0 must lie in \[0, inf\)",
        ),
        (
            lambda: losses.subclass_contrastive(X, Y, Y, Y, class_temperature=0.0),
            r"class_temperature=0.0 must lie in \(0, inf\)",
        ),
        (
            lambda: losses.subclass_contrastive(X, Y, Y, Y, class_temperature=jnp.ones(2)),
            r"class_temperature has shape \(2,\): it must be a number or have shape \(3,\)",
        ),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
