"""The parameters that the model sees: masked, fake-quantized, normalised, cast; and how these compose."""

from steelyard.reparam.base import Reparam, chain, identity, only
from steelyard.reparam.cast import cast
from steelyard.reparam.dynamic_sparse import dynamic_sparse as dynamic_sparse
from steelyard.reparam.fake_quant import fake_quant, lsq, lsq_init
from steelyard.reparam.masked import masked
from steelyard.reparam.masking import soft_masked, sr_ste, straight_through
from steelyard.reparam.nm_sparse import nm_sparse
from steelyard.reparam.pruned import pruned as pruned
from steelyard.reparam.pst import Factors, pst_weight
from steelyard.reparam.pst import pst as pst
from steelyard.reparam.weight_compander import Curve, compand, expand
from steelyard.reparam.weight_compander import weight_compander as weight_compander
from steelyard.reparam.weight_norm import WeightNormed, weight_norm_data_init, weight_norm_merge, weight_norm_split
from steelyard.reparam.weight_norm import weight_norm as weight_norm

__all__ = [
    "Curve",
    "Factors",
    "Reparam",
    "WeightNormed",
    "cast",
    "chain",
    "compand",
    "dynamic_sparse",
    "expand",
    "fake_quant",
    "identity",
    "lsq",
    "lsq_init",
    "masked",
    "nm_sparse",
    "only",
    "pruned",
    "pst",
    "pst_weight",
    "soft_masked",
    "sr_ste",
    "straight_through",
    "weight_compander",
    "weight_norm",
    "weight_norm_data_init",
    "weight_norm_merge",
    "weight_norm_split",
]
