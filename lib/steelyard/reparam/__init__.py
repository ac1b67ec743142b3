"""The parameters that the model sees: masked, fake-quantized, normalised, cast; and how these compose."""

from steelyard.reparam.base import Reparam, chain, identity, only
from steelyard.reparam.cast import cast
from steelyard.reparam.fake_quant import fake_quant, lsq, lsq_init
from steelyard.reparam.masked import masked
from steelyard.reparam.masking import soft_masked, sr_ste, straight_through
from steelyard.reparam.nm_sparse import nm_sparse

__all__ = [
    "Reparam",
    "cast",
    "chain",
    "fake_quant",
    "identity",
    "lsq",
    "lsq_init",
    "masked",
    "nm_sparse",
    "only",
    "soft_masked",
    "sr_ste",
    "straight_through",
]
