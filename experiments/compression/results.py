"""Results of all jobs beside the dense model: who is on the front, a table, a CSV file."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]

COLUMNS = ("method", "point", "sparsity", "before", "after", "packed", "agreement", "bytes", "bytes_are", "compute",
           "multiply_adds", "flops", "milliseconds", "dense_milliseconds", "steps", "train_seconds",
           "on_bytes_front", "on_compute_front")  # fmt: skip


def rows(dense: Result, results: Sequence[Result], score: str, direction: str) -> list[dict[str, Any]]:
    """A row for the dense model and one for each job, with what is compared.

    `compute` is the share of the dense model's work: counted multiply-adds of the weights, or for a smaller model the
    operations of the compiled program. The fronts are those of score against bytes and against compute.
    """
    found = [_row(dense, result, score) for result in (dense, *results)]
    for key, cost in (("on_bytes_front", "bytes"), ("on_compute_front", "compute")):
        flags = front([row[cost] for row in found], [row["packed"] for row in found], direction)
        for row, flag in zip(found, flags, strict=True):
            row[key] = flag
    return found


def _row(dense: Result, result: Result, score: str) -> dict[str, Any]:
    row = {key: result.get(key) for key in COLUMNS}
    for key in ("before", "after", "packed"):
        row[key] = None if result.get(key) is None else result[key][score]
    measured = result.get("flops") is not None and result.get("dense_flops")
    share = result["flops"] / result["dense_flops"] if measured else result["multiply_adds"] / dense["multiply_adds"]
    return row | {"compute": share}


def front(costs: Sequence[float], scores: Sequence[float], direction: str) -> list[bool]:
    """Which points no other beats: none costs less without scoring worse, or scores better without costing more.

    Args:
      costs: less is better.
      scores: NaN is worse than everything.
      direction: whether "higher" or "lower" scores are better.
    """
    sign = 1 if direction == "higher" else -1
    worst = float("-inf")
    points = [(cost, -(sign * score if score == score else worst)) for cost, score in zip(costs, scores, strict=True)]
    return [
        not any(other != point and all(a <= b for a, b in zip(other, point, strict=True)) for other in points)
        for point in points
    ]


def as_csv(table: Sequence[Mapping[str, Any]]) -> str:
    """All columns, numbers in full."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: "" if row[key] is None else row[key] for key in COLUMNS} for row in table)
    return text.getvalue()


HEAD = ("", "method", "point", "zeros or gone", "before", "after", "packed", "bytes", "compute", "steps")
NOTE = (
    "*: no other is better in {score} and smaller in bytes. zeros or gone: of the leaves that a method prunes. before, "
    "after: {score} on the test split before and after retraining; packed: as it is stored. bytes: as stored, or where "
    "marked c computed (the smaller of the dense array and values with a bit for each entry). compute: share of the "
    "dense model's multiply-adds with weights, counted (zeros skipped: a count, not a time); where marked m measured, "
    "as operations of the compiled program. steps: of retraining."
)


def cells(table: Sequence[Mapping[str, Any]], score: str) -> list[tuple[str, ...]]:
    """The table for people: a tuple of texts for each row, the head first."""
    return [HEAD, *(_cells(row, score) for row in table)]


def _cells(row: Mapping[str, Any], score: str) -> tuple[str, ...]:
    return (
        "*" if row["on_bytes_front"] else "",
        row["method"],
        row["point"],
        f"{100 * row['sparsity']:.1f} %",
        *(shown(row[key], score) for key in ("before", "after", "packed")),
        f"{row['bytes']:,}" + (" c" if row["bytes_are"] == "computed" else ""),
        f"{100 * row['compute']:.1f} %" + (" m" if row["flops"] is not None else ""),
        str(row["steps"]),
    )


def shown(value: float | None, score: str) -> str:
    """A score for people."""
    if value is None:
        return ""
    return f"{100 * value:.2f} %" if score == "accuracy" else f"{value:.4f}"


def markdown(table: Sequence[Mapping[str, Any]], score: str) -> str:
    """The table in Markdown, aligned for a terminal, with its note and the times of smaller models."""
    lines = cells(table, score)
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(HEAD))]
    sides = [str.ljust if i < 3 else str.rjust for i in range(len(HEAD))]

    def text(line: Sequence[str]) -> str:
        return "| " + " | ".join(side(x, w) for side, x, w in zip(sides, line, widths, strict=True)) + " |"

    rule = (
        "| " + " | ".join("-" * max(w, 3) if i < 3 else "-" * max(w - 1, 2) + ":" for i, w in enumerate(widths)) + " |"
    )
    return "\n".join(
        [text(lines[0]), rule, *map(text, lines[1:]), "", NOTE.format(score=score.replace("_", " ")), *times(table)]
    )


def times(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each smaller model: its time beside that of the dense one."""
    return [
        f"{row['method']} {row['point']}: {row['milliseconds']:.2f} ms a batch, dense {row['dense_milliseconds']:.2f}, "
        "measured in turn"
        for row in table
        if row["milliseconds"] is not None
    ]
