"""Allocations: how much of each leaf goes."""

from steelyard.sparsity.allocation.coarse_to_fine import coarse_to_fine
from steelyard.sparsity.allocation.lamp import lamp
from steelyard.sparsity.allocation.minimum_kept import minimum_kept
from steelyard.sparsity.allocation.rate_distortion import distortion_curves, rate_distortion
from steelyard.sparsity.allocation.static import erdos_renyi, uniform, uniform_plus
from steelyard.sparsity.allocation.water_fill import water_fill

__all__ = [
    "coarse_to_fine",
    "distortion_curves",
    "erdos_renyi",
    "lamp",
    "minimum_kept",
    "rate_distortion",
    "uniform",
    "uniform_plus",
    "water_fill",
]
