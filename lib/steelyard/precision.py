"""Half precision is stored, never accumulated."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def wide(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """The array in float32 at least: float16 and bfloat16 are widened, float64 is kept.

    >>> wide(jnp.ones(2, jnp.bfloat16)).dtype
    dtype('float32')
    """
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
