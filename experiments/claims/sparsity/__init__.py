"""The claims of the sparsity room, one module a method."""

from experiments.claims.sparsity.class_dependent import class_dependent as class_dependent
from experiments.claims.sparsity.coarse_to_fine import coarse_to_fine as coarse_to_fine
from experiments.claims.sparsity.dual_gradient import dual_gradient as dual_gradient
from experiments.claims.sparsity.dynamic_recommendation import dynamic_recommendation as dynamic_recommendation
from experiments.claims.sparsity.gating import gating as gating
from experiments.claims.sparsity.global_magnitude import global_magnitude as global_magnitude
from experiments.claims.sparsity.grokking_tickets import grokking_tickets as grokking_tickets
from experiments.claims.sparsity.layer_tickets import layer_tickets as layer_tickets
from experiments.claims.sparsity.lora_prune import lora_prune as lora_prune
from experiments.claims.sparsity.lottery_ticket import lottery_ticket as lottery_ticket
from experiments.claims.sparsity.performance_aware import performance_aware as performance_aware
from experiments.claims.sparsity.perp import perp as perp
from experiments.claims.sparsity.progressive_flow import progressive_flow as progressive_flow
from experiments.claims.sparsity.progressive_flow import progressive_flow_digits
from experiments.claims.sparsity.pst import pst as pst
from experiments.claims.sparsity.random_pruning import random_pruning as random_pruning
from experiments.claims.sparsity.random_search import random_search as random_search
from experiments.claims.sparsity.rate_distortion import rate_distortion as rate_distortion
from experiments.claims.sparsity.rethinking_pruning import rethinking_pruning as rethinking_pruning
from experiments.claims.sparsity.rethinking_pruning import rethinking_tickets
from experiments.claims.sparsity.slimming import slimming as slimming
from experiments.claims.sparsity.soft_shrinkage import soft_shrinkage as soft_shrinkage
from experiments.claims.sparsity.sparse_soups import sparse_soups as sparse_soups

__all__ = [
    "class_dependent",
    "coarse_to_fine",
    "dual_gradient",
    "dynamic_recommendation",
    "gating",
    "global_magnitude",
    "grokking_tickets",
    "layer_tickets",
    "lora_prune",
    "lottery_ticket",
    "performance_aware",
    "perp",
    "progressive_flow",
    "progressive_flow_digits",
    "pst",
    "random_pruning",
    "random_search",
    "rate_distortion",
    "rethinking_pruning",
    "rethinking_tickets",
    "slimming",
    "soft_shrinkage",
    "sparse_soups",
]
