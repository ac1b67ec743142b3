"""One name, one dataset."""

import inspect
import os
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from steelyard import tree
from steelyard.data import embedded, tfds
from steelyard.data import source as source_lib

EMBEDDED: Mapping[str, Callable[..., source_lib.Arrays]] = MappingProxyType(
    {
        "breast_cancer": embedded.breast_cancer,
        "diabetes": embedded.diabetes,
        "digits": embedded.digits,
        "python_source": embedded.python_source,
        "wine": embedded.wine,
    }
)


def load(
    name: str, *, split: str = "train", data_dir: str | os.PathLike | None = None, **options: Any
) -> source_lib.Source:
    """Opens a dataset by name.

    Args:
      name: an embedded dataset, or "tfds:<name>" for any that TFDS has prepared.
      split: "train" or "test"; for TFDS any of its split expressions.
      data_dir: the folder of prepared TFDS datasets; embedded datasets need none.
      **options: the options of the dataset's own function: `label_noise` of `digits`, `length` of `python_source`,
        `standardize` of the tables, `in_memory`, `text` and `length` of `tfds.open_tfds`.

    Returns:
      `Arrays` or `Records`.

    Raises:
      ValueError: an unknown name, split or option.
      FileNotFoundError: a TFDS dataset that is not there.
    """
    if name.startswith(tfds.PREFIX):
        _check_options(name, tfds.open_tfds, options)
        return tfds.open_tfds(name.removeprefix(tfds.PREFIX), split=split, data_dir=data_dir, **options)
    if name not in EMBEDDED:
        near = tree.nearest(name, EMBEDDED)
        hint = f"nearest: {', '.join(near)}; " if near else ""
        raise ValueError(f"unknown dataset {name!r}; {hint}embedded: {', '.join(EMBEDDED)}; others are 'tfds:<name>'")
    _check_options(name, EMBEDDED[name], options)
    return EMBEDDED[name](split=split, **options)


def _check_options(name: str, function: Callable, options: Mapping[str, Any]) -> None:
    allowed = set(inspect.signature(function).parameters) - {"name", "split", "data_dir"}
    for option in options:
        if option not in allowed:
            raise ValueError(f"{name} has no option {option!r}; its options: {', '.join(sorted(allowed)) or 'none'}")
