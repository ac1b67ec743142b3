"""MGDA: closed forms for two gradients, the conditions of the shortest combination, edges."""

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
NORMALIZE = ("none", "l2", "loss", "loss+")
LOSSES = np.float32([0.5, 2.0, 3.0, 1.0, 0.1])


@functools.cache
def compiled(normalize):
    rule = aggregate.mgda(normalize=normalize)
    return jax.jit(lambda x, losses: rule.update(x, optax.EmptyState(), losses=losses)[0])


def run(x, normalize="none", losses=None):
    """The update; columns of zeros change nothing, and save compiling again."""
    x = np.asarray(x, np.float32)
    losses = LOSSES[: len(x)] if losses is None else np.asarray(losses, np.float32)
    padded = np.pad(x, ((0, 0), (0, 6 - x.shape[1])))
    return np.asarray(compiled(normalize)(padded, losses), np.float64)[: x.shape[1]]


@functools.cache
def weigh():
    """Gram matrix -> weights."""
    return jax.jit(lambda gram: aggregate.mgda().gram_weights(gram, None, optax.EmptyState())[0])


def scales(x, normalize):
    norms, losses = np.linalg.norm(x, axis=1), LOSSES[: len(x)]
    return {"none": np.ones(len(x)), "l2": norms, "loss": losses, "loss+": losses * norms}[normalize]


def gradients(count, seed=0, size=6):
    rng = np.random.default_rng([seed, count])
    return (rng.standard_normal((count, size)) + 0.5) * 10.0 ** rng.uniform(-1, 1, (count, 1))


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("seed", range(4))
def test_two_gradients_have_a_closed_form(seed, normalize):
    x = gradients(2, seed).astype(np.float32).astype(np.float64)
    first, second = x / scales(x, normalize)[:, None]
    share = np.clip((second @ second - first @ second) / np.sum((first - second) ** 2), 0, 1)
    expected = share * first + (1 - share) * second
    # The share is a quotient of float32 differences of entries up to the largest square.
    size = max(first @ first, second @ second)
    error = 8 * EPS * size / np.sum((first - second) ** 2)
    np.testing.assert_allclose(run(x, normalize), expected, atol=error * np.linalg.norm(first - second) + 4 * EPS)


def test_equal_gradients_give_that_gradient():
    np.testing.assert_allclose(run(np.tile([1.0, 2.0, -3.0], (2, 1))), [1, 2, -3], rtol=4 * EPS)


@pytest.mark.parametrize("normalize", ["none", "loss+"])
@hypothesis.given(seed=st.integers(0, 10_000))
@hypothesis.settings(max_examples=15, deadline=None)
def test_common_descent(seed, normalize):
    """`<out, g_k / c_k> >= |out|^2`, up to the rounding of the Gram matrix: relative to the longest scaled gradient."""
    x = gradients(4, seed)
    scaled = x / scales(x, normalize)[:, None]
    out = run(x, normalize)
    lengths = np.linalg.norm(scaled, axis=1)
    assert np.all(scaled @ out >= out @ out - 32 * EPS * lengths * lengths.max())
    assert np.linalg.norm(out) <= lengths.min() * (1 + 8 * EPS)


def test_three_gradients_by_hand():
    """(2, 0), (0, 1) and (3, 3): the third is above the line through the others, on which (.4, .8) is nearest to 0."""
    x = np.float32([[2.0, 0.0], [0.0, 1.0], [3.0, 3.0]])
    weights = weigh()(x @ x.T)
    assert weights[2] == 0
    np.testing.assert_allclose(weights, [1 / 5, 4 / 5, 0], atol=16 * EPS)
    np.testing.assert_allclose(run(x), [0.4, 0.8], atol=16 * EPS)


def test_a_longer_parallel_gradient_has_no_weight():
    np.testing.assert_allclose(run([[1.0, 0.0], [5.0, 0.0]]), [1, 0], rtol=4 * EPS)


@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_opposite_equal_gradients_give_zero(scale, normalize):
    g = scale * np.float32([1.0, -2.0, 2.0])
    out = run([g, -g], normalize, losses=[1.0, 1.0])
    length = 3 * scale if normalize in ("none", "loss") else 1
    np.testing.assert_allclose(out, 0, atol=4 * EPS * length)


@pytest.mark.parametrize("normalize", NORMALIZE)
def test_a_zero_gradient_gives_zero(normalize):
    x = gradients(2)
    x[0] = 0
    np.testing.assert_array_equal(run(x, normalize), 0)


@pytest.mark.parametrize("normalize", ["none", "loss+"])
def test_one_gradient_is_divided_by_its_scale(normalize):
    x = gradients(1)
    np.testing.assert_allclose(run(x, normalize), x[0] / scales(x, normalize), rtol=8 * EPS)


def test_a_scale_of_zero_counts_as_one():
    x = gradients(2)
    np.testing.assert_allclose(run(x, "loss", losses=[0.0, 1.0]), run(x), rtol=4 * EPS)


def test_the_sign_of_a_loss_does_not_turn_its_gradient():
    x = gradients(2)
    np.testing.assert_array_equal(run(x, "loss", losses=[-0.5, 2.0]), run(x, "loss", losses=[0.5, 2.0]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gradients_that_are_not_finite_stay_visible(bad):
    x = gradients(4)
    x[1, 2], x[2] = bad, 0
    assert not np.isfinite(run(x)).any()
    assert np.isnan(weigh()(np.diag(np.float32([1.0, bad, 0.0])))).all()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"normalize": "12"}, "did you mean 'l2'"),
        ({"normalize": "mean"}, "normalize='mean' is not one of none, l2, loss, loss+"),
        ({"iterations": 0}, r"iterations=0 must lie in \[1, inf\)"),
    ],
)
def test_bad_arguments(options, text):
    with pytest.raises(ValueError, match=text):
        aggregate.mgda(**options)


@pytest.mark.parametrize("normalize", ["loss", "loss+"])
def test_losses_that_are_needed_and_missing(normalize):
    with pytest.raises(ValueError, match="needs the losses"):
        aggregate.mgda(normalize=normalize).update(jnp.ones((2, 3)), optax.EmptyState())
