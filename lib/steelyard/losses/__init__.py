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

from steelyard.losses.bellman_saddle import Saddle, bellman_saddle, corrected_td
from steelyard.losses.calibrated import box_cox_parameter, calibrated_derivatives, ensemble_calibrated_loss
from steelyard.losses.classification import encouraging_loss, rescaled_square_loss, squentropy
from steelyard.losses.contrastive import (
    relu_normalize,
    subclass_contrastive,
    supervised_contrastive,
    supervised_contrastive_bound,
)
from steelyard.losses.decision import spo_plus_targeting, targeting_regret, targeting_regret_smooth, targeting_value
from steelyard.losses.declare import batch_dependent, with_example_state
from steelyard.losses.detection import adaptive_threshold, foreground_prior, guided_loss_scale, prior_bias
from steelyard.losses.distillation import balanced_kl, entropy, forward_kl, reverse_kl
from steelyard.losses.experts import diversity_temperatures, ride_loss, routed_mean, routing_targets
from steelyard.losses.geometry import (
    class_means,
    cone_cosine,
    fisher_discriminant_ratio,
    frame_gap,
    nearest_mean_angle,
    simplex_frame,
    within_class_spread,
)
from steelyard.losses.hashing import binary_target_codes, orthohash_loss
from steelyard.losses.image_frequency import iif_loss, inverse_image_frequency
from steelyard.losses.imbalance import (
    class_counts,
    class_weights,
    deferred,
    max_norm,
    softmax_focal_loss,
    tau_normalize,
)
from steelyard.losses.info_nce import cosent, info_nce, stale_negatives
from steelyard.losses.label_robust import adaptive_ldr_loss, ldr_loss
from steelyard.losses.logit_adjustment import (
    ldam_loss,
    ldam_margins,
    logit_adjusted_cross_entropy,
    multiplicative_logit_adjustment,
    posthoc_logit_adjustment,
    vector_scaling_loss,
)
from steelyard.losses.macro_auc import macro_auc_pairwise, macro_auc_univariate
from steelyard.losses.margins import adjust_logits, log_one_minus_p, normalize
from steelyard.losses.multi_head import adaptive_temperatures, multi_head_contrastive
from steelyard.losses.multilabel import asymmetric_loss, asymmetric_softmax_loss
from steelyard.losses.ordinal import (
    cumulative_logits,
    cumulative_nll,
    cumulative_probabilities,
    from_differences,
    fused_penalty,
    soft_threshold,
    to_differences,
)
from steelyard.losses.overlap import simpson_gap, soft_counts, soft_dice_loss, soft_tversky_loss
from steelyard.losses.ranking_hinge import ranking_hinge
from steelyard.losses.regression import (
    amplify,
    bin_targets,
    pseudo_huber,
    pseudo_huber_delta,
    pseudo_huber_delta_snr,
    quantile_edges,
    regression_with_classification,
    uniform_edges,
)
from steelyard.losses.robust_iql import advantage_weights, ensemble_quantile, expectile_loss, riql_critic_loss
from steelyard.losses.sigmoid_contrastive import INITIAL_BIAS, INITIAL_LOG_SCALE, sigmoid_contrastive
from steelyard.losses.td_error import (
    best_biased_variance,
    generalized_gaussian_excess_kurtosis,
    generalized_gaussian_nll,
    generalized_gaussian_variance,
    inverse_variance_weights,
    td_error,
)
from steelyard.losses.triplet import (
    Mixed,
    batch_hard_triplet,
    contrastive_pair_loss,
    metric_mixup,
    multi_similarity_loss,
    utilization,
)

__all__ = [
    "INITIAL_BIAS",
    "INITIAL_LOG_SCALE",
    "Mixed",
    "Saddle",
    "adaptive_ldr_loss",
    "adaptive_temperatures",
    "adaptive_threshold",
    "adjust_logits",
    "advantage_weights",
    "amplify",
    "asymmetric_loss",
    "asymmetric_softmax_loss",
    "balanced_kl",
    "batch_dependent",
    "batch_hard_triplet",
    "bellman_saddle",
    "best_biased_variance",
    "bin_targets",
    "binary_target_codes",
    "box_cox_parameter",
    "calibrated_derivatives",
    "class_counts",
    "class_means",
    "class_weights",
    "cone_cosine",
    "contrastive_pair_loss",
    "corrected_td",
    "cosent",
    "cosine_similarity",
    "cumulative_logits",
    "cumulative_nll",
    "cumulative_probabilities",
    "deferred",
    "diversity_temperatures",
    "encouraging_loss",
    "ensemble_calibrated_loss",
    "ensemble_quantile",
    "entropy",
    "expectile_loss",
    "fisher_discriminant_ratio",
    "foreground_prior",
    "forward_kl",
    "frame_gap",
    "from_differences",
    "fused_penalty",
    "generalized_gaussian_excess_kurtosis",
    "generalized_gaussian_nll",
    "generalized_gaussian_variance",
    "guided_loss_scale",
    "huber_loss",
    "iif_loss",
    "info_nce",
    "inverse_image_frequency",
    "inverse_variance_weights",
    "l2_loss",
    "ldam_loss",
    "ldam_margins",
    "ldr_loss",
    "log_cosh",
    "log_one_minus_p",
    "logit_adjusted_cross_entropy",
    "macro_auc_pairwise",
    "macro_auc_univariate",
    "max_norm",
    "metric_mixup",
    "multi_head_contrastive",
    "multi_similarity_loss",
    "multiplicative_logit_adjustment",
    "nearest_mean_angle",
    "normalize",
    "orthohash_loss",
    "posthoc_logit_adjustment",
    "prior_bias",
    "pseudo_huber",
    "pseudo_huber_delta",
    "pseudo_huber_delta_snr",
    "quantile_edges",
    "ranking_hinge",
    "regression_with_classification",
    "relu_normalize",
    "rescaled_square_loss",
    "reverse_kl",
    "ride_loss",
    "riql_critic_loss",
    "routed_mean",
    "routing_targets",
    "sigmoid_binary_cross_entropy",
    "sigmoid_contrastive",
    "sigmoid_focal_loss",
    "simplex_frame",
    "simpson_gap",
    "smooth_labels",
    "soft_counts",
    "soft_dice_loss",
    "soft_threshold",
    "soft_tversky_loss",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "softmax_focal_loss",
    "spo_plus_targeting",
    "squared_error",
    "squentropy",
    "stale_negatives",
    "subclass_contrastive",
    "supervised_contrastive",
    "supervised_contrastive_bound",
    "targeting_regret",
    "targeting_regret_smooth",
    "targeting_value",
    "tau_normalize",
    "td_error",
    "to_differences",
    "uniform_edges",
    "utilization",
    "vector_scaling_loss",
    "with_example_state",
    "within_class_spread",
]
