"""Dice and Tversky against sums by loops, optax and scikit-learn; Simpson's gap against cases worked by hand."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn import metrics

from steelyard import losses

FRAMES, CLASSES = 6, 3
dice, tversky = losses.soft_dice_loss, losses.soft_tversky_loss


def roll():
    """Probabilities and an event roll, [recordings, frames, classes]."""
    rng = np.random.default_rng(0)
    shape = (2, FRAMES, CLASSES)
    return rng.uniform(size=shape).astype(np.float32), rng.integers(0, 2, shape).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("axis", "power"))
def evaluate(p, t, *, axis, power=1, smooth=1.0, alpha=0.5, beta=0.5, where=None):
    """Dice and Tversky, each with the gradient of its sum."""

    def value(p, fn, **options):
        values = fn(p, t, axis=axis, smooth=smooth, where=where, **options)
        return jnp.sum(values), values

    gradients = [
        jax.grad(value, has_aux=True)(p, dice, power=power),
        jax.grad(value, has_aux=True)(p, tversky, alpha=alpha, beta=beta),
    ]
    return [(values, slopes) for slopes, values in gradients]


def transcribed_dice(p, t, power=1, smooth=1.0):
    pairs = list(zip(p.tolist(), t.tolist(), strict=True))
    overlap, total = sum(a * b for a, b in pairs), sum(a**power + b**power for a, b in pairs)
    return 1 - (2 * overlap + smooth) / (total + smooth)


def transcribed_tversky(p, t, alpha=0.5, beta=0.5, smooth=1.0):
    pairs = list(zip(p.tolist(), t.tolist(), strict=True))
    hits, alarms = sum(a * b for a, b in pairs), sum(a * (1 - b) for a, b in pairs)
    misses = sum((1 - a) * b for a, b in pairs)
    return 1 - (hits + smooth) / (hits + alpha * alarms + beta * misses + smooth)


def over(axis, fn, *arrays):
    """A function of vectors, of all that lies along some axes, for each index of the others."""
    axes = np.atleast_1d(axis) % 3
    kept = [i for i in range(3) if i not in axes]
    shape = [arrays[0].shape[i] for i in kept]
    moved = [np.transpose(x, [*kept, *axes]).reshape(math.prod(shape), -1) for x in arrays]
    return np.reshape([fn(*rows) for rows in zip(*moved, strict=True)], shape)


@pytest.mark.parametrize(("axis", "power", "smooth"), [(1, 1, 1.0), ((1, 2), 2, 0.5), ((-1, 0), 1, 0.0)])
def test_the_losses_follow_the_definitions(axis, power, smooth):
    got = evaluate(*roll(), axis=axis, power=power, smooth=smooth, alpha=0.3, beta=0.9)
    expected = (
        over(axis, functools.partial(transcribed_dice, power=power, smooth=smooth), *roll()),
        over(axis, functools.partial(transcribed_tversky, alpha=0.3, beta=0.9, smooth=smooth), *roll()),
    )
    for (values, _), loops in zip(got, expected, strict=True):
        np.testing.assert_allclose(values, loops, rtol=1e-5)


def test_soft_counts_of_decisions_are_those_of_scikit_learn():
    p, t = (np.float32(x > 0.5) for x in roll())
    got = losses.soft_counts(p, t, axis=(0, 1))
    p, t = (x.reshape(-1, CLASSES) for x in (p, t))
    confusion = metrics.multilabel_confusion_matrix(t, p)
    for a, b in zip(got, (confusion[:, 1, 1], confusion[:, :, 1].sum(1), confusion[:, 1].sum(1)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_smooth_dice_of_decisions_is_one_minus_f1():
    p, t = (np.float32(x > 0.5) for x in roll())
    (values, _), _ = evaluate(p, t, axis=1, smooth=0.0)
    np.testing.assert_allclose(values, over(1, lambda a, b: 1 - metrics.f1_score(b, a), p, t), atol=1e-6)


def test_what_is_right_has_no_loss_and_what_is_wrong_nearly_all():
    t = roll()[1]
    (right, _), _ = evaluate(t, t, axis=(1, 2), power=2, smooth=0.5)
    np.testing.assert_allclose(right, 0, atol=1e-6)
    # Every entry is predicted or there, so that the denominator is their number, and smooth.
    (wrong, _), _ = evaluate(1 - t, t, axis=(1, 2), power=2, smooth=0.5)
    np.testing.assert_allclose(wrong, 1 - 0.5 / (FRAMES * CLASSES + 0.5), rtol=1e-6)


def test_tversky_is_dice_of_twice_the_smooth():
    (dices, _), _ = evaluate(*roll(), axis=1, smooth=1.0)
    _, (tverskys, _) = evaluate(*roll(), axis=1, smooth=0.5)
    np.testing.assert_allclose(tverskys, dices, rtol=1e-6)


def test_optax_has_half_the_smooth():
    logits, t = 4 * roll()[0], roll()[1]
    (ours, _), _ = evaluate(jax.nn.softmax(logits), t, axis=1, smooth=0.6)
    theirs = jax.jit(functools.partial(optax.losses.dice_loss, smooth=0.3, reduction="none"))(logits, t)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize("smooth", [0.0, 1.0])
def test_an_absent_class_that_is_not_predicted_has_no_loss(smooth):
    """With a smooth of 1 the losses are sum p / (sum p + 1), and for Tversky half the sums."""
    zeros = np.zeros_like(roll()[0])
    for (values, slopes), slope in zip(evaluate(zeros, zeros, axis=1, smooth=smooth), (1, 0.5), strict=True):
        np.testing.assert_array_equal(values, 0)
        np.testing.assert_allclose(slopes, slope if smooth else 0, rtol=1e-6)
    for values, _ in evaluate(zeros + 1e-6, zeros, axis=1, smooth=smooth):
        np.testing.assert_allclose(values, 0 if smooth else 1, atol=1e-5)


@pytest.mark.parametrize(("axis", "counted"), [((-1, 1), FRAMES)])
def test_where_is_of_the_first_of_the_summed_axes(axis, counted):
    """What is left out may be anything, and has no gradient."""
    first = min(np.atleast_1d(axis) % 3)
    where = np.arange(counted) != 1
    outside = np.broadcast_to(np.expand_dims(~where, [i for i in range(3) if i != first]), roll()[0].shape)
    got = evaluate(np.where(outside, np.nan, roll()[0]), roll()[1], axis=axis, where=where)
    kept = [np.compress(where, x, axis=first) for x in roll()]
    for (values, slopes), fn in zip(got, (transcribed_dice, transcribed_tversky), strict=True):
        np.testing.assert_allclose(values, over(axis, fn, *kept), rtol=1e-5)
        np.testing.assert_array_equal(slopes[outside], 0)
        assert np.all(slopes[~outside] != 0)


def f1(hits, positives):
    """Of examples with a hit or none, and predicted and actual positives: 2 TP / (P + T)."""
    return 2 * jnp.sum(hits) / jnp.sum(positives)


@pytest.mark.parametrize(("positives", "whole"), [([1, 1, 1, 1], 0.5), ([1, 1, 3, 3], 0.25)])
def test_simpson_gap_of_two_batches_by_hand(positives, whole):
    """TP and P + T are (1, 2) in the first batch, F1 = 1; and (0, 2) or (0, 6) in the second, F1 = 0."""
    arrays = np.float32([1, 0, 0, 0]), np.float32(positives)
    gaps = jax.jit(lambda *x: [losses.simpson_gap(f1, x, batch_size=size) for size in (2, 4)])(*arrays)
    np.testing.assert_array_equal(gaps, [whole - 0.5, 0])


def test_simpson_gap_of_a_mean_is_zero():
    """Exactly, of eighths and powers of two."""
    p = np.round(8 * roll()[0].ravel()[:32]) / 8
    assert losses.simpson_gap(jnp.mean, (p,), batch_size=8) == 0


def test_a_remainder_is_in_the_whole_only():
    """0..6 by threes: 3 less the mean of 1 and 4."""
    got = losses.simpson_gap(jnp.mean, (np.arange(7, dtype=np.float32),), batch_size=3)
    np.testing.assert_allclose(got, 3 - 2.5, rtol=1e-6)


def test_simpson_gap_keeps_the_shape_of_the_metric():
    p, t = (x.reshape(-1, CLASSES) for x in roll())
    got = jax.jit(lambda *x: losses.simpson_gap(functools.partial(dice, axis=0), x, batch_size=4))(p, t)
    for k in range(CLASSES):
        whole, *parts = (transcribed_dice(p[i:j, k], t[i:j, k]) for i, j in ((0, 12), (0, 4), (4, 8), (8, 12)))
        np.testing.assert_allclose(got[k], whole - sum(parts) / 3, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: dice(*roll(), axis=0, power=3), "power=3 must be 1 or 2"),
        (lambda: dice(*roll(), axis=0, smooth=-1.0), r"smooth=-1.0 must lie in \[0, inf\)"),
        *[
            (functools.partial(dice, *roll(), axis=axis), rf"axis={re.escape(str(axis))} .* \(2, 6, 3\)")
            for axis in (3, (0, -3), ())
        ],
        (lambda: dice(roll()[0], roll()[1][:1], axis=0), r"\(2, 6, 3\) and targets \(1, 6, 3\)"),
        (lambda: dice(*roll(), axis=(1, 2), where=jnp.ones(3, bool)), r"where has shape \(3,\): .* \(6,\)"),
        *[
            (functools.partial(tversky, *roll(), axis=0, **{name: -1.0}), rf"{name}=-1.0 must lie in \[0, inf\)")
            for name in ("alpha", "beta", "smooth")
        ],
        (lambda: losses.simpson_gap(jnp.mean, (jnp.ones(7),), batch_size=8), r"batch_size=8 must lie in \[1, 7\]"),
        (lambda: losses.simpson_gap(jnp.mean, (jnp.ones(7),), batch_size=2.5), "batch_size=2.5 must be a whole"),
        (lambda: losses.simpson_gap(f1, (jnp.ones(7), jnp.ones((6, 2))), batch_size=2), r"\(7,\), \(6, 2\)"),
        (lambda: losses.simpson_gap(jnp.mean, (), batch_size=2), "arrays must have one leading axis"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
