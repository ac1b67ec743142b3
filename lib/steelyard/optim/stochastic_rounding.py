"""Parameters in half precision without master weights: what is added is rounded up or down at random, right on average.

Near 1 a bfloat16 weight has steps of 2^-7. An update of less than half a step is lost in rounding to the nearest, each
time anew, and training stands still; rounded at random, it arrives as often as it should.

Source: Deep Learning with Limited Numerical Precision (2015, Gupta et al.), section 4; for bfloat16 weights: Revisiting
BFloat16 Training (2020, Zamirai et al.), section 4.
"""

import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key, UInt16

from steelyard import tree as tree_lib

PyTree = Any


class StochasticRoundingState(NamedTuple):
    """State of `stochastic_rounding`: the number of updates made."""

    count: Int[Array, ""]


def stochastic_rounding(*, key: Key[Array, ""] | None = None) -> optax.GradientTransformationExtraArgs:
    """Turns updates into such that `optax.apply_updates` rounds stochastically; the last link of a chain.

        s = p + u in float32;  low <= s <= high its neighbours in the dtype of p
        q = high with probability (s - low) / (high - low), else low
        u <- q - p in float32, which apply_updates adds and casts to q

    So the mean of q is s, and q = s where s is a value of the dtype, zero updates included. What float32 loses in
    p + u (below 2^-24 of the larger) is lost here too. In the subnormal range of float16 the probability is rounded to
    2^-16; float32 subnormals, and with them those of bfloat16, count as zero where the device flushes them (CPU does).
    A sum that is not finite stays as it is, and one rounds up to infinity only where the nearest value is infinity.
    Leaves of other dtypes than float16 and bfloat16 pass unchanged.

    Cost: 2 random bytes a parameter, and updates in float32 where they were in half precision.

    Args:
      key: of the draws, which are those of fold_in(fold_in(key, count), hash of the leaf's path): the same for every
        sharding. Without it the extra argument `rng` takes its place, which `train.make_step` gives anew at each step.

    Returns:
      A transformation with the state `StochasticRoundingState`, whose `update` needs params.

    Raises:
      ValueError: `update` without params, or with neither `key` nor the extra argument `rng`.

    Source: Deep Learning with Limited Numerical Precision (2015, Gupta et al.), equation for stochastic rounding in
    section 4.
    """

    def init(params):
        del params
        return StochasticRoundingState(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, *, rng=None, **extra_args):
        del extra_args
        if params is None:
            raise ValueError("stochastic_rounding needs params: tx.update(grads, state, params)")
        if key is None and rng is None:
            raise ValueError(
                "stochastic_rounding needs the extra argument rng: tx.update(grads, state, params, rng=key), "
                "or a key of its own: stochastic_rounding(key=key)"
            )
        draw_key = jax.random.fold_in(rng if key is None else key, state.count)
        updates = tree_lib.map_with_path(lambda path, u, p: _round_update(draw_key, path, u, p), updates, params)
        return updates, StochasticRoundingState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _round_update(key, path: str, u, p):
    p = jnp.asarray(p)
    if p.dtype not in (jnp.bfloat16, jnp.float16):
        return u
    wide, u = p.astype(jnp.float32), jnp.asarray(u).astype(jnp.float32)
    # crc32 and not `hash`: the same in every process.
    random = jax.random.bits(jax.random.fold_in(key, zlib.crc32(path.encode())), p.shape, jnp.uint16)
    total = wide + u
    rounded = _round(total, p.dtype, random)
    change = rounded - wide
    # Elsewhere u stays as it is, and apply_updates rounds p + u to the nearest: to infinity only where it must.
    is_inside = jnp.isfinite(total) & (jnp.abs(rounded) <= float(jnp.finfo(p.dtype).max))
    return jnp.where(is_inside & jnp.isfinite(change), change, u)


def _round(x: Float[Array, "..."], dtype, random: UInt16[Array, "..."]) -> Float[Array, "..."]:
    """Finite float32 values rounded to the values of a half dtype, or beyond them to the next step.

    The bits of a float, without its sign, are an integer that counts the values from zero on. So a random number below
    one step of the half dtype, added to them, carries into the step with the right probability, at powers of two as
    elsewhere, and what is below the step is cut off.
    """
    dropped = jnp.finfo(jnp.float32).nmant - jnp.finfo(dtype).nmant
    below = jnp.uint32(2**dropped - 1)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = (bits + (random >> (16 - dropped)).astype(jnp.uint32)) & ~below
    rounded = jax.lax.bitcast_convert_type(bits, jnp.float32)
    if dtype == jnp.float16:
        is_subnormal = jnp.abs(x) < float(jnp.finfo(dtype).tiny)
        rounded = jnp.where(is_subnormal, _round_fixed(x, float(jnp.finfo(dtype).smallest_subnormal), random), rounded)
    return rounded


def _round_fixed(x, step: float, random):
    """Rounds to multiples of a step: all subnormals have the same, which float32 numbers have not."""
    scaled = jnp.abs(x) / step
    low = jnp.floor(scaled)
    up = jnp.round((scaled - low) * 2.0**16) > random
    return jnp.copysign((low + up) * step, x)
