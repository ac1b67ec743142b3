"""The comparison of methods of compression, made tiny: measured, resumed, refused."""

import csv
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from experiments import compress, loop
from experiments import experiment as experiment_lib
from experiments.compression import costs, cut, mask_files, methods, results
from experiments.compression.calibration import Calibration, Weights
from steelyard import models
from steelyard import tree as tree_lib
from steelyard.sparsity import masks as masks_lib

METHODS = {
    "magnitude": {"sparsity": (0.5, 0.95)},
    "nm": {"pattern": "2:4"},
    "gradual": {"schedule": "polynomial", "allocation": "erdos_renyi", "sparsity": 0.75, "every": 1},
    "channels": {"kind": "channels", "sparsity": 0.5, "round_to": 8},
    "rounds": {"schedule": "iterative", "rounds": 2, "allocation": "global", "sparsity": 0.84},
}


def config(chosen=METHODS, **values):
    """A perceptron 64-32-10 on digits."""
    found = ConfigDict({
        "seed": 0, "steps": 6, "batch": 64, "dataset": {"name": "digits"}, "eval_batch": 64,
        "model": {"name": "MLP", "features": (32, 10), "flatten": True},
        "task": {"name": "classify"}, "optimizer": {"name": "sgd", "learning_rate": 0.1},
        "defaults": {"retrain_steps": 4, "sparsity": 0.5, "calibration_batches": 1, "where": ".*/kernel"},
        "methods": chosen,
    })  # fmt: skip
    for key, value in values.items():
        found[key] = value
    return found


@pytest.fixture(scope="module", autouse=True)
def quickly():
    """Programs for one device that are not optimized compile in a third of the time."""
    with pytest.MonkeyPatch.context() as patch:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("data",))
        patch.setattr(experiment_lib.sharding, "make_mesh", lambda sizes: mesh)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run, and its summary."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    compress.main(config(), workdir)
    return workdir, json.loads((workdir / "summary.json").read_text())


def jobs_of(summary):
    return {f"{job['method']} {job['point']}": job for job in summary["jobs"]}


SIZES = {"dense_0/kernel": 64 * 32, "dense_1/kernel": 32 * 10}
BIASES = 4 * (32 + 10)


def test_every_point_is_measured_and_shown(finished):
    workdir, summary = finished
    found, total = jobs_of(summary), sum(SIZES.values())
    assert set(found) == {"magnitude 0.5", "magnitude 0.95", "nm 2:4", "gradual 0.75", "channels 0.5", "rounds 0.84"}
    assert summary["dense"]["bytes"] == 4 * total + BIASES
    assert summary["dense"]["multiply_adds"] == total  # each weight is used once
    half = found["magnitude 0.5"]
    assert (half["sparsity"], half["multiply_adds"]) == (0.5, total / 2)
    # Values and a bit for each entry; biases are not pruned.
    assert (half["bytes"], half["bytes_are"]) == (4 * total // 2 + total // 8 + BIASES, "computed")
    groups = found["nm 2:4"]
    assert (groups["bytes"], groups["bytes_are"]) == (4 * total // 2 + total // 8 + BIASES, "stored")  # 2 bits a value
    assert groups["agreement"] == 1.0
    assert found["gradual 0.75"]["sparsity"] == pytest.approx(0.75, abs=1e-3)
    assert found["rounds 0.84"]["sparsity"] == pytest.approx(0.84, abs=1e-3)
    assert found["rounds 0.84"]["steps"] == 8
    rows = list(csv.DictReader((workdir / "results.csv").open()))
    assert rows[0]["method"] == "dense"
    assert len(rows) == 7
    page = (workdir / "report.html").read_text()
    for name in ("pareto", "sparsity", "layers", "masks", "magnitudes"):
        assert (workdir / "report" / f"{name}.png").stat().st_size > 5000
        assert f"report/{name}.png" in page
    assert "a count, not a time" in (workdir / "results.md").read_text()


def test_channels_leave_a_smaller_model_that_is_faster_by_count(finished):
    _, summary = finished
    small = jobs_of(summary)["channels 0.5"]
    assert small["layers"] == {"dense_0/kernel": 0.5, "dense_1/kernel": 0.5}
    assert (small["bytes"], small["bytes_are"]) == (4 * (64 * 16 + 16 * 10 + 16 + 10), "stored")
    assert small["multiply_adds"] == 64 * 16 + 16 * 10
    assert small["flops"] < 0.6 * small["dense_flops"]
    assert small["milliseconds"] > 0
    assert small["dense_milliseconds"] > 0


class StopsAfter:
    """A preemption that is requested once the loop has asked so many times."""

    def __init__(self, asked):
        self.left = asked

    def __enter__(self):
        return self

    def __exit__(self, *exc_info):
        pass

    @property
    def requested(self):
        self.left -= 1
        return self.left < 0


def test_a_run_that_was_cut_off_gives_the_same_results_and_repeats_no_finished_job(finished, tmp_path, monkeypatch):
    workdir = tmp_path / "cut"
    settings = config({"magnitude": {"sparsity": 0.5}, "rounds": METHODS["rounds"]}, checkpoint=str(finished[0]))
    fits = []
    original = loop.fit
    monkeypatch.setattr(
        loop, "fit", lambda *args, label, **kw: fits.append(label) or original(*args, label=label, **kw)
    )
    monkeypatch.setattr(compress.checkpoint, "Preemption", lambda: StopsAfter(14))  # it is asked twice a step
    with pytest.raises(loop.Preempted, match=r"rounds 0\.84, round 1: stopped at step"):
        compress.main(settings, workdir)
    fits.clear()
    monkeypatch.setattr(compress.checkpoint, "Preemption", lambda: StopsAfter(10**9))
    compress.main(settings, workdir)
    assert fits == ["rounds 0.84, round 0", "rounds 0.84, round 1"]
    for name in ("magnitude_0.5", "rounds_0.84"):
        ours, theirs = (json.loads((w / "jobs" / name / "result.json").read_text()) for w in (workdir, finished[0]))
        assert {**ours, "train_seconds": 0} == {**theirs, "train_seconds": 0}
        found, expected = (mask_files.load(w / "jobs" / name) for w in (workdir, finished[0]))
        for path, mask in expected.items():
            np.testing.assert_array_equal(found[path], mask)


def test_a_method_may_be_added_and_masks_be_taken_from_another_job_on_eight_devices(finished, monkeypatch):
    workdir, _ = finished
    before = {path: path.read_bytes() for path in workdir.glob("jobs/*/result.json")}
    monkeypatch.setattr(compress.page_lib, "write", lambda *args: workdir / "report.html")
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
    monkeypatch.setattr(experiment_lib.sharding, "make_mesh", lambda sizes: mesh)
    given = {"masks": str(workdir / "jobs" / "magnitude_0.5"), "retrain_steps": 0}
    compress.main(config({"magnitude": METHODS["magnitude"], "again": given}), workdir)
    assert {path: path.read_bytes() for path in before} == before
    again = json.loads((workdir / "jobs" / "again_0.5" / "result.json").read_text())
    assert again["before"] == again["after"]
    assert again["after"]["accuracy"] == jobs_of(finished[1])["magnitude 0.5"]["before"]["accuracy"]
    assert again["layers"] == jobs_of(finished[1])["magnitude 0.5"]["layers"]


BAD = [
    ({"a": {"sparsity": 1.5}}, "config.methods.a.sparsity=1.5 must lie in [0, 1]"),
    ({"a": {"sparsity": (0.5, -0.1)}}, "config.methods.a.sparsity=-0.1"),
    ({"a": {"sparsty": 0.5}}, "config.methods.a.sparsty is not a key that is used; nearest: sparsity"),
    ({"a": {"where": ".*/kernels"}}, "config.methods.a.where='.*/kernels' matches none of the"),
    ({"a": {"where": ".*/bias"}}, "a leaf needs two axes"),
    ({"a": {"pattern": "5:4"}}, "n=5, m=4 is not a pattern"),
    ({"a": {"pattern": "blok:4x4"}}, "did you mean 'block:4x4'"),
    ({"a": {"score": "magnitud"}}, "nearest: magnitude"),
    ({"a": {"score": "lora"}}, "no score of single weights that could be measured here"),
    ({"a": {"allocation": "globl"}}, "did you mean 'global'"),
    ({"a": {"allocation": "global", "pattern": "block:4x4"}}, "needs pattern='unstructured'"),
    ({"a": {"schedule": "iteratively"}}, "did you mean 'iterative'"),
    ({"a": {"recipe": "mdgf", "pattern": "2:4"}}, "config.methods.a: recipe='mdgf'"),
    ({"a": {"recipe": "ste", "pattern": "unstructured"}}, "a recipe trains N:M patterns such as '2:4'"),
    ({"a": {"schedule": "polynomial", "retrain_steps": 0}}, "retrain_steps must be at least 1"),
    ({"a": {"optimizer": {"name": "adamm", "learning_rate": 1.0}}}, "config.methods.a.optimizer.name='adamm'"),
    ({"a": {"kind": "channel"}}, "did you mean 'channels'"),
    ({"a": {"kind": "channels", "groups": ".*dense_9.*"}}, "config.methods.a.groups='.*dense_9.*' matches none"),
    ({"a": {"masks": "nowhere"}}, "nowhere holds no masks"),
    ({"a b": {}, "a_b": {}}, "a b 0.5 and a_b 0.5 would be kept in one folder"),
    ({}, "config.methods is empty"),
]


@pytest.mark.parametrize(("chosen", "message"), BAD, ids=lambda value: str(value) if isinstance(value, dict) else "")
def test_what_cannot_be_run_is_one_line_before_anything_is_written(chosen, message, tmp_path):
    with pytest.raises((ValueError, OSError)) as error:
        compress.main(config(chosen), tmp_path / "run")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_checkpoints_and_masks_of_another_model_are_refused(finished, tmp_path):
    workdir, _ = finished
    wider = {"name": "MLP", "features": (40, 10), "flatten": True}
    with pytest.raises(ValueError, match="is of another model") as error:
        compress.main(config({"a": {}}, checkpoint=str(workdir), model=wider), tmp_path / "run")
    assert "params/dense_0/kernel" in str(error.value)
    with pytest.raises(OSError, match="holds no dense run"):
        compress.main(config({"a": {}}, checkpoint=str(tmp_path)), tmp_path / "run")
    given = {"masks": str(workdir / "jobs" / "magnitude_0.5")}
    with pytest.raises(ValueError, match=r"dense_0/kernel has shape \(64, 32\) there and \(64, 40\) here"):
        compress.main(config({"a": given}, model=wider), tmp_path / "run")
    with pytest.raises(ValueError, match="keep more than 2 of 4 entries in a group"):
        compress.main(config({"a": given | {"pattern": "2:4"}}), tmp_path / "run")
    with pytest.raises(ValueError, match=r"was run with other settings: retrain_steps is 4 there and 5 here"):
        compress.main(config({"magnitude": {"sparsity": 0.5, "retrain_steps": 5}}), workdir)
    assert not (tmp_path / "run").exists()


def test_a_model_without_channels_says_which_operation_stopped_them(tmp_path):
    model = {"name": "MLP", "features": (10,), "flatten": True}
    with pytest.raises(ValueError, match=r"config.methods.a: no channel of this model .*dense_0/kernel axis"):
        compress.main(config({"a": {"kind": "channels"}}, model=model), tmp_path / "run")


def test_defaults_are_checked_too(tmp_path):
    found = config({"a": {}})
    found.defaults["schedule"] = "iterative"  # it decides the kind of a method, and stands with it
    with pytest.raises(ValueError, match=r"config\.defaults\.schedule is not a key"):
        compress.main(found, tmp_path / "run")


def test_a_score_by_activations_names_the_leaf_that_is_no_kernel(tmp_path):
    vit = {"name": "ViT", "patch": 4, "width": 8, "depth": 1, "heads": 2, "mlp_width": 8, "stem": (4,)}
    found = config({"a": {"score": "wanda", "where": ".*"}}, model=vit)
    with pytest.raises(ValueError, match="and position is none"):
        compress.main(found, tmp_path / "run")


@pytest.fixture(scope="module")
def untrained():
    experiment = experiment_lib.build({k: v for k, v in config().items() if k not in compress.OWN})
    params = jax.jit(experiment.model.init)(jax.random.key(1), jnp.zeros((1, 8, 8, 1)))["params"]
    return Weights(experiment, params, None)


def job(settings, sparsity=0.5):
    defaults = config().defaults.to_dict() | {"sparsity": sparsity}
    return methods.jobs({"a": settings}, defaults)[0]


@pytest.mark.parametrize("score", ["fisher", "wanda", "synflow", {"name": "snip", "normalize": False}], ids=str)
def test_any_score_gives_masks_of_the_sparsity(score, untrained):
    masks, _ = cut.masks_for(job({"score": score}), Calibration(untrained, 1), 0.5, None)
    assert {path: int(mask.sum()) for path, mask in tree_lib.flatten(masks)} == {p: n // 2 for p, n in SIZES.items()}


@pytest.mark.parametrize("allocation", ["lamp", "rate_distortion", "coarse_to_fine", "output"])
def test_any_allocation_spends_the_budget(allocation, untrained):
    masks, _ = cut.masks_for(job({"allocation": allocation}), Calibration(untrained, 1), 0.5, None)
    kept = sum(int(mask.sum()) for mask in jax.tree.leaves(masks))
    # Distortions are measured at twentieths of a layer, and never over the budget.
    slack = 0.05 if allocation == "rate_distortion" else 0.001
    assert (0.5 - slack) * sum(SIZES.values()) <= kept <= 0.501 * sum(SIZES.values())


def test_masks_of_rounds_are_nested_whatever_the_score(untrained):
    first, _ = cut.masks_for(job({}), Calibration(untrained, 1), 0.5, None)
    other = jax.tree.map(lambda w: w[::-1], untrained.params)  # what was removed may score high now
    second, _ = cut.masks_for(job({}), Calibration(untrained._replace(params=other), 1), 0.8, first)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert not np.any(np.asarray(b) & ~np.asarray(a))
    assert masks_lib.summarize(second)["total"] == pytest.approx(0.8, abs=1e-3)


def test_nan_counts_as_the_smallest_and_is_reported(untrained, capsys):
    params = jax.tree.map(jnp.copy, untrained.params)
    params["dense_0"]["kernel"] = params["dense_0"]["kernel"].at[3, :5].set(jnp.nan)
    compress._report_nan(params)
    assert "5 of 2048 weights of dense_0/kernel are NaN" in capsys.readouterr().err
    masks, _ = cut.masks_for(job({}), Calibration(untrained._replace(params=params), 1), 0.5, None)
    assert not np.any(masks["dense_0"]["kernel"][3, :5])
    assert int(masks["dense_0"]["kernel"].sum()) == SIZES["dense_0/kernel"] // 2


def test_a_layer_that_would_be_pruned_away_keeps_the_minimum_and_is_named(untrained):
    masks, notes = cut.masks_for(job({"min_kept": 7}, sparsity=1.0), Calibration(untrained, 1), 1.0, None)
    assert {int(mask.sum()) for mask in jax.tree.leaves(masks)} == {7}
    assert notes[0] == "dense_0/kernel is down to the minimum: 7 of 2048 weights are kept"
    tiny = untrained._replace(params=jax.tree.map(lambda w: w, untrained.params))
    tiny.params["dense_1"]["kernel"] = 1e-6 * tiny.params["dense_1"]["kernel"]
    masks, notes = cut.masks_for(job({"allocation": "global", "min_kept": 3}), Calibration(tiny, 1), 0.9, None)
    assert int(masks["dense_1"]["kernel"].sum()) == 3
    assert [note.split()[0] for note in notes] == ["dense_1/kernel"]


def test_the_front_is_what_no_point_beats():
    rng = np.random.default_rng(0)
    costs_, scores = rng.integers(0, 6, 40), rng.integers(0, 6, 40) / 5
    scores[3] = np.nan
    for direction, sign in (("higher", 1), ("lower", -1)):
        values = np.where(np.isnan(scores), -np.inf, sign * scores)
        for i, flag in enumerate(results.front(costs_, scores, direction)):
            better = (costs_ <= costs_[i]) & (values >= values[i]) & ((costs_ < costs_[i]) | (values > values[i]))
            assert flag == (not better.any())


def test_uses_of_kernels_are_counted_by_positions():
    """Products of a convolution with padding count as all the others."""
    batch = {"image": jnp.zeros((2, 8, 8, 1))}
    for model, expected in (
        (models.ResNet(10, 1, 4), {"stem/kernel": 64, "stage_1_block_0/conv_0/kernel": 16, "logits/kernel": 1}),
        (models.ViT(10, 4, 8, 1, 2, 8, (4,)), {"stem_0/kernel": 64, "patch/kernel": 4, "block_0/mlp/up/kernel": 4}),
    ):
        variables = jax.eval_shape(model.init, jax.random.key(0), batch["image"])
        task = types.SimpleNamespace(inputs=lambda batch: batch["image"])
        data = types.SimpleNamespace(take=None)
        experiment = types.SimpleNamespace(model=model, task=task, train_data=data, settings={"batch": 2})
        params = variables.pop("params")
        found = costs.uses(Weights(experiment, params, variables or None), batch)
        assert {path: found[path] for path in expected} == expected
