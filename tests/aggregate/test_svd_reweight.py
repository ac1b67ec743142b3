"""SVD task reweighting against singular vectors of the tasks themselves, in NumPy float64."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import aggregate

EPS = 2.0**-23


def reference(theta, rank):
    """`|U_r^T theta_i|`, with the tasks in the columns as in the paper."""
    columns = np.asarray(theta, np.float64).T
    left, _, _ = np.linalg.svd(columns, full_matrices=False)
    return np.linalg.norm(left[:, :rank].T @ columns, axis=0)


def tasks(count, seed=0, size=20):
    """Rows with well separated singular values: 2, 1, 1/2, ..."""
    rng = np.random.default_rng([seed, count])
    left, _ = np.linalg.qr(rng.standard_normal((count, count)))
    right, _ = np.linalg.qr(rng.standard_normal((size, count)))
    return (left * 2.0 ** (1 - np.arange(count)) @ right.T).astype(np.float32)


def assert_near(alpha, expected, length, gap=1.0):
    """Squares are right to a few eps of the longest squared length over the relative gap of singular values."""
    np.testing.assert_allclose(np.square(alpha), np.square(expected), atol=32 * EPS * length**2 / gap)


@pytest.mark.parametrize(("count", "rank"), [(1, 1), (2, 1), (4, 1), (4, 2), (4, 3), (4, 4)])
def test_lengths_of_the_projections(count, rank):
    theta = tasks(count)
    alpha = jax.jit(aggregate.svd_weights, static_argnums=1)(theta @ theta.T, rank)
    assert_near(alpha, reference(theta, rank), length=2, gap=3 / 4 * 4.0 ** (1 - rank))


@hypothesis.given(seed=st.integers(0, 10_000), count=st.integers(1, 5))
@hypothesis.settings(max_examples=20, deadline=None)
def test_at_full_rank_a_weight_is_the_length(seed, count):
    theta = np.random.default_rng(seed).standard_normal((count, 20)).astype(np.float32)
    lengths = np.linalg.norm(theta.astype(np.float64), axis=1)
    assert_near(aggregate.svd_weights(jnp.asarray(theta @ theta.T), count), lengths, lengths.max() * np.sqrt(count))


@hypothesis.given(seed=st.integers(0, 10_000))
@hypothesis.settings(max_examples=10, deadline=None)
def test_weights_grow_with_the_rank_and_never_above_the_lengths(seed):
    theta = tasks(4, seed)
    by_rank = np.stack([aggregate.svd_weights(jnp.asarray(theta @ theta.T), rank) for rank in (1, 2, 3, 4)])
    assert np.all(np.diff(by_rank, axis=0) >= -1e-6)
    assert np.all(by_rank[-1] <= np.linalg.norm(theta, axis=1) * (1 + 1e-5))
    # The squares of all weights are the squares of the first r singular values.
    np.testing.assert_allclose((by_rank**2).sum(1), np.cumsum(4.0 ** (1 - np.arange(4))), rtol=1e-5)


def test_orthogonal_tasks_by_hand():
    """Norms 3 > 2 > 1 at right angles: the best plane has the first two, whatever their order."""
    turn, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((5, 3)))
    theta = (turn * [1.0, 3.0, 2.0]).T
    np.testing.assert_allclose(aggregate.svd_weights(jnp.asarray(theta @ theta.T), 2), [0, 3, 2], atol=1e-5)


def test_equal_tasks_by_hand():
    """All in one line: the first singular vector has everything, and eigenvalues that round below zero do no harm."""
    theta = np.outer([1.0, 2.0, -2.0], [0.6, 0.8]).astype(np.float32)
    for rank in (1, 2, 3):
        np.testing.assert_allclose(aggregate.svd_weights(theta @ theta.T, rank), [1, 2, 2], rtol=1e-5)


def test_at_zero_weights_of_a_linear_model_the_gradients_give_the_papers_weights():
    rng = np.random.default_rng(2)
    x, y = rng.standard_normal((3, 8, 5)).astype(np.float32), rng.standard_normal((3, 8)).astype(np.float32)
    theta = np.einsum("knd,kn->kd", x, y)

    def losses(w):
        return jnp.sum((x @ w - y) ** 2, axis=1) / 2

    rule = aggregate.svd_reweight(2)
    for mode in ("stacked", "lean"):
        fn = aggregate.value_and_grad(losses, rule, mode=mode, report=True)
        _, update, _, report = jax.jit(fn)(jnp.zeros(5), rule.init(None))
        expected = reference(theta, 2)
        np.testing.assert_allclose(report.weights, expected, rtol=1e-4)
        np.testing.assert_allclose(update, -expected @ theta.astype(np.float64), rtol=1e-4)


def run(rule, rows):
    return jax.jit(rule.update)(rows, rule.init(None))[0]


def test_normalized_weights_sum_to_the_number_of_tasks():
    theta = tasks(4)
    expected = reference(theta, 2)
    expected = 4 * expected / expected.sum()
    np.testing.assert_allclose(run(aggregate.svd_reweight(2, normalize=True), theta), expected @ theta, atol=1e-5)


def test_the_length_of_the_gradients_matters_unless_normalized():
    theta = tasks(3)
    plain, normalized = (aggregate.svd_reweight(2, normalize=flag) for flag in (False, True))
    np.testing.assert_allclose(run(plain, 2 * theta), 4 * run(plain, theta), atol=1e-5)
    np.testing.assert_allclose(run(normalized, 2 * theta), 2 * run(normalized, theta), atol=1e-5)


@pytest.mark.parametrize("normalize", [False, True])
def test_zero_gradients_give_zero_and_bad_ones_stay_visible(normalize):
    rule = aggregate.svd_reweight(2, normalize=normalize)
    np.testing.assert_array_equal(run(rule, jnp.zeros((3, 4))), 0)
    assert not np.isfinite(run(rule, jnp.ones((3, 4)).at[1, 2].set(jnp.nan))).any()


def test_one_task():
    g = np.array([[3.0, 4.0]], np.float32)
    np.testing.assert_allclose(run(aggregate.svd_reweight(1), g), 5 * g[0], rtol=1e-5)
    np.testing.assert_allclose(run(aggregate.svd_reweight(1, normalize=True), g), g[0], rtol=1e-5)


def test_trees_and_dtypes():
    theta = tasks(3, size=7)
    tree = {"w": jnp.asarray(theta[:, :6]).reshape(3, 3, 2), "n": None, "s": jnp.asarray(theta[:, 6], jnp.bfloat16)}
    flat = np.concatenate([theta[:, :6], np.asarray(tree["s"], np.float32)[:, None]], axis=1)
    out = run(aggregate.svd_reweight(2), tree)
    expected = reference(flat, 2) @ flat
    assert out["n"] is None
    np.testing.assert_allclose(np.ravel(out["w"]), expected[:6], atol=1e-4)
    np.testing.assert_allclose(np.float32(out["s"]), expected[6], rtol=2.0**-8, atol=1e-4)
    assert out["s"].dtype == jnp.bfloat16


@pytest.mark.parametrize("make", [aggregate.svd_reweight, lambda rank: aggregate.svd_weights(jnp.eye(3), rank)])
@pytest.mark.parametrize(
    ("rank", "text"),
    [(0, r"rank=0 must lie in \[1, inf\)"), (-1, "rank=-1"), (1.5, "rank=1.5 must be a whole number"), (np.nan, "nan")],
)
def test_bad_ranks(make, rank, text):
    with pytest.raises(ValueError, match=text):
        make(rank)


def test_bad_shapes():
    with pytest.raises(ValueError, match="rank=4 must be at most the number of tasks, 3"):
        aggregate.svd_weights(jnp.eye(3), 4)
    with pytest.raises(ValueError, match="rank=4 must be at most the number of tasks, 3"):
        run(aggregate.svd_reweight(4), jnp.ones((3, 2)))
    with pytest.raises(ValueError, match=r"square matrix \[K, K\], got shape \(2, 3\)"):
        aggregate.svd_weights(jnp.ones((2, 3)), 1)
