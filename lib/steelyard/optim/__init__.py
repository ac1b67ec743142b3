"""The update: optimizers, loss scaling and gradient flow, each an optax transformation or a wrapper of a gradient."""

from steelyard.optim.adamp import adamp as adamp
from steelyard.optim.adamp import projection_level, scale_by_adamp, scale_by_sgdp, sgdp, tangent_projection
from steelyard.optim.loss_scale import DynamicLossScaleState, all_finite, current_loss_scale, dynamic_loss_scale
from steelyard.optim.sam import sam_value_and_grad
from steelyard.optim.sparse import DecayGradientFlowState, decay_gradient_flow
from steelyard.optim.sparse import sparse as sparse

__all__ = [
    "DecayGradientFlowState",
    "DynamicLossScaleState",
    "adamp",
    "all_finite",
    "current_loss_scale",
    "decay_gradient_flow",
    "dynamic_loss_scale",
    "projection_level",
    "sam_value_and_grad",
    "scale_by_adamp",
    "scale_by_sgdp",
    "sgdp",
    "sparse",
    "tangent_projection",
]
