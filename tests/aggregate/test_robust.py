"""Robust rules against their definitions in NumPy float64, written with loops."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import aggregate
from steelyard.aggregate import robust

EPS = 2.0**-23
RULES = {
    "median": aggregate.median(),
    "trimmed_mean": aggregate.trimmed_mean(1),
    "krum": aggregate.krum(1),
    "multi_krum": aggregate.krum(1, num_selected=3),
    "geometric_median": aggregate.geometric_median(),
    "geometric_median_mean": aggregate.geometric_median(init="mean"),
    "geometric_median_zero": aggregate.geometric_median(init="zero", iterations=3),
}
by_rule = pytest.mark.parametrize("name", RULES)


@functools.cache
def compiled(name):
    rule = RULES[name]
    return jax.jit(lambda x: rule.update(x, rule.init(None))[0])


def run(rule, x):
    return np.asarray(jax.jit(rule.update)(jnp.asarray(x, jnp.float32), rule.init(None))[0], np.float64)


def gradients(count=7, size=12, seed=0):
    return np.random.default_rng([seed, count]).standard_normal((count, size)).astype(np.float32)


def trimmed_reference(x, num_trimmed):
    out = []
    for column in np.asarray(x, np.float64).T:
        values = sorted(np.inf if np.isnan(v) else v for v in column)
        kept = values[num_trimmed : len(values) - num_trimmed]
        out.append(sum(kept) / len(kept))
    return np.array(out)


def krum_reference(x, num_byzantine, num_selected=1):
    scores = []
    for k, row in enumerate(x):
        distances = sorted(np.sum((row - other) ** 2) for i, other in enumerate(x) if i != k)
        scores.append(sum(distances[: len(x) - num_byzantine - 2]))
    chosen = sorted(range(len(x)), key=lambda k: (scores[k], k))[:num_selected]
    return np.mean([x[k] for k in chosen], axis=0)


def weiszfeld_reference(x, iterations, z, smoothing=1e-6):
    for _ in range(iterations):
        pulls = [1 / max(np.linalg.norm(z - row), smoothing) for row in x]
        z = sum(b * row for b, row in zip(pulls, x, strict=True)) / sum(pulls)
    return z


def majority_reference(x):
    """The mean of the smallest ball about a row that holds more than half of the rows; of equal ones the densest."""
    count = len(x) // 2 + 1
    balls = [sorted(x, key=lambda row, center=center: np.linalg.norm(row - center))[:count] for center in x]
    squares = [[np.sum((row - center) ** 2) for row in ball] for ball, center in zip(balls, x, strict=True)]
    best = min(range(len(x)), key=lambda k: (round(squares[k][-1], 9), sum(squares[k])))
    return np.mean(balls[best], axis=0)


REFERENCES = {
    "median": lambda x: np.median(x, axis=0),
    "trimmed_mean": lambda x: trimmed_reference(x, 1),
    "krum": lambda x: krum_reference(x, 1),
    "multi_krum": lambda x: krum_reference(x, 1, 3),
    "geometric_median": lambda x: weiszfeld_reference(x, 8, majority_reference(x)),
    "geometric_median_mean": lambda x: weiszfeld_reference(x, 8, np.mean(x, axis=0)),
    "geometric_median_zero": lambda x: weiszfeld_reference(x, 3, np.zeros(x.shape[1])),
}


@by_rule
def test_definition(name):
    # Numbers near 1 and weights that sum to 1; a distance is good to sqrt-free 1e-6, as no two rows are close.
    for count, seed in ((7, 0), (7, 1), (8, 2)):
        x = gradients(count, seed=seed)
        np.testing.assert_allclose(compiled(name)(x), REFERENCES[name](x.astype(np.float64)), atol=64 * EPS)


@by_rule
def test_identical_rows_return_the_row(name):
    row = gradients(1)
    out = compiled(name)(np.repeat(row, 7, axis=0))
    np.testing.assert_allclose(out, row[0], rtol=8 * EPS)  # a rounding for each product and each sum of seven


@hypothesis.given(seed=st.integers(0, 10_000))
@hypothesis.settings(max_examples=10, deadline=None)
@by_rule
def test_the_order_of_workers_does_not_matter(name, seed):
    x = gradients(seed=seed)
    order = np.random.default_rng(seed).permutation(len(x))
    np.testing.assert_allclose(compiled(name)(x[order]), compiled(name)(x), atol=64 * EPS)


@hypothesis.given(seed=st.integers(0, 10_000), factor=st.sampled_from([0.25, 0.5, 8.0]))
@hypothesis.settings(max_examples=10, deadline=None)
@by_rule
def test_translation_and_scaling_commute(name, seed, factor):
    """Powers of two scale exactly. Zero, where one form starts, is a point: it does not move along."""
    x, shift = gradients(seed=seed), np.float32(2)
    out = compiled(name)(x)
    np.testing.assert_allclose(compiled(name)(np.float32(factor) * x), factor * out, atol=8 * 64 * EPS)
    if name != "geometric_median_zero":
        np.testing.assert_allclose(compiled(name)(x + shift), out + shift, atol=256 * EPS)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("rule", [aggregate.median(), aggregate.trimmed_mean(0), aggregate.geometric_median()])
def test_one_gradient_is_returned_and_two_are_averaged(rule, count):
    x = gradients(count)
    np.testing.assert_allclose(run(rule, x), x.astype(np.float64).mean(axis=0), atol=4 * EPS)


def test_counts_may_be_whole_floats():
    """As configurations and sweeps give them."""
    x = gradients()
    np.testing.assert_array_equal(run(aggregate.trimmed_mean(2.0), x), run(aggregate.trimmed_mean(2), x))
    np.testing.assert_array_equal(
        run(aggregate.krum(1.0, num_selected=2.0), x), run(aggregate.krum(1, num_selected=2), x)
    )


def test_nothing_trimmed_is_the_mean():
    x = gradients()
    np.testing.assert_allclose(run(aggregate.trimmed_mean(0), x), run(aggregate.mean(), x), atol=8 * EPS)


def test_worked_examples():
    x = np.float32([[2, 2], [-2, 2], [2, -2], [-2, -2], [40, 40]])
    np.testing.assert_array_equal(run(aggregate.median(), x), [2, 2])
    # Sorted coordinates are -2 -2 2 2 40: without an end at each side, (-2 + 2 + 2) / 3.
    np.testing.assert_allclose(run(aggregate.trimmed_mean(1), x), [2 / 3, 2 / 3], rtol=2 * EPS)
    # The two nearest of each corner are at 4 and 4: the tie goes to the first.
    np.testing.assert_array_equal(run(aggregate.krum(1), x), [2, 2])
    np.testing.assert_array_equal(run(aggregate.krum(1, num_selected=2), x), [0, 2])


def test_an_equilateral_triangle_has_its_geometric_median_in_the_middle_and_an_obtuse_one_in_the_corner():
    angles = 2 * np.pi * np.arange(3) / 3
    out = run(aggregate.geometric_median(iterations=100), np.stack([np.cos(angles), np.sin(angles)], axis=1))
    np.testing.assert_allclose(out, 0, atol=1e-6)
    # Fermat: a corner of 120 degrees or more is the point itself. Convergence to a corner is slow but monotone.
    out = run(aggregate.geometric_median(iterations=200), [[0, 0], [3, 0.5], [-3, 0.5]])
    np.testing.assert_allclose(out, 0, atol=1e-2)


def test_iterations_do_not_raise_the_sum_of_distances():
    x = gradients().astype(np.float64)
    points = [run(aggregate.geometric_median(iterations=n), x) for n in (1, 2, 4, 8)]
    sums = [np.linalg.norm(z - x, axis=1).sum() for z in points]
    assert np.all(np.diff(sums) < 1e-5)


def test_from_the_mean_huge_rows_are_still_felt_and_from_a_majority_they_are_not():
    """Each iteration multiplies the pull of f rows far away by about f / (K - f): (3 / 7)^8 of the first 3e7."""
    x = gradients(10)
    x[7:] = 1e8 * gradients(1) / np.linalg.norm(gradients(1))
    far = np.linalg.norm(run(aggregate.geometric_median(init="mean"), x))
    assert 1e4 < far < 1e5
    assert np.linalg.norm(run(aggregate.geometric_median(), x)) < np.linalg.norm(x[:7], axis=1).max()
    assert np.linalg.norm(run(aggregate.geometric_median(init="zero"), x)) < np.linalg.norm(x[:7], axis=1).max()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 11, 16, 17])
def test_rows_are_sorted_by_a_network_or_a_sort(count):
    """A network that sorts all columns of zeros and ones sorts everything (the 0-1 principle)."""
    columns = np.arange(2 ** min(count, 16))[None] >> np.arange(count)[:, None] & 1
    x = np.concatenate([columns, gradients(count)], axis=1).astype(np.float32)
    np.testing.assert_array_equal(jax.jit(robust.sorted_rows)(x), np.sort(x, axis=0))


def test_what_is_not_finite_is_sorted_last_or_left_out():
    x = gradients()
    bad = x.copy()
    bad[2, 3], bad[2, 5], bad[2, 7] = np.nan, -np.nan, np.inf
    np.testing.assert_allclose(run(aggregate.median(), bad)[3], trimmed_reference(bad, 3)[3], rtol=EPS)
    np.testing.assert_allclose(run(aggregate.trimmed_mean(1), bad), trimmed_reference(bad, 1), atol=16 * EPS)
    rest = np.delete(x, 2, axis=0).astype(np.float64)
    expected = weiszfeld_reference(rest, 8, majority_reference(rest))
    np.testing.assert_allclose(compiled("geometric_median")(bad), expected, atol=64 * EPS)


@by_rule
def test_nothing_finite_is_never_applied_as_nan_by_rules_on_distances(name):
    out = compiled(name)(np.full((7, 12), np.nan, np.float32))
    if name in ("median", "trimmed_mean"):
        assert np.isposinf(out).all()  # no honest value is left: this stays visible
    else:
        np.testing.assert_array_equal(out, 0)


def test_krum_never_takes_a_row_that_is_not_finite_and_averages_fewer_if_it_must():
    x = gradients()
    x[0] = np.inf
    x[3:] = np.nan  # two rows are left, too few for any finite score
    np.testing.assert_allclose(run(aggregate.krum(2), x), x[1], rtol=EPS)
    np.testing.assert_allclose(run(aggregate.krum(2, num_selected=4), x), x[1:3].mean(axis=0), atol=2 * EPS)


def test_the_lowest_are_averaged_with_ties_to_the_lower_index():
    values, valid = jnp.array([2.0, 1.0, 1.0, jnp.inf, 0.0]), jnp.array([True, True, True, True, False])
    for count, expected in ((1, [0, 1, 0, 0]), (2, [0, 1, 1, 0]), (4, [1, 1, 1, 1]), (5, [1, 1, 1, 1])):
        weights = robust.mean_of_lowest(values, count, valid)
        np.testing.assert_allclose(weights, np.array([*expected, 0]) / sum(expected), rtol=EPS)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: aggregate.trimmed_mean(-1), r"num_trimmed=-1 must lie in \[0, inf\)"),
        (lambda: aggregate.trimmed_mean(0.5), "num_trimmed=0.5 must be a whole number"),
        (lambda: run(aggregate.trimmed_mean(2), gradients(4)), "num_trimmed=2 .* more than 4 gradients, got K=4"),
        (lambda: aggregate.krum(-1), r"num_byzantine=-1 must lie in \[0, inf\)"),
        (lambda: aggregate.krum(1, num_selected=0), r"num_selected=0 must lie in \[1, inf\)"),
        (lambda: aggregate.krum(1, num_selected=1.5), "num_selected=1.5 must be a whole number"),
        (lambda: run(aggregate.krum(1), gradients(4)), "num_byzantine=1 needs more than 4 gradients, got K=4"),
        (lambda: run(aggregate.krum(0), gradients(2)), "num_byzantine=0 needs more than 2 gradients, got K=2"),
        (lambda: run(aggregate.krum(1, num_selected=5), gradients(5)), "num_selected=5 must be at most .* = 4"),
        (lambda: aggregate.geometric_median(iterations=0), r"iterations=0 must lie in \[1, inf\)"),
        (lambda: aggregate.geometric_median(smoothing=0.0), r"smoothing=0.0 must lie in \(0, inf\)"),
        (lambda: aggregate.geometric_median(init="majorty"), "init='majorty' .* did you mean 'majority'"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@by_rule
def test_workers_on_a_mesh_agree_with_a_stack_in_one_place(name):
    x = {"w": jnp.asarray(gradients(8, 12)), "b": jnp.asarray(gradients(8, 1, seed=3))[:, 0]}
    mesh = jax.make_mesh((8,), ("worker",), axis_types=(jax.sharding.AxisType.Auto,))
    rule = aggregate.over_workers(RULES[name], "worker")

    def local(rows):
        own = jax.tree.map(lambda leaf: leaf[0], rows)
        return rule.update(own, rule.init(own))[0]

    spec = jax.sharding.PartitionSpec
    out = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec("worker"), out_specs=spec(), check_vma=False))(x)
    expected = compiled(name)(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=64 * EPS), out, expected)
