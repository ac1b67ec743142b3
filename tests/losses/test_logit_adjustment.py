"""Logits moved by class sizes against loops in float64, and the losses that they are at the ends of their ranges."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import losses

COUNTS = np.array([100, 20, 5, 1])
EQUAL = np.full(4, 7)
LABELLED = {
    "adjusted": losses.logit_adjusted_cross_entropy,
    "scaled": losses.vector_scaling_loss,
    "margin": losses.ldam_loss,
}


def examples(shape=(6,), classes=4):
    rng = np.random.default_rng(0)
    z = jnp.asarray(2 * rng.standard_normal((*shape, classes)), jnp.float32)
    return z, jnp.asarray(rng.integers(0, classes, shape))


@functools.cache
def compiled(fn):
    """With its numbers as arguments, so that one program serves for all of them."""
    return jax.jit(fn)


def cross_entropy(z, y):
    """Of each row, in float64."""
    z = np.asarray(z, np.float64)
    return np.array([math.log(sum(math.exp(x) for x in row)) - row[label] for row, label in zip(z, y, strict=True)])


def test_the_adjusted_loss_follows_the_definition():
    z, y = examples()
    shifted = np.asarray(z, np.float64)
    for c in range(4):
        shifted[:, c] += 1.5 * math.log(COUNTS[c] / COUNTS.sum())
    got = compiled(losses.logit_adjusted_cross_entropy)(z, y, counts=COUNTS, tau=1.5)
    np.testing.assert_allclose(got, cross_entropy(shifted, y), rtol=1e-5, atol=1e-6)


def test_the_scaled_loss_follows_the_definition():
    z, y = examples()
    moved = np.asarray(z, np.float64)
    for c in range(4):
        moved[:, c] = (COUNTS[c] / 100) ** 0.2 * moved[:, c] + 1.25 * math.log(COUNTS[c] / COUNTS.sum())
    got = compiled(losses.vector_scaling_loss)(z, y, counts=COUNTS)
    np.testing.assert_allclose(got, cross_entropy(moved, y), rtol=1e-5, atol=1e-6)


def test_the_margin_loss_follows_the_definition():
    z, y = examples()
    cosines = jnp.tanh(z)
    moved = np.asarray(cosines, np.float64)
    for i, label in enumerate(y):
        moved[i, label] -= 0.5 * COUNTS[label] ** -0.25
    got = compiled(losses.ldam_loss)(cosines, y, counts=COUNTS)
    # Logits of up to 30, each with a rounding.
    np.testing.assert_allclose(got, cross_entropy(30 * moved, y), rtol=1e-5, atol=30 * 2.0**-21)


def test_the_smallest_class_has_the_greatest_margin():
    got = compiled(losses.ldam_margins)(COUNTS * 16, max_margin=0.4)
    np.testing.assert_allclose(got, 0.4 * (1 / COUNTS) ** 0.25, rtol=1e-6)
    assert got[3] == np.float32(0.4)


def test_at_the_ends_of_their_ranges_they_are_simpler_losses():
    z, y = examples()
    plain = compiled(optax.softmax_cross_entropy_with_integer_labels)
    np.testing.assert_array_equal(
        compiled(losses.logit_adjusted_cross_entropy)(z, y, counts=COUNTS, tau=0.0), plain(z, y)
    )
    np.testing.assert_array_equal(
        compiled(losses.vector_scaling_loss)(z, y, counts=COUNTS, gamma=0.0, tau=0.0), plain(z, y)
    )
    np.testing.assert_array_equal(
        compiled(losses.ldam_loss)(z, y, counts=COUNTS, max_margin=0.0, scale=3.0), plain(3 * z, y)
    )
    np.testing.assert_array_equal(
        compiled(losses.vector_scaling_loss)(z, y, counts=COUNTS, gamma=0.0, tau=2.0),
        compiled(losses.logit_adjusted_cross_entropy)(z, y, counts=COUNTS, tau=2.0),
    )


def test_equal_counts_change_no_loss_and_no_prediction():
    z, y = examples()
    plain = compiled(optax.softmax_cross_entropy_with_integer_labels)(z, y)
    np.testing.assert_allclose(
        compiled(losses.logit_adjusted_cross_entropy)(z, y, counts=EQUAL), plain, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(compiled(losses.vector_scaling_loss)(z, y, counts=EQUAL), plain, rtol=1e-5, atol=1e-6)
    moved = compiled(losses.posthoc_logit_adjustment)(z, counts=EQUAL) - z
    np.testing.assert_allclose(moved, math.log(4), rtol=1e-6)


@pytest.mark.parametrize("name", LABELLED)
def test_only_ratios_of_counts_matter(name):
    """A factor adds a constant to all log-priors."""
    z, y = examples((2, 3))
    fn = compiled(LABELLED[name])
    got = fn(z, y, counts=10 * COUNTS)
    assert got.shape == (2, 3)
    np.testing.assert_allclose(got, fn(z, y, counts=COUNTS), rtol=1e-5, atol=1e-5)


def test_after_training_the_prior_is_taken_away():
    z, y = examples()
    expected = np.asarray(z, np.float64) - 0.5 * np.log(COUNTS / COUNTS.sum())
    np.testing.assert_allclose(
        compiled(losses.posthoc_logit_adjustment)(z, counts=COUNTS, tau=0.5), expected, rtol=1e-6
    )
    np.testing.assert_array_equal(compiled(losses.posthoc_logit_adjustment)(z, counts=COUNTS, tau=0.0), z)
    undone = compiled(losses.posthoc_logit_adjustment)(z, counts=COUNTS)
    got = compiled(losses.logit_adjusted_cross_entropy)(undone, y, counts=COUNTS)
    np.testing.assert_allclose(
        got, compiled(optax.softmax_cross_entropy_with_integer_labels)(z, y), rtol=1e-5, atol=1e-5
    )


def test_multiplied_logits_are_those_of_rare_classes():
    z, _ = examples()
    got = compiled(losses.multiplicative_logit_adjustment)(z, counts=COUNTS, gamma=0.5)
    np.testing.assert_allclose(got, np.asarray(z, np.float64) * np.sqrt(100 / COUNTS), rtol=1e-6)
    np.testing.assert_array_equal(compiled(losses.multiplicative_logit_adjustment)(z, counts=COUNTS, gamma=0.0), z)


def test_multiplication_keeps_the_order_of_positive_logits_of_equally_frequent_classes():
    z = jnp.abs(examples((50,))[0])
    got = compiled(losses.multiplicative_logit_adjustment)(z, counts=np.array([9, 2, 9, 9]), gamma=0.7)
    for a, b in ((0, 2), (0, 3), (2, 3)):
        np.testing.assert_array_equal(got[:, a] < got[:, b], z[:, a] < z[:, b])


def test_a_traced_count_of_zero_leaves_the_other_classes_alone():
    z, _ = examples()
    y = jnp.array([0, 1, 2, 0, 1, 2])
    fn = jax.jit(jax.value_and_grad(lambda z, n: losses.logit_adjusted_cross_entropy(z, y, counts=n).sum()))
    value, grads = fn(z, jnp.array([3.0, 2.0, 1.0, 0.0]))
    expected, slopes = fn(z[:, :3], jnp.array([3.0, 2.0, 1.0]))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grads, jnp.pad(slopes, ((0, 0), (0, 1))), rtol=1e-5, atol=1e-6)


def test_double_precision_is_that_of_the_logits():
    z, y = map(np.asarray, examples())
    with jax.enable_x64(True):
        for fn in LABELLED.values():
            assert jax.eval_shape(fn, z, y, counts=COUNTS.astype(np.float64)).dtype == jnp.float32
            assert jax.eval_shape(fn, z.astype(np.float64), y, counts=COUNTS).dtype == jnp.float64


@pytest.mark.parametrize(
    ("call", "match"),
    [
        *[
            (functools.partial(fn, *examples(), counts=counts), match)
            for fn in LABELLED.values()
            for counts, match in (
                (np.array([3, 0, 1, 2]), r"counts=0.0 must lie in \(0, inf\)"),
                (np.ones((2, 2)), r"counts has shape \(2, 2\)"),
                (np.array([1, 2, 3]), r"\(3,\).*\(4,\)"),
            )
        ],
        (lambda: losses.logit_adjusted_cross_entropy(*examples(), counts=COUNTS, tau=-1.0), r"tau=-1.0 must lie in"),
        (lambda: losses.posthoc_logit_adjustment(examples()[0], counts=COUNTS, tau=-1.0), r"tau=-1.0 must lie in"),
        (lambda: losses.posthoc_logit_adjustment(examples()[0], counts=np.ones(3)), r"\(3,\).*\(4,\)"),
        (
            lambda: losses.multiplicative_logit_adjustment(examples()[0], counts=COUNTS, gamma=-1.0),
            r"gamma=-1.0 must lie in \[0, inf\)",
        ),
        (lambda: losses.vector_scaling_loss(*examples(), counts=COUNTS, gamma=-1.0), r"gamma=-1.0 must lie in"),
        (lambda: losses.vector_scaling_loss(*examples(), counts=COUNTS, tau=-1.0), r"tau=-1.0 must lie in"),
        (lambda: losses.ldam_margins(COUNTS, max_margin=-1.0), r"max_margin=-1.0 must lie in \[0, inf\)"),
        (lambda: losses.ldam_loss(*examples(), counts=COUNTS, scale=0.0), r"scale=0.0 must lie in \(0, inf\)"),
        (
            lambda: losses.ldam_loss(examples()[0], jnp.zeros(5, int), counts=COUNTS),
            r"labels has shape \(5,\) and logits \(6, 4\)",
        ),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
