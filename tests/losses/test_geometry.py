"""Means, spreads, angles and frames against loops in float64 and closed forms."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from steelyard import losses

CLASSES, FEATURES = 4, 3
# Of classes 0, 1, 2, 1, ...; class 3 has none.
LABELS = np.array([0, 1, 2, 1, 0, 1, 2, 2, 1, 1])
SIMPLEX = np.eye(4)
CLASSWISE = ("class_means", "cone_cosine", "fisher_discriminant_ratio")
# Sums of ten products of numbers near 1.
TOLERANCE = 16 * 2.0**-23


def features(seed=0, shape=(10, FEATURES)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def mean_of(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def rows_of(x, c, where=None):
    where = np.ones(len(LABELS), bool) if where is None else where
    return [row for row, label, is_in in zip(x.tolist(), LABELS, where, strict=True) if label == c and is_in]


def means_of(x, where=None):
    return [mean_of(rows) if (rows := rows_of(x, c, where)) else [0.0] * x.shape[1] for c in range(CLASSES)]


def angles_of(means):
    """By vectors, without matrices."""
    unit = means - np.mean(means, axis=0)
    unit = [row / math.sqrt(sum(row**2)) for row in unit]
    return [math.acos(max(sum(a * b) for j, b in enumerate(unit) if j != i)) for i, a in enumerate(unit)]


@functools.cache
def compiled(name):
    fn = getattr(losses, name)
    return jax.jit(functools.partial(fn, num_classes=CLASSES) if name in CLASSWISE else fn)


@pytest.mark.parametrize("where", [None, np.arange(len(LABELS)) != 3])
def test_means_follow_the_definition(where):
    x = features()
    got = compiled("class_means")(x, LABELS, where=where)
    np.testing.assert_allclose(got, means_of(x.astype(np.float64), where), atol=TOLERANCE)
    np.testing.assert_array_equal(got[3], 0)


def test_a_masked_row_may_hold_anything():
    x = features()
    where = np.arange(len(LABELS)) != 3
    x[3] = np.nan
    means = compiled("class_means")(x, LABELS, where=where)
    assert np.isfinite(means).all()
    assert np.isfinite(compiled("within_class_spread")(x, LABELS, means, where=where)).all()


def test_labels_that_name_no_class_are_left_out_if_traced():
    x, labels = features(), np.where(np.arange(len(LABELS)) == 3, 7, LABELS)
    where = np.arange(len(LABELS)) != 3
    got = compiled("class_means")(x, labels)
    np.testing.assert_array_equal(got, compiled("class_means")(x, LABELS, where=where))


def test_means_on_eight_devices_are_those_of_the_whole_batch():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x, labels = features(shape=(16, FEATURES)), np.arange(16) % 5 % CLASSES

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("data"), out_specs=PartitionSpec())
    def sharded(x, labels):
        return losses.class_means(x, labels, CLASSES, axis_name="data")

    def value(fn):
        return lambda x: jnp.sum(jnp.sin(fn(x, labels)))

    got, expected = (
        jax.jit(jax.value_and_grad(value(fn)))(x)
        for fn in (sharded, functools.partial(losses.class_means, num_classes=CLASSES))
    )
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE)


def test_spread_follows_the_definition_and_sums_to_the_mean_squared_radius():
    x, means = features(), features(1, (CLASSES, FEATURES))
    got = compiled("within_class_spread")(x, LABELS, means)
    radii = [sum((row - means[c].astype(np.float64)) ** 2) for row, c in zip(x.astype(np.float64), LABELS, strict=True)]
    sizes = np.bincount(LABELS)
    expected = [r / (CLASSES * sizes[c]) for r, c in zip(radii, LABELS, strict=True)]
    np.testing.assert_allclose(got, expected, rtol=TOLERANCE)
    per_class = np.bincount(LABELS, radii) / sizes
    # The class without examples has no radius, and counts in the mean.
    np.testing.assert_allclose(np.sum(got), sum(per_class) / CLASSES, rtol=TOLERANCE)


def test_spread_is_zero_at_the_means_and_trains_them():
    means = features(1, (CLASSES, FEATURES))
    spread = compiled("within_class_spread")
    np.testing.assert_array_equal(spread(means[LABELS], LABELS, means), 0)
    gradient = jax.jit(jax.grad(lambda m: jnp.sum(losses.within_class_spread(features(), LABELS, m))))(means)
    # Of sum_i |h_i - m_c|^2 / (C n_c): 2 (m_c - mean_c) / C.
    expected = 2 * (means - np.array(means_of(features().astype(np.float64)))) / CLASSES
    np.testing.assert_allclose(gradient[:3], expected[:3], atol=TOLERANCE)
    np.testing.assert_array_equal(gradient[3], 0)


def test_angles_follow_the_definition():
    means = features(2, (CLASSES, 5))
    np.testing.assert_allclose(compiled("nearest_mean_angle")(means), angles_of(means.astype(np.float64)), rtol=1e-5)


def test_the_identity_is_a_simplex_wherever_it_stands():
    for means in (SIMPLEX, 3 * SIMPLEX + np.array([2.0, -1.0, 0.5, 4.0])):
        np.testing.assert_allclose(compiled("nearest_mean_angle")(means), math.acos(-1 / 3), rtol=1e-6)
        np.testing.assert_allclose(compiled("frame_gap")(means), 0, atol=1e-5)


def test_a_lone_class_has_an_angle_of_pi_and_no_gradient():
    value, gradient = jax.jit(jax.value_and_grad(lambda m: losses.nearest_mean_angle(m).sum()))(jnp.ones((1, 3)))
    np.testing.assert_allclose(value, math.pi)
    np.testing.assert_array_equal(gradient, 0)


def test_degenerate_means_have_angles_with_finite_gradients():
    fn = jax.jit(jax.value_and_grad(lambda m: losses.nearest_mean_angle(m).sum()))
    opposite = np.array([[1.0, 0, 0], [-1, 0, 0], [0, 0, 0], [0, 0, 0]], np.float32)
    for means, expected in (
        (np.ones((CLASSES, 3), np.float32), CLASSES * math.pi / 2),  # all in their centre
        (opposite, CLASSES * math.pi / 2),  # the nearest to each is one in the centre
        (np.repeat(opposite[:2], 2, axis=0), CLASSES * math.acos(1 - 1e-5)),  # clipped
    ):
        value, gradient = fn(means)
        # Near 1 the cosine's rounding, 2^-24, moves the angle of 4e-3 by 1e-5.
        np.testing.assert_allclose(value, expected, rtol=4e-3)
        assert np.isfinite(gradient).all()


def test_the_gap_follows_the_definition():
    means = features(3, (CLASSES, 5)).astype(np.float64)
    unit = means - means.mean(0)
    unit = [row / math.sqrt(sum(row**2)) for row in unit]
    terms = [(sum(a * b) - (1 if i == j else -1 / 3)) ** 2 for i, a in enumerate(unit) for j, b in enumerate(unit)]
    np.testing.assert_allclose(compiled("frame_gap")(means), math.sqrt(sum(terms)), rtol=1e-5)
    two = np.array([[1.0, 2], [3, 4]])
    value, gradient = jax.jit(jax.value_and_grad(losses.frame_gap))(jnp.asarray(two, jnp.float32))
    # Two classes always are a simplex.
    np.testing.assert_allclose(value, 0, atol=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(("size", "classes", "norm"), [(7, 5, 3.0), (2, 2, 0.5)])
def test_the_frame_is_a_simplex(size, classes, norm):
    frame = losses.simplex_frame(jax.random.key(0), size, classes, norm=norm)
    assert frame.shape == (size, classes)
    expected = np.where(np.eye(classes, dtype=bool), 1, -1 / (classes - 1))
    gram = np.asarray(frame, np.float64).T @ np.asarray(frame, np.float64)
    np.testing.assert_allclose(gram / norm**2, expected, atol=TOLERANCE)


def test_frames_differ_between_keys():
    a, b = (losses.simplex_frame(jax.random.key(seed), 7, 5) for seed in (0, 1))
    assert np.abs(a - b).max() > 0.1


def scatter(x):
    """Within and between classes, by loops over outer products."""
    x = x.astype(np.float64)
    means, centre = np.array(means_of(x)), x.mean(0)
    within = sum(np.outer(r - means[c], r - means[c]) for r, c in zip(x, LABELS, strict=True)) / len(x)
    between = sum(np.outer(means[c] - centre, means[c] - centre) for c in LABELS) / len(x)
    return within, between


@pytest.mark.parametrize("ridge", [0.0, 0.5])
def test_fisher_ratio_follows_the_definition(ridge):
    x = features()
    within, between = scatter(x)
    within += ridge * np.trace(within) / FEATURES * np.eye(FEATURES)
    got = compiled("fisher_discriminant_ratio")(x, LABELS, ridge=ridge)
    np.testing.assert_allclose(got, np.trace(np.linalg.inv(within) @ between), rtol=1e-4)


def test_fisher_ratio_is_the_same_in_all_coordinates():
    x = features()
    linear = np.array([[2.0, 1, 0], [0, 1, -1], [0.5, 0, 1]], np.float32)
    a, b = (compiled("fisher_discriminant_ratio")(z, LABELS, ridge=0.0) for z in (x, x @ linear + 1))
    np.testing.assert_allclose(a, b, rtol=1e-4)


def test_a_ridge_makes_the_fisher_ratio_finite_where_a_direction_has_no_spread():
    x = np.concatenate([features(), np.zeros((len(LABELS), 1), np.float32)], axis=1)
    fn = jax.jit(lambda x, ridge: losses.fisher_discriminant_ratio(x, LABELS, CLASSES, ridge=ridge))
    assert np.isnan(fn(x, 0.0))
    assert np.isfinite(fn(x, 1e-3))


def test_cone_cosine_follows_the_definition():
    x = features().astype(np.float64)
    cosines = [
        sum(a * b) / math.sqrt(sum(a * a) * sum(b * b))
        for a, c in zip(x, LABELS, strict=True)
        for b, d in zip(x, LABELS, strict=True)
        if c != d
    ]
    got = compiled("cone_cosine")(x, LABELS)
    np.testing.assert_allclose(got, np.mean(cosines), atol=TOLERANCE)


def test_cone_cosine_at_its_ends():
    fn = compiled("cone_cosine")
    np.testing.assert_allclose(fn(np.ones((len(LABELS), FEATURES)), LABELS), 1, rtol=1e-6)
    np.testing.assert_array_equal(fn(features(), np.zeros_like(LABELS)), 0)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: losses.class_means(np.ones((2, 3)), np.zeros(3, int), 2),
            r"labels has shape \(3,\) and features \(2, 3\)",
        ),
        (lambda: losses.class_means(np.ones(3), np.zeros(3, int), 2), r"features has shape \(3,\)"),
        (lambda: losses.class_means(np.ones((2, 3)), np.zeros(2), 2), "labels are float"),
        (lambda: losses.class_means(np.ones((2, 3)), np.array([0, 2]), 2), r"labels=2 must lie in \[0, 2\)"),
        (lambda: losses.class_means(np.ones((2, 3)), np.zeros(2, int), 0), r"num_classes=0 must lie in \[1, inf\)"),
        (
            lambda: losses.class_means(np.ones((2, 3)), np.zeros(2, int), 2, where=np.ones(3, bool)),
            r"where has shape \(3,\)",
        ),
        (
            lambda: losses.within_class_spread(np.ones((2, 3)), np.zeros(2, int), np.ones((4, 2))),
            r"means has shape \(4, 2\) and features \(2, 3\)",
        ),
        (
            lambda: losses.within_class_spread(np.ones((2, 3)), np.array([0, 4]), np.ones((4, 3))),
            "labels=4 must lie in",
        ),
        (lambda: losses.nearest_mean_angle(SIMPLEX, eps=0.0), r"eps=0.0 must lie in \(0, 1\)"),
        (lambda: losses.nearest_mean_angle(np.ones(3)), r"means has shape \(3,\)"),
        (lambda: losses.frame_gap(np.ones((1, 3))), r"classes=1 must lie in \[2, inf\)"),
        (lambda: losses.simplex_frame(jax.random.key(0), 3, 4), r"features=3 must lie in \[4, inf\)"),
        (lambda: losses.simplex_frame(jax.random.key(0), 3, 1), r"classes=1 must lie in \[2, inf\)"),
        (lambda: losses.simplex_frame(jax.random.key(0), 3, 2, norm=-1.0), r"norm=-1.0 must lie in \[0, inf\)"),
        (
            lambda: losses.fisher_discriminant_ratio(features(), LABELS, CLASSES, ridge=-1.0),
            r"ridge=-1.0 must lie in \[0, inf\)",
        ),
        (lambda: losses.cone_cosine(features(), LABELS, 2), r"labels=2 must lie in \[0, 2\)"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
