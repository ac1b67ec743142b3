"""The definition of the product with a quantized weight, in jax.numpy."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from steelyard_kernels.quant_matmul import grid, packing


def result_dtype(x: Array, scale: Array) -> jnp.dtype:
    """Dtype of the product: that of x for half precision, else what x and the scale promote to."""
    return x.dtype if x.dtype in (jnp.bfloat16, jnp.float16) else jnp.result_type(x, scale)


def quant_matmul(
    x: Float[Array, "*rows K"],
    codes: Int[Array, "packed N"],
    scale: Float[Array, "G S"],
    zero_point: Num[Array, "G S"] | None = None,
    *,
    bits: int,
) -> Float[Array, "*rows N"]:
    """Unpacks, decodes, and multiplies in float32; the arguments are those of `ops.quant_matmul`."""
    dtype = result_dtype(x, scale)
    accumulator = jnp.promote_types(dtype, jnp.float32)
    codes = codes if bits == 8 else packing.unpack(codes, bits)
    weight = grid.decode(codes, scale, zero_point, dtype=accumulator)
    return jnp.matmul(x.astype(accumulator), weight, precision="highest").astype(dtype)
