"""The surgeon's cost against least squares solved anew without each weight; the dual gradient against its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard.sparsity import scores

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 5))
W = RNG.normal(size=(5, 3)).astype(np.float32)
H = 2 / len(X) * X.T @ X

obs = jax.jit(scores.obs)


def test_is_the_error_of_the_best_layer_without_the_weight():
    """Mean squared error at the outputs, minimised over the other weights of the unit by least squares."""
    expected = np.zeros(W.shape)
    for i, j in np.ndindex(W.shape):
        rest = np.delete(X, i, axis=1)
        target = X @ W[:, j].astype(np.float64)
        solution = np.linalg.lstsq(rest, target, rcond=None)[0]
        expected[i, j] = np.mean((rest @ solution - target) ** 2)
    # E = w^2 / (2 [H^-1]_ii) with the Hessian 2/N X^T X; the score leaves out the half.
    np.testing.assert_allclose(obs(W, jnp.asarray(H, jnp.float32), damping=0.0), 2 * expected, rtol=1e-4)


def test_of_a_diagonal_hessian_is_in_closed_form():
    diagonal = np.array([1.0, 2.0, 4.0, 8.0, 1.0])  # mean 3.2
    got = obs(W, jnp.diag(jnp.asarray(diagonal, jnp.float32)), damping=0.25)
    np.testing.assert_allclose(got, W.astype(np.float64) ** 2 * (diagonal + 0.8)[:, None], rtol=1e-6)


def test_damping_makes_a_singular_hessian_usable():
    """Two inputs that are always equal can make up for each other: nearly free. By damping they share what is added."""
    x = np.repeat(X[:, :1], 2, axis=1)
    h = jnp.asarray(2 / len(x) * x.T @ x, jnp.float32)
    got = np.asarray(obs(jnp.ones((2, 1)), h, damping=0.01))
    s, d = float(h[0, 0]), 0.01 * float(h[0, 0])
    # The inverse of [[s + d, s], [s, s + d]] has s + d over d (2 s + d) on its diagonal.
    np.testing.assert_allclose(got, d * (2 * s + d) / (s + d), rtol=1e-3)


def test_inputs_that_are_always_zero():
    """They cost what damping adds; with nothing at all on the diagonal, it is 1 there."""
    h = jnp.diag(jnp.array([4.0, 0.0]))
    w = jnp.array([[3.0], [2.0]])
    np.testing.assert_allclose(obs(w, h, damping=0.01), [[9 * 4.02], [4 * 0.02]], rtol=1e-5)
    np.testing.assert_allclose(obs(w, h, damping=0.0), [[36], [4]], rtol=1e-6)
    np.testing.assert_allclose(obs(w, jnp.zeros((2, 2))), [[9], [4]], rtol=1e-6)


def test_a_convolution_is_its_matrix():
    kernel, h = RNG.normal(size=(1, 5, 1, 3)).astype(np.float32), jnp.asarray(H, jnp.float32)
    np.testing.assert_allclose(obs(kernel, h).reshape(5, 3), obs(kernel.reshape(5, 3), h), rtol=1e-6)


def test_dual_gradient_is_its_formula_and_additive_in_strength():
    g, general = {"w": W, "none": None}, {"w": W**2, "none": None}
    got = scores.dual_gradient(g, general, learning_rate=0.5, strength=0.2)
    w = W.astype(np.float64)
    np.testing.assert_allclose(got["w"], w + 2 * 0.2 * 0.25 * w**2 * w**2, rtol=1e-5)
    assert got["none"] is None
    parts = [scores.dual_gradient(g, general, learning_rate=0.5, strength=s)["w"] - W for s in (0.05, 0.15)]
    np.testing.assert_allclose(got["w"] - W, sum(parts), rtol=1e-4, atol=1e-6)


def test_dual_gradient_of_no_step_or_no_strength_is_the_gradient():
    for options in ({"learning_rate": 0.0}, {"learning_rate": 1.0, "strength": 0.0}):
        np.testing.assert_array_equal(scores.dual_gradient(W, W**2, **options), W)


REFUSED = {
    r"hessian of shape \(5, 4\) does not fit a weight of shape \(5, 3\): it must be \(5, 5\)": lambda: scores.obs(
        W, jnp.ones((5, 4))
    ),
    r"hessian of shape \(3, 3\) does not fit": lambda: scores.obs(W, jnp.eye(3)),
    r"weight of shape \(5,\)": lambda: scores.obs(W[:, 0], jnp.eye(1)),
    r"damping=-0.1 must lie in \[0, inf\)": lambda: scores.obs(W, jnp.eye(5), damping=-0.1),
    r"learning_rate=-1 must lie": lambda: scores.dual_gradient(W, W, learning_rate=-1),
    r"strength=-1 must lie": lambda: scores.dual_gradient(W, W, learning_rate=1, strength=-1),
    r"shape \(5, 3\) in grads, but \(5,\) in general": lambda: scores.dual_gradient(
        {"a": W}, {"a": W[:, 0]}, learning_rate=1
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()
