"""The flag aggregator against singular vectors of the gradients themselves, in NumPy float64."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import aggregate

P = jax.sharding.PartitionSpec
SIZE = 30
# Where the subspace contains a row, the squared sine is the rounding of float32; with this its root is no issue.
TAME = 1e-2


def reference(x, rank=None, iterations=5, regularization=0.0, eps=1e-7, normalize=True):
    """The definition, column by column."""
    x = np.asarray(x, np.float64)
    rank = -(-(len(x) + 1) // 2) if rank is None else rank
    finite = np.isfinite(x).all(axis=1)
    rows = [row for row in x[finite] if np.linalg.norm(row) > 0]
    units = [row / np.linalg.norm(row) for row in rows]
    if not rows:
        return np.zeros(x.shape[1])
    basis = leading(units, rank)
    for _ in range(iterations):
        columns = [weight(basis, u, eps) * u for u in units]
        for i, u in enumerate(units):
            for j, v in enumerate(units):
                if i != j and regularization:
                    share = regularization / (len(units) * (len(units) - 1))
                    columns.append(weight(basis, u - v, eps) * share * (u - v))
        basis = leading(columns, rank)
    if normalize:
        return basis @ (basis.T @ np.sum(units, axis=0)) / rank
    return basis @ (basis.T @ np.sum(rows, axis=0)) / finite.sum()


def leading(columns, rank):
    vectors, values, _ = np.linalg.svd(np.stack(columns, axis=1), full_matrices=False)
    return vectors[:, :rank][:, values[:rank] > 1e-3 * values[0]]


def weight(basis, u, eps):
    return (abs(1 - np.sum((basis.T @ u) ** 2)) + eps) ** -0.25


@functools.cache
def compiled(**options):
    rule = aggregate.flag(**options)
    return jax.jit(lambda x: rule.update(x, rule.init(None))[0])


def run(x, **options):
    return np.asarray(compiled(**options)(jnp.asarray(x, jnp.float32)), np.float64)


def gradients(count, seed=0, spread=1.0):
    """Rows with a common part, of very different lengths."""
    rng = np.random.default_rng([5, seed, count])
    rows = rng.standard_normal(SIZE) / np.sqrt(SIZE) + spread * rng.standard_normal((count, SIZE)) / np.sqrt(SIZE)
    return (rows * 10.0 ** rng.uniform(-1, 1, (count, 1))).astype(np.float32)


def assert_near(out, expected, tolerance=1e-4):
    """Singular vectors of a cosine matrix known to float32, over gaps of its eigenvalues of a hundredth and more."""
    np.testing.assert_allclose(out, expected, atol=tolerance * max(np.linalg.norm(expected), 1e-30))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("regularization", [0.0, 8.0])
@pytest.mark.parametrize(("count", "rank"), [(3, None), (6, 1), (6, None), (6, 6)])
def test_against_the_definition(count, rank, regularization, normalize):
    options = dict(rank=rank, regularization=regularization, normalize=normalize, eps=TAME)
    x = gradients(count)
    assert_near(run(x, **options), reference(x, **options))


def test_the_regularization_matters():
    """So that the cases above test it."""
    x = gradients(6)
    one, other = (reference(x, rank=2, regularization=r, eps=TAME) for r in (0.0, 8.0))
    assert np.linalg.norm(one - other) > 0.01 * np.linalg.norm(one)


@pytest.mark.parametrize("seed", range(3))
def test_the_smallest_sine_of_the_method(seed):
    """Weights of rows inside the subspace are then known to a tenth, but it contains these rows all the same."""
    x = gradients(7, seed)
    assert_near(run(x), reference(x), 1e-2)


def test_without_iterations_it_is_the_flag_mean():
    x = gradients(5)
    assert_near(run(x, iterations=0), reference(x, iterations=0))
    assert np.linalg.norm(run(x, eps=TAME) - run(x, iterations=0)) > 1e-3


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_full_rank_of_independent_rows_is_the_mean(count):
    x = gradients(count)
    assert_near(run(x, rank=count, normalize=False), x.astype(np.float64).mean(0))


def test_one_row_is_its_direction():
    x = gradients(1)
    assert_near(run(x), x[0] / np.linalg.norm(x[0].astype(np.float64)))


def test_parallel_rows_add_their_directions():
    u = np.array([1.0, 2.0, 2.0]) / 3
    assert_near(run(np.outer([1, 5, 0.2, 3], u), rank=1), 4 * u)


@pytest.mark.parametrize("normalize", [True, False])
def test_dependent_rows_have_a_smaller_subspace(normalize):
    basis = np.random.default_rng(3).integers(-4, 5, (2, SIZE))
    x = np.array([[1, 0], [0, 1], [1, 1], [2, -1], [1, 2]]) @ basis  # small integers: exactly of rank 2
    out = run(x, rank=4, normalize=normalize)
    assert_near(out, reference(x, rank=4, normalize=normalize))
    if not normalize:
        assert_near(out, x.mean(0))


@hypothesis.given(seed=st.integers(0, 1000))
@hypothesis.settings(max_examples=10, deadline=None)
def test_the_order_and_the_lengths_of_rows_do_not_matter(seed):
    rng = np.random.default_rng(seed)
    x = gradients(6, seed % 3)
    changed = x[rng.permutation(6)] * 2.0 ** rng.integers(-8, 8, (6, 1)).astype(np.float32)
    assert_near(run(changed, rank=2, eps=TAME), run(x, rank=2, eps=TAME))


@pytest.mark.parametrize("normalize", [True, False])
def test_the_update_lies_in_the_span_of_the_rows(normalize):
    x = gradients(4).astype(np.float64)
    out = run(x, normalize=normalize)
    inside = x.T @ np.linalg.lstsq(x.T, out, rcond=None)[0]
    assert_near(out, inside)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30, 0.0])
def test_bad_and_zero_rows_are_left_out(bad, normalize):
    x = gradients(6)
    rest = np.delete(x, 2, axis=0)
    x[2] = bad
    options = dict(rank=3, normalize=normalize, eps=TAME, regularization=1.0)
    factor = 5 / 6 if bad == 0 and not normalize else 1  # a zero row counts in the mean
    assert_near(run(x, **options), factor * reference(rest, **options))


def test_nothing_but_bad_rows_gives_zero():
    np.testing.assert_array_equal(run(np.full((3, SIZE), np.nan)), 0)
    np.testing.assert_array_equal(run(np.zeros((3, SIZE)), normalize=False, regularization=1.0), 0)


@pytest.mark.parametrize("seed", range(3))
def test_random_rows_do_not_turn_it(seed):
    """7 rows around a direction and 3 random ones, 1e6 times as long: the mean is lost, the subspace is not."""
    rng = np.random.default_rng(seed)
    x = gradients(10, seed, spread=0.3)
    direction = (x[:7] / np.linalg.norm(x[:7], axis=1, keepdims=True)).sum(0)
    x[7:] = 1e6 * rng.standard_normal((3, SIZE))

    def cosine(v):
        return v @ direction / np.linalg.norm(v) / np.linalg.norm(direction)

    assert cosine(run(x, rank=1)) > 0.99
    assert abs(cosine(x.mean(0))) < 0.7


BAD = {
    "rank_zero": (dict(rank=0), r"rank=0 must lie in \[1, inf\)"),
    "rank_half": (dict(rank=1.5), "rank=1.5 must be a whole number"),
    "iterations": (dict(iterations=-1), r"iterations=-1 must lie in \[0, inf\)"),
    "regularization": (dict(regularization=-1.0), r"regularization=-1.0 must lie in \[0, inf\)"),
    "eps": (dict(eps=0.0), r"eps=0.0 must lie in \(0, inf\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    options, text = BAD[name]
    with pytest.raises(ValueError, match=text):
        aggregate.flag(**options)


def test_a_rank_above_the_number_of_rows():
    with pytest.raises(ValueError, match="rank=4 must be at most the number of gradients, K=3"):
        run(gradients(3), rank=4)


def test_trees_and_half_precision():
    x = gradients(3)
    tree = {"w": jnp.asarray(x[:, 1:], jnp.bfloat16), "n": None, "s": jnp.asarray(x[:, 0])}
    out, _ = aggregate.flag(eps=TAME).update(tree, aggregate.flag().init(None))
    assert out["n"] is None
    assert (out["w"].dtype, out["s"].dtype, out["s"].shape) == (jnp.bfloat16, jnp.float32, ())
    flat = np.concatenate([np.asarray(tree["s"])[:, None], np.asarray(tree["w"], np.float64)], axis=1)
    got = np.append(out["s"], np.asarray(out["w"], np.float64))
    assert_near(got, reference(flat, eps=TAME), 2.0**-8)  # one rounding to bfloat16


def test_workers_that_are_devices():
    x = gradients(8)
    rule = aggregate.over_workers(aggregate.flag(eps=TAME), "worker")
    mesh = jax.make_mesh((8,), ("worker",), axis_types=(jax.sharding.AxisType.Auto,))
    fn = jax.shard_map(
        lambda x: rule.update(x[0], rule.init(x[0]))[0], mesh=mesh, in_specs=P("worker"), out_specs=P(), check_vma=False
    )
    assert_near(jax.jit(fn)(x), reference(x, eps=TAME))
