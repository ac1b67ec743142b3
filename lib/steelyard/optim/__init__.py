"""The update: optimizers, loss scaling and gradient flow, each an optax transformation or a wrapper of a gradient."""

from steelyard.optim.adamp import adamp as adamp
from steelyard.optim.adamp import projection_level, scale_by_adamp, scale_by_sgdp, sgdp, tangent_projection
from steelyard.optim.bilevel import BilevelState, bilevel_penalty_gradient, bilevel_penalty_step
from steelyard.optim.block_coordinate import block_coordinate as block_coordinate
from steelyard.optim.block_coordinate import block_direction, block_scores, greedy_block
from steelyard.optim.by_path import by_path as by_path
from steelyard.optim.convex_relu import (
    ConvexRelu,
    convex_relu_admm,
    convex_relu_network,
    convex_relu_objective,
    convex_relu_patterns,
)
from steelyard.optim.halpern import HalpernResult, variance_reduced_halpern
from steelyard.optim.halpern import halpern as halpern
from steelyard.optim.loss_scale import DynamicLossScaleState, all_finite, current_loss_scale, dynamic_loss_scale
from steelyard.optim.low_bit import LowBitState, low_bit_state
from steelyard.optim.low_rank import GradNormLowRankState, grad_norm_low_rank
from steelyard.optim.normalized import normalize_by_error
from steelyard.optim.reset import reset as reset
from steelyard.optim.sam import sam_value_and_grad
from steelyard.optim.schedules import (
    adapt_regime,
    infinite_schedule,
    one_cycle_momentum_schedule,
    refined_schedule,
    refined_schedule_values,
    rewarmed_cosine_schedule,
)
from steelyard.optim.soft_shrinkage import SoftShrinkageState
from steelyard.optim.soft_shrinkage import soft_shrinkage as soft_shrinkage
from steelyard.optim.sparse import DecayGradientFlowState, decay_gradient_flow
from steelyard.optim.sparse import sparse as sparse
from steelyard.optim.stochastic_rounding import StochasticRoundingState
from steelyard.optim.stochastic_rounding import stochastic_rounding as stochastic_rounding
from steelyard.optim.target_surrogate import target_surrogate as target_surrogate
from steelyard.optim.target_surrogate import target_surrogate_step

__all__ = [
    "BilevelState",
    "ConvexRelu",
    "DecayGradientFlowState",
    "DynamicLossScaleState",
    "GradNormLowRankState",
    "HalpernResult",
    "LowBitState",
    "SoftShrinkageState",
    "StochasticRoundingState",
    "adamp",
    "adapt_regime",
    "all_finite",
    "bilevel_penalty_gradient",
    "bilevel_penalty_step",
    "block_coordinate",
    "block_direction",
    "block_scores",
    "by_path",
    "convex_relu_admm",
    "convex_relu_network",
    "convex_relu_objective",
    "convex_relu_patterns",
    "current_loss_scale",
    "decay_gradient_flow",
    "dynamic_loss_scale",
    "grad_norm_low_rank",
    "greedy_block",
    "halpern",
    "infinite_schedule",
    "low_bit_state",
    "normalize_by_error",
    "one_cycle_momentum_schedule",
    "projection_level",
    "refined_schedule",
    "refined_schedule_values",
    "reset",
    "rewarmed_cosine_schedule",
    "sam_value_and_grad",
    "scale_by_adamp",
    "scale_by_sgdp",
    "sgdp",
    "soft_shrinkage",
    "sparse",
    "stochastic_rounding",
    "tangent_projection",
    "target_surrogate",
    "target_surrogate_step",
    "variance_reduced_halpern",
]
