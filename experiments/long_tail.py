"""Six ways to learn from classes of very different sizes, on the same images.

    python -m experiments.long_tail --data_dir=../shared/data --folder=docs

Trains perceptrons on long-tailed digits and, if the folder of prepared TFDS datasets has it, on a long-tailed part of
`mnist_10k`. Writes a picture of the accuracy of each class and a page of tables, and prints it; a minute on two cores.
"""

import argparse
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import matplotlib.patches

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import optax
import tqdm
from jaxtyping import Array, Float, Int, Key

from experiments import machine
from experiments.claims import long_tail, training
from experiments.report import SERIES, STYLE
from steelyard import data, losses

MNIST = "mnist_10k"
FIRST_SEED = 100  # the claims chose the settings by seeds from 0
BASELINE, BARS = "#555555", "#e4e4e4"
HEAD = """# Long-tailed digits

Accuracy in percent on test images, mean ± standard error over seeds, which draw training images, initialisation and
batches: *balanced* is the mean over the ten classes, *head* over the three largest, *tail* over the three smallest.
The settings are those that the claims in `experiments/claims/losses` chose on digits, by other seeds. Batches of 64;
AdamW of rate 3e-3. LDAM is weighted by class in the last fifth of the steps; IIF multiplies logits in prediction too;
weight balancing trains by SGD of rate 0.1 and momentum 0.9, and its second stage, of the last layer, adds a third of
the steps. Written by `python -m experiments.long_tail`.
"""

Results = dict[str, dict[str, Float[np.ndarray, "seeds ..."]]]
Run = Callable[[Key[Array, ""], training.Task], dict[str, Array]]


class Bed(NamedTuple):
    """A data set with a long tail, and what learns it: `test` images a class, `widths` of the perceptron."""

    name: str
    draw: Callable[[Key[Array, ""]], training.Task]
    counts: Int[np.ndarray, "classes"]
    test: int
    widths: tuple[int, ...]
    seeds: int
    steps: int = 600


def main(argv: Sequence[str]) -> None:
    # Not a flag of absl, which are one set for all modules: the claims have a --folder too.
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="../shared/data", help="Where TFDS prepared data, or what holds tfds/.")
    parser.add_argument("--folder", default="docs", help="Where long-tail.png and long-tail.md are written.")
    args = parser.parse_args(argv[1:])
    places = [pathlib.Path(args.data_dir, below) for below in ("", "tfds")]
    beds = [digits(), *[mnist(place) for place in places if (place / MNIST).is_dir()][:1]]
    if len(beds) == 1:
        print(f"no {MNIST} in --data_dir={args.data_dir}: digits alone", file=sys.stderr)
    print(write(pathlib.Path(args.folder), beds))


def digits() -> Bed:
    """The digits of the claims: 120 to 4 training images a class."""
    return Bed("digits", long_tail.load, long_tail.counts(), long_tail.TEST, long_tail.WIDTHS, seeds=10)


def mnist(folder: pathlib.Path) -> Bed:
    """500 to 5 images a class, drawn from the training split; of the test split as many as the smallest class has."""
    load = functools.partial(data.load, f"tfds:{MNIST}", data_dir=folder, in_memory=True)
    parts = [load(split=split).columns for split in ("train", "test")]
    x, x_test = (part["image"].reshape(len(part["image"]), -1) / np.float32(255) for part in parts)
    y, y_test = (part["label"] for part in parts)
    sizes, test = long_tail.counts(rho=100, largest=500), int(np.bincount(y_test).min())
    rows = np.concatenate([np.flatnonzero(y_test == label)[:test] for label in range(long_tail.CLASSES)])

    def draw(key):
        drawn = long_tail.split(key, x, y, np.stack([0 * sizes, sizes]))
        return drawn._replace(x_test=jnp.asarray(x_test[rows]), y_test=jnp.asarray(y_test[rows]))

    return Bed(MNIST, draw, sizes, test, (x.shape[1], 128, long_tail.CLASSES), seeds=3)


def methods(bed: Bed) -> dict[str, tuple[str, Run]]:
    """Name -> settings in words, and what measures a key and its task; the first is what the others correct."""
    of, trained = {"counts": bed.counts}, functools.partial(_trained, bed)
    adjusted = functools.partial(losses.logit_adjusted_cross_entropy, **of, tau=1.5)
    ldam = long_tail.ldam_drw(**of, steps=bed.steps, max_margin=0.3)
    iif = functools.partial(losses.iif_loss, **of)
    multiply = functools.partial(losses.adjust_logits, scale=losses.inverse_image_frequency(**of))
    focal = functools.partial(losses.softmax_focal_loss, gamma=0.5)
    return {
        "cross-entropy": ("decay 1e-2", trained(optax.softmax_cross_entropy_with_integer_labels, decay=1e-2)),
        "logit adjustment": ("in training, tau 1.5, decay 1e-3", trained(adjusted)),
        "LDAM-DRW": ("greatest margin 0.3, scale 30, cosine head, decay 1e-3", trained(ldam, apply=long_tail.cosines)),
        "IIF": ("raw weights, decay 1e-4", trained(iif, decay=1e-4, predict=multiply)),
        "weight balancing": ("two stages, decay 2e-3, radius 1", functools.partial(_balanced, bed)),
        "focal": ("gamma 0.5, decay 1e-3", trained(focal)),
    }


def _trained(
    bed: Bed, loss: Callable[..., Array], decay=1e-3, apply=training.mlp, predict=lambda logits: logits
) -> Run:
    init = functools.partial(training.mlp_init, widths=bed.widths)

    def run(key, task):
        params = long_tail.fit(loss, key, task, steps=bed.steps, weight_decay=decay, init=init, apply=apply)
        return long_tail.measure(predict(apply(params, task.x_test)), task.y_test)

    return run


def _balanced(bed: Bed, key: Key[Array, ""], task: training.Task) -> dict[str, Array]:
    params, steps = training.mlp_init(key, bed.widths), (bed.steps, -(-bed.steps // 3))
    params = long_tail.balance_weights(key, task, params, counts=bed.counts, decay=2e-3, radius=1.0, steps=steps)
    return long_tail.measure(training.mlp(params, task.x_test), task.y_test)


def write(folder: pathlib.Path, beds: Sequence[Bed]) -> str:
    """Trains all methods on all data sets, and writes picture and page; returns the page's text."""
    folder.mkdir(parents=True, exist_ok=True)
    measured = [(bed, _measure(bed)) for bed in beds]
    picture(measured, folder / "long-tail.png")
    text = "\n".join([HEAD, *(table(bed, results) for bed, results in measured), f"{machine.describe()}.", ""])
    (folder / "long-tail.md").write_text(f"{text}\n![Accuracy of each class](long-tail.png)\n")
    return text


def _measure(bed: Bed) -> Results:
    """All methods with the same seeds, in percent."""
    keys = jax.vmap(jax.random.key)(FIRST_SEED + jnp.arange(bed.seeds))
    tasks, results = jax.jit(jax.vmap(bed.draw))(keys), {}
    with tqdm.tqdm(methods(bed).items(), desc=bed.name, unit="method", disable=None, leave=False) as bar:
        for name, (_, run) in bar:
            bar.set_postfix_str(name)
            found = jax.jit(jax.vmap(run))(keys, tasks)
            results[name] = {metric: 100 * np.asarray(values, np.float64) for metric, values in found.items()}
    return results


def table(bed: Bed, results: Results) -> str:
    """A section of the page."""
    network, sizes = "-".join(map(str, bed.widths)), ", ".join(map(str, bed.counts))
    measured_on = (
        f"{bed.seeds} seeds; {sizes} training images of the classes 0 to 9, {bed.test} test images of each; "
        f"perceptron {network}; {bed.steps} steps."
    )
    head = "| method | settings | balanced | head | tail |\n| --- | --- | --- | --- | --- |"
    lines = [f"## {bed.name}\n\n{measured_on}\n", head]
    for name, (settings, _) in methods(bed).items():
        found = [results[name][metric] for metric in ("balanced", "head", "tail")]
        cells = [f"{x.mean():.1f} ± {x.std() / max(len(x) - 1, 1) ** 0.5:.1f}" for x in found]
        lines.append(f"| {' | '.join([name, settings, *cells])} |")
    return "\n".join([*lines, ""])


def picture(measured: Sequence[tuple[Bed, Results]], path: pathlib.Path) -> None:
    """A row for each data set, a panel for each correction, with what it corrects in grey."""
    baseline, *corrections = methods(measured[0][0])
    size = 2.6 * len(corrections), 0.8 + 2.7 * len(measured)
    with plt.rc_context(STYLE | {"axes.grid": False}):
        figure, axes = plt.subplots(len(measured), len(corrections), figsize=size, sharey=True, squeeze=False)
        for row, (bed, results) in zip(axes, measured, strict=True):
            for axis, name, color in zip(row, corrections, SERIES, strict=False):
                _bars(axis, bed.counts, is_last=axis is row[-1])
                _line(axis, results[baseline]["classes"], BASELINE, "o--")
                _line(axis, results[name]["classes"], color, "o-")
                axis.set_title(name, color=color, fontweight="bold")
            row[0].set_ylabel(f"{bed.name}, {bed.seeds} seeds\ntest accuracy (%)")
        figure.supxlabel("class, from frequent to rare", fontsize=10)
        figure.legend(handles=_handles(baseline), loc="outside upper center", ncols=4)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def _bars(axis: plt.Axes, counts: Int[np.ndarray, "classes"], is_last: bool) -> None:
    """Class sizes, behind the lines and on a scale of their own."""
    behind = axis.twinx()
    behind.bar(np.arange(len(counts)), counts, color=BARS, width=0.8)
    behind.set_ylim(0, 1.05 * counts[0])
    behind.spines["right"].set_visible(is_last)
    behind.tick_params(right=is_last, labelright=is_last, colors="#888888")
    behind.set_ylabel("training images" if is_last else "", color="#888888")
    axis.set_zorder(behind.get_zorder() + 1)
    axis.patch.set_visible(False)
    axis.set(xticks=np.arange(len(counts)), ylim=(0, 102))


def _line(axis: plt.Axes, classes: Float[np.ndarray, "seeds classes"], color: str, style: str) -> None:
    """The mean over seeds, and a band of one standard deviation on each side."""
    places, mean, spread = np.arange(classes.shape[1]), classes.mean(0), classes.std(0)
    axis.fill_between(places, mean - spread, np.minimum(mean + spread, 100), color=color, alpha=0.18, linewidth=0)
    axis.plot(places, mean, style, color=color, markersize=3.5, linewidth=1.6)


def _handles(baseline: str) -> list[Any]:
    line, patch = functools.partial(plt.Line2D, [], [], marker="o", markersize=3.5), matplotlib.patches.Patch
    return [
        line(color=BASELINE, linestyle="--", label=baseline),
        line(color=SERIES[0], label="the method above the panel"),
        patch(color=SERIES[0], alpha=0.18, linewidth=0, label="± one standard deviation over seeds"),
        patch(color=BARS, label="training images, right scale"),
    ]


if __name__ == "__main__":
    main(sys.argv)
