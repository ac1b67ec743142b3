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
import pytest

from experiments import metrics

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
    """The bytes that a run computes."""
    return {variant: (workdir / variant / "metrics.jsonl").read_bytes() for variant in ("dense", "compressed")}


def final_arrays(workdir):
    """Arrays of the last checkpoints, read without any code of ours."""
    import orbax.checkpoint as ocp

    result = {}
    for variant in ("dense", "compressed"):
        steps = [int(p.name) for p in (workdir / variant / "checkpoints").iterdir() if p.name.isdigit()]
        folder = workdir / variant / "checkpoints" / str(max(steps)) / "state"
        restored = ocp.StandardCheckpointer().restore(folder.resolve())
        for path, leaf in jax.tree_util.tree_leaves_with_path(restored["params"]):
            result[f"{variant}{jax.tree_util.keystr(path)}"] = np.asarray(leaf)
    return result


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
    process = start(workdir, *SMALL)
    variant = random.choice(("dense", "compressed"))
    step = random.randrange(1, 22)
    path = workdir / variant / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and len(path.read_bytes().splitlines()) > step):
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.3))
    process.send_signal(signal.SIGKILL)
    process.wait()
    print(f"killed in {variant}, after step {step}")
    result = run(workdir, *SMALL)
    assert result.returncode == 0, result.stderr
    assert files(workdir) == files(finished[0])
    expected, actual = final_arrays(finished[0]), final_arrays(workdir)
    assert expected.keys() == actual.keys()
    for path in expected:
        np.testing.assert_array_equal(actual[path], expected[path], err_msg=path)


def test_told_to_stop_it_saves_exits_75_and_goes_on(finished, tmp_path):
    workdir = tmp_path / "stopped"
    flags = (*SMALL, "--config.checkpoint_every=1000")
    process = start(workdir, *flags)
    path = workdir / "dense" / "metrics.jsonl"
    while process.poll() is None and not (path.exists() and len(path.read_bytes().splitlines()) > 3):
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 75, error.decode()
    assert b"the same command goes on from here" in error
    result = run(workdir, *flags)
    assert result.returncode == 0, result.stderr
    assert "dense: restored step" in result.stderr
    assert files(workdir) == files(finished[0])


def test_on_eight_devices_it_runs_the_same_program(finished, tmp_path):
    mesh = ("--config.mesh={'data': 2, 'fsdp': 2, 'tensor': 2}", "--config.sharding=transformer")
    result = run(tmp_path / "eight", *SMALL, *mesh, "--config.steps=6", devices=8)
    assert result.returncode == 0, result.stderr
    expected = metrics.read(finished[0] / "compressed" / "metrics.jsonl")
    actual = metrics.read(tmp_path / "eight" / "compressed" / "metrics.jsonl")
    # The same losses up to the order of sums, before differences have had time to grow.
    for a, b in zip(actual[:5], expected[:5], strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=1e-4)


BAD = [
    (("--config.optimizer.nam=x",), "nam"),
    (("--config.stps=3",), "steps"),
    (("--config.optimizer.name=adampp",), "nearest: adamp"),
    (("--config.reparam[0].n=5",), "n=5"),
    (("--config.reparam[0].where=.*/kernels",), "matches none"),
    (("--config.dataset.name=digit",), "digits"),
    (("--config.dataset.name=tfds:no_such_set",), "no_such_set"),
    (("--config.batch=0",), "batch"),
    (("--config=configs/no_such_config.py",), "no_such_config"),
    (("extra",), "extra"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(flags, message, tmp_path):
    result = run(tmp_path / "run", *flags)
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert message in lines[0]
    assert "Traceback" not in result.stderr


def test_a_batch_that_the_mesh_does_not_divide(tmp_path):
    result = run(tmp_path / "run", *SMALL, "--config.batch=18", devices=8)
    assert result.returncode == 2
    assert "batch=18" in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_workdir_of_another_run_is_left_alone(finished):
    workdir, _ = finished
    before = files(workdir)
    result = run(workdir, *SMALL, "--config.seed=1")
    assert result.returncode == 2
    assert "seed is 0 there and 1 here" in result.stderr
    assert files(workdir) == before


def test_a_workdir_that_is_a_file_or_someone_elses(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    result = run(file, *SMALL)
    assert result.returncode == 2
    assert "is a file" in result.stderr
    assert file.read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    result = run(other, *SMALL)
    assert result.returncode == 2
    assert "not empty" in result.stderr
