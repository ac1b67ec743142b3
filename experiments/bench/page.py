"""docs/performance.md: a part for each room, each written by its own benchmark and by nothing else."""

import pathlib
from collections.abc import Sequence

from experiments import machine

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "performance.md"
_HEAD = """# Performance

Written by `make bench`, a part for each room. Ratios are between programs that took turns in one run on the machine
named there. Bytes are those that a program moves as compiled for a TPU by its real compiler; no TPU is needed, and no
time is claimed for one.
"""


def write(room: str, lines: Sequence[str], page: pathlib.Path = PAGE) -> None:
    """Replaces the part of a room, or adds it; the rest of the page stays as it is."""
    begin, end = f"<!-- {room}: begin -->", f"<!-- {room}: end -->"
    text = page.read_text() if page.exists() else _HEAD
    part = "\n".join([begin, f"## {room}", "", f"{machine.describe()}", "", *lines, end])
    if begin in text:
        before, rest = text.split(begin, 1)
        text = before + part + rest.split(end, 1)[1]
    else:
        text = f"{text}\n{part}\n"
    page.parent.mkdir(exist_ok=True)
    page.write_text(text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; all columns but the first are aligned to the right.

    >>> table(["rule", "time"], [["adamw", "1.00"]])
    ['| rule | time |', '| --- | ---: |', '| adamw | 1.00 |']
    """
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return [f"| {' | '.join(cells)} |" for cells in lines]
