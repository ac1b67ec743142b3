"""What is kept of measured claims: a journal to resume from, the page of reproductions, the forest plot."""

import hashlib
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from experiments import machine
from experiments.claims import harness
from experiments.report import STYLE

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reproductions.md"
LIMIT_SECONDS = 60

_HEAD = """# Reproductions

What the papers claim, measured on data that ships with the code. This page is written by `make claims`; each run of a
room adds a section. Both sides of a comparison are tuned over the same number of configurations and paired by seed.
An effect is positive in the direction that the claim states, its 95 % interval is the paired bootstrap's, expanded for
few seeds. A claim *holds* if the whole interval lies above its margin (0 unless stated), *does not hold* if all of it
lies at or below, and is *inconclusive* otherwise. What would count as what was written into each claim's docstring, in
`experiments/claims/`, before it was first run.
"""
_COLORS = {"holds": "#117733", "does not hold": "#cc6677", "inconclusive": "#4477aa"}


class Row(NamedTuple):
    """A measured claim: name of its function, the claim in a line, what came out, and how long that took."""

    name: str
    statement: str
    outcomes: tuple[harness.Outcome, ...]
    seconds: float


class Journal:
    """Claims measured so far, in a file that a run which was killed goes on from.

    A row is read back only if the code that made it is the same. A line that was cut short is ignored.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self._rows: dict[str, tuple[str, Row]] = {}
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            outcomes = tuple(harness.Outcome(**outcome) for outcome in entry["outcomes"])
            row = Row(entry["name"], entry["statement"], outcomes, entry["seconds"])
            self._rows[row.name] = (entry["fingerprint"], row)

    def get(self, name: str, fingerprint: str) -> Row | None:
        """The row of a claim, if it was measured with this code."""
        known, row = self._rows.get(name, ("", None))
        return row if known == fingerprint else None

    def add(self, row: Row, fingerprint: str) -> None:
        """Writes a row to the file at once."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        outcomes = [outcome._asdict() for outcome in row.outcomes]
        was_cut = self.path.exists() and not self.path.read_bytes().endswith(b"\n")
        with self.path.open("a") as file:
            file.write(
                "\n" * was_cut + json.dumps({**row._asdict(), "outcomes": outcomes, "fingerprint": fingerprint}) + "\n"
            )

    def clear(self) -> None:
        """Forgets everything, once it stands elsewhere or is to be measured anew."""
        self._rows.clear()
        self.path.unlink(missing_ok=True)


def fingerprint(source: pathlib.Path) -> str:
    """Of the code that a claim's result depends on: its own module, the library and the harness."""
    shared = [*sorted((ROOT / "lib").rglob("*.py")), *sorted((ROOT / "kernels").rglob("*.py"))]
    own = [p for p in sorted((ROOT / "experiments" / "claims").glob("*.py")) if p.stem not in ("report", "__main__")]
    digest = hashlib.blake2b(machine.versions().encode(), digest_size=16)
    for path in [*shared, *own, source]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def append(room: str, rows: Sequence[Row], page: pathlib.Path) -> None:
    """Adds a section to the page and draws its picture beside it."""
    page.parent.mkdir(exist_ok=True)
    text = page.read_text() if page.exists() else _HEAD
    picture = page.with_name(f"{page.stem}-{room}.png")
    forest(rows, picture)
    total = sum(row.seconds for row in rows)
    lines = [
        "",
        f"## {room}: {_tally(rows)}",
        "",
        f"{machine.describe()}; {total / 60:.1f} minutes.",
        "",
        "| claim | method | baseline | effect | seeds | s | verdict |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_page_line(room, row, outcome) for row in rows for outcome in row.outcomes),
        "",
        *_reasons(rows),
        f"![Effects and 95 % intervals of the claims of {room}]({picture.name})",
        "",
    ]
    page.write_text(text + "\n".join(lines))


def _tally(rows: Sequence[Row]) -> str:
    verdicts = [outcome.verdict for row in rows for outcome in row.outcomes]
    return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in harness.VERDICTS)


def _page_line(room: str, row: Row, outcome: harness.Outcome) -> str:
    """A line of the table; guides link to the first of a claim, by `#<room>-<claim>`."""
    margin = f"; margin {outcome.margin:g}" if outcome.margin else ""
    anchor = f'<a id="{room}-{row.name}"></a>' if outcome is row.outcomes[0] else ""
    cells = [
        f"{anchor}`{row.name}`{_part(outcome)}: {row.statement}",
        outcome.method,
        outcome.baseline,
        f"{effect(outcome)} {outcome.unit}{margin}",
        str(outcome.seeds),
        f"{row.seconds:.0f}",
        outcome.verdict,
    ]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _reasons(rows: Sequence[Row]) -> list[str]:
    found = [
        f"- `{row.name}`{_part(outcome)}, {outcome.verdict}: {outcome.why}"
        for row in rows
        for outcome in row.outcomes
        if outcome.verdict != "holds" and outcome.why
    ]
    return [*found, ""] if found else []


def effect(outcome: harness.Outcome) -> str:
    """The effect with its interval, in three digits.

    >>> effect(harness.Outcome(1.2345, -0.5, 3.0, 5, "points"))
    '+1.23 [-0.5, +3]'
    """
    if outcome.seeds == 1:
        return f"{outcome.effect:+.3g}"
    return f"{outcome.effect:+.3g} [{outcome.low:+.3g}, {outcome.high:+.3g}]"


def table_line(row: Row, outcome: harness.Outcome) -> str:
    """One line of the table that the terminal shows."""
    name = row.name + _part(outcome)
    late = " (over the limit)" if row.seconds > LIMIT_SECONDS else ""
    return (
        f"{name:<52}{effect(outcome):>26} {outcome.unit:<36}{outcome.seeds:>3} seeds{row.seconds:>6.0f} s{late}  "
        f"{outcome.verdict}"
    )


def forest(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Draws all effects with their intervals. Units differ: each line is scaled to its own largest end, 0 is common."""
    entries = [(row, outcome) for row in rows for outcome in row.outcomes]
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axis = plt.subplots(figsize=(11, 0.8 + 0.34 * len(entries)))
        axis.axvline(0, color="#888888", linewidth=1)
        for place, (row, outcome) in enumerate(reversed(entries)):
            _line(axis, place, row, outcome)
        axis.set(xlim=(-1.1, 1.1), ylim=(-0.8, len(entries) - 0.2), xticks=[-1, 0, 1])
        axis.set_xticklabels(["against the claim", "0", "as claimed"])
        axis.set_yticks(
            range(len(entries)), [row.name + _part(outcome) for row, outcome in reversed(entries)], fontsize=8
        )
        axis.tick_params(axis="y", length=0)
        axis.spines["left"].set_visible(False)
        handles = [plt.Line2D([], [], color=color, marker="o", label=name) for name, color in _COLORS.items()]
        margin = plt.Line2D(
            [], [], color="#888888", marker="|", linestyle="none", markersize=10, label="margin, if not 0"
        )
        axis.legend(
            handles=[*handles, margin],
            loc="lower center",
            bbox_to_anchor=(0.5, 1.0),
            ncols=len(handles) + 1,
            fontsize=8,
        )
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _part(outcome: harness.Outcome) -> str:
    return f" ({outcome.part})" if outcome.part else ""


def _line(axis: plt.Axes, place: int, row: Row, outcome: harness.Outcome) -> None:
    largest = max(abs(outcome.low), abs(outcome.high), abs(outcome.margin)) or 1.0
    scale = largest if math.isfinite(largest) else 1.0
    color = _COLORS[outcome.verdict]
    axis.plot([outcome.low / scale, outcome.high / scale], [place, place], color=color, linewidth=2)
    axis.plot(outcome.effect / scale, place, "o", color=color, markersize=5)
    if outcome.margin:
        axis.plot(outcome.margin / scale, place, "|", color="#888888", markersize=12)
    axis.annotate(
        f"{effect(outcome)} {outcome.unit}", (1.12, place), xycoords=("data", "data"), fontsize=8, va="center",
        annotation_clip=False,
    )  # fmt: skip


def statement(claim: Callable) -> str:
    """The first line of a claim's docstring."""
    return (claim.__doc__ or "").strip().splitlines()[0]
