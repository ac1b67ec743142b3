"""Sparsities from the importance of whole layers, the coarse half of coarse-to-fine pruning."""

import numpy as np
from jaxtyping import Float, Int

from steelyard import choices
from steelyard.sparsity.allocation.water_fill import water_fill

_MARGIN = 0.1  # of the default of `max_sparsity` over the sparsity of the whole


def coarse_to_fine(
    scores: Float[np.ndarray, " L"],
    sizes: Int[np.ndarray, " L"],
    sparsity: float,
    *,
    max_sparsity: float | None = None,
) -> Float[np.ndarray, " L"]:
    """Keeps weights in proportion to the score of their layer, between a minimum and all of them.

        kept = water_fill(weights=scores, lower=(1 - max_sparsity) n, upper=n, total=(1 - sparsity) sum(n)),
        s_l = 1 - kept_l / n_l.

    The shares are real numbers; whoever selects the weights rounds them. The fine half takes these sparsities with a
    local score, such as `scores.wanda` with `masks.topk_mask_along`.

    Args:
      scores: of the layers, at least 0, such as those of `scores.zeroth_order`; of a block of several leaves their sum.
      sizes: weights of each layer.
      sparsity: of the whole, in [0, 1].
      max_sparsity: of one layer, in [sparsity, 1]; min(sparsity + 0.1, 1) by default.

    Returns:
      The sparsities.

    Raises:
      ValueError: a number is out of range, shapes differ, or the layers of score 0 hold more than may be pruned.

    Source: ECoFLaP: Efficient coarse-to-fine layer-wise pruning for vision-language models (2024, Sung et al.).

    >>> coarse_to_fine(np.array([1.0, 3.0]), np.array([100, 100]), 0.5, max_sparsity=1.0).tolist()
    [0.75, 0.25]
    """
    choices.require_within("sparsity", sparsity, "[0, 1]")
    max_sparsity = min(sparsity + _MARGIN, 1) if max_sparsity is None else max_sparsity
    choices.require_within("max_sparsity", max_sparsity, f"[{sparsity}, 1]")
    choices.require_within("scores", scores, "[0, inf)")
    sizes = np.asarray(sizes, np.float64)
    choices.require_within("sizes", sizes, "[1, inf)")
    kept = water_fill(scores, sizes, (1 - sparsity) * sizes.sum(), lower=(1 - max_sparsity) * sizes)
    return (sizes - kept) / sizes
