"""`report.html` of `experiments.compress`."""

import html
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from experiments import report
from experiments.compression import mask_files, methods, pictures, results
from experiments.compression.calibration import Weights
from steelyard import tree as tree_lib


def write(
    dense: Weights,
    found: Sequence[Mapping[str, Any]],
    todo: Sequence[methods.Job],
    table: pictures.Rows,
    workdir: pathlib.Path,
) -> pathlib.Path:
    """Draws all pictures and writes the page; returns its path."""
    task = dense.experiment.task
    pairs = pictures.nearest([(job, result) for job, result in zip(todo, found, strict=True) if result["sparsity"] > 0])
    folders = {job.name: workdir / "jobs" / job.folder for job in todo}
    stored = {job.name: mask_files.load(folders[job.name]) for job, _ in pairs}
    figures: list[report.Figure] = [
        (
            "pareto",
            f"{pictures.words(task.score)} against bytes and against multiply-adds",
            lambda: pictures.pareto(table, task.score),
        ),
        ("sparsity", "Right after pruning, and after retraining", lambda: pictures.curves(table, task.score)),
        (
            "recovery",
            "While retraining, the sparsest point of each method",
            lambda: pictures.recovery(todo, found, folders, task),
        ),
        ("layers", "How much of each layer is gone", lambda: pictures.layers(todo, found)),
        ("masks", "One weight matrix: what is left of it (dark)", lambda: pictures.masks(pairs, stored)),
        ("magnitudes", "Magnitudes before and after", lambda: pictures.magnitudes(pairs, todo)),
    ]
    shapes = {path: w.shape for path, w in tree_lib.flatten(dense.params)}
    details = {
        "Every layer of every job": _layer_table(found, shapes),
        "Methods": report.config({job.name: dict(job.settings) for job in todo}),
        "Config": report.config(dense.experiment.settings),
    }
    return report.page(workdir, dense.experiment.mesh, _head(table, found, task.score), figures, details)


def _head(table: pictures.Rows, found: Sequence[Mapping[str, Any]], score: str) -> str:
    """The table of results and the notes, in HTML."""
    first, *rest = results.cells(table, score)
    lines = [f"<tr>{''.join(f'<th>{html.escape(x)}</th>' for x in first)}</tr>"]
    lines += [f"<tr>{''.join(f'<td>{html.escape(x)}</td>' for x in line)}</tr>" for line in rest]
    notes = [f"{r['method']} {r['point']}: {note}" for r in found for note in r["notes"]] + results.times(table)
    said = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    legend = html.escape(results.NOTE.format(score=pictures.words(score)))
    return f"<table>{''.join(lines)}</table><p>{legend}</p><ul>{said}</ul>"


def _layer_table(found: Sequence[Mapping[str, Any]], shapes: Mapping[str, tuple[int, ...]]) -> str:
    lines = "".join(
        f"<tr><td>{html.escape(result['method'])} {html.escape(result['point'])}</td><td>{html.escape(path)}</td>"
        f"<td>{' x '.join(map(str, shapes[path]))}</td><td>{100 * share:.2f} %</td></tr>"
        for result in found
        for path, share in result["layers"].items()
    )
    return f"<table><tr><th>job</th><th>parameter</th><th>shape</th><th>gone</th></tr>{lines}</table>"
