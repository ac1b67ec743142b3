"""Product of float activations with an integer weight.

*Codes* are the integers that are stored; a *group* is the run of consecutive rows of K that share a scale. The weight
is read at its stored size, so a product with few rows of x is bound by memory and can be faster than a bfloat16 one by
at most 16 / (bits + 32 / group).
"""

import functools

import jax
from jaxtyping import Array, Float, Int, Num

from steelyard_kernels import common
from steelyard_kernels.quant_matmul import reference

AVAILABLE = ("auto", "reference")
BITS = (8, 4, 2)


@functools.partial(jax.jit, static_argnames=("bits", "backend"))
def quant_matmul(
    x: Float[Array, "*rows K"],
    codes: Int[Array, "packed N"],
    scale: Float[Array, "G S"],
    zero_point: Num[Array, "G S"] | None = None,
    *,
    bits: int,
    backend: str = "auto",
) -> Float[Array, "*rows N"]:
    """Multiplies x with a weight of `bits`-bit codes, accumulating in float32.

        y = x @ w,   w = (code - zero_point) * scale

    The backward pass decodes the weight again instead of keeping it; integer operands have no gradient.

    Args:
      x: activations; leading axes are allowed.
      codes: int8 `(K, N)` for 8 bits; for 4 and 2 bits uint8 `(K * bits / 8, N)`, consecutive rows in a byte, the
        first in the lowest bits.
      scale: `(G, S)`, G dividing K and S dividing N: `(1, N)` per output channel, `(K / g, N)` for groups of g rows.
      zero_point: codes of zero, shaped like `scale`; `None` for a symmetric grid.
      bits: 8, 4 or 2. Codes of 3, 5, 6 and 7 bits are stored a byte each and count as 8.
      backend: `"auto"` or `"reference"`.

    Returns:
      The product; x's dtype if that is bfloat16 or float16, else `result_type(x, scale)`.

    Raises:
      ValueError: another width or backend, or operands that do not fit.
    """
    common.check_backend(backend, AVAILABLE)
    _check(x, codes, scale, zero_point, bits)
    return _product(bits, x, codes, scale, zero_point)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(bits, x, codes, scale, zero_point):
    return reference.quant_matmul(x, codes, scale, zero_point, bits=bits)


def _forward(bits, x, codes, scale, zero_point):
    return _product(bits, x, codes, scale, zero_point), (x, codes, scale, zero_point)


def _backward(bits, residuals, gradient):
    # The residuals are the operands as stored, so that a scan over layers does not keep every decoded weight. The
    # forward product inside, and the gradients that nobody asks for, are dropped by dead-code elimination.
    _, pullback = jax.vjp(functools.partial(reference.quant_matmul, bits=bits), *residuals)
    return pullback(gradient)


_product.defvjp(_forward, _backward)


def _check(x, codes, scale, zero_point, bits) -> None:
    if bits not in BITS:
        raise ValueError(f"bits={bits!r} is not one of {', '.join(map(str, BITS))}")
    expected = "int8" if bits == 8 else "uint8"
    if codes.ndim != 2 or codes.dtype != expected:
        raise ValueError(
            f"codes of {bits} bits must be {expected} with two axes; they are {codes.dtype} of shape {codes.shape}"
        )
    rows = codes.shape[0] * (8 // bits)
    if x.ndim < 1 or x.shape[-1] != rows:
        raise ValueError(
            f"x of shape {x.shape} does not fit codes of shape {codes.shape}: with {bits} bits they have {rows} rows, "
            "and the last axis of x must have as many entries"
        )
    if scale.ndim != 2 or rows % scale.shape[0] or codes.shape[1] % scale.shape[1]:
        raise ValueError(f"scale of shape {scale.shape} does not divide a weight of shape {(rows, codes.shape[1])}")
    if zero_point is not None and zero_point.shape != scale.shape:
        raise ValueError(f"zero_point of shape {zero_point.shape} must have the shape of scale, {scale.shape}")
