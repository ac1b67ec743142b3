"""Which parameters stay: patterns, scores, allocations, masks, and their schedules.

The submodules are exported, not their functions, because one name may serve twice (a score and an allocation).
"""

from steelyard.sparsity import (
    allocation,
    calibration,
    channels,
    dynamic,
    gating,
    layers,
    lottery,
    masks,
    patterns,
    retrain,
    schedules,
    scores,
    soup,
)

__all__ = [
    "allocation",
    "calibration",
    "channels",
    "dynamic",
    "gating",
    "layers",
    "lottery",
    "masks",
    "patterns",
    "retrain",
    "schedules",
    "scores",
    "soup",
]
