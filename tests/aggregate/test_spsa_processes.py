"""One byte per gradient between processes: one joins late, one leaves early, all end with the same bits."""

import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

from experiments import one_byte
from steelyard import aggregate

ROOT = pathlib.Path(__file__).parents[2]
MACHINES, ROUNDS, SAMPLES, JOIN, LEAVE = 3, 12, 4, 4, 8
RATE, SEED = 0.1, 5


def run(*flags):
    command = [sys.executable, "-m", "experiments.one_byte", f"--num_processes={MACHINES}", *flags]
    return subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("one_byte") / "log.npy"
    sizes = [f"--rounds={ROUNDS}", f"--samples={SAMPLES}", f"--join={JOIN}", f"--leave={LEAVE}", f"--log={path}"]
    result = run(*sizes, f"--learning_rate={RATE}", f"--seed={SEED}")
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, np.load(path)


def test_every_process_ends_with_the_same_bits(finished):
    output, _ = finished
    hashes = dict(re.findall(r"machine (\d): .* sha256 ([0-9a-f]{64})", output))
    assert sorted(hashes) == ["0", "1", "2"]
    assert len(set(hashes.values())) == 1
    assert "machine 2: joins in round 4" in output
    assert "machine 1: leaves before round 8" in output


def test_the_bytes_show_who_took_part(finished):
    _, log = finished
    assert (log.shape, log.dtype) == ((ROUNDS, MACHINES, SAMPLES), np.uint8)
    steps = np.arange(ROUNDS)
    present = np.stack([steps >= 0, steps < LEAVE, steps >= JOIN], axis=1)
    np.testing.assert_array_equal(np.any(log, axis=2), present)


def test_the_log_alone_rebuilds_the_parameters(finished):
    """In this process, which took no part: from the key, the first parameters and 144 bytes."""
    output, log = finished
    start, root = one_byte.first_params(), one_byte.root_key(SEED)
    params = aggregate.spsa_replay(start, root, log, learning_rate=RATE)
    assert one_byte.fingerprint(params) in output
    without_last = aggregate.spsa_replay(start, root, log[:-1], learning_rate=RATE)
    assert one_byte.fingerprint(without_last) not in output


def test_rounds_that_do_not_exist_are_refused():
    result = run("--rounds=5", "--join=6")
    assert result.returncode == one_byte.BAD_INPUT
    assert result.stderr.strip().endswith("must lie between 0 and --rounds=5")
