"""Sharding rules: which axes of an array lie over which axes of the mesh.

A rule is a pair `(regex, entries)`. The regex must match the whole path of a leaf; the first that does applies.
`entries` has one item for each dimension: `None`, the name of a mesh axis or a tuple of names. One `...` stands for
any number of `None`, so that a rule for a kernel also fits a stack of such kernels. What a rule asks for and the shape
does not allow is dropped (`choose` says how, `sharding.explain` says where).
"""

import math
import re
from collections.abc import Mapping, Sequence
from types import EllipsisType
from typing import NamedTuple

from jax.sharding import PartitionSpec

from steelyard import choices, tree

Axes = None | str | tuple[str, ...]
Entries = tuple[Axes | EllipsisType, ...]
Rule = tuple[str, Entries]

AXES = ("replica", "data", "fsdp", "context", "tensor", "expert")
"""The axes of our meshes, in order of falling tolerance to distance (see `sharding`)."""

MIN_SIZE = 2**16
"""Arrays with fewer entries are not filled: the collective would cost more than the memory that it saves."""


class _Fields(NamedTuple):
    rules: tuple[Rule, ...]
    fill: Axes


class RuleSet(_Fields):
    """Rules, and the axes that go over the largest dimension of what no rule has sharded.

    Attributes:
      rules: pairs `(regex, entries)`, first match wins.
      fill: a mesh axis, a tuple of them, or `None`: see `choose`.

    Raises:
      ValueError: a malformed regex, more than one `...`, or an entry that is not a name.
    """

    def __new__(cls, rules: Sequence[Rule] = (), fill: Axes = None):
        for number, (pattern, entries) in enumerate(rules):
            _check_rule(number, pattern, entries)
        return super().__new__(cls, tuple((pattern, tuple(entries)) for pattern, entries in rules), fill)


def as_rule_set(rules: RuleSet | Sequence[Rule], fill: Axes = None) -> RuleSet:
    """A rule set from one or from plain pairs; `fill` overrides its own if given."""
    given = rules if isinstance(rules, RuleSet) else RuleSet(tuple(rules))
    return given if fill is None else RuleSet(given.rules, fill)


def _check_rule(number: int, pattern: str, entries: Entries) -> None:
    where = f"rule {number} ({pattern!r})"
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{where} is not a regular expression: {error}") from error
    if isinstance(entries, str):
        raise ValueError(f"{where}: entries={entries!r} must be a tuple, as in ({entries!r},)")
    if sum(entry is ... for entry in entries) > 1:
        raise ValueError(f"{where}: at most one `...` is allowed, got {entries}")
    for entry in entries:
        names = entry if isinstance(entry, tuple) else (entry,)
        if not all(name is None or name is ... or isinstance(name, str) for name in names):
            raise ValueError(f"{where}: {entry!r} is not None, `...`, a name or a tuple of names")


class Choice(NamedTuple):
    """Where an array lies, and why.

    Attributes:
      entries: for each dimension the mesh axes that shard it.
      rule: number of the rule that applied, or `None`.
      dropped: what the rule or `fill` asked for and did not get, with the reason.
      filled: whether `fill` has added an axis.
    """

    entries: tuple[tuple[str, ...], ...]
    rule: int | None = None
    dropped: tuple[str, ...] = ()
    filled: bool = False

    @property
    def spec(self) -> PartitionSpec:
        """The entries as JAX writes them: bare names, no `None` at the end."""
        short = [None if not names else names[0] if len(names) == 1 else names for names in self.entries]
        while short and short[-1] is None:
            short.pop()
        return PartitionSpec(*short)


def choose(
    path: str,
    shape: Sequence[int],
    rules: RuleSet,
    axis_sizes: Mapping[str, int],
    *,
    min_size: int = MIN_SIZE,
    lenient: bool = False,
) -> Choice:
    """Applies the rules to one array.

    The first rule whose regex matches the whole path gives an entry for each dimension (without one: `None`). Over
    dimensions from left to right, axes are dropped that the mesh lacks, that have size 1 or that an earlier dimension
    has taken; then the last of the rest, for as long as their product does not divide the dimension. If none of the
    axes of `fill` is in use then, and the array has `min_size` entries, the largest unsharded dimension (the first of
    equals) that their product divides takes them all.

    The arrays inside a weight node (`dense/kernel/codes`), if no rule matches them, obey the first that matches the
    node, where their rank allows it.

    Args:
      path: keys joined by slashes, as `tree.paths` gives them.
      shape: the array's shape.
      rules: the rules and their `fill`.
      axis_sizes: size of each mesh axis by name.
      min_size: fewest entries that are worth filling.
      lenient: for what is no parameter (factored moments): a rule for another rank is passed over, not refused.

    Raises:
      ValueError: the rule has entries for another rank, or names an axis that is neither in `AXES` nor in the mesh.
    """
    number = _first_match(path, rules.rules)
    if number is None:
        number, lenient = _first_match(path.rpartition("/")[0], rules.rules), True
    if number is None or (lenient and not _fits_rank(rules.rules[number], len(shape))):
        choice = replicated(shape)
    else:
        choice = fit(shape, _expand(path, shape, rules.rules[number]), axis_sizes)._replace(rule=number)
    return fill(choice, shape, rules.fill, axis_sizes, min_size=min_size)


def replicated(shape: Sequence[int]) -> Choice:
    """The whole array on every device."""
    return Choice(((),) * len(shape))


def _first_match(path: str, rules: Sequence[Rule]) -> int | None:
    return next((number for number, (regex, _) in enumerate(rules) if re.fullmatch(regex, path)), None)


def _fits_rank(rule: Rule, ndim: int) -> bool:
    entries = rule[1]
    return ndim >= len(entries) - 1 if ... in entries else ndim == len(entries)


def _expand(path: str, shape: Sequence[int], rule: Rule) -> Entries:
    """The rule's entries, one for each dimension."""
    regex, entries = rule
    if not _fits_rank(rule, len(shape)):
        raise ValueError(
            f"rule {regex!r} has the entries {entries}, but {path} has shape {tuple(shape)}: give one entry for each "
            f"of its {len(shape)} dimensions, or `...` in place of some."
        )
    if ... not in entries:
        return entries
    at = entries.index(...)
    return entries[:at] + (None,) * (len(shape) - len(entries) + 1) + entries[at + 1 :]


def fit(shape: Sequence[int], entries: Entries, axis_sizes: Mapping[str, int]) -> Choice:
    """Keeps of the wished axes those that the shape and the mesh allow (see `choose`)."""
    taken, kept, dropped = set(), [], []
    for size, entry in zip(shape, entries, strict=True):
        here = []
        for name in _sharding_axes(entry, axis_sizes):
            if name in taken or name in here:
                dropped.append(f"{name} (already used)")
            else:
                here.append(name)
        while here and size % math.prod(axis_sizes[name] for name in here):
            product = "*".join(str(axis_sizes[name]) for name in here)
            dropped.append(f"{here.pop()} ({size} % {product})")
        taken.update(here)
        kept.append(tuple(here))
    return Choice(tuple(kept), dropped=tuple(dropped))


def _sharding_axes(axes: Axes, axis_sizes: Mapping[str, int]) -> tuple[str, ...]:
    """The axes that shard anything on this mesh; a name that no mesh would have is an error."""
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    for name in names:
        if name not in axis_sizes and name not in AXES:
            near = tree.nearest(name, (*axis_sizes, *AXES))
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"the axis {name!r} is neither in the mesh ({', '.join(axis_sizes)}) nor known{hint}")
    return tuple(name for name in names if axis_sizes.get(name, 1) > 1)


def fill(
    choice: Choice, shape: Sequence[int], axes: Axes, axis_sizes: Mapping[str, int], *, min_size: int = MIN_SIZE
) -> Choice:
    """Lays an array over `axes` too, along its largest free dimension, if it uses none of them yet (see `choose`)."""
    names = _sharding_axes(axes, axis_sizes)
    used = {name for entry in choice.entries for name in entry}
    if not names or used & set(names) or math.prod(shape) < min_size:
        return choice
    product = math.prod(axis_sizes[name] for name in names)
    fitting = [i for i, entry in enumerate(choice.entries) if not entry and shape[i] % product == 0]
    if not fitting:
        reason = f"{', '.join(names)} (fill: no free dimension of {tuple(shape)} % {product})"
        return choice._replace(dropped=(*choice.dropped, reason))
    largest = max(fitting, key=lambda i: shape[i])
    entries = (*choice.entries[:largest], names, *choice.entries[largest + 1 :])
    return choice._replace(entries=entries, filled=True)


# Presets.

# Features lie over `tensor` between these two kinds of kernels, so that a block of a transformer needs one sum over
# `tensor` after attention and one after the MLP.
_INTO_BLOCK = "query|key|value|qkv|up|gate"
_OUT_OF_BLOCK = "out|down"


def _at(names: str) -> str:
    """A regex for paths that end with one of `names`."""
    return rf"(?:.*/)?(?:{names})"


REPLICATE = RuleSet()
"""Every parameter on every device: plain data parallel."""

FSDP = RuleSet(fill="fsdp")
"""The largest dimension of each large parameter over `fsdp`."""

TRANSFORMER = RuleSet(
    (
        (_at("embedding"), (..., "tensor", "fsdp")),
        (_at(rf"(?:experts|moe)/(?:{_INTO_BLOCK})(?:/kernel)?"), (..., "expert", "fsdp", "tensor")),
        (_at(rf"(?:experts|moe)/(?:{_OUT_OF_BLOCK})(?:/kernel)?"), (..., "expert", "tensor", "fsdp")),
        (_at(rf"(?:{_INTO_BLOCK}|logits|head)/kernel"), (..., "fsdp", "tensor")),
        (_at(rf"(?:{_OUT_OF_BLOCK})/kernel"), (..., "tensor", "fsdp")),
        (_at(r"(?:stem|conv|shortcut)\w*/kernel"), (..., "fsdp", "tensor")),
        (_at("kernel"), (..., "fsdp", None)),
        (_at("bias|scale|mean|var"), (...,)),
    ),
    fill="fsdp",
)
"""Tensor parallel inside a block, `fsdp` over the rest; where the mesh has `tensor` 1 it is FSDP."""

PRESETS = {"replicate": REPLICATE, "fsdp": FSDP, "transformer": TRANSFORMER}


def preset(name: str) -> RuleSet:
    """The preset of that name: "replicate", "fsdp" or "transformer".

    Raises:
      ValueError: there is none; the text names the nearest.

    >>> preset("fsdp").fill
    'fsdp'
    """
    choices.require("preset", name, PRESETS)
    return PRESETS[name]
