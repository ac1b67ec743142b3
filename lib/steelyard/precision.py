"""Half precision is stored, never accumulated."""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float


def wide(x: Float[ArrayLike, "..."]) -> Float[Array, "..."]:
    """The array in float32 at least: float16 and bfloat16 are widened, float64 is kept.

    >>> wide(jnp.ones(2, jnp.bfloat16)).dtype
    dtype('float32')
    """
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
