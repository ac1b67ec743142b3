"""Machines that train one model and exchange nothing but bytes, each of them a process.

    python -m experiments.one_byte --num_processes=4 --rounds=300

Starts the processes itself, joined by `jax.distributed` over loopback. Each has a share of the digits and trains a
linear classifier on them by `aggregate.spsa_round`; in a round it sends `--samples` bytes and gets those of the others.
One machine joins late and rebuilds the parameters from the log of bytes; another leaves early, and at the end catches
up from where it left. Every process prints a hash of its parameters, and fails if they are not equal to the bit.

The processes of `jax.distributed` are a fixed set, so a machine that is away still listens: it sends zeros, by which
the others know, and keeps the bytes that it hears, but measures and updates nothing.

With the defaults: 94% of the test digits are right after 32 kB from all machines together; half a minute on two cores.
"""

import functools
import hashlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int, Key, UInt8

from steelyard import aggregate, data

PyTree = Any
BAD_INPUT = 2
_PROCESSES = flags.DEFINE_integer("num_processes", 4, "How many machines there are.", lower_bound=3)
_ROUNDS = flags.DEFINE_integer("rounds", 300, "How many updates.", lower_bound=1)
_SAMPLES = flags.DEFINE_integer("samples", 32, "Bytes that a machine sends in a round.", lower_bound=1)
_RATE = flags.DEFINE_float("learning_rate", 0.3, "Learning rate.")
_JOIN = flags.DEFINE_integer("join", 100, "The last machine takes part from this round on.")
_LEAVE = flags.DEFINE_integer("leave", 200, "Machine 1 takes part before this round.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the key that all machines share.")
_LOG = flags.DEFINE_string("log", None, "File for the bytes of all rounds, uint8 [rounds, machines, samples] (.npy).")
_PROCESS = flags.DEFINE_integer("process", None, "Which machine this process is; set by the process that starts it.")
_PORT = flags.DEFINE_integer("port", None, "Where the machines meet on loopback; set likewise.")


def main(argv: Sequence[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    if not 0 <= _JOIN.value <= _ROUNDS.value or not 0 <= _LEAVE.value <= _ROUNDS.value:
        _refuse(f"--join={_JOIN.value} and --leave={_LEAVE.value} must lie between 0 and --rounds={_ROUNDS.value}")
    sys.exit(_start_all() if _PROCESS.value is None else _be(_PROCESS.value))


def root_key(seed: int) -> Key[Array, ""]:
    """The key that all machines share."""
    return jax.random.key(seed)


def first_params() -> PyTree:
    """Where all machines start: a linear classifier of 64 pixels."""
    return {"kernel": jnp.zeros((64, 10)), "bias": jnp.zeros(10)}


def fingerprint(params: PyTree) -> str:
    """A hash of the bits of all parameters."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


# The process that starts the others.


def _start_all() -> int:
    """Runs the machines until all are done; when one fails the others, which wait for it, are stopped."""
    command = [sys.executable, "-m", "experiments.one_byte", *sys.argv[1:], f"--port={_free_port()}"]
    machines = [
        subprocess.Popen([*command, f"--process={process}"], env=_environment()) for process in range(_PROCESSES.value)
    ]
    try:
        while any(machine.poll() is None for machine in machines):
            if any(machine.poll() for machine in machines):
                return 1
            time.sleep(0.05)
        return max(abs(machine.returncode) for machine in machines)
    finally:
        for machine in machines:
            machine.terminate()
            machine.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment() -> dict[str, str]:
    """One CPU device for each process, and no proxy between them."""
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    one_device = f"{kept.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=1"
    return kept | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": one_device.strip()}


# A machine.


def _be(machine: int) -> int:
    """Takes part as one of the machines; the exit code."""
    count, address = _PROCESSES.value, f"127.0.0.1:{_PORT.value}"
    jax.distributed.initialize(address, count, machine, coordinator_bind_address=address, initialization_timeout=60)
    params, log = _train(machine)
    mine = fingerprint(params)
    sent = int(np.count_nonzero(log[:, machine]))
    _say(machine, f"{sent} bytes sent, {100 * _accuracy(params):.1f}% right, sha256 {mine}")
    if machine == 0 and _LOG.value is not None:
        np.save(_LOG.value, log)
    hashes = _gather(np.frombuffer(bytes.fromhex(mine), np.uint8))
    jax.distributed.shutdown()
    return int(np.any(hashes != hashes[0]))


def _train(machine: int) -> tuple[PyTree, UInt8[np.ndarray, "rounds machines samples"]]:
    """The last parameters, which are those of all machines, and the bytes of all rounds."""
    count, rounds = _PROCESSES.value, _ROUNDS.value
    begin = _JOIN.value if machine == count - 1 else 0
    end = _LEAVE.value if machine == 1 else rounds
    root, options = root_key(_SEED.value), {"learning_rate": _RATE.value}
    measure = jax.jit(functools.partial(_measure, root=root, machine=machine, share=_share(machine, count)))
    params, known, log = first_params(), 0, []  # the parameters are those after `known` rounds

    for step in range(rounds):
        is_here = begin <= step < end
        if is_here and known < step:
            params, known = aggregate.spsa_replay(params, root, log[known:], first_step=known, **options), step
            _say(machine, f"joins in round {step}, after a replay of the log")
        if step == end:
            _say(machine, f"leaves before round {step}")
        sent = np.asarray(measure(params, step)) if is_here else np.zeros(_SAMPLES.value, np.uint8)
        log.append(_gather(sent))
        if is_here:
            params, known = aggregate.spsa_round(params, root, step, log[step], **options), step + 1
        if machine == 0 and (step + 1) % max(rounds // 5, 1) == 0:
            present = int(np.sum(np.any(log[step], axis=1)))
            _say(machine, f"round {step + 1} of {rounds}, {present} machines: {100 * _accuracy(params):.1f}% right")

    params = aggregate.spsa_replay(params, root, log[known:], first_step=known, **options)
    return params, np.stack(log)


def _measure(
    params: PyTree, step: Int[Array, ""], *, root: Key[Array, ""], machine: int, share: tuple[Array, Array]
) -> UInt8[Array, "samples"]:
    """The bytes that a machine sends in a round."""
    images, labels = share

    def loss(params):
        logits = images @ params["kernel"] + params["bias"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))

    def slope(sample):
        key = aggregate.spsa_key(root, step, machine, sample)
        return aggregate.spsa_projected_gradient(loss, params, key)

    return aggregate.encode_byte(jax.lax.map(slope, jnp.arange(_SAMPLES.value)))


def _gather(mine: UInt8[np.ndarray, "n"]) -> UInt8[np.ndarray, "machines n"]:
    """What all machines send: the only thing that passes between them."""
    return np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, mine.size)


def _digits(split: str) -> tuple[Float[np.ndarray, "n 64"], Int[np.ndarray, "n"]]:
    columns = data.load("digits", split=split).columns
    return columns["image"].reshape(-1, 64), columns["label"]


def _share(machine: int, count: int) -> tuple[Array, Array]:
    return tuple(jnp.asarray(column[machine::count]) for column in _digits("train"))


@functools.cache
def _test_split() -> tuple[Float[np.ndarray, "n 64"], Int[np.ndarray, "n"]]:
    return _digits("test")


def _accuracy(params: PyTree) -> float:
    images, labels = _test_split()
    return float(np.mean(np.argmax(images @ params["kernel"] + params["bias"], axis=1) == labels))


def _say(machine: int, text: str) -> None:
    print(f"machine {machine}: {text}", flush=True)


def _refuse(text: str) -> NoReturn:
    print(f"error: {text}", file=sys.stderr)
    sys.exit(BAD_INPUT)


if __name__ == "__main__":
    app.run(main)
