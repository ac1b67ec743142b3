"""Many gradients, or losses, into one: of tasks, classes, workers or clients."""

from steelyard.aggregate import attacks as attacks
from steelyard.aggregate.cagrad import cagrad
from steelyard.aggregate.centered_clip import (
    CenteredClipState,
    WorkerMomentumState,
    centered_clip,
    worker_momentum,
)
from steelyard.aggregate.class_normalized import class_normalized, per_class_losses
from steelyard.aggregate.collectives import (
    block_dequantize,
    block_quantize,
    hierarchical_reduce_scatter,
    quantized_all_gather,
    quantized_gather,
    quantized_reduce_scatter,
)
from steelyard.aggregate.compressors import Sparsifier, random_k, top_k
from steelyard.aggregate.conflict_free import conflict_free
from steelyard.aggregate.domain_penalty import DomainPenaltyState, domain_penalty
from steelyard.aggregate.dwa import dynamic_weight_average
from steelyard.aggregate.ef21 import (
    EF21ExchangeState,
    EF21State,
    ef21,
    ef21_exchange,
    ef21_exchange_init,
    ef21_step_size,
)
from steelyard.aggregate.entry import Report, value_and_grad, value_and_grad_at, weighted_gradient
from steelyard.aggregate.epochs import EpochMeans, epoch, epoch_init, epoch_push
from steelyard.aggregate.flag import flag
from steelyard.aggregate.gradnorm import GradNormState, gradnorm
from steelyard.aggregate.group_dro import GroupDROState, group_dro
from steelyard.aggregate.improvable_gap import improvable_gap
from steelyard.aggregate.improvable_gap_rl import ImprovableGapRLState, improvable_gap_rl
from steelyard.aggregate.loss_balancer import LossBalancerState, loss_balancer
from steelyard.aggregate.mgda import mgda
from steelyard.aggregate.momentum_conflict_free import (
    MomentumConflictFreeState,
    momentum_conflict_free,
    value_and_grad_cyclic,
)
from steelyard.aggregate.multi_teacher import NormalizedLossBalanceState, balance_entropies, normalized_loss_balance
from steelyard.aggregate.nash import nash
from steelyard.aggregate.nearest_neighbor import nearest_neighbor as nearest_neighbor
from steelyard.aggregate.nearest_neighbor import nearest_neighbor_mixing
from steelyard.aggregate.pcgrad import PCGradState, pcgrad
from steelyard.aggregate.private import noisy_counts, private_task_weights
from steelyard.aggregate.robust import geometric_median, krum, median, trimmed_mean
from steelyard.aggregate.spsa import (
    decode_byte,
    encode_byte,
    spsa_apply,
    spsa_key,
    spsa_projected_gradient,
    spsa_replay,
    spsa_round,
)
from steelyard.aggregate.stacked import (
    Aggregator,
    combine,
    count_rows,
    finite_rows,
    from_distances,
    from_gram,
    from_losses,
    gram,
    pairwise_sqdist,
    square_norms,
    zero_rows,
)
from steelyard.aggregate.static import mean, static
from steelyard.aggregate.svd_reweight import svd_reweight, svd_weights
from steelyard.aggregate.uncertainty import (
    SoftmaxWeightingState,
    UncertaintyWeightingState,
    softmax_weighting,
    uncertainty_weighting,
)
from steelyard.aggregate.workers import over_workers, transpose_workers

__all__ = [
    "Aggregator",
    "CenteredClipState",
    "DomainPenaltyState",
    "EF21ExchangeState",
    "EF21State",
    "EpochMeans",
    "GradNormState",
    "GroupDROState",
    "ImprovableGapRLState",
    "LossBalancerState",
    "MomentumConflictFreeState",
    "NormalizedLossBalanceState",
    "PCGradState",
    "Report",
    "SoftmaxWeightingState",
    "Sparsifier",
    "UncertaintyWeightingState",
    "WorkerMomentumState",
    "balance_entropies",
    "block_dequantize",
    "block_quantize",
    "cagrad",
    "centered_clip",
    "class_normalized",
    "combine",
    "conflict_free",
    "count_rows",
    "decode_byte",
    "domain_penalty",
    "dynamic_weight_average",
    "ef21",
    "ef21_exchange",
    "ef21_exchange_init",
    "ef21_step_size",
    "encode_byte",
    "epoch",
    "epoch_init",
    "epoch_push",
    "finite_rows",
    "flag",
    "from_distances",
    "from_gram",
    "from_losses",
    "geometric_median",
    "gradnorm",
    "gram",
    "group_dro",
    "hierarchical_reduce_scatter",
    "improvable_gap",
    "improvable_gap_rl",
    "krum",
    "loss_balancer",
    "mean",
    "median",
    "mgda",
    "momentum_conflict_free",
    "nash",
    "nearest_neighbor",
    "nearest_neighbor_mixing",
    "noisy_counts",
    "normalized_loss_balance",
    "over_workers",
    "pairwise_sqdist",
    "pcgrad",
    "per_class_losses",
    "private_task_weights",
    "quantized_all_gather",
    "quantized_gather",
    "quantized_reduce_scatter",
    "random_k",
    "softmax_weighting",
    "spsa_apply",
    "spsa_key",
    "spsa_projected_gradient",
    "spsa_replay",
    "spsa_round",
    "square_norms",
    "static",
    "svd_reweight",
    "svd_weights",
    "top_k",
    "transpose_workers",
    "trimmed_mean",
    "uncertainty_weighting",
    "value_and_grad",
    "value_and_grad_at",
    "value_and_grad_cyclic",
    "weighted_gradient",
    "worker_momentum",
    "zero_rows",
]
