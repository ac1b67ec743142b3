"""Master weights in full precision, a copy in 16 bits for the model.

Source: Mixed Precision Training (2018, Micikevicius et al.), section 3.1.
"""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from steelyard import choices, formats
from steelyard import tree as tree_lib
from steelyard.reparam import base

PyTree = Any


def cast(
    dtype: Any = jnp.bfloat16, *, keep: tree_lib.Where | None = None, finish: Literal["cast", "keep"] = "cast"
) -> base.Reparam:
    """The model sees floating parameters in `dtype`; the stored ones, and so their gradients, keep their own.

    The stored tree is the master copy, so that no other is needed. Integers are left alone.

    Args:
      dtype: a floating dtype.
      keep: leaves that the model sees as they are stored, such as the scales of norms.
      finish: "cast" deploys what the model sees in training; "keep" deploys the stored parameters, and then
        `apply(train=False)` shows those too. Of a weight node "cast" changes the dtype of what it decodes to.

    Raises:
      ValueError: `dtype` is not a floating dtype, or `finish` is unknown; at `init`, `keep` matches no parameter; at
        `finish`, a weight node cannot be cast without another rounding.
    """
    _check_dtype(dtype)
    choices.require("finish", finish, ("cast", "keep"))

    def init(params, rng):
        del rng
        _cast_tree(params, dtype, keep)
        return params, ()

    def apply(stored, state, *, step, rng, train):
        del state, step, rng
        return stored if finish == "keep" and not train else _cast_tree(stored, dtype, keep)

    def store(stored, state):
        del state
        return stored if finish == "keep" else _cast_tree(stored, dtype, keep)

    return base.Reparam(init, apply, None, None, store)


def _check_dtype(dtype: Any) -> None:
    try:
        is_floating = jnp.issubdtype(dtype, jnp.floating)
    except TypeError:  # a misspelt name
        is_floating = False
    if not is_floating:
        near = tree_lib.nearest(str(dtype), ("bfloat16", "float16", "float32"), 1) or ["bfloat16"]
        raise ValueError(f"dtype={dtype!r} is not a floating dtype; did you mean {near[0]!r}?")


def _cast_tree(tree: PyTree, dtype: Any, keep: tree_lib.Where | None) -> PyTree:
    if keep is None:
        return tree_lib.map_with_path(lambda path, x: _cast(path, x, dtype), tree, is_leaf=formats.is_weight)
    kept = tree_lib.select(tree, keep, name="keep", is_leaf=formats.is_weight)
    return tree_lib.map_with_path(
        lambda path, x, is_kept: x if is_kept else _cast(path, x, dtype), tree, kept, is_leaf=formats.is_weight
    )


def _cast(path: str, x: Any, dtype: Any) -> Any:
    if isinstance(x, formats.NMSparse):
        return dataclasses.replace(x, values=_cast(path, x.values, dtype))
    if isinstance(x, formats.Quantized):
        return dataclasses.replace(x, dtype=jnp.dtype(dtype).name)
    if formats.is_weight(x):
        raise ValueError(f"{path} is stored as {type(x).__name__}, which `cast` does not know how to cast exactly")
    return jnp.asarray(x).astype(dtype) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x
