"""Product with an integer weight, and the packing of its codes."""

from steelyard_kernels.quant_matmul.grid import decode, divide, expand
from steelyard_kernels.quant_matmul.ops import quant_matmul
from steelyard_kernels.quant_matmul.packing import pack, unpack

__all__ = ["decode", "divide", "expand", "pack", "quant_matmul", "unpack"]
