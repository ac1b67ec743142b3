"""Costs as ratios measured side by side in one run; absolute times are this machine's and mean nothing elsewhere.

python -m experiments.bench --room=train
"""

import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import optax
from absl import app, flags

from experiments import tasks
from launch import aot, hlo
from steelyard import data, models, optim, train

PyTree = Any
_ROOM = flags.DEFINE_string("room", "all", "What to measure: a room, or all.")


def main(argv: Sequence[str]) -> None:
    del argv
    rooms = {"train": bench_train, "optim": bench_optim, "data": bench_data, "startup": bench_startup}
    if _ROOM.value not in ("all", *rooms):
        sys.exit(f"error: --room={_ROOM.value} is not one of all, {', '.join(rooms)}")
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, {os.cpu_count()} cores", flush=True)
    for room, bench in rooms.items():
        if _ROOM.value in ("all", room):
            print(f"\n{room}", flush=True)
            bench()


def bench_train() -> None:
    """`make_step` with everything off against a step written by hand, on the quickstart's ViT and the transformer."""
    vit = models.ViT(10, width=64, depth=3, heads=4, mlp_width=128)
    images = next(data.batches(data.load("digits"), batch=128, seed=0))[1]
    transformer = models.Transformer(256, width=128, depth=2, heads=4, mlp_width=344)
    text = next(data.batches(data.load("python_source", length=128), batch=32, seed=0))[1]
    for name, task, model, batch in (
        ("ViT", tasks.classify(vit), vit, images),
        ("transformer", tasks.predict_next(transformer), transformer, text),
    ):
        tx = optax.adam(1e-3)
        batch = jax.tree.map(jnp.asarray, batch)
        params = jax.jit(lambda m=model, t=task, b=batch: m.init(jax.random.key(0), t.inputs(b), train=False))()[
            "params"
        ]
        steps = {
            "by hand": _hand_written(task, tx, params),
            "make_step, everything off": _made(task, tx, params, skip_nonfinite=False),
            "make_step, as it comes": _made(task, tx, params),
        }
        _print_ratios(name, {label: _stepper(*step, batch) for label, step in steps.items()})


def _hand_written(task: tasks.Task, tx, params: PyTree):
    """What one would write with Flax and optax, with the two metrics that any loop logs."""

    def step(state, batch):
        params, opt_state, rng, count = state

        def loss(params):
            key = jax.random.fold_in(rng, count)
            terms = task.losses(task.forward(params, batch, rng=key, train=True), batch)
            return sum(jnp.mean(term) for term in terms.values())

        value, grads = jax.value_and_grad(loss)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        metrics = {"loss": value, "grad_norm": optax.tree.norm(grads)}
        return (optax.apply_updates(params, updates), opt_state, rng, count + 1), metrics

    return jax.jit(step, donate_argnums=0), (params, tx.init(params), jax.random.key(1), jnp.zeros((), jnp.int32))


def _made(task: tasks.Task, tx, params: PyTree, **options):
    step = jax.jit(train.make_step(task.forward, task.losses, tx, **options), donate_argnums=0)
    return step, train.init_state(params, tx, rng=jax.random.key(1))


def _stepper(step, state, batch) -> Callable[[int], None]:
    """A function that runs so many steps; the state is its own copy, because steps donate it."""
    holder = [jax.tree.map(jnp.copy, state)]

    def steps(count: int) -> None:
        for _ in range(count):
            holder[0], _ = step(holder[0], batch)
        jax.block_until_ready(holder[0])

    return steps


def bench_optim() -> None:
    """AdamP against AdamW: time of an update on CPU, bytes of the update as compiled for a TPU v5e."""
    shapes = {f"w{i}": (1024, 1024) for i in range(8)} | {"wide": (512, 4096), "bias": (4096,)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}
    optimizers = {"adamw": optax.adamw(1e-3), "adamp": optim.adamp(1e-3, weight_decay=1e-4)}

    def updater(tx):
        def update(state, grads):
            params, opt_state = state
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.jit(update, donate_argnums=0), (params, tx.init(params)), jax.tree.map(lambda p: 0.1 * p, params)

    size = sum(p.size for p in params.values())
    _print_ratios(
        f"update of {size / 1e6:.0f} M parameters", {k: _stepper(*updater(tx)) for k, tx in optimizers.items()}
    )
    if importlib.util.find_spec("libtpu") is None:
        print("  bytes on TPU v5e: not measured, the extra `tpu` is not installed")
        return
    matrices = {f"w{n}": jax.ShapeDtypeStruct((n, n), jnp.float32) for n in (512, 1024, 2048, 4096)}
    count = sum(leaf.size for leaf in matrices.values())
    device = aot.topology_device()
    for name, tx in optimizers.items():

        def update(params, opt_state, grads, tx=tx):
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        compiled = aot.compile_for(
            device, update, matrices, jax.eval_shape(tx.init, matrices), matrices, donate_argnums=(0, 1)
        )
        moved = hlo.fusion_bytes(compiled.as_text()) / count
        counted = compiled.cost_analysis()["bytes accessed"] / count
        temporary = compiled.memory_analysis().temp_size_in_bytes
        print(
            f"  {name}, compiled for TPU v5e: {moved:.1f} bytes per parameter over fusions, {counted:.1f} by the "
            f"compiler's own count (with its prefetch copies), {temporary / 2**20:.2f} MiB of temporaries"
        )


def bench_data() -> None:
    """Images per second through the batcher alone."""
    source = data.load("digits")
    batch, count = 256, 4000
    for _ in range(2):  # the first round warms up
        start = time.perf_counter()
        for _ in data.batches(source, batch=batch, seed=0, num_steps=count):
            pass
        seconds = time.perf_counter() - start
    print(f"  digits in batches of {batch}: {batch * count / seconds / 1e6:.2f} million images/s")


def bench_startup() -> None:
    """Seconds from the start of Python until the first step begins to compile."""
    code = (
        "import time, sys; start = time.perf_counter()\n"
        "from experiments import experiment, train\n"
        "from configs import quickstart\n"
        "experiment.programs(experiment.build(quickstart.get_config()))\n"
        "print(time.perf_counter() - start)"
    )
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    print(f"  imports, data, shapes and shardings of both variants: {statistics.median(seconds):.2f} s")


def _print_ratios(title: str, runs: dict[str, Callable[[int], None]], *, rounds: int = 15, steps: int = 10) -> None:
    """Medians over interleaved rounds, as ratios to the first: drift of the machine meets all alike."""
    for run in runs.values():
        run(3)
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(rounds):
        for label, run in runs.items():
            start = time.perf_counter()
            run(steps)
            seconds[label].append((time.perf_counter() - start) / steps)
    first = next(iter(runs))
    for label, times in seconds.items():
        ratios = [t / base for t, base in zip(times, seconds[first], strict=True)]
        ms = 1e3 * statistics.median(times)
        print(f"  {title}, {label}: {statistics.median(ratios):.3f} x ({ms:.2f} ms here)", flush=True)


if __name__ == "__main__":
    app.run(main)
