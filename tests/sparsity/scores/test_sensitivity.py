"""SNIP, GraSP and SynFlow against closed forms: quadratic losses and networks small enough to follow by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from steelyard.sparsity import scores

RNG = np.random.default_rng(4)
W = {"a": RNG.normal(size=(3, 2)).astype(np.float32), "b": RNG.normal(size=4).astype(np.float32), "none": None}
A = RNG.normal(size=(10, 10))
A = (A + A.T).astype(np.float32)  # symmetric, not definite: curvatures of both signs


def flat(params):
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(params)])


def quadratic(params):
    """w A w / 2: gradient A w, Hessian A."""
    w = flat(params)
    return w @ A @ w / 2


raw_grasp = jax.jit(lambda params: scores.grasp(quadratic, params, normalize=False))


def as_flat64(params):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)]).astype(np.float64)


def test_snip_of_a_quadratic():
    w = as_flat64(W)
    expected = np.abs(w * (A @ w))
    got = jax.jit(lambda p: scores.snip(quadratic, p))(W)
    assert got["none"] is None
    np.testing.assert_allclose(as_flat64(got), expected / expected.sum(), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(as_flat64(got).sum(), 1, rtol=1e-6)
    got = jax.jit(lambda p: scores.snip(quadratic, p, normalize=False))(W)
    np.testing.assert_allclose(as_flat64(got), expected, rtol=1e-4, atol=1e-5)


def test_snip_without_gradient_is_zero():
    got = jax.jit(lambda p: scores.snip(lambda p: 0 * quadratic(p), p))(W)
    np.testing.assert_array_equal(as_flat64(got), 0)


def test_grasp_of_a_quadratic():
    w = as_flat64(W)
    expected = w * (A.astype(np.float64) @ (A @ w))
    got = jax.jit(lambda p: scores.grasp(quadratic, p))(W)
    np.testing.assert_allclose(as_flat64(got), expected / abs(expected.sum()), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(abs(as_flat64(got).sum()), 1, rtol=1e-5)
    np.testing.assert_allclose(as_flat64(raw_grasp(W)), expected, rtol=1e-4, atol=1e-4)


def test_grasp_is_what_the_gradient_loses():
    """Removing a little of an entry, w_i -> (1 - t) w_i, lowers |g|^2 / 2 by t w_i h_i."""
    w, t = as_flat64(W), 1e-6
    norms = [np.sum((A @ (w - t * w * np.eye(10)[i])) ** 2) / 2 for i in range(10)]
    lost = (np.sum((A @ w) ** 2) / 2 - np.array(norms)) / t
    np.testing.assert_allclose(as_flat64(raw_grasp(W)), lost, rtol=1e-3, atol=1e-3)


def perceptron(params, x):
    for kernel in params[:-1]:
        x = jax.nn.relu(x @ kernel)
    return x @ params[-1]


def test_synflow_is_conserved_and_counts_paths():
    """The score of an entry is the sum over all paths through it of the products of their magnitudes."""
    params = [jnp.asarray(RNG.normal(size=shape), jnp.float32) for shape in ((3, 4), (4, 5), (5, 2))]
    got = jax.jit(lambda p: scores.synflow(perceptron, p, jnp.zeros((1, 3))))(params)
    a, b, c = (np.abs(np.asarray(w, np.float64)) for w in params)
    expected = [np.zeros_like(w) for w in (a, b, c)]
    for i, j, k, m in np.ndindex(3, 4, 5, 2):
        path = a[i, j] * b[j, k] * c[k, m]
        expected[0][i, j] += path
        expected[1][j, k] += path
        expected[2][k, m] += path
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)
    totals = [float(jnp.sum(x)) for x in got]
    np.testing.assert_allclose(totals, totals[0], rtol=1e-5)


def test_synflow_of_removed_entries_is_zero_and_of_halves_wide():
    """A unit whose only way out is removed has no flow."""
    params = [jnp.full((2, 2), 300.0, jnp.float16), jnp.asarray([[300.0], [0.0]], jnp.float16)]
    got = jax.jit(lambda p: scores.synflow(perceptron, p, jnp.zeros((1, 2))))(params)
    assert {x.dtype for x in got} == {jnp.dtype("float32")}
    # 300 * 300 does not fit a half.
    np.testing.assert_array_equal(got[0], [[9e4, 0], [9e4, 0]])
    np.testing.assert_array_equal(got[1], [[18e4], [0]])


def test_none_passes():
    tree = {"w": jnp.ones((2, 2)), "none": None}
    for score in (scores.snip, scores.grasp):
        assert jax.eval_shape(lambda p, s=score: s(lambda p: jnp.sum(p["w"] ** 2), p), tree)["none"] is None
    assert jax.eval_shape(lambda p: scores.synflow(lambda p, x: x @ p["w"], p, jnp.ones(2)), tree)["none"] is None
