"""Which examples count, and how much."""

from steelyard.examples.batches import bind_batches, binding_examples, pk_batch
from steelyard.examples.bilevel import BilevelStepState, bilevel_step
from steelyard.examples.class_gaussians import Gaussians, class_gaussians, sample_features
from steelyard.examples.clusters import balanced_clusters, cluster_temperatures, subclass_count
from steelyard.examples.negatives import NegativeState, refresh_negatives
from steelyard.examples.trilateral import FusionRatio, class_means, trilateral_features

__all__ = [
    "BilevelStepState",
    "FusionRatio",
    "Gaussians",
    "NegativeState",
    "balanced_clusters",
    "bilevel_step",
    "bind_batches",
    "binding_examples",
    "class_gaussians",
    "class_means",
    "cluster_temperatures",
    "pk_batch",
    "refresh_negatives",
    "sample_features",
    "subclass_count",
    "trilateral_features",
]
