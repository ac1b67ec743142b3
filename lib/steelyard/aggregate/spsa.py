"""One byte per gradient: training by forward passes, over machines that exchange scalars (2023, Zelikman et al.).

Just One Byte (per gradient): A Note on Low-Bandwidth Decentralized Language Model Finetuning Using Shared Randomness.

A machine perturbs the parameters in a random direction, measures by how much its loss changes, and sends that number
as a byte. Who holds the root key can make the direction again, so that the byte is the whole gradient:

    z = normal(key),  g = (loss(p + eps z) - loss(p - eps z)) / (2 eps),  p <- p - learning_rate c sum_n g_n z_n.

Words: a *round* is one update; a *machine* is a number, the same in all rounds in which it takes part; it sends some
*samples* a round, each of a direction of its own; the *log* holds the bytes of all rounds. Byte 0 means "nothing", from
a machine that is away or whose loss was not finite. Membership needs no other message: who joins late replays the log
from the first parameters, or from anyone's later ones, and holds the same bits as all others.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Key, UInt8

from steelyard import choices, precision

PyTree = Any

_SCALES = {"mean": lambda count: 1 / count, "sqrt": lambda count: 1 / jnp.sqrt(count)}
# ln |g| goes in steps of 1/8 around that of code 64.
_STEPS, _MIDDLE, _REACH = 8, 64, 63


def _byte_values() -> Float32[np.ndarray, "256"]:
    codes = np.arange(256)
    low = codes & 127
    values = np.where(codes < 128, 1, -1) * np.exp((low - _MIDDLE) / _STEPS)
    return np.where(low == 0, 0, values).astype(np.float32)


# A table, because devices differ in the last bit of their exponentials.
_BYTE_VALUES = _byte_values()


def encode_byte(g: Float[Array, "..."]) -> UInt8[Array, "..."]:
    """A number as a byte: bit 7 its sign, the others its logarithm.

        0 for 0, NaN and infinities;  else low 7 bits = 64 + clip(round(8 ln |g|), -63, 63).

    The range is e^(+-7.875), 0.00038 to 2632, in steps of 13%; what lies outside goes to its ends.
    """
    g = jnp.asarray(g)
    usable = jnp.isfinite(g) & (g != 0)
    logs = jnp.round(_STEPS * jnp.log(jnp.abs(jnp.where(usable, precision.wide(g), 1))))
    low = (_MIDDLE + jnp.clip(logs, -_REACH, _REACH)).astype(jnp.uint8)
    return jnp.where(usable, low | jnp.where(g < 0, np.uint8(128), np.uint8(0)), np.uint8(0))


def decode_byte(codes: UInt8[Array, "..."]) -> Float32[Array, "..."]:
    """The numbers that bytes stand for: `sign exp((low - 64) / 8)`, and 0 for 0; the same bits on every device."""
    return jnp.asarray(_BYTE_VALUES)[codes]


def spsa_key(
    root: Key[Array, ""], step: Int[Array, ""] | int, machine: Int[Array, ""] | int, sample: Int[Array, ""] | int = 0
) -> Key[Array, ""]:
    """The key of the direction of one sample: `root` with the round, the machine and the sample folded in."""
    key = jax.random.fold_in(jax.random.fold_in(root, step), machine)
    return jax.random.fold_in(key, sample)


def spsa_projected_gradient(
    loss_fn: Callable[[PyTree], Float[Array, ""]], params: PyTree, key: Key[Array, ""], *, epsilon: float = 1e-3
) -> Float[Array, ""]:
    """The slope of the loss along a random direction, from two forward passes:

        g = (loss(p + eps z) - loss(p - eps z)) / (2 eps),   z of leaf i = normal(fold_in(key, i)) in float32.

    `g z` is an unbiased estimate of the gradient, up to eps^2. Memory is that of the parameters plus one leaf.

    Args:
      loss_fn: `params -> scalar`.
      params: floating-point leaves, counted in the order of `jax.tree.leaves`. Perturbed ones are rounded to the
        dtype of their leaf: for bfloat16 an epsilon below 1e-2 would be lost.
      key: of the direction, such as `spsa_key`.
      epsilon: length of the step, in units of a standard normal entry.

    Returns:
      g, in float32 at least. It is not finite if a loss is not: `encode_byte` drops it then.

    Raises:
      ValueError: `epsilon` is not positive.
    """
    choices.require_within("epsilon", epsilon, "(0, inf)")
    ahead = loss_fn(_along(params, key, epsilon))
    behind = loss_fn(_along(params, key, -epsilon))
    return (precision.wide(ahead) - precision.wide(behind)) / (2 * epsilon)


def spsa_apply(
    params: PyTree,
    keys: Key[Array, "N"],
    projected: Float[Array, "N"],
    *,
    learning_rate: Float[Array, ""] | float,
    scale: str = "mean",
) -> PyTree:
    """One update from N slopes, whose directions are made again: `p - learning_rate c sum_n g_n z(key_n)`.

    Leaf by leaf, one direction at a time, summed in float32 and added to the leaf once. Costs N random numbers for each
    parameter, and the memory of a few leaves whatever N is.

    Args:
      params: the parameters at which the slopes were measured.
      keys: of the directions.
      projected: the slopes, finite. With none of them the parameters stay as they are.
      learning_rate: may be traced.
      scale: "mean" for c = 1 / N, "sqrt" for 1 / sqrt(N).

    Raises:
      ValueError: an unknown scale, or keys and slopes of unequal number.
    """
    choices.require("scale", scale, _SCALES)
    if jnp.ndim(keys) != 1 or jnp.shape(keys) != jnp.shape(projected):
        raise ValueError(
            f"keys and projected must be vectors of one length, got {jnp.shape(keys)} and {jnp.shape(projected)}"
        )
    if keys.shape[0] == 0:
        return params
    return _descend(params, keys, projected, learning_rate * _SCALES[scale](jnp.float32(keys.shape[0])))


@functools.partial(jax.jit, static_argnames=("scale",))
def spsa_round(
    params: PyTree,
    root: Key[Array, ""],
    step: Int[Array, ""] | int,
    codes: UInt8[Array, "machines samples"],
    *,
    learning_rate: Float[Array, ""] | float,
    scale: str = "mean",
) -> PyTree:
    """One update from the bytes of a round; N counts the bytes that are not 0.

    Called as it is, not inside another jitted function, it is one program, whatever calls it. Machines of one kind that
    start from the same bits then hold the same bits after it.

    Args:
      params: as before the round.
      root: the key that all machines share.
      step: number of the round.
      codes: what each machine sent; 0 for those that are away.
      learning_rate: may be traced, and change from round to round.
      scale: as in `spsa_apply`.

    Raises:
      ValueError: an unknown scale, or codes that are not a table of bytes.
    """
    choices.require("scale", scale, _SCALES)
    if jnp.ndim(codes) != 2 or codes.dtype != jnp.uint8:
        raise ValueError(f"codes must be uint8 [machines, samples], got {codes.dtype} of shape {jnp.shape(codes)}")
    machines, samples = codes.shape
    of_machine = jax.vmap(spsa_key, (None, None, None, 0))
    keys = jax.vmap(of_machine, (None, None, 0, None))(root, step, jnp.arange(machines), jnp.arange(samples))
    projected = decode_byte(codes).ravel()
    count = jnp.maximum(jnp.sum(projected != 0), 1).astype(jnp.float32)
    return _descend(params, keys.ravel(), projected, learning_rate * _SCALES[scale](count))


def spsa_replay(
    params: PyTree,
    root: Key[Array, ""],
    log: Iterable[UInt8[Array, "machines samples"]],
    *,
    learning_rate: float,
    first_step: int = 0,
    scale: str = "mean",
) -> PyTree:
    """The parameters after the rounds of a log, bit for bit those of a machine that ran `spsa_round` in each.

    A loop in Python over one compiled program: a scan would be another program, which may round differently.

    Args:
      params: the first ones, or a snapshot taken before round `first_step`.
      root: the key that all machines share.
      log: the bytes of each round, from round `first_step` on, such as an array uint8 [rounds, machines, samples].
      learning_rate: the one of these rounds.
      first_step: number of the log's first round.
      scale: as in `spsa_apply`.

    Raises:
      ValueError: as `spsa_round`.
    """
    for step, codes in enumerate(log, start=first_step):
        params = spsa_round(params, root, step, codes, learning_rate=learning_rate, scale=scale)
    return params


def _direction(key: Key[Array, ""], index: int, leaf: Array) -> Float32[Array, "..."]:
    return jax.random.normal(jax.random.fold_in(key, index), jnp.shape(leaf), jnp.float32)


def _along(params: PyTree, key: Key[Array, ""], length: float) -> PyTree:
    def move(index, leaf):
        return (precision.wide(leaf) + length * _direction(key, index, leaf)).astype(jnp.result_type(leaf))

    return _map_leaves(move, params)


def _descend(params: PyTree, keys: Key[Array, "N"], projected: Float[Array, "N"], rate: Float[Array, ""]) -> PyTree:
    projected = jnp.asarray(projected, jnp.float32)

    def move(index, leaf):
        def add(n, total):
            return total + projected[n] * _direction(keys[n], index, leaf)

        # Small updates of half-precision leaves are summed before they are rounded.
        total = jax.lax.fori_loop(0, keys.shape[0], add, jnp.zeros(jnp.shape(leaf), jnp.float32))
        return (precision.wide(leaf) - rate * total).astype(jnp.result_type(leaf))

    return _map_leaves(move, params)


def _map_leaves(fn: Callable[[int, Array], Array], tree: PyTree) -> PyTree:
    leaves, structure = jax.tree.flatten(tree)
    return structure.unflatten(fn(index, leaf) for index, leaf in enumerate(leaves))
