"""CAGrad: the conditions on its direction, the limits of c, edges. Its optimality is tested in `test_solvers`."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import aggregate

EPS = 2.0**-23


@functools.cache
def compiled(rescale):
    return jax.jit(lambda x, c: aggregate.cagrad(c=c, rescale=rescale).update(x, optax.EmptyState())[0])


def run(x, c=0.5, rescale=0):
    """The update; columns of zeros change nothing, and save compiling again."""
    x = np.asarray(x, np.float32)
    padded = np.pad(x, ((0, 0), (0, 6 - x.shape[1])))
    return np.asarray(compiled(rescale)(padded, c), np.float64)[: x.shape[1]]


def gradients(count, seed=0, size=6):
    rng = np.random.default_rng([seed, count])
    return (rng.standard_normal((count, size)) + 0.3) * 10.0 ** rng.uniform(-1, 1, (count, 1))


def test_orthogonal_gradients_by_hand():
    """(1, 0) and (0, 1): by symmetry g_w is along g_0 = (.5, .5), and d = (1 + c) g_0."""
    np.testing.assert_allclose(run(np.eye(2)), [0.75, 0.75], rtol=16 * EPS)
    np.testing.assert_allclose(run(np.eye(2), rescale=1), np.full(2, 0.75 / 1.25), rtol=16 * EPS)
    np.testing.assert_allclose(run(np.eye(2), rescale=2), [0.5, 0.5], rtol=16 * EPS)


def test_a_small_task_that_is_hurt_gets_all_the_weight():
    """g = (4, 0), (-1, 1), g_0 = (1.5, .5), c = .5: at w = e_2, `d = g_0 + phi (-1, 1) / sqrt 2`, phi = |g_0| / 2.

    There <d, g_1> = 4 (1.5 - phi / sqrt 2) is larger than <d, g_2> = -1 + sqrt 2 phi, so that w = e_2 is optimal.
    """
    phi = np.sqrt(1.5**2 + 0.5**2) / 2
    expected = np.array([1.5, 0.5]) + phi * np.array([-1, 1]) / np.sqrt(2)
    assert expected @ [4, 0] > expected @ [-1, 1]
    np.testing.assert_allclose(run([[4.0, 0.0], [-1.0, 1.0]]), expected, rtol=16 * EPS)


@hypothesis.given(seed=st.integers(0, 10_000), c=st.floats(0, 3, width=32))
@hypothesis.settings(max_examples=20, deadline=None)
def test_no_task_is_worse_off_and_the_mean_is_near(seed, c):
    """Rounding is relative to the longest gradient, as that of the mean is."""
    x = gradients(4, seed)
    mean, out = x.mean(axis=0), run(x, c)
    lengths = np.linalg.norm(x, axis=1)
    slack = np.sqrt(8 * EPS) * c * lengths.max() if np.linalg.norm(mean) < 0.03 * lengths.max() else 0
    assert np.linalg.norm(out - mean) <= c * np.linalg.norm(mean) * (1 + 1e-4) + slack + 8 * EPS * lengths.max()
    assert np.min(x @ out) >= np.min(x @ mean) - (slack + 64 * EPS * (1 + c) * lengths.max()) * lengths.max()


@pytest.mark.parametrize("rescale", [0, 1, 2])
def test_no_distance_gives_the_mean(rescale):
    x = gradients(2)
    np.testing.assert_allclose(run(x, c=0.0, rescale=rescale), x.mean(axis=0), atol=4 * EPS * np.abs(x).max())


def test_a_large_distance_gives_the_direction_of_mgda():
    """The part of g_0 in d is 1 / c of the rest; so is the change of the optimum by the linear term."""
    x = gradients(3, seed=3)
    mgda = jax.jit(lambda rows: aggregate.mgda().update(rows, optax.EmptyState())[0])
    shortest = np.asarray(mgda(jnp.asarray(x, jnp.float32)), np.float64)
    out = run(x, c=1e4)
    np.testing.assert_allclose(out / np.linalg.norm(out), shortest / np.linalg.norm(shortest), atol=1e-2)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_the_scale_of_the_gradients_is_that_of_the_update(scale):
    x = gradients(3).astype(np.float32)
    np.testing.assert_allclose(run(np.float32(scale) * x) / scale, run(x), atol=256 * EPS * np.abs(x).max())


def test_one_gradient_grows_by_its_distance():
    x = gradients(1)
    np.testing.assert_allclose(run(x), 1.5 * x[0], rtol=16 * EPS)


def test_a_zero_gradient_counts_in_the_mean_alone():
    """With (1, 0), (0, 1) and 0: g_0 = (1, 1) / 3, and d = (1 + c) g_0 by symmetry of the two that are left."""
    np.testing.assert_allclose(run([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]), np.full(2, 1.5 / 3), rtol=16 * EPS)
    np.testing.assert_array_equal(run(np.zeros((3, 4))), 0)


def test_opposite_gradients_have_a_mean_of_zero_and_stay_there():
    g = np.float32([1.0, -2.0, 2.0])
    np.testing.assert_allclose(run([g, -g]), 0, atol=8 * EPS)


def test_beyond_one_it_stops_where_no_task_can_gain():
    """-1 and 3 on a line: g_0 = 1 helps one task only. With c = 2, d = 0 is the best for the worse of both.

    The term K eps under the root leaves its root.
    """
    np.testing.assert_allclose(run([[-1.0], [3.0]], c=2.0), 0, atol=3 * np.sqrt(6 * EPS))
    np.testing.assert_allclose(run([[-1.0], [3.0]], c=0.5), 0.5, rtol=1e-4)


def test_gradients_that_are_not_finite_stay_visible():
    weights = jax.jit(lambda gram: aggregate.cagrad().gram_weights(gram, None, optax.EmptyState())[0])
    assert np.isnan(weights(jnp.array([[1.0, jnp.nan], [jnp.nan, 1.0]]))).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"c": -0.1}, r"c=-0.1 must lie in \[0, inf\)"),
        ({"c": np.nan}, r"c=nan must lie in \[0, inf\)"),
        ({"rescale": 3}, "rescale=3 must be 0, 1 or 2"),
        ({"iterations": 0}, r"iterations=0 must lie in \[1, inf\)"),
    ],
)
def test_bad_arguments(options, text):
    with pytest.raises(ValueError, match=text):
        aggregate.cagrad(**options)
