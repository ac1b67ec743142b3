"""The main job as a user starts it: from a shell, killed, stopped, restarted, and given bad input.

All runs are the quickstart, made small by flags.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ml_collections import ConfigDict

from configs import quickstart
from experiments import experiment, metrics
from experiments import workdir as workdir_lib

ROOT = pathlib.Path(__file__).parents[2]
SMALL = (
    "--config.steps=24",
    "--config.batch=16",
    "--config.model.width=16",
    "--config.model.depth=1",
    "--config.model.heads=2",
    "--config.model.mlp_width=16",
    "--config.log_every=1",
    "--config.eval_every=8",
    "--config.checkpoint_every=4",
)


def environment(devices=1):
    flags = f"--xla_force_host_platform_device_count={devices}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def command(workdir, *flags):
    config = () if any(f.startswith("--config=") for f in flags) else ("--config=configs/quickstart.py",)
    return [sys.executable, "-m", "experiments.train", *config, f"--workdir={workdir}", *flags]


def run(workdir, *flags, devices=1):
    return subprocess.run(
        command(workdir, *flags), cwd=ROOT, env=environment(devices), capture_output=True, text=True, timeout=300
    )


def start(workdir, *flags):
    return subprocess.Popen(
        command(workdir, *flags), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )


def files(workdir):
    """The bytes that the compressed variant computes; it owes nothing to the baseline before it."""
    return (workdir / "compressed" / "metrics.jsonl").read_bytes()


def final_arrays(workdir):
    """Parameters of the last checkpoint, read without any code of ours."""
    folder = workdir / "compressed" / "checkpoints"
    last = max(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    restored = ocp.StandardCheckpointer().restore((folder / str(last) / "state").resolve())
    leaves = jax.tree_util.tree_leaves_with_path(restored["params"])
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    result = run(workdir, *SMALL)
    assert result.returncode == 0, result.stderr
    return workdir, result


def test_a_run_leaves_what_it_promises(finished):
    workdir, result = finished
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["packed_agreement"] == 1.0
    assert summary["packed_accuracy"] == summary["compressed_accuracy"]
    assert summary["packed_bytes"] < summary["dense_bytes"]
    assert {"dense_accuracy", "train_seconds"} <= set(summary)
    for name in ("curves", "tasks", "layers", "weights", "wrong"):
        assert (workdir / "report" / f"{name}.png").stat().st_size > 5000
        assert f"report/{name}.png" in (workdir / "report.html").read_text()
    steps = [record["step"] for record in metrics.read(workdir / "compressed" / "metrics.jsonl") if "loss" in record]
    assert steps == list(range(24))
    assert list((workdir / "compressed").glob("*tfevents*"))
    record = json.loads((workdir / "config.json").read_text())
    assert record["config"]["model"]["width"] == 16
    assert record["versions"]["jax"] == jax.__version__
    assert "\x1b" not in result.stderr  # plain lines where there is no terminal
    assert "checkpoint_manager" not in result.stderr  # and ours alone
    assert "compressed, packed" in result.stderr


def test_a_finished_run_is_not_trained_again(finished):
    workdir, _ = finished
    before = files(workdir)
    result = run(workdir, *SMALL)
    assert result.returncode == 0
    assert "restored step 24" in result.stderr
    assert files(workdir) == before


def test_killed_at_a_random_moment_and_restarted_it_computes_the_same_bits(finished, tmp_path):
    workdir = tmp_path / "killed"
    flags = (*SMALL, "--config.baseline=False")
    process = start(workdir, *flags)
    step = random.randrange(1, 22)
    path = workdir / "compressed" / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and len(path.read_bytes().splitlines()) > step):
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.wait()
    print(f"killed after step {step}")
    result = run(workdir, *flags)
    assert result.returncode == 0, result.stderr
    assert files(workdir) == files(finished[0])
    expected, actual = final_arrays(finished[0]), final_arrays(workdir)
    assert expected.keys() == actual.keys()
    for path in expected:
        np.testing.assert_array_equal(actual[path], expected[path], err_msg=path)


def test_told_to_stop_it_saves_exits_75_and_goes_on(finished, tmp_path):
    workdir = tmp_path / "stopped"
    flags = (*SMALL, "--config.baseline=False", "--config.checkpoint_every=1000")
    process = start(workdir, *flags)
    path = workdir / "compressed" / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and len(path.read_bytes().splitlines()) > 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 75, error.decode()
    assert b"the same command goes on from here" in error
    result = run(workdir, *flags)
    assert result.returncode == 0, result.stderr
    assert "compressed: restored step" in result.stderr
    assert files(workdir) == files(finished[0])


def test_on_eight_devices_it_runs_the_same_program(finished, tmp_path):
    mesh = ("--config.mesh={'data': 2, 'fsdp': 2, 'tensor': 2}", "--config.sharding=transformer")
    result = run(tmp_path / "eight", *SMALL, *mesh, "--config.baseline=False", devices=8)
    assert result.returncode == 0, result.stderr
    expected = metrics.read(finished[0] / "compressed" / "metrics.jsonl")
    actual = metrics.read(tmp_path / "eight" / "compressed" / "metrics.jsonl")
    # The same losses up to the order of sums, before differences have had time to grow.
    for a, b in zip(actual[:5], expected[:5], strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)


BAD_FLAGS = [
    (("--config.stps=3",), "config.stps is not a key that is used; nearest: steps"),
    (("--config=configs/no_such_config.py",), "configs/quickstart.py"),
    (("extra",), "unexpected arguments extra"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS, ids=["key", "file", "argument"])
def test_bad_flags_are_one_line_and_exit_code_2(flags, message, tmp_path):
    result = run(tmp_path / "run", *flags)
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert message in lines[0]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def changed(**values):
    """The quickstart's config with some keys, given by path, set to other values."""
    config = quickstart.get_config()
    for path, value in values.items():
        *parents, last = path.split("__")
        node = config
        for parent in parents:
            node = node[int(parent) if parent.isdigit() else parent]
        with ConfigDict.unlocked(node):
            node[last] = value
    return config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer__name": "adampp"}, "nearest: adamp"),
        ({"optimizer__learning_rat": 1.0}, "config.optimizer.learning_rat is not a key that is used"),
        ({"aggregator__name": "conflictfree"}, "nearest: conflict_free"),
        ({"aggregator__length": "longest"}, "config.aggregator: length='longest'"),
        ({"reparam__0__n": 5}, "n=5"),
        ({"reparam__0__where": ".*/kernels"}, "matches none of the"),
        ({"reparam__1__format": "int9"}, "int9"),
        ({"dataset__name": "digit"}, "digits"),
        ({"dataset__name": "tfds:no_such_set"}, "no_such_set"),
        ({"model__num_classes": 9}, "labels must be in"),
        ({"model__heads": 5}, "heads must divide"),
        ({"task__mask_ratio": 1.0}, "config.task: mask_ratio=1.0"),
        ({"batch": 0}, "config.batch=0"),
        ({"batch": 12}, "batch=12 is not a positive multiple of 8"),  # tests run on eight devices
        ({"mesh__data": 3}, "multiply to 3"),
        ({"sharding": "fsdpp"}, "did you mean 'fsdp'"),
        ({"mode": "leen"}, "did you mean 'lean'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_config_that_cannot_be_run_is_refused_before_anything_is_trained(values, message):
    with pytest.raises((ValueError, OSError)) as error:
        experiment.programs(experiment.build(changed(**values)))
    assert message in str(error.value)


def test_a_key_that_is_missing_is_named():
    config = quickstart.get_config()
    del config["task"]
    with pytest.raises(ValueError, match="config needs the key task"):
        experiment.build(config)


def test_inputs_that_are_not_finite_are_named(monkeypatch):
    from steelyard import data

    digits = data.load("digits")
    digits.columns["image"][3, 2, 1] = np.nan
    monkeypatch.setattr(data, "load", lambda name, split: digits)
    with pytest.raises(ValueError, match=r"column 'image', row 3, element .2, 1, 0. holds nan"):
        experiment.build(quickstart.get_config())


def test_a_workdir_of_another_run_is_left_alone(finished):
    workdir, _ = finished
    before = files(workdir)
    settings = json.loads((workdir / "config.json").read_text())["config"]
    workdir_lib.claim(workdir, settings)  # its own config may go on
    with pytest.raises(ValueError, match="seed is 0 there and 1 here"):
        workdir_lib.claim(workdir, settings | {"seed": 1})
    assert files(workdir) == before


def test_a_workdir_that_is_a_file_or_someone_elses_or_not_writable(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("mine")
    for path in (file, file / "below"):
        with pytest.raises(ValueError, match="is a file"):
            workdir_lib.claim(path, {})
    assert file.read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        workdir_lib.claim(other, {})
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # the superuser may write anywhere
    with pytest.raises(ValueError, match="not writable"):
        workdir_lib.claim(tmp_path / "locked", {})
