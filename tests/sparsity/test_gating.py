"""Targets of gated channels against loops in NumPy, and the predictor's loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import sparsity

gating = sparsity.gating

# Sixteen channels of eight examples; the last but one example is silent and the last has one channel alone.
SALIENCY = np.abs(np.random.default_rng(0).normal(size=(8, 16))).astype(np.float32)
SALIENCY[:, 3] = 0
SALIENCY[-2] = 0
SALIENCY[-1] = np.eye(16)[5]

mass_mask = jax.jit(gating.mass_mask, static_argnames="min_kept")
top_mask = jax.jit(gating.top_mask)


def numpy_mass_mask(saliency, mass):
    """Row by row, channel by channel in falling order."""
    mask = np.zeros(saliency.shape, bool)
    for row, values in zip(mask, np.asarray(saliency, np.float64), strict=True):
        if mass < 0 or values.sum() == 0:
            row[:] = True
            continue
        share, cumulative = values / values.sum(), 0.0
        for c in sorted(range(len(values)), key=lambda c: (-share[c], c)):
            cumulative += share[c]
            row[c] = share[c] > 1e-5 if mass == 1 else cumulative - mass <= 1e-5
    return mask


def numpy_top_mask(saliency, ratio):
    mask = np.zeros(saliency.shape, bool)
    for row, values in zip(mask, saliency, strict=True):
        kept = len(values) - int(np.floor(ratio * len(values)))
        for c in sorted(range(len(values)), key=lambda c: (-values[c], c))[:kept]:
            row[c] = values[c] > 1e-5
    return mask


def test_saliency_is_the_largest_absolute_value_over_the_pixels():
    x = np.random.default_rng(1).normal(size=(2, 3, 4, 5)).astype(np.float32)
    expected = [[max(abs(x[n, i, j, c]) for i in range(3) for j in range(4)) for c in range(5)] for n in range(2)]
    np.testing.assert_array_equal(gating.channel_saliency(x), expected)
    np.testing.assert_array_equal(gating.channel_saliency(x[:, 0, 0]), np.abs(x[:, 0, 0]))


@pytest.mark.parametrize("mass", [-1.0, 0.0, 0.3, 0.8, 0.999, 1.0])
def test_mass_mask_equals_the_loops(mass):
    np.testing.assert_array_equal(mass_mask(SALIENCY, mass), numpy_mass_mask(SALIENCY, mass))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 1.0])
def test_top_mask_equals_the_loops(ratio):
    np.testing.assert_array_equal(top_mask(SALIENCY, ratio), numpy_top_mask(SALIENCY, ratio))


def padded(*rows):
    """Rows of saliencies in the shape that is compiled already; channels that do not fire have no share."""
    saliency = np.zeros((8, 16), np.float32)
    for i, row in enumerate(rows):
        saliency[i, : len(row)] = row
    return saliency


def test_the_channel_that_crosses_the_mass_is_off_unless_one_must_stay():
    # Shares 0.9, 0.1: the first crosses 0.8.
    saliency = padded([9, 1])
    assert np.flatnonzero(mass_mask(saliency, 0.8)[0]).tolist() == []
    assert np.flatnonzero(mass_mask(saliency, 0.9)[0]).tolist() == [0]
    assert np.flatnonzero(mass_mask(saliency, 0.8, min_kept=1)[0]).tolist() == [0]


def test_half_the_mass_of_equal_channels_is_half_of_them():
    sizes = [1, 4, 7, 16]
    kept = mass_mask(padded(*([0.7] * n for n in sizes)), 0.5)
    for n, row in zip(sizes, kept, strict=False):
        np.testing.assert_array_equal(row, np.arange(16) < n // 2)


def test_all_that_fires_stays_as_the_mass_nears_one():
    fires = SALIENCY[:-2] > 0
    np.testing.assert_array_equal(mass_mask(SALIENCY, 1.0)[:-2], fires)
    # Within the slack of 1e-5 the silent channels stay too.
    assert np.all(mass_mask(SALIENCY, 1 - 1e-6)[:-2][fires])


@pytest.mark.parametrize("mask", [functools.partial(mass_mask, mass=0.7), functools.partial(top_mask, ratio=0.7)])
def test_permuted_channels_give_the_permuted_mask(mask):
    order = np.random.default_rng(2).permutation(16)
    saliency = SALIENCY + np.linspace(0.01, 0.02, 16, dtype=np.float32)  # without ties
    np.testing.assert_array_equal(mask(saliency[:, order]), np.asarray(mask(saliency))[:, order])


def test_predictor_loss_is_the_mean_of_the_cross_entropies():
    logits = np.random.default_rng(3).normal(size=(4, 3)) * 5
    target = np.random.default_rng(4).random((4, 3)) > 0.5
    p = 1 / (1 + np.exp(-logits))
    expected = np.mean([-np.log(p[i] if target[i] else 1 - p[i]) for i in np.ndindex(4, 3)])
    # Twelve numbers of order 1 in float32.
    np.testing.assert_allclose(gating.predictor_loss(jnp.float32(logits), target), expected, rtol=1e-6)
    assert gating.predictor_loss(jnp.asarray([[1e4, -1e4]]), jnp.asarray([[True, False]])) == 0


def test_targets_are_not_differentiated():
    grad = jax.grad(lambda target: gating.predictor_loss(jnp.ones((8, 16)), target))
    assert not np.any(grad(jnp.asarray(SALIENCY)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: gating.channel_saliency(jnp.ones(3)), r"x has shape \(3,\)"),
        (lambda: gating.mass_mask(jnp.ones((1, 3)), 1.5), r"mass=1.5 must lie in \(-inf, 1\]"),
        (lambda: gating.mass_mask(jnp.ones((1, 3)), 0.5, min_kept=-1), r"min_kept=-1 must lie in \[0, inf\)"),
        (lambda: gating.top_mask(jnp.ones((1, 3)), -0.1), r"ratio=-0.1 must lie in \[0, 1\]"),
        (lambda: gating.predictor_loss(jnp.ones((2, 3)), jnp.ones((3, 2), bool)), r"\(2, 3\).*\(3, 2\)"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
