"""What a compiled program moves, read from its text (`compiled.as_text()`).

Words: an *instruction* is a line of the text, `%name = shape opcode(operands), ...`. A *fusion* is an instruction that
computes a group of others in one pass over its operands, so that what it moves is its operands and results. The
*entry* is the computation that runs first; the others are called by it.

The compiler's own cost analysis ("bytes accessed") also counts the copies by which it brings operands into fast
memory ahead of their use, and so counts them twice; this count leaves these out.
"""

import collections
import re
from typing import NamedTuple

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64,
    "f8e4m3fn": 8, "f8e5m2": 8, "f16": 16, "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128, "token": 0,
}  # fmt: skip

# Move nothing.
_FREE = frozenset({"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "partition-id"})
# Bring an operand into fast memory ahead of its use, or take a result out: the fusions' operands count for them.
_PREFETCH = frozenset({"copy-start", "copy-done", "slice-start", "slice-done"})
_PREFETCH_TARGET = 'custom_call_target="ConcatBitcast"'
# What these run is in another computation.
_CALLS = frozenset({"while", "conditional", "call"})

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
# A TPU runs a collective beside computations as several fusions that all repeat it; this stands in the first.
_ASYNC_START = 'custom_call_target="AsyncCollectiveStart"'

_SHAPE = re.compile(r"\b([a-z]+[a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?(%[\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_NAME = re.compile(r"%[\w.\-]+")
_COMPUTATION = re.compile(r"^(ENTRY )?(%[\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition|true_computation|false_computation)=(%[\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Instruction(NamedTuple):
    """An instruction of the entry that moves data.

    Attributes:
      name: its name in the text, such as `%fusion.3`.
      opcode: what it is: `fusion`, `copy`, `reduce`...
      bytes: size of its operands and results.
    """

    name: str
    opcode: str
    bytes: int


def fusion_bytes(text: str) -> int:
    """Bytes that the fusions (and other instructions that move data) of the entry read and write.

    Raises:
      ValueError: as `moving_instructions`.
    """
    return sum(instruction.bytes for instruction in moving_instructions(text))


def moving_instructions(text: str) -> list[Instruction]:
    """The instructions of the entry that move data, in the order of the text.

    Parameters, tuples, bitcasts and the compiler's prefetch copies are left out. An operand given twice counts twice.

    Raises:
      ValueError: the text has no entry, a shape of an unknown type, or a loop, branch or call, whose bytes depend on
        how often it runs.
    """
    results: dict[str, int] = {}
    moving = []
    for line in _entry(text):
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        name, shape, opcode, rest = match.groups()
        results[name] = shape_bytes(shape)
        if opcode in _CALLS:
            raise ValueError(f"{name} is a {opcode}; only programs without loops, branches and calls can be counted")
        if opcode in _FREE or opcode in _PREFETCH or _PREFETCH_TARGET in line:
            continue
        operands = _NAME.findall(_until_closing(rest))
        moving.append(Instruction(name, opcode, results[name] + sum(results[operand] for operand in operands)))
    return moving


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes that each kind of collective moves through one device, in one run of the program.

    A collective counts with the larger of what a device puts in and what it gets out, so for an all-gather the whole
    result, for a reduce-scatter the whole operand. On a ring of n devices each link carries (n - 1) / n of that, twice
    for an all-reduce. What is in a loop counts as often as the loop runs.

    Returns:
      One of `COLLECTIVES` -> bytes, for the kinds that occur, in the order of the alphabet.

    Raises:
      ValueError: the text has no entry, a collective has a shape of an unknown type, or it is in a branch, or in a loop
        of which the text does not say how often it runs.
    """
    computations, entry = _computations(text)
    return dict(sorted(_collectives(computations, entry).items()))


def _collectives(computations: dict[str, list[str]], name: str) -> collections.Counter[str]:
    """Bytes of the collectives of a computation and of those that it calls."""
    total: collections.Counter[str] = collections.Counter()
    results: dict[str, int] = {}
    for line in computations[name]:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        instruction, shape, opcode, rest = match.groups()
        kind = opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            results[instruction] = shape_bytes(shape)
            operands = sum(results[operand] for operand in _NAME.findall(_until_closing(rest)))
            # The result of the start of an all-gather holds its operands too.
            gathered = results[instruction] - (operands if opcode != kind else 0)
            total[kind] += gathered if kind == "all-gather" else operands
            continue
        results[instruction] = _bytes_if_known(shape)
        called = _called(computations, opcode, rest)
        inside = sum((_collectives(computations, computation) for computation in called), collections.Counter())
        if inside:
            total += collections.Counter({kind: _runs(instruction, opcode, rest) * n for kind, n in inside.items()})
    return total


def _called(computations: dict[str, list[str]], opcode: str, attributes: str) -> list[str]:
    """The computations that an instruction runs and that may hold collectives of their own."""
    names = _CALLED.findall(attributes)
    for branches in _BRANCHES.findall(attributes):
        names += _NAME.findall(branches)
    if opcode == "fusion":
        names = [name for name in names if any(_ASYNC_START in line for line in computations[name])]
    return names


def _runs(name: str, opcode: str, attributes: str) -> int:
    if opcode == "conditional":
        raise ValueError(f"{name} is a conditional with collectives: their bytes depend on which branch runs")
    if opcode != "while":
        return 1
    trips = _TRIPS.search(attributes)
    if trips is None:
        raise ValueError(f"{name} is a loop with collectives, and the text does not say how often it runs")
    return int(trips.group(1))


def _bytes_if_known(shape: str) -> int:
    """As `shape_bytes`; 0 for element types that no collective moves, such as opaque ones."""
    return shape_bytes(shape) if all(dtype in _BITS for dtype, _ in _SHAPE.findall(shape)) else 0


def shape_bytes(shape: str) -> int:
    """Bytes of an array or tuple shape as HLO text writes it; layouts and tiles do not count.

    >>> shape_bytes("(f32[8,128]{1,0:T(8,128)}, bf16[4]{0}, s32[])")
    4108

    Raises:
      ValueError: an unknown element type.
    """
    total = 0
    for dtype, dims in _SHAPE.findall(shape):
        if dtype not in _BITS:
            raise ValueError(f"element type {dtype!r} in {shape!r} is not one of {sorted(_BITS)}")
        bits = _BITS[dtype]
        for dim in dims.split(",") if dims else ():
            bits *= int(dim)
        total += -(-bits // 8)
    return total


def _entry(text: str) -> list[str]:
    computations, entry = _computations(text)
    return computations[entry]


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation by its name, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    entry, lines = None, []
    for line in text.splitlines():
        match = _COMPUTATION.match(line)
        if match is not None:
            lines = computations.setdefault(match.group(2), [])
            entry = match.group(2) if match.group(1) else entry
        elif not line.startswith("}"):
            lines.append(line)
    if entry is None:
        raise ValueError("the text has no ENTRY computation; give compiled.as_text()")
    return computations, entry


def _until_closing(text: str) -> str:
    """The part before the parenthesis that closes one opened just before `text`."""
    depth = 1
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return text[:i]
    return text
