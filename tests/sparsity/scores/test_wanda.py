"""Wanda: hand cases, and what it shares with magnitudes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard.sparsity import masks, scores

W = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
NORM = np.arange(1.0, 7.0, dtype=np.float32)


def test_is_the_size_of_a_product():
    expected = [[abs(W[i, j]) * NORM[i] for j in range(4)] for i in range(6)]
    np.testing.assert_allclose(scores.wanda(W, NORM), expected, rtol=1e-6)


def test_equal_norms_are_magnitudes():
    topk = jax.jit(masks.topk_mask_along)
    for sparsity in (0.3, 0.5):
        kept = topk(scores.wanda(W, jnp.full(6, 0.7)), sparsity)
        np.testing.assert_array_equal(kept, topk(jnp.abs(W), sparsity))


def test_doubling_an_input_doubles_its_row():
    twice = NORM.copy()
    twice[2] *= 2
    ratio = np.asarray(scores.wanda(W, twice)) / np.asarray(scores.wanda(W, NORM))
    np.testing.assert_array_equal(ratio, np.where(np.arange(6) == 2, 2, 1)[:, None] * np.ones(4))


def test_a_convolution_has_norms_for_its_window_or_its_channels():
    kernel, window = np.ones((2, 3, 4, 5), np.float32), np.arange(24.0).reshape(2, 3, 4)
    np.testing.assert_array_equal(scores.wanda(kernel, window), np.repeat(window[..., None], 5, axis=-1))
    np.testing.assert_array_equal(scores.wanda(kernel, window[0, 0])[1, 2, :, 0], window[0, 0])


def test_half_precision_is_rounded_once():
    half = jnp.asarray(W, jnp.bfloat16)
    expected = scores.wanda(half.astype(jnp.float32), NORM).astype(jnp.bfloat16)
    np.testing.assert_array_equal(scores.wanda(half, NORM), expected)


@pytest.mark.parametrize(("weight", "norm"), [((6, 4), (4,)), ((6, 4), (6, 1)), ((4,), ()), ((2, 3, 4, 5), (3, 4))])
def test_what_is_refused(weight, norm):
    with pytest.raises(ValueError, match=rf"input_norm of shape \({', '.join(map(str, norm))}.* weight of shape"):
        scores.wanda(jnp.ones(weight), jnp.ones(norm))
