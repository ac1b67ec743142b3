"""What methods of compression cost and keep, in pictures: fronts, recovery, layers, masks, magnitudes."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import matplotlib.ticker
import numpy as np

from experiments import metrics, report
from experiments.compression import costs, methods

Rows = Sequence[Mapping[str, Any]]

DENSE = "#333333"
MARKERS = "osD^vP"
REFERENCE = 0.8  # masks and magnitudes are shown at the point of each method that is nearest to this sparsity
SHOWN = 64  # rows and columns of a mask
BEFORE = {"linestyle": "--", "linewidth": 0.9, "alpha": 0.55, "markerfacecolor": "white"}
MOST = 8  # small panels in a picture


def nearest(pairs: Sequence[tuple[methods.Job, Mapping[str, Any]]]) -> list[tuple[methods.Job, Mapping[str, Any]]]:
    """The job of each method whose sparsity is nearest to REFERENCE."""
    chosen: dict[str, tuple[methods.Job, Mapping[str, Any]]] = {}
    for job, result in sorted(pairs, key=lambda pair: abs(pair[1]["sparsity"] - REFERENCE)):
        chosen.setdefault(job.method, (job, result))
    order = list(dict.fromkeys(job.method for job, _ in pairs))
    return [chosen[name] for name in order]


def _style(methods_in_order: Iterable[str]) -> dict[str, dict[str, Any]]:
    """A colour and a marker for each method; beyond six they differ in marker and line too."""
    names = dict.fromkeys(methods_in_order)
    return {
        name: {
            "color": report.SERIES[i % len(report.SERIES)],
            "marker": MARKERS[(i + i // len(report.SERIES)) % len(MARKERS)],
            "linestyle": ("-", "--", ":")[i // len(report.SERIES) % 3],
            "markersize": 5,
            "linewidth": 1.4,
        }
        for i, name in enumerate(names)
    }


def _by_method(table: Rows) -> dict[str, list[Mapping[str, Any]]]:
    """The rows of each method, from dense to sparse; without the dense model, which is the first row."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in sorted(table[1:], key=lambda row: row["sparsity"]):
        groups.setdefault(row["method"], []).append(row)
    return {name: groups[name] for name in dict.fromkeys(row["method"] for row in table[1:])}


def pareto(table: Rows, score: str) -> plt.Figure:
    """Score against bytes, and against the share of the multiply-adds; a grey line through those that none beats."""
    groups = _by_method(table)
    styles = _style(groups)
    figure, axes = plt.subplots(1, 2, figsize=(11.5, 4.6), sharey=True)
    panels = (("bytes", "bytes of the weights", 1 / 1024), ("compute", "multiply-adds, share of dense (%)", 100))
    for axis, (key, label, scale) in zip(axes, panels, strict=True):
        front = sorted((row for row in table if row[f"on_{key}_front"]), key=lambda row: row[key])
        axis.plot(*_points(front, key, scale, score), color="#c8c8c8", linewidth=7, alpha=0.6, zorder=0, label="front")
        for name, rows in groups.items():
            axis.plot(*_points(rows, key, scale, score), label=name, **styles[name])
        axis.plot(*_points(table[:1], key, scale, score), "*", color=DENSE, markersize=13, label="dense")
        axis.axhline(_percent(table[0]["packed"], score), color=DENSE, linewidth=0.8, linestyle=":")
        axis.set_xscale("log")
        axis.set_xlabel(label.replace("bytes", "KiB") if scale < 1 else label)
        _plain_ticks(axis)
    axes[0].set_ylabel(_label(score))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    return figure


def _plain_ticks(axis: plt.Axes) -> None:
    axis.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def _points(rows: Rows, key: str, scale: float, score: str) -> tuple[list[float], list[float]]:
    return [scale * row[key] for row in rows], [_percent(row["packed"], score) for row in rows]


def curves(table: Rows, score: str) -> plt.Figure:
    """Score against sparsity: hollow and dashed right after pruning, full after retraining."""
    groups = _by_method(table)
    figure, axis = plt.subplots(figsize=(8.5, 4.6))
    for name, style in _style(groups).items():
        xs = [100 * row["sparsity"] for row in groups[name]]
        axis.plot(xs, [_percent(row["after"], score) for row in groups[name]], label=name, **style)
        before = [_percent(row["before"], score) for row in groups[name]]
        axis.plot(
            xs, before, **style | {"linestyle": "--", "linewidth": 0.9, "alpha": 0.55, "markerfacecolor": "white"}
        )
    axis.axhline(_percent(table[0]["after"], score), color=DENSE, linewidth=1, linestyle=":", label="dense")
    axis.set_xlabel("weights that are gone, of those selected (%)")
    axis.set_ylabel(_label(score))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", fontsize=9)
    axis.set_title("dashed: right after pruning; full: after retraining", fontsize=9)
    return figure


def recovery(
    todo: Sequence[methods.Job], found: Sequence[Mapping[str, Any]], folders: Mapping[str, pathlib.Path], task
) -> plt.Figure | None:
    """Test score over the steps of retraining, rounds one after the other."""
    pairs = sorted(zip(todo, found, strict=True), key=lambda pair: pair[0].sparsity)
    last = {job.method: (job, result["before"]) for job, result in pairs}
    lines = []
    for job, before in (last[name] for name in dict.fromkeys(job.method for job in todo)):
        start = [] if before is None or job.rounds > 1 else [(0, before[task.score])]
        lines.append((job, start + _history(folders[job.name], task.score)))
    lines = [(job, points) for job, points in lines if len(points) > 1]
    if not lines:
        return None
    figure, axis = plt.subplots(figsize=(8.5, 4.2))
    styles = _style(job.method for job in todo)
    for job, points in lines:
        steps, values = zip(*points, strict=True)
        shown = [_percent(value, task.score) for value in values]
        axis.plot(steps, shown, label=job.name, **styles[job.method] | {"markersize": 3.5})
    axis.set_xlabel("step of retraining")
    axis.set_ylabel(_label(task.score))
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right center", fontsize=9)
    return figure


def _history(folder: pathlib.Path, score: str) -> list[tuple[int, float]]:
    points, start = [], 0
    rounds = sorted(folder.glob("round_*"), key=lambda path: int(path.name.partition("_")[2]))
    for path in rounds or [folder]:
        records = metrics.read(path / "metrics.jsonl")
        points += [(start + r["step"] + 1, r[f"test/{score}"]) for r in records if f"test/{score}" in r]
        start += max((r["step"] + 1 for r in records), default=0)
    return points


def layers(todo: Sequence[methods.Job], found: Sequence[Mapping[str, Any]]) -> plt.Figure | None:
    """A table in colour: a row for each job, a column for each layer."""
    paths = list(dict.fromkeys(path for result in found for path in result["layers"]))
    if not paths:
        return None
    grid = np.array([[100 * result["layers"].get(path, np.nan) for path in paths] for result in found])
    figure, axis = plt.subplots(figsize=(3.2 + 0.42 * len(paths), 2.2 + 0.26 * len(found)))
    image = axis.imshow(grid, cmap="YlGnBu", vmin=0, vmax=100, aspect="auto")
    axis.set_xticks(np.arange(len(paths)), paths, rotation=55, ha="right", fontsize=8)
    axis.set_yticks(np.arange(len(todo)), [job.name for job in todo], fontsize=8)
    axis.grid(visible=False)
    for i, j in np.argwhere(~np.isnan(grid)):
        axis.text(
            j, i, f"{grid[i, j]:.0f}", ha="center", va="center", fontsize=6.5, color="w" if grid[i, j] > 60 else "k"
        )
    figure.colorbar(image, label="gone (%)", shrink=0.8)
    return figure


def masks(
    pairs: Sequence[tuple[methods.Job, Mapping[str, Any]]], stored: Mapping[str, Mapping[str, np.ndarray]]
) -> plt.Figure | None:
    """The first rows and columns of one matrix for each method."""
    pairs = [(job, result) for job, result in pairs if stored[job.name]][:MOST]
    if not pairs:
        return None
    sizes = {path: mask.size for job, _ in pairs for path, mask in stored[job.name].items()}
    counts = {path: sum(path in stored[job.name] for job, _ in pairs) for path in sizes}
    path = max(sizes, key=lambda path: (counts[path], sizes[path]))
    pairs = [(job, result) for job, result in pairs if path in stored[job.name]]
    figure, axes = _panels(len(pairs), 2.5, 2.9)
    for axis, (job, _) in zip(axes, pairs, strict=False):
        mask = stored[job.name][path]
        axis.imshow(
            mask.reshape(-1, mask.shape[-1])[:SHOWN, :SHOWN], cmap="gray_r", vmin=0, vmax=1, interpolation="nearest"
        )
        axis.set_title(f"{job.name}: {100 * mask.mean():.0f} % left", fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
    axes[0].set_ylabel("input (contracted)")
    axes[0].set_xlabel("output")
    figure.suptitle(f"{path}, first {SHOWN} x {SHOWN} entries", fontsize=10)
    return figure


def magnitudes(
    pairs: Sequence[tuple[methods.Job, Mapping[str, Any]]], todo: Sequence[methods.Job]
) -> plt.Figure | None:
    """Histograms of log10 |w| of the leaves that a job prunes: dense in grey, and what is left in colour."""
    pairs = list(pairs)[:MOST]
    if not pairs:
        return None
    figure, axes = _panels(len(pairs), 2.9, 2.3)
    styles = _style(job.method for job in todo)
    edges = costs.BINS
    for axis, (job, result) in zip(axes, pairs, strict=False):
        before, after = (np.array(result[key]) for key in ("dense_histogram", "histogram"))
        axis.stairs(before, edges, color="#bbbbbb", fill=True, label="dense")
        axis.stairs(after, edges, color=styles[job.method]["color"], linewidth=1.4, label="left")
        axis.set_title(job.name, fontsize=9)
        inside = np.flatnonzero(before + after)
        axis.set_xlim(max(edges[inside[0]], -4), edges[inside[-1] + 1])
        axis.set_yticks([])
        axis.set_xlabel("log10 |w|", fontsize=8)
    axes[0].legend(fontsize=8)
    return figure


def _panels(count: int, width: float, height: float) -> tuple[plt.Figure, list[plt.Axes]]:
    columns = min(count, 4)
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows + 0.4), squeeze=False)
    for axis in axes.ravel()[count:]:
        axis.axis("off")
    return figure, list(axes.ravel())


def words(name: str) -> str:
    """A key for people."""
    return name.replace("_", " ")


def _label(score: str) -> str:
    return f"test {words(score)}" + (" (%)" if score == "accuracy" else "")


def _percent(value: float | None, score: str) -> float:
    if value is None:
        return float("nan")
    return 100 * value if score == "accuracy" else value
