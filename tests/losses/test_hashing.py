"""Codes by their orthogonality, and the loss against loops in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import losses

BITS, CLASSES = 8, 5
CODES = losses.binary_target_codes(CLASSES, BITS)
MANY = jnp.array([[1.0, 0, 0, 1, 0], [0, 0, 2, 0, 0], [0.5, 0, 0, 1, 1], [0, 0, 0, 0, 0]])


def embeddings(seed=0, shape=(4, BITS)):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@functools.cache
def compiled(margin_kind="cos"):
    return jax.jit(functools.partial(losses.orthohash_loss, margin_kind=margin_kind))


def transcribed(h, targets, codes, scale=8.0, margin=0.2, margin_kind="cos"):
    result = []
    for row, t in zip(np.asarray(h, np.float64), np.asarray(targets, np.float64), strict=True):
        adjusted = []
        for code, share in zip(np.asarray(codes, np.float64), t, strict=True):
            cos = row @ code / math.sqrt((row @ row) * (code @ code))
            if margin_kind == "cos":
                adjusted.append(scale * (cos - margin * share))
            else:
                cos = min(max(cos, -0.99999), 0.99999)
                adjusted.append(scale * math.cos(math.acos(cos) + margin * share))
        total = math.log(sum(math.exp(a) for a in adjusted))
        result.append(sum(s / max(t.sum(), 1e-9) * (total - a) for s, a in zip(t, adjusted, strict=True)))
    return result


def test_codes_are_orthogonal_and_opposite():
    codes = losses.binary_target_codes(2 * BITS, BITS)
    np.testing.assert_array_equal(jnp.abs(codes), 1)
    eye = BITS * np.eye(BITS)
    np.testing.assert_array_equal(codes @ codes.T, np.block([[eye, -eye], [-eye, eye]]))


def test_a_key_chooses_among_the_same_codes():
    ordered = {tuple(row) for row in np.asarray(losses.binary_target_codes(2 * BITS, BITS)).tolist()}
    chosen = losses.binary_target_codes(CLASSES, BITS, key=jax.random.key(0))
    rows = [tuple(row) for row in chosen.tolist()]
    assert len(set(rows)) == CLASSES
    assert set(rows) <= ordered
    assert not np.array_equal(chosen, losses.binary_target_codes(CLASSES, BITS, key=jax.random.key(1)))


def test_random_codes_are_balanced_signs():
    codes = losses.binary_target_codes(100, 30, key=jax.random.key(0), kind="bernoulli")
    assert codes.shape == (100, 30)
    np.testing.assert_array_equal(jnp.abs(codes), 1)
    # Five standard deviations of a mean of 3000 signs.
    assert abs(codes.mean()) < 5 / math.sqrt(3000)


@pytest.mark.parametrize("margin_kind", ["cos", "arc"])
def test_the_loss_follows_the_definition(margin_kind):
    h, y = embeddings(), jnp.array([0, 4, 2, 2])
    fn = compiled(margin_kind)
    for targets in (MANY, np.eye(CLASSES)[y]):
        expected = transcribed(h, targets, CODES, margin_kind=margin_kind)
        given = y if targets is not MANY else targets
        np.testing.assert_allclose(fn(h, given, CODES), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("margin_kind", ["cos", "arc"])
def test_without_margin_it_is_cross_entropy_of_cosines(margin_kind):
    h, y = embeddings(), jnp.array([0, 4, 2, 2])
    cosines = h @ CODES.T / (jnp.linalg.norm(h, axis=1, keepdims=True) * math.sqrt(BITS))
    got = compiled(margin_kind)(h, y, CODES, scale=5.0, margin=0.0)
    np.testing.assert_allclose(got, optax.softmax_cross_entropy_with_integer_labels(5 * cosines, y), rtol=1e-5)


def test_the_length_of_an_embedding_does_not_matter():
    h, y = embeddings(), jnp.array([0, 4, 2, 2])
    np.testing.assert_allclose(compiled()(300 * h, y, CODES), compiled()(h, y, CODES), rtol=1e-5)
    np.testing.assert_allclose(compiled()(h, y, 3 * CODES), compiled()(h, y, CODES), rtol=1e-5)


@pytest.mark.parametrize("margin_kind", ["cos", "arc"])
def test_examples_at_the_edges_have_finite_gradients(margin_kind):
    h = jnp.stack([jnp.zeros(BITS), CODES[1], -CODES[1], 1e4 * CODES[2], jnp.ones(BITS)])
    targets = jnp.eye(CLASSES).at[3:, 3:].set(0)
    grad = jax.jit(jax.grad(lambda h: losses.orthohash_loss(h, targets, CODES, margin_kind=margin_kind).sum()))(h)
    assert np.isfinite(grad).all()
    # Without a label there is neither loss nor gradient.
    values = compiled(margin_kind)(h, targets, CODES)
    assert values[4] == 0
    np.testing.assert_array_equal(grad[4], 0)
    if margin_kind == "cos":
        # A zero embedding has equal cosines; its own logit is lower by scale times margin.
        np.testing.assert_allclose(values[0], math.log(4 + math.exp(-1.6)) + 1.6, rtol=1e-6)


def test_leading_axes_are_free():
    h, y = embeddings(shape=(2, 3, BITS)), jnp.array([[0, 1, 2], [3, 4, 0]])
    got = compiled()(h, y, CODES)
    assert got.shape == (2, 3)
    np.testing.assert_allclose(got[1, 2], compiled()(h[1, 2], y[1, 2], CODES), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: losses.binary_target_codes(3, 12), "bits=12 must be a power of two"),
        (lambda: losses.binary_target_codes(9, 4), "num_classes=9 must be at most 2 bits = 8"),
        (lambda: losses.binary_target_codes(0, 4), r"num_classes=0 must lie in \[1, inf\)"),
        (lambda: losses.binary_target_codes(3, 0), r"bits=0 must lie in \[1, inf\)"),
        (lambda: losses.binary_target_codes(3, 4, kind="bernoulli"), "needs a key, got key=None"),
        (lambda: losses.binary_target_codes(3, 4, kind="hadamar"), "did you mean 'hadamard'"),
        (lambda: losses.orthohash_loss(embeddings(), jnp.zeros(4, int), CODES, margin_kind="ark"), "'arc'"),
        (lambda: losses.orthohash_loss(embeddings(), jnp.zeros(4, int), CODES, scale=0.0), "scale=0.0 must lie in"),
        (lambda: losses.orthohash_loss(embeddings(), jnp.zeros(4, int), CODES, margin=-1.0), "margin=-1.0 must lie in"),
        (lambda: losses.orthohash_loss(embeddings(), jnp.zeros(4, int), CODES[:, :4]), r"\(4, 8\) and codes \(5, 4\)"),
        (lambda: losses.orthohash_loss(embeddings(), jnp.zeros(3, int), CODES), r"\(3,\) and the table .* \(4, 5\)"),
        (lambda: losses.orthohash_loss(embeddings(), jnp.full(4, 5), CODES), r"labels=5 must lie in \[0, 5\)"),
        (lambda: losses.orthohash_loss(embeddings(), MANY[:, :3], CODES), r"\(4, 5\) and targets \(4, 3\)"),
        (lambda: losses.orthohash_loss(embeddings(), -MANY, CODES), r"targets=-1.0 must lie in \[0, inf\)"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
