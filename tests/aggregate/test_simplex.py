"""The walk over faces, by the conditions that the solution of a convex problem meets, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard.aggregate import simplex

EPS = 2.0**-23
CASES = 30


def cases(count, bound):
    """Random problems: matrix, linear with entries up to `bound` times a cosine, normal with one entry of 1."""
    rng = np.random.default_rng([count, int(10 * bound)])
    rows = rng.standard_normal((CASES, count, count + 3)) + rng.standard_normal((CASES, 1, count + 3))
    rows /= np.linalg.norm(rows, axis=2, keepdims=True)
    linear = bound * np.einsum("nkp,np->nk", rows, rng.standard_normal((CASES, count + 3)) / np.sqrt(count + 3))
    normal = 10.0 ** -rng.uniform(0, 2, (CASES, count))
    normal /= normal.max(axis=1, keepdims=True)
    return [x.astype(np.float32) for x in (rows @ rows.transpose(0, 2, 1), linear, normal)]


@jax.jit
@functools.partial(jax.vmap, in_axes=(0, 0, 0, None))
def minimize(matrix, linear, normal, iterations):
    return simplex.minimize(matrix, linear, normal, iterations=iterations)


def solve(problem, iterations=100):
    return np.asarray(minimize(*problem, iterations), np.float64)


@pytest.mark.parametrize("bound", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_no_entry_can_lower_the_function(count, bound):
    """With x = y / |y| and `t = (1 + <b, x>) / <q, x>`: `b + M x - t q` is zero where x is positive, else at least 0.

    The rounding of K products of x, whose sum is bounded by the condition of M, and of t.
    """
    problem = cases(count, bound)
    for matrix, linear, normal, x in zip(*problem, solve(problem), strict=True):
        assert x.min() >= 0
        condition = np.linalg.cond(matrix.astype(np.float64))
        np.testing.assert_allclose(x @ matrix @ x, 1, atol=4 * count * EPS * condition)
        level = (1 + linear @ x) / (normal @ x)
        slope = linear + matrix @ x - level * normal
        limit = 4 * count * EPS * (1 + bound + x.sum()) * condition
        assert slope.min() >= -limit
        assert np.abs(slope[x > 0]).max() <= limit


def test_one_iteration_stays_at_the_best_corner():
    """Corner k is y = e_k / q_k, where the function is (1 + b_k) / q_k for a unit diagonal."""
    problem = cases(5, 0.5)
    _, linears, normals = problem
    x = solve(problem, 1)
    np.testing.assert_array_equal(np.argmax(x, axis=1), np.argmin((1 + linears) / normals, axis=1))
    np.testing.assert_array_equal(np.sum(x != 0, axis=1), 1)


@pytest.mark.parametrize("iterations", [2, 3, 4])
def test_every_further_face_is_no_worse(iterations):
    matrices, linears, normals = problem = cases(5, 3.0)

    def value(x):
        y = x / np.sum(x * normals, axis=1, keepdims=True)
        return np.sqrt(np.einsum("nk,nkl,nl->n", y, matrices, y)) + np.sum(y * linears, axis=1)

    before, after = value(solve(problem, iterations - 1)), value(solve(problem, iterations))
    assert np.all(after <= before + 16 * EPS * (1 + np.abs(before)))


def test_entries_without_a_part_in_the_sum_stay_zero():
    """Two entries are left, each at 1/2 and divided by the norm."""
    matrices, linears, normals = cases(5, 0.0)
    normals = np.broadcast_to(np.float32([0, 1, 0, 1, 0]), normals.shape)
    x = solve((np.broadcast_to(np.eye(5, dtype=np.float32), matrices.shape), linears - 9 * (normals == 0), normals))
    np.testing.assert_allclose(x, normals * np.sqrt(0.5), rtol=4 * EPS)


def test_cosines_of_gradients_of_very_different_lengths():
    rows = np.array([[3e-12, 4e-12], [4e12, 3e12], [0.0, 0.0]])
    matrix, norms, units = simplex.unit_gram(jnp.asarray(rows @ rows.T, jnp.float32))
    raised = 1 + (3 + 4) * EPS
    expected = [[raised, 24 / 25, 0], [24 / 25, raised, 0], [0, 0, raised]]
    np.testing.assert_allclose(matrix, expected, atol=4 * EPS)
    np.testing.assert_allclose(norms, [5e-12, 5e12, 0], rtol=2 * EPS)
    np.testing.assert_allclose(units, [1 / 5e-12, 1 / 5e12, 0], rtol=3 * EPS)
    np.testing.assert_allclose(simplex.normal_of(norms), [1, 1e-24, 0], rtol=8 * EPS)


def test_what_is_not_a_number_stays_visible():
    """In each problem one argument has an entry that is NaN."""
    problem = cases(5, 0.5)
    for case in range(CASES):
        problem[case % 3][case].flat[case % 5] = np.nan
    assert np.isnan(solve(problem)).all()
    _, norms, units = simplex.unit_gram(jnp.array([[1.0, jnp.inf], [jnp.inf, 1.0]]))
    assert np.isnan(norms).all()
    assert np.isnan(units).all()
