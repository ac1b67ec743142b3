"""Patterns: in what units entries go, one by one, in groups, in blocks or in whole channels.

Source of blocks with pooled scores and of the N:M notation: Accelerating Sparse Deep Neural Networks (2021, Mishra et
al.) for N:M; To prune, or not to prune (2017, Zhu and Gupta) for gradual pruning of single entries and blocks.
"""

import re
from typing import NamedTuple

from steelyard import choices

__all__ = ["NM", "Block", "Channel", "Unstructured", "parse"]

POOLS = ("mean", "max")
_FORMS = ("unstructured", "2:4", "block:4x4", "channel:-1")


class Unstructured(NamedTuple):
    """Every entry by itself."""


class NM(NamedTuple):
    """n entries stay of every m consecutive ones along an axis; the default axis is the contracted one."""

    n: int
    m: int
    axis: int = -2


class Block(NamedTuple):
    """Blocks of the first two axes stay or go as a whole, by the mean or the max of their scores."""

    shape: tuple[int, int] = (4, 4)
    pool: str = "mean"


class Channel(NamedTuple):
    """Slices along an axis stay or go as a whole, by the sum of their scores; the default axis is the output."""

    axis: int = -1


Pattern = Unstructured | NM | Block | Channel


def parse(pattern: str | Pattern) -> Pattern:
    """A pattern from its text.

    Args:
      pattern: "unstructured"; "2:4" or "2:4:-1" with an axis; "block:4x4" or "block:4x4:max"; "channel" or
        "channel:-1". A pattern is given back as it is.

    Raises:
      ValueError: the text is none of these forms, or its numbers are out of range.

    >>> parse("2:4"), parse("block:8x1:max")
    (NM(n=2, m=4, axis=-2), Block(shape=(8, 1), pool='max'))
    """
    if isinstance(pattern, Pattern):
        return check(pattern)
    if not isinstance(pattern, str):
        raise ValueError(f"pattern={pattern!r} is neither a pattern nor a text such as {', '.join(_FORMS)}")
    if pattern == "unstructured":
        return Unstructured()
    if match := re.fullmatch(r"(\d+):(\d+)(?::(-?\d+))?", pattern):
        n, m, axis = match.groups()
        return check(NM(int(n), int(m), -2 if axis is None else int(axis)))
    if match := re.fullmatch(r"block:(\d+)x(\d+)(?::(\w+))?", pattern):
        rows, columns, pool = match.groups()
        return check(Block((int(rows), int(columns)), pool or "mean"))
    if match := re.fullmatch(r"channel(?::(-?\d+))?", pattern):
        return Channel(-1 if match[1] is None else int(match[1]))
    choices.require("pattern", pattern, _FORMS)
    raise AssertionError("unreachable: every form of the list is parsed above")


def check(pattern: Pattern) -> Pattern:
    """The pattern, if its numbers are possible.

    Raises:
      ValueError: they are not.
    """
    if isinstance(pattern, NM):
        check_nm(pattern.n, pattern.m)
    if isinstance(pattern, Block):
        choices.require("pool", pattern.pool, POOLS)
        if len(pattern.shape) != 2 or min(pattern.shape) < 1:
            raise ValueError(f"shape={pattern.shape} of a block must be two numbers of at least 1")
    return pattern


def check_nm(n: int, m: int) -> None:
    """Refuses an N:M pattern that is not 0 <= n <= m with m >= 1.

    Raises:
      ValueError: the pattern is impossible.
    """
    if m < 1 or not 0 <= n <= m:
        raise ValueError(f"n={n}, m={m} is not a pattern: 0 <= n <= m and m >= 1 are needed")
