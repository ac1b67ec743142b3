"""Mined, weighted and mixed pairs against loops in float64, cases by hand, and the distribution of the draws."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from steelyard import losses

LABELS = np.array([0, 1, 0, 2, 1, 0, 1, 3])
# Distances near 3, from sums of five squares, and their differences.
TOLERANCE = 16 * 2.0**-23


def embeddings(seed=0, shape=(8, 5)):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def compiled(name, **options):
    return jax.jit(functools.partial(getattr(losses, name), **options))


@functools.cache
def hinge():
    return jax.jit(lambda x, labels, margin: losses.batch_hard_triplet(x, labels, margin=margin, squared=True))


def transcribed(x, labels, margin="soft", squared=False):
    """The triplet loss of each anchor, by loops."""
    x, result = x.astype(np.float64), []

    def distance(i, j):
        square = sum((x[i] - x[j]) ** 2)
        return square if squared else math.sqrt(square)

    for i in range(len(x)):
        positives = [distance(i, j) for j in range(len(x)) if j != i and labels[j] == labels[i]]
        negatives = [distance(i, j) for j in range(len(x)) if labels[j] != labels[i]]
        if not positives or not negatives:
            result.append(0.0)
            continue
        gap = max(positives) - min(negatives)
        result.append(math.log1p(math.exp(gap)) if margin == "soft" else max(gap + margin, 0))
    return result


@pytest.mark.parametrize(("margin", "squared"), [("soft", False), (0.3, False), (1.0, True)])
def test_triplets_follow_the_definition(margin, squared):
    x = embeddings()
    fn = functools.partial(hinge(), margin=margin) if squared else compiled("batch_hard_triplet", margin=margin)
    got = fn(x, LABELS)
    np.testing.assert_allclose(got, transcribed(x, LABELS, margin, squared), rtol=1e-5, atol=TOLERANCE)
    # Classes 2 and 3 have one example each.
    np.testing.assert_array_equal(np.asarray(got)[[3, 7]], 0)


def test_triplets_are_the_same_after_a_shift_and_a_rotation():
    x = embeddings()
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0].astype(np.float32)
    got = compiled("batch_hard_triplet")(x @ rotation + 3, LABELS)
    np.testing.assert_allclose(got, compiled("batch_hard_triplet")(x, LABELS), rtol=1e-5)


def test_a_case_by_hand():
    """On a line, with positives at 0, 4, -1 and a negative at -4, which has no positive itself."""
    x, labels = np.array([[0.0], [4], [-4], [-1]], np.float32), np.array([0, 0, 1, 0])
    np.testing.assert_allclose(compiled("batch_hard_triplet")(x, labels)[0], math.log(2), rtol=1e-6)
    np.testing.assert_array_equal(hinge()(x, labels, 0.5), [16 - 16 + 0.5, 0, 0, 25 - 9 + 0.5])


def test_the_hinge_is_zero_just_where_the_negative_is_far_enough():
    labels = np.arange(8) % 3
    x = embeddings() + 2 * np.eye(5, dtype=np.float32)[labels]
    gaps = np.log(np.expm1(transcribed(x, labels, "soft", True)))
    for margin in (0.0, 3.0):
        is_zero = hinge()(x, labels, margin) == 0
        np.testing.assert_array_equal(is_zero, gaps + margin <= 0)
        assert 0 < np.sum(is_zero) < 8


def test_the_gradient_is_that_of_the_chosen_distances():
    """By central differences in float64."""
    x = embeddings()
    got = jax.jit(jax.grad(lambda x: losses.batch_hard_triplet(x, LABELS, squared=True).sum()))(x)
    step = 1e-5
    for i, k in ((0, 0), (1, 3), (3, 2), (5, 4)):
        ends = []
        for sign in (1, -1):
            moved = x.astype(np.float64)
            moved[i, k] += sign * step
            ends.append(sum(transcribed(moved, LABELS, squared=True)))
        np.testing.assert_allclose(got[i, k], (ends[0] - ends[1]) / (2 * step), rtol=1e-4, atol=1e-4)


def test_coinciding_embeddings_have_a_finite_gradient():
    fn = jax.jit(jax.value_and_grad(lambda x: losses.batch_hard_triplet(x, LABELS).sum()))
    value, gradient = fn(np.ones((8, 5), np.float32))
    np.testing.assert_allclose(value, 6 * math.log(2), rtol=1e-6)
    np.testing.assert_array_equal(gradient, 0)


def pair_loss(s, y, b, g, margin, contrastive=False):
    """Of one anchor, by sums."""
    if contrastive:
        return sum(-w * a + (1 - w) * max(a - margin, 0) for a, w in zip(s, y, strict=True))
    pull = sum(w * math.exp(-b * (a - margin)) for a, w in zip(s, y, strict=True))
    push = sum((1 - w) * math.exp(g * (a - margin)) for a, w in zip(s, y, strict=True))
    return math.log1p(pull) / b + math.log1p(push) / g


def table():
    rng = np.random.default_rng(3)
    y = np.where(rng.random((6, 4)) < 0.3, rng.random((6, 4)), rng.integers(0, 2, (6, 4)))
    return rng.uniform(-1, 1, (6, 4)).astype(np.float32), y.astype(np.float32)


def test_pair_losses_follow_the_definition():
    s, y = table()
    rows = [row.astype(np.float64).tolist() for row in (*s, *y)]
    for name, options in (("contrastive_pair_loss", {"margin": 0.2}), ("multi_similarity_loss", {"margin": 0.6})):
        expected = [
            pair_loss(a, b, 18.0, 75.0, **options, contrastive=name == "contrastive_pair_loss")
            for a, b in zip(rows[:6], rows[6:], strict=True)
        ]
        np.testing.assert_allclose(compiled(name, **options)(s, y), expected, rtol=1e-5, atol=1e-6)


def test_one_positive_at_the_margin():
    got = compiled("multi_similarity_loss", positive_scale=4.0, margin=0.75)(jnp.array([[0.75]]), jnp.array([[1.0]]))
    np.testing.assert_allclose(got, math.log(2) / 4, rtol=1e-6)


def test_without_negatives_their_scale_does_not_matter():
    s, _ = table()
    fn = jax.jit(lambda g: losses.multi_similarity_loss(s, jnp.ones_like(s), negative_scale=g))
    np.testing.assert_array_equal(fn(75.0), fn(1.0))


def test_masked_pairs_do_not_matter_and_no_pair_is_no_loss():
    s, y = table()
    where = np.arange(4) != 2
    wild = np.where(where, s, np.nan).astype(np.float32)
    mask = np.broadcast_to(where, s.shape)
    for name in ("contrastive_pair_loss", "multi_similarity_loss"):
        fn = jax.jit(jax.value_and_grad(lambda s, mask, name=name: getattr(losses, name)(s, y, where=mask).sum()))
        value, gradient = fn(wild, mask)
        np.testing.assert_allclose(value, compiled(name)(s[:, where], y[:, where]).sum(), rtol=1e-6)
        assert np.isfinite(gradient).all()
        np.testing.assert_array_equal(gradient[:, 2], 0)
        value, gradient = fn(wild, np.zeros_like(mask))
        assert value == 0
        np.testing.assert_array_equal(gradient, 0)


def test_a_pair_without_weight_does_not_hide_the_others():
    """A positive of similarity 1000 is no negative: exp(75000) must not enter their sum."""
    s, y = jnp.array([[1e3, 0.8]]), jnp.array([[1.0, 0.0]])
    expected = pair_loss([0.8], [0.0], 18.0, 75.0, 0.77)
    np.testing.assert_allclose(compiled("multi_similarity_loss")(s, y), expected, rtol=1e-5)


@functools.cache
def mixtures():
    """Of the rows of the identity, so that a mixture shows what it is made of; 200 batches, and one of one class."""

    def mix(key_and_labels):
        key, labels = key_and_labels
        return losses.metric_mixup(key, jnp.eye(8), labels, pairs=3)

    labels = np.repeat([LABELS, np.zeros_like(LABELS)], [200, 1], axis=0)
    mixed = jax.jit(lambda *args: jax.lax.map(mix, args))(jax.random.split(jax.random.key(0), 201), labels)
    mixed = jax.tree.map(np.asarray, mixed)
    return tuple(jax.tree.map(lambda x, part=part: x[part], mixed) for part in (slice(200), 200))


def test_mixtures_are_of_a_positive_and_a_negative():
    mixed, _ = mixtures()
    assert mixed.embeddings.shape == (200, 8, 3, 8)
    np.testing.assert_array_equal(mixed.valid, np.broadcast_to(~np.isin(LABELS, (2, 3))[:, None], (200, 8, 3)))
    assert np.all(np.ptp(mixed.targets, axis=(1, 2)) == 0)
    np.testing.assert_allclose(np.linalg.norm(mixed.embeddings, axis=-1), 1, rtol=1e-6)
    for batch in range(20):
        lam = float(mixed.targets[batch, 0, 0])
        for i in np.flatnonzero(mixed.valid[0, :, 0]):
            for row in mixed.embeddings[batch, i]:
                parts = np.flatnonzero(row)
                shares = row[parts] / row[parts].sum()
                positive = LABELS[parts] == LABELS[i]
                assert sorted(positive) == [False, True]
                np.testing.assert_allclose(shares[positive], lam, rtol=1e-5)


def test_half_of_the_batches_mix_the_anchor_itself():
    mixed, _ = mixtures()
    valid = np.flatnonzero(mixed.valid[0, :, 0])
    itself = mixed.embeddings[:, valid, :, valid] > 0
    counts = itself.sum((0, 2))
    assert set(counts) == {0, itself.shape[0] * itself.shape[2]}
    # 200 tosses: three standard deviations.
    assert abs(np.mean(counts > 0) - 1 / 2) < 3 * math.sqrt(1 / 4 / 200)


def test_pairs_are_drawn_uniformly_and_the_share_from_its_distribution():
    mixed, _ = mixtures()
    other = mixed.embeddings[:, 0, 0, 0] == 0
    positives = np.sum(mixed.embeddings[other][:, 0, :, [2, 5]] > 0, axis=(1, 2))
    negatives = np.sum(mixed.embeddings[:, 0][..., [1, 3, 4, 6, 7]] > 0, axis=(0, 1))
    for counts in (positives, negatives):
        assert scipy.stats.chisquare(counts).pvalue > 1e-3
    lam = mixed.targets[:, 0, 0]
    assert scipy.stats.kstest(lam, scipy.stats.beta(2, 2).cdf).pvalue > 1e-3


def test_a_batch_of_one_class_has_no_valid_pairs():
    _, mixed = mixtures()
    assert not mixed.valid.any()
    assert np.isfinite(mixed.embeddings).all()


def test_utilization_follows_the_definition_and_falls_with_more_examples():
    queries, examples = embeddings(4, (6, 3)), embeddings(5, (9, 3))
    nearest = [min(sum((q - e) ** 2) for e in examples.astype(np.float64)) for q in queries.astype(np.float64)]
    got = compiled("utilization")(queries, examples)
    np.testing.assert_allclose(got, np.mean(nearest), rtol=1e-5)
    assert compiled("utilization")(queries, examples[:5]) >= got
    np.testing.assert_allclose(compiled("utilization")(queries, queries), 0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: losses.batch_hard_triplet(embeddings(), LABELS, margin="sof"), "margin='sof'.*did you mean 'soft'"),
        (lambda: losses.batch_hard_triplet(embeddings(), LABELS, margin=-1.0), r"margin=-1.0 must lie in \[0, inf\)"),
        (
            lambda: losses.batch_hard_triplet(embeddings(), LABELS[:3]),
            r"labels has shape \(3,\) and embeddings \(8, 5\)",
        ),
        (lambda: losses.batch_hard_triplet(embeddings(), LABELS / 2), "labels are float"),
        (lambda: losses.batch_hard_triplet(embeddings(), LABELS, where=np.ones(3, bool)), r"where has shape \(3,\)"),
        (lambda: losses.contrastive_pair_loss(np.ones((2, 3)), np.ones((2, 4))), r"\(2, 3\) and targets \(2, 4\)"),
        (
            lambda: losses.contrastive_pair_loss(np.ones((2, 3)), np.full((2, 3), 1.5)),
            r"targets=1.5 must lie in \[0, 1\]",
        ),
        (
            lambda: losses.contrastive_pair_loss(np.ones((2, 3)), np.ones((2, 3)), where=np.ones(3, bool)),
            r"where has shape \(3,\) and similarity \(2, 3\)",
        ),
        (
            lambda: losses.multi_similarity_loss(np.ones((2, 3)), np.ones((2, 3)), positive_scale=0.0),
            r"positive_scale=0.0 must lie in \(0, inf\)",
        ),
        (
            lambda: losses.multi_similarity_loss(np.ones((2, 3)), np.ones((2, 3)), negative_scale=0.0),
            r"negative_scale=0.0 must lie in \(0, inf\)",
        ),
        (
            lambda: losses.metric_mixup(jax.random.key(0), embeddings(), LABELS, pairs=0),
            r"pairs=0 must lie in \[1, inf\)",
        ),
        (
            lambda: losses.metric_mixup(jax.random.key(0), embeddings(), LABELS, concentration=0.0),
            r"concentration=0.0 must lie in \(0, inf\)",
        ),
        (
            lambda: losses.metric_mixup(jax.random.key(0), embeddings(), LABELS[:3]),
            r"labels has shape \(3,\) and embeddings \(8, 5\)",
        ),
        (lambda: losses.utilization(np.ones((2, 3)), np.ones((2, 4))), r"\(2, 3\) and examples \(2, 4\)"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
