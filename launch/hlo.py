"""What a compiled program moves, read from its text (`compiled.as_text()`).

Words: an *instruction* is a line of the text, `%name = shape opcode(operands), ...`. A *fusion* is an instruction that
computes a group of others in one pass over its operands, so that what it moves is its operands and results. The
*entry* is the computation that runs first; the others are called by it.

The compiler's own cost analysis ("bytes accessed") also counts the copies by which it brings operands into fast
memory ahead of their use, and so counts them twice; this count leaves these out.
"""

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

_SHAPE = re.compile(r"\b([a-z]+[a-z0-9]*)\[([\d,]*)\]")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?(%[\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_NAME = re.compile(r"%[\w.\-]+")


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
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("ENTRY ")), None)
    if start is None:
        raise ValueError("the text has no ENTRY computation; give compiled.as_text()")
    end = next(i for i in range(start, len(lines)) if lines[i].startswith("}"))
    return lines[start + 1 : end]


def _until_closing(text: str) -> str:
    """The part before the parenthesis that closes one opened just before `text`."""
    depth = 1
    for i, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if depth == 0:
            return text[:i]
    return text
