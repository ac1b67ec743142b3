"""One prediction: losses per example, without reduction.

The losses that optax has are re-exported, so that one import serves.
"""

from optax.losses import (
    cosine_similarity,
    huber_loss,
    l2_loss,
    log_cosh,
    sigmoid_binary_cross_entropy,
    sigmoid_focal_loss,
    smooth_labels,
    softmax_cross_entropy,
    softmax_cross_entropy_with_integer_labels,
    squared_error,
)

from steelyard.losses.declare import batch_dependent
from steelyard.losses.distillation import balanced_kl, entropy, forward_kl, reverse_kl

__all__ = [
    "balanced_kl",
    "batch_dependent",
    "cosine_similarity",
    "entropy",
    "forward_kl",
    "huber_loss",
    "l2_loss",
    "log_cosh",
    "reverse_kl",
    "sigmoid_binary_cross_entropy",
    "sigmoid_focal_loss",
    "smooth_labels",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "squared_error",
]
