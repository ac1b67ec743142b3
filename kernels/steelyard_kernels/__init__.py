"""Kernels: arrays in, arrays out. Import the module of an operation, for example `steelyard_kernels.quant_matmul`."""
