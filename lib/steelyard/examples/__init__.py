"""Which examples count, and how much."""

from steelyard.examples.bilevel import BilevelStepState, bilevel_step
from steelyard.examples.trilateral import FusionRatio, class_means, trilateral_features

__all__ = [
    "BilevelStepState",
    "FusionRatio",
    "bilevel_step",
    "class_means",
    "trilateral_features",
]
