"""Sparsities in proportion to the importance of layers: limits in closed form, and a case worked by hand."""

import numpy as np
import pytest

from steelyard.sparsity.allocation import coarse_to_fine

SCORES, SIZES = np.array([5.0, 1.0, 0.0, 2.0]), np.array([100, 300, 50, 200])


def test_by_hand():
    """130 of 650 are kept, 65 of them by the minimum of a tenth; the other 65 are shared as 5 : 1 : 0 : 2."""
    sparsities = coarse_to_fine(SCORES, SIZES, 0.8, max_sparsity=0.9)
    kept = SIZES / 10 + 65 * SCORES / 8
    np.testing.assert_allclose(sparsities, 1 - kept / SIZES, rtol=1e-12)
    np.testing.assert_array_equal(
        coarse_to_fine(SCORES, SIZES, 0.8), coarse_to_fine(SCORES, SIZES, 0.8, max_sparsity=0.9)
    )


def test_a_full_layer_leaves_its_share_to_the_others():
    """With scores 8 : 1 : 1 of 120 weights the first would keep 96 of its 60: the others share 60."""
    sparsities = coarse_to_fine(np.array([8.0, 1, 1]), np.array([60, 60, 60]), 1 / 3, max_sparsity=1.0)
    np.testing.assert_allclose(sparsities, [0, 0.5, 0.5], atol=1e-12)


@pytest.mark.parametrize("sparsity", [0.0, 0.35, 0.7, 0.97, 1.0])
def test_limits(sparsity):
    equal = coarse_to_fine(3.0 * SIZES, SIZES, sparsity)
    np.testing.assert_allclose(equal, sparsity, rtol=1e-9, atol=1e-12)
    uniform = coarse_to_fine(SCORES, SIZES, sparsity, max_sparsity=sparsity)
    np.testing.assert_allclose(uniform, sparsity, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        coarse_to_fine(np.zeros(4), SIZES, sparsity, max_sparsity=sparsity), sparsity, rtol=1e-9, atol=1e-12
    )


def test_shares_without_a_minimum_are_proportional():
    sparsities = coarse_to_fine(SCORES, SIZES, 0.9, max_sparsity=1.0)
    np.testing.assert_allclose((1 - sparsities) * SIZES, 65 * SCORES / 8, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"scores": np.zeros(4)}, r"total=130 cannot be shared"),
        ({"scores": -SCORES}, r"scores=-5.0 must lie"),
        ({"sizes": SIZES[:2]}, r"weights \(4,\), upper \(2,\)"),
        ({"sizes": 0 * SIZES}, r"sizes=0.0 must lie in \[1, inf\)"),
        ({"sparsity": -0.1}, r"sparsity=-0.1"),
        ({"max_sparsity": 0.5}, r"max_sparsity=0.5 must lie in \[0.8, 1\]"),
    ],
)
def test_refuses(changes, text):
    with pytest.raises(ValueError, match=text):
        coarse_to_fine(**({"scores": SCORES, "sizes": SIZES, "sparsity": 0.8} | changes))
