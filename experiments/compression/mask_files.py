"""Masks on disk, as bits."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from steelyard import tree as tree_lib
from steelyard.sparsity import masks as masks_lib
from steelyard.sparsity import patterns

PyTree = Any


def write(path: pathlib.Path, masks: PyTree) -> None:
    """Writes masks, whole or not at all."""
    flat = dict(tree_lib.flatten(masks))
    arrays = {f"{i}": np.packbits(np.asarray(mask)) for i, mask in enumerate(flat.values())}
    shapes = {p: list(mask.shape) for p, mask in flat.items()}
    temporary = path.with_name("masks.tmp.npz")
    np.savez(temporary, shapes=np.array(json.dumps(shapes)), **arrays)
    temporary.replace(path)


def load(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Path -> mask, of a finished job.

    Raises:
      FileNotFoundError: the folder holds no masks.
    """
    path = folder / "masks.npz"
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no masks (masks.npz): give the folder of a finished job of this main")
    with np.load(path) as arrays:
        shapes: Mapping[str, list[int]] = json.loads(str(arrays["shapes"]))
        return {
            name: np.unpackbits(arrays[f"{i}"], count=math.prod(shape)).reshape(shape).astype(bool)
            for i, (name, shape) in enumerate(shapes.items())
        }


def read(folder: pathlib.Path, params: PyTree, pattern: patterns.Pattern, where: str) -> PyTree:
    """The masks of a finished job, as a tree like the parameters (or their shapes).

    Raises:
      ValueError: they are masks of another model, or keep more than an N:M pattern has room for.
    """
    found = load(folder)
    known = {path: tuple(w.shape) for path, w in tree_lib.flatten(params)}
    odd = [path for path, mask in found.items() if known.get(path) != mask.shape]
    if odd:
        there = f"{odd[0]} has shape {found[odd[0]].shape} there and {known.get(odd[0], 'no place')} here"
        raise ValueError(f"{where}.masks={str(folder)!r} are masks of another model: {there}")
    if isinstance(pattern, patterns.NM):
        for path, mask in found.items():
            most = np.asarray(masks_lib.nm_mask(jnp.asarray(mask, jnp.float32), pattern.n, pattern.m, pattern.axis))
            if np.any(mask & ~most):
                raise ValueError(
                    f"{where}.masks={str(folder)!r} keep more than {pattern.n} of {pattern.m} entries in a group of "
                    f"{path}: give the masks of an N:M job, or another pattern"
                )
    return tree_lib.map_with_path(lambda path, w: jnp.asarray(found[path]) if path in found else None, params)
