"""LAMP against the loop of its definition."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from steelyard.sparsity import scores

lamp = jax.jit(lambda w: scores.lamp({"kernel": w})["kernel"])


def lamp_loop(w):
    """Entry by entry: its square by the sum of all that are not smaller; of equal ones the first is the larger."""
    squares = [float(x) ** 2 for x in np.ravel(w)]

    def score(i):
        above = sum(s for j, s in enumerate(squares) if s > squares[i] or (s == squares[i] and j <= i))
        return squares[i] / above if above else 0

    return np.array([score(i) for i in range(len(squares))]).reshape(np.shape(w))


# Few distinct values, so that ties are the rule.
MATRICES = hnp.arrays(np.float32, (4, 3), elements=st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 3.0]))


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(MATRICES)
def test_is_the_loop(w):
    np.testing.assert_allclose(lamp(w), lamp_loop(w), rtol=1e-6)


def test_hand_case():
    """Squares 1, 4, 4: the larger four counts itself, the other one 4 / 8, the least 1 / 9."""
    np.testing.assert_allclose(lamp(jnp.array([[-1.0, 2.0, -2.0]])), [[1 / 9, 1, 1 / 2]], rtol=1e-6)


def test_properties():
    w = np.random.default_rng(0).normal(size=(20, 10)).astype(np.float32)
    score = np.asarray(lamp(w))
    assert 0 < score.min() < score.max() == 1
    # The order of the magnitudes, and that of a rescaled leaf, also where its squares leave the range of float32.
    np.testing.assert_array_equal(np.argsort(score, axis=None), np.argsort(np.abs(w), axis=None))
    for scale in (2.0**-80, 2.0**80):
        np.testing.assert_array_equal(lamp(scale * w), score)


def test_zeros_and_nan():
    np.testing.assert_array_equal(lamp(jnp.zeros((2, 2))), 0)
    score = lamp(jnp.array([[jnp.nan, 1.0, 2.0]]))
    assert np.isnan(score[0, 0])
    np.testing.assert_allclose(score[0, 1:], [1 / 5, 1], rtol=1e-6)


def test_which_leaves_are_scored():
    params = {"a": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}, "b": {"kernel": jnp.ones((2, 2))}, "none": None}
    structure = jax.tree.map(lambda w: True, scores.lamp(params))
    assert structure == {"a": {"kernel": True, "bias": None}, "b": {"kernel": True}, "none": None}
    assert scores.lamp(params, where="b/.*")["a"] == {"kernel": None, "bias": None}
    assert scores.lamp(params, where=lambda path, leaf: path == "a/bias")["a"]["bias"].tolist() == [1, 0.5]
    with pytest.raises(ValueError, match="b/kernel"):
        scores.lamp(params, where="b/kernels")
