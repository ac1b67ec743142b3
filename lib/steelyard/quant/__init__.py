"""How many bits a parameter gets: grids, calibration, rounding."""

from steelyard.quant.affine import (
    FORMATS,
    NF4_LEVELS,
    Format,
    decode,
    encode,
    fake_quantize,
    get_format,
    round_ste,
)
from steelyard.quant.calibration import QParams, block_counts, calibrate

__all__ = [
    "FORMATS",
    "NF4_LEVELS",
    "Format",
    "QParams",
    "block_counts",
    "calibrate",
    "decode",
    "encode",
    "fake_quantize",
    "get_format",
    "round_ste",
]
