"""What the study of rare categories trains and measures, by loops in float64 and by scikit-learn."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import sklearn.metrics

from experiments.claims.losses.weighting_study import _f1, _rarity, weighted_cross_entropy
from steelyard import losses

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((6, 3)).astype(np.float32)
TARGETS = RNG.integers(0, 2, (6, 3)).astype(np.float32)


def test_the_positive_term_is_weighed():
    weights = np.array([0.5, 2.0, 0.0], np.float32)
    p = 1 / (1 + np.exp(-LOGITS.astype(np.float64)))
    expected = [
        [-(w * t * math.log(a) + (1 - t) * math.log(1 - a)) for a, t, w in zip(*row, weights, strict=True)]
        for row in zip(p, TARGETS, strict=True)
    ]
    np.testing.assert_allclose(weighted_cross_entropy(LOGITS, TARGETS, weights), expected, rtol=1e-5)


def test_a_weight_of_one_is_binary_cross_entropy():
    plain = losses.sigmoid_binary_cross_entropy(LOGITS, TARGETS)
    np.testing.assert_array_equal(weighted_cross_entropy(LOGITS, TARGETS, 1.0), plain)


def test_an_empty_category_has_no_weight_and_no_f1():
    rarity = _rarity(jnp.array([0.0, 1000.0]))
    np.testing.assert_array_equal(rarity, [0, 2])
    found, wanted = LOGITS > 0, (TARGETS > 0) & [True, True, False]
    assert found[:, 2].any()
    mean, each = jax.jit(_f1)(found, wanted)
    expected = sklearn.metrics.f1_score(wanted, found, average=None, zero_division=0.0)
    np.testing.assert_allclose(each, expected, rtol=1e-6)
    np.testing.assert_allclose(mean, expected[:2].mean(), rtol=1e-6)
