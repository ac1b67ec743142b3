"""`report.html`: what a run did, in pictures.

The page stands beside its pictures (`report/*.png`) and needs nothing else.
"""

import html
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import jax
import matplotlib.pyplot as plt
import numpy as np

from experiments import experiment as experiment_lib
from experiments import loop, metrics, packing
from steelyard import formats, train
from steelyard import tree as tree_lib

PyTree = Any
Records = list[dict[str, Any]]
Figure = tuple[str, str, Callable[[], plt.Figure | None]]

# Colours of one palette that stay apart for colour-blind readers and in grey.
COLORS = {"dense": "#4477aa", "compressed": "#cc6677", "packed": "#117733"}
SERIES = ("#4477aa", "#cc6677", "#117733", "#ddaa33", "#882255", "#44aa99")
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "font.size": 10,
    "axes.titlesize": 11,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
MOST_WRONG = 24


def write(
    experiment: experiment_lib.Experiment,
    trained: packing.Trained,
    workdir: pathlib.Path,
    summary: Mapping[str, Any],
) -> pathlib.Path:
    """Draws the pictures and writes the page; returns its path."""
    records = {variant: metrics.read(workdir / variant / "metrics.jsonl") for variant in trained}
    program, state = trained[list(trained)[-1]]
    packed = packing.packed_params(program, state)
    rows = packing.layers(packed)
    figures: list[Figure] = [
        ("curves", "Training and test curves", lambda: curves(records, experiment.task)),
        ("tasks", "How the gradients of the tasks were combined", lambda: tasks(records, experiment.task.names)),
        ("layers", "Sparsity and bits of each layer, as packed", lambda: layers(rows)),
        ("weights", "One weight matrix, before and after", lambda: weights(trained, packed)),
        ("wrong", "Test examples that the packed model gets wrong", lambda: wrong(experiment, program, state, packed)),
    ]
    details = {"Every parameter, as packed": _layer_table(rows), "Config": config(experiment.settings)}
    return page(workdir, experiment.mesh, _summary_table(summary), figures, details)


def page(
    workdir: pathlib.Path, mesh: jax.sharding.Mesh, head: str, figures: Sequence[Figure], details: Mapping[str, str]
) -> pathlib.Path:
    """Saves the pictures that there are, and writes `report.html`; returns its path.

    Args:
      workdir: the folder of the run.
      mesh: what it ran on.
      head: HTML before the pictures.
      figures: name of the file, title, and what draws it (or returns `None`).
      details: title -> HTML that is folded away at the end.
    """
    (workdir / "report").mkdir(exist_ok=True)
    sections = []
    with plt.rc_context(STYLE):
        for name, title, draw in figures:
            figure = draw()
            if figure is None:
                continue
            figure.savefig(workdir / "report" / f"{name}.png", dpi=110)
            plt.close(figure)
            title = html.escape(title)
            sections.append(f'<section><h2>{title}</h2><img src="report/{name}.png" alt="{title}"></section>')
    folded = [f"<details><summary>{html.escape(key)}</summary>{text}</details>" for key, text in details.items()]
    device = f"{mesh.size} {mesh.devices.flat[0].device_kind}, JAX {jax.__version__}"
    path = workdir / "report.html"
    path.write_text(
        _TEMPLATE.format(
            name=html.escape(workdir.name),
            device=html.escape(device),
            head=head,
            pictures="\n".join(sections),
            details="\n".join(folded),
        )
    )
    return path


def config(settings: Mapping[str, Any]) -> str:
    """Settings as HTML, a line each."""
    lines = "\n".join(f"{key} = {value}" for key, value in sorted(settings.items()))
    return f"<pre>{html.escape(lines)}</pre>"


def curves(records: Mapping[str, Records], task) -> plt.Figure:
    """Losses of every task, and the score, of all variants over the steps."""
    losses = sorted({key for rs in records.values() for r in rs for key in r if key.startswith("loss/")})
    panels = [*losses, task.score]
    figure, axes = plt.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.2), squeeze=False)
    for axis, key in zip(axes[0], panels, strict=True):
        for variant, rs in records.items():
            steps, values = _series(rs, key)
            axis.plot(steps, values, color=COLORS[variant], alpha=0.25, linewidth=1)
            axis.plot(steps, _smooth(values), color=COLORS[variant], label=f"{variant}, training")
            test_steps, test = _series(rs, f"test/{key}")
            axis.plot(test_steps, test, "o--", color=COLORS[variant], markersize=4, label=f"{variant}, test")
        if key.startswith("loss/"):
            axis.set_yscale("log")
        axis.set_title(key.replace("loss/", "loss of task: ").replace("_", " "))
        axis.set_xlabel("step")
    _legend(axes[0][-1])
    return figure


def tasks(records: Mapping[str, Records], names: Sequence[str]) -> plt.Figure | None:
    """Weights, gradient norms and cosines of the tasks, of the last variant, or nothing without an aggregator."""
    rs = records[list(records)[-1]]
    groups = {
        "weight of each task's gradient": [f"weight/{name}" for name in names],
        "norm of each task's gradient": [f"norm/{name}" for name in names],
        "cosine between gradients (below 0: conflict)": sorted({k for r in rs for k in r if k.startswith("cosine/")}),
    }
    groups = {title: [k for k in keys if any(k in r for r in rs)] for title, keys in groups.items()}
    groups = {title: keys for title, keys in groups.items() if keys}
    if not groups:
        return None
    figure, axes = plt.subplots(1, len(groups), figsize=(4.4 * len(groups), 3.2), squeeze=False)
    for axis, (title, keys) in zip(axes[0], groups.items(), strict=True):
        for color, key in zip(SERIES, keys, strict=False):
            steps, values = _series(rs, key)
            axis.plot(steps, values, color=color, alpha=0.25, linewidth=1)
            axis.plot(steps, _smooth(values), color=color, label=" and ".join(key.split("/")[1:]))
        if title.startswith("cosine"):
            axis.axhline(0.0, color="#555555", linewidth=1)
            share = np.mean([r[k] < 0 for r in rs for k in keys if k in r])
            axis.set_title(f"{title}\nin conflict at {100 * share:.0f} % of the steps")
        else:
            axis.set_yscale("log")
            axis.set_title(title)
        axis.set_xlabel("step")
        _legend(axis)
    return figure


def layers(rows: Records) -> plt.Figure:
    """Share of zeros and stored bits per entry, one bar a layer."""
    shown = [row for row in rows if len(row["shape"]) >= 2]
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.2 + 0.24 * len(shown)), sharey=True)
    places = np.arange(len(shown))
    axes[0].barh(places, [100 * row["sparsity"] for row in shown], color=COLORS["compressed"])
    axes[0].set_xlabel("entries that are zero (%)")
    axes[0].set_xlim(0, 100)
    axes[0].set_yticks(places, [row["path"] for row in shown], fontsize=8)
    axes[0].set_ylim(len(shown) - 0.4, -0.6)
    axes[1].barh(places, [row["bits"] for row in shown], color=COLORS["dense"])
    axes[1].set_xlabel("stored bits per entry (scales and indices included)")
    for place, row in zip(places, shown, strict=True):
        axes[1].text(row["bits"] + 0.3, place, f"{row['bits']:.1f}", va="center", fontsize=8)
    axes[1].set_xlim(0, 36)
    return figure


def weights(trained: packing.Trained, packed: PyTree) -> plt.Figure | None:
    """The largest packed matrix: as the optimizer keeps it, as the packed model has it, and both histograms."""
    leaves = [
        (path, leaf) for path, leaf in tree_lib.flatten(packed, is_leaf=formats.is_weight) if formats.is_weight(leaf)
    ]
    if not leaves:
        return None
    path, leaf = max(leaves, key=lambda item: (hasattr(item[1], "indices"), np.prod(item[1].shape)))
    program, state = trained[list(trained)[-1]]
    del program
    stored = dict(tree_lib.flatten(state.params))
    before = np.asarray(next(value for key, value in stored.items() if key == path or key.endswith(f"/{path}")))
    after = np.asarray(formats.dense(leaf))
    before, after = (x.reshape(-1, x.shape[-1])[:32, :32] for x in (before, after))
    limit = np.abs(before).max()
    figure, axes = plt.subplots(1, 3, figsize=(12.5, 3.9), width_ratios=[1, 1, 1.1])
    titles = ("as trained (stored, dense)", "as packed")
    for axis, matrix, title in zip(axes, (before, after), titles, strict=False):
        image = axis.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axis.set_title(title)
        axis.set_xlabel("output")
        axis.grid(visible=False)
    axes[0].set_ylabel("input (contracted)")
    figure.colorbar(image, ax=axes[:2], shrink=0.85, label="weight")
    bins = np.linspace(-limit, limit, 61)
    axes[2].hist(before.ravel(), bins, color=COLORS["dense"], alpha=0.6, label="as trained")
    axes[2].hist(after[after != 0], bins, color=COLORS["packed"], alpha=0.6, label="as packed, without zeros")
    axes[2].set_xlabel("weight")
    axes[2].set_ylabel("entries")
    axes[2].legend(fontsize=8, loc="upper left")
    axes[2].margins(y=0.25)
    figure.suptitle(f"{path}, first {before.shape[0]} x {before.shape[1]} entries", fontsize=11)
    return figure


def wrong(experiment: experiment_lib.Experiment, program, state: train.TrainState, packed: PyTree) -> plt.Figure | None:
    """Misclassified test images with what they are and what they were taken for."""
    source = experiment.test_data
    columns = source.take(np.arange(len(source)))
    if "image" not in columns or "label" not in columns:
        return None
    predicted = loop.predictions(experiment, program, state, packed)
    mistakes = np.flatnonzero(predicted != columns["label"])
    shown = mistakes[:MOST_WRONG]
    if shown.size == 0:
        return None
    width = min(8, len(shown))
    height = -(-len(shown) // width)
    figure, axes = plt.subplots(height, width, figsize=(1.35 * width, 1.7 * height + 0.5), squeeze=False)
    for axis in axes.ravel():
        axis.axis("off")
    for axis, i in zip(axes.ravel(), shown, strict=False):
        axis.imshow(np.squeeze(columns["image"][i]), cmap="gray_r", interpolation="nearest")
        axis.set_title(f"is {columns['label'][i]}, taken\nfor {predicted[i]}", fontsize=8)
    figure.suptitle(f"{len(mistakes)} of {len(predicted)} test images are wrong; the first {len(shown)}", fontsize=11)
    return figure


def _series(records: Records, key: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(record["step"], record[key]) for record in records if key in record]
    steps, values = zip(*pairs, strict=True) if pairs else ((), ())
    return np.asarray(steps), np.asarray(values, float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over about a tenth of the values, shorter at the ends."""
    span = min(len(values) // 20 * 2 + 1, 25)
    kernel = np.ones(span)
    if span == 1:
        return values
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def _legend(axis: plt.Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    kept = [(h, label) for h, label in zip(handles, labels, strict=True) if len(h.get_xdata())]
    if kept:
        axis.legend(*zip(*kept, strict=True), fontsize=8)


def _summary_table(summary: Mapping[str, Any]) -> str:
    measured = sorted(
        {k.removeprefix("dense_") for k in summary if k.startswith("dense_")}
        & {k.removeprefix("packed_") for k in summary if k.startswith("packed_")}
    ) or [summary["score"], "bytes"]
    head = "".join(f"<th>{html.escape(key.replace('_', ' '))}</th>" for key in measured)
    body = []
    for variant, title in packing.ROWS.items():
        if f"{variant}_{summary['score']}" in summary:
            cells = "".join(f"<td>{_cell(key, summary.get(f'{variant}_{key}'))}</td>" for key in measured)
            body.append(f"<tr><th>{title}</th>{cells}</tr>")
    note = f"<p>Trained in {summary['train_seconds']:.1f} s, {summary['steps']} steps each."
    if "packed_agreement" in summary:
        ratio = summary["compressed_bytes"] / summary["packed_bytes"]
        note += (
            f" Packed weights predict the same as unpacked ones for {100 * summary['packed_agreement']:.2f} % of the "
            f"test split, in {ratio:.1f} times fewer bytes."
        )
    return f"<table><tr><th></th>{head}</tr>{''.join(body)}</table>{note}</p>"


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if key == "bytes":
        return f"{value:,}"
    return f"{100 * value:.2f} %" if key == "accuracy" else f"{value:.4f}"


def _layer_table(rows: Records) -> str:
    head = "<tr><th>parameter</th><th>shape</th><th>bytes</th><th>zeros</th><th>bits per entry</th></tr>"
    body = "".join(
        f"<tr><td>{html.escape(row['path'])}</td><td>{' x '.join(map(str, row['shape']))}</td>"
        f"<td>{row['bytes']:,}</td><td>{100 * row['sparsity']:.1f} %</td><td>{row['bits']:.2f}</td></tr>"
        for row in rows
    )
    return f"<table>{head}{body}</table>"


_TEMPLATE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{name}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
img {{ max-width: 100%; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }}
th:first-child, td:first-child {{ text-align: left; }}
pre {{ background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 12px; }}
</style></head><body>
<h1>{name}</h1>
<p>{device}</p>
{head}
{pictures}
{details}
</body></html>
"""
