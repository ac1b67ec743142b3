"""How a parameter is stored and multiplied."""

from steelyard.formats.base import Weight
from steelyard.formats.matmul import conv, dense, explain, is_weight, matmul, nbytes, take
from steelyard.formats.nm import NMSparse
from steelyard.formats.quantized import Quantized, pack, unpack

__all__ = [
    "NMSparse",
    "Quantized",
    "Weight",
    "conv",
    "dense",
    "explain",
    "is_weight",
    "matmul",
    "nbytes",
    "pack",
    "take",
    "unpack",
]
