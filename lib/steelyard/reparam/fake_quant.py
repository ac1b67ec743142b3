"""Training through quantized weights: rounded on the way forward, straight-through on the way back.

Sources: Pareto-Optimal Quantized ResNet Is Mostly 4-bit (2021) for scales from the range of the weights; Learned Step
Size Quantization (2020) for `lsq`.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from steelyard import choices, formats, quant
from steelyard import tree as tree_lib
from steelyard.reparam import base
from steelyard_kernels import quant_matmul

PyTree = Any

METHODS = ("range", "lsq")
_SMALLEST_SCALE = 1e-5


def lsq(x: Float[Array, "..."], scale: Float[Array, "..."], *, bits: int, signed: bool = True) -> Float[Array, "..."]:
    """Rounds to a grid whose step is learned.

    y = round(clip(x / s, low, high)) * s with low, high = -2^(b-1), 2^(b-1) - 1, or 0, 2^b - 1 if unsigned.
    dy/dx = 1 where low <= x / s <= high, else 0; dy/ds = round(x / s) - x / s there, low below, high above. The
    gradient of a scale is summed over its block and multiplied by 1 / sqrt(high * n), n the entries of the block.

    Args:
      x: values.
      scale: positive steps, a scalar or one for each block: as many axes as `x`, each dividing its axis there.
      bits: of the grid.
      signed: whether it has negative points.

    Returns:
      Of the shape and dtype of `x`; computed in float32 at least.

    Raises:
      ValueError: the grid has no positive point, or the shapes do not fit.
    """
    return _lsq(*_grid(bits, signed), jnp.asarray(x), jnp.asarray(scale))


def lsq_init(
    x: Float[Array, "..."], *, bits: int, signed: bool = True, block: Sequence[int] | None = None
) -> Float[Array, "..."]:
    """The first steps for `lsq`: 2 * mean |x| / sqrt(high) of each block, 1 for a block of zeros.

    Args:
      x: values.
      bits: of the grid.
      signed: whether it has negative points.
      block: for each axis how many consecutive entries share a scale, -1 for all; `None` is one scale for each entry
        of the last axis (for fewer than two axes one for everything).

    Returns:
      float32 scales, for each axis as many as there are blocks.

    Raises:
      ValueError: the grid has no positive point, or `block` does not divide the shape.
    """
    _, high = _grid(bits, signed)
    x = jnp.asarray(x)
    counts = quant.block_counts(x.shape, block)
    wide = jnp.abs(x).astype(jnp.promote_types(x.dtype, jnp.float32))
    scale = 2 * _block_sum(wide, counts) / (_block_size(x.shape, counts) * math.sqrt(high))
    return jnp.where(scale > 0, scale, 1).astype(jnp.float32)


def fake_quant(
    format: str = "int4",
    *,
    method: Literal["range", "lsq"] = "range",
    block: Sequence[int] | None = None,
    bound: Literal["max", "edge"] = "max",
    gradient: Literal["identity", "clipped"] = "identity",
    overrides: Mapping[str, str | None] | None = None,
    where: tree_lib.Where = r".*kernel$",
) -> base.Reparam:
    """The model sees weights rounded to a few bits.

    "range": the scale of a block is max |w| / q of the current weights, recomputed at every step and not
    differentiated. "lsq": the scale is trained (see `lsq`); stored is then `{"base": params, "fake_quant": scales}`
    with the scales under their parameter's path, dots for slashes, and ".scale", so that the ends of other paths stay
    as they were. `project` keeps those scales at 1e-5 or more.

    `finish` stores `formats.Quantized`; a `formats.NMSparse`, from a link before this one, keeps its positions and
    gets quantized values, with the scales of the masked dense weight.

    Args:
      format: name of the grid; for "lsq" an integer one.
      method: "range" or "lsq".
      block: which entries share a scale, as in `quant.calibrate`.
      bound: "max" puts the largest weight on the last grid point, "edge" on the edge of its cell; for "range".
      gradient: "identity" passes it everywhere, "clipped" not to weights beyond the grid; for "range".
      overrides: path pattern -> another format for those of the selected leaves, `None` to leave them as they are; the
        last pattern that matches a path decides.
      where: which leaves; those without floating numbers are skipped.

    Raises:
      ValueError: an unknown name, or a format that the method lacks; at `init`, a pattern matches nothing, or `block`
        does not divide a leaf; at `finish`, scales that do not fit the groups of an N:M weight, or a weight node of
        another kind.
    """
    overrides = dict(overrides or {})
    _check_arguments(method, bound, gradient, [format, *(name for name in overrides.values() if name is not None)])
    is_learned = method == "lsq"

    def quantized(fn, stored):
        """`fn` of weight, format and learned scale for each leaf that gets fewer bits; the others as they are."""
        params, scales = (stored["base"], stored["fake_quant"]) if is_learned else (stored, {})
        plan = _plan(params, format, overrides, where)

        def leaf(path, w):
            return fn(w, plan[path], scales.get(_scale_name(path))) if path in plan else w

        return tree_lib.map_with_path(leaf, params, is_leaf=formats.is_weight)

    def scale_of(w, name, learned):
        if is_learned:
            return _at_least_smallest(learned)
        w = jax.lax.stop_gradient(w)
        return quant.calibrate(w, name, block=block, method="range", bound=bound).scale

    def see(w, name, learned):
        return quant.fake_quantize(w, name, scale_of(w, name, learned), gradient=gradient)

    def see_learned(w, name, learned):
        return lsq(w, scale_of(w, name, learned), bits=quant.get_format(name).bits)

    def store(w, name, learned):
        if not formats.is_weight(w):
            scale = scale_of(w, name, learned)
            return formats.Quantized.from_codes(quant.encode(w, name, scale), scale, None, name, w.dtype)
        if not isinstance(w, formats.NMSparse) or formats.is_weight(w.values):
            raise ValueError(
                f"fake_quant quantizes arrays and NMSparse weights of arrays; it came to a {type(w).__name__}"
            )
        return w.quantize(name, scale=scale_of(w.dense(), name, learned))

    def init(params, rng):
        del rng
        plan = _plan(params, format, overrides, where)
        weights = {path: w for path, w in tree_lib.flatten(params) if path in plan}
        _check_blocks(weights, block)
        if not is_learned:
            return params, ()
        scales = {
            _scale_name(path): lsq_init(w, bits=quant.get_format(plan[path]).bits, block=block)
            for path, w in weights.items()
        }
        return {"base": params, "fake_quant": scales}, ()

    def apply(stored, state, *, step, rng, train):
        del state, step, rng
        return quantized(see_learned if is_learned and train else see, stored)

    def project(stored, state):
        del state
        return stored | {
            "fake_quant": {key: jnp.maximum(s, _SMALLEST_SCALE) for key, s in stored["fake_quant"].items()}
        }

    def finish(stored, state):
        del state
        return quantized(store, stored)

    return base.Reparam(init, apply, None, project if is_learned else None, finish)


def _plan(params: PyTree, format: str, overrides: Mapping[str, str | None], where: tree_lib.Where) -> dict[str, str]:
    """path -> format, of the leaves that get fewer bits."""
    chosen = jax.tree.leaves(tree_lib.select(params, where, is_leaf=formats.is_weight))
    leaves = zip(tree_lib.flatten(params, is_leaf=formats.is_weight), chosen, strict=True)
    plan = {path: format for (path, w), pick in leaves if pick and jnp.issubdtype(w.dtype, jnp.floating)}
    for pattern, name in overrides.items():
        hits = tree_lib.select(dict.fromkeys(plan, 0), pattern, name="overrides")
        plan |= {path: name for path, hit in hits.items() if hit}
    return {path: name for path, name in plan.items() if name is not None}


def _scale_name(path: str) -> str:
    return path.replace("/", ".") + ".scale"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lsq(low, high, x, scale):
    wide = jnp.promote_types(x.dtype, jnp.float32)
    code = jnp.clip(jnp.round(_in_steps(x, scale, wide)), low, high)
    return (code * quant_matmul.expand(scale.astype(wide), x.shape)).astype(x.dtype)


def _lsq_forward(low, high, x, scale):
    return _lsq(low, high, x, scale), (x, scale)


def _lsq_backward(low, high, residuals, g):
    x, scale = residuals
    wide = jnp.promote_types(x.dtype, jnp.float32)
    steps = _in_steps(x, scale, wide)
    is_inside = (steps >= low) & (steps <= high)
    slope = jnp.where(is_inside, jnp.round(steps) - steps, jnp.clip(steps, low, high))
    factor = 1 / math.sqrt(high * _block_size(x.shape, scale.shape))
    scale_gradient = factor * _block_sum(g.astype(wide) * slope, scale.shape)
    return jnp.where(is_inside, g, 0), scale_gradient.astype(scale.dtype)


_lsq.defvjp(_lsq_forward, _lsq_backward)


def _in_steps(x, scale, dtype):
    return quant_matmul.divide(x.astype(dtype), quant_matmul.expand(scale.astype(dtype), x.shape))


def _block_size(shape: tuple[int, ...], counts: tuple[int, ...]) -> int:
    return math.prod(shape) // max(math.prod(counts), 1)


def _block_sum(x: Array, counts: tuple[int, ...]) -> Array:
    """The sum of each block; of everything if there is one for all, `counts` being empty."""
    if not counts:
        return jnp.sum(x)
    split = [n for size, count in zip(x.shape, counts, strict=True) for n in (count, size // max(count, 1))]
    return jnp.sum(x.reshape(split), axis=tuple(range(1, len(split), 2)))


def _at_least_smallest(scale: Array) -> Array:
    """max(scale, 1e-5), with the gradient of the identity."""
    return jnp.where(scale >= _SMALLEST_SCALE, scale, scale - jax.lax.stop_gradient(scale) + _SMALLEST_SCALE)


def _grid(bits: int, signed: bool) -> tuple[int, int]:
    if bits < (2 if signed else 1):
        raise ValueError(
            f"bits={bits}, signed={signed}: the grid has no positive point; at least {1 + signed} are needed"
        )
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


def _check_arguments(method: str, bound: str, gradient: str, names: Sequence[str]) -> None:
    choices.require("method", method, METHODS)
    choices.require("bound", bound, ("max", "edge"))
    choices.require("gradient", gradient, ("identity", "clipped"))
    for name in names:
        if quant.get_format(name).kind != "integer" and method == "lsq":
            raise ValueError(f"format={name!r}: method='lsq' needs an integer format")


def _check_blocks(weights: Mapping[str, Array], block: Sequence[int] | None) -> None:
    for path, w in weights.items():
        try:
            quant.block_counts(w.shape, block)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    if len({_scale_name(path) for path in weights}) < len(weights):
        raise ValueError("two parameter paths differ only in dots and slashes; rename one, their scales would collide")
