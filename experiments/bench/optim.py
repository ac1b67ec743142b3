"""Every optimizer of the room, and optax's best known: time of an update on this machine, bytes of it on a TPU."""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tqdm

from experiments.bench import page, timing
from launch import aot, hlo
from steelyard import optim, tree

PyTree = Any

_WIDTH, _MLP, _DEPTH, _VOCABULARY = 512, 1376, 6, 12288
# Matrices of several sizes, so that no one size decides; all of them large enough to be streamed from memory.
_TPU_SHAPES = {f"w{n}": (n, n) for n in (512, 1024, 2048, 4096)}


class Case(NamedTuple):
    """An optimizer.

    Attributes:
      tx: the optimizer.
      extra: the extra arguments of its update, as a function of the parameters.
      is_compiled: for a TPU too; singular value decompositions take it minutes each.
    """

    tx: optax.GradientTransformation
    extra: Callable[[PyTree], dict[str, Any]] = lambda params: {}
    is_compiled: bool = True


def cases() -> dict[str, Case]:
    """What is measured, by name; the first is what the others are compared with."""
    adamw = optax.adamw(1e-3)

    def masks(params):
        return {"masks": jax.tree.map(lambda p: p > 0, params)}

    return {
        "optax.adamw": Case(adamw),
        "optax.lamb": Case(optax.lamb(1e-3)),
        "optax.contrib.muon": Case(optax.contrib.muon(1e-3)),
        "adamp, nothing projected": Case(optim.adamp(1e-3, weight_decay=1e-4, delta=0.0)),
        "adamp, everything projected": Case(optim.adamp(1e-3, weight_decay=1e-4, delta=1e6)),
        "sgdp": Case(optim.sgdp(1e-3, weight_decay=1e-4)),
        "tangent_projection(lion)": Case(
            optax.chain(
                optim.tangent_projection(optax.scale_by_lion(), weight_decay=1e-4), optax.scale_by_learning_rate(1e-3)
            )
        ),
        "grad_norm_low_rank": Case(optim.grad_norm_low_rank(1e-3, rank=128), is_compiled=False),
        "low_bit_state(adamw, bits=8)": Case(optim.low_bit_state(adamw, bits=8)),
        "low_bit_state(adamw, bits=8, block=32)": Case(optim.low_bit_state(adamw, bits=8, block=32)),
        "low_bit_state(adamw, bits=4)": Case(optim.low_bit_state(adamw, bits=4)),
        "dynamic_loss_scale(adamw)": Case(optim.dynamic_loss_scale(adamw)),
        "sparse(adamw)": Case(optim.sparse(adamw), masks),
        "normalize_by_error, sgd": Case(
            optax.chain(optim.normalize_by_error(), optax.sgd(1e-3)), lambda params: {"error": jnp.float32(0.5)}
        ),
        "block_coordinate, sgd": Case(optax.chain(optim.block_coordinate(), optax.sgd(1e-3))),
    }


def bench() -> None:
    """Measures both tables, prints them and writes them to the page."""
    params = _transformer_tree()
    count = tree.size(params)
    print(f"  an update of {count / 1e6:.1f} M parameters (transformer), against optax.adamw", flush=True)
    chosen = cases()
    grads = jax.tree.map(lambda p: 0.1 * p + 1e-3, params)
    timings = timing.ratios({name: _stepper(case, params, grads) for name, case in chosen.items()}, rounds=9)
    state_bytes = {name: tree.nbytes(jax.eval_shape(case.tx.init, params)) / count for name, case in chosen.items()}
    moved = _tpu_bytes(chosen)
    rows = [
        [f"`{name}`", f"{timings[name].ratio:.2f}", f"{state_bytes[name]:.2f}", *moved.get(name, ("", "", ""))]
        for name in chosen
    ]
    header = ["optimizer", "CPU time", "state, B/parameter", "v5e, B/parameter", "by its count", "temporaries, MiB"]
    for row in [header, *rows]:
        print("  " + f"{row[0]:<42}" + "".join(f"{cell:>20}" for cell in row[1:]), flush=True)
    for name, timing_ in timings.items():
        print(f"  {name}: {1e3 * timing_.seconds:.1f} ms here")
    page.write("optim", [*_explanation(count, bool(moved)), "", *page.table(header, rows)])


_ON_CPU = """
An update of {count:.1f} million float32 parameters shaped like a transformer, and adding it. CPU time is a ratio to
`optax.adamw`, median of rounds in which all take turns; `grad_norm_low_rank` is timed between two refreshes of its
subspace.
"""
_ON_TPU = """
v5e: bytes that the fusions read and write for each parameter of square matrices from 512 to 4096, compiled for a TPU
v5e; empty where the program has loops or branches, whose bytes depend on how often they run, and where it was not
compiled (singular value decompositions take minutes each). Two passes are AdamP's least: p, g, m, v read and m, v
written (24 bytes), then p, m, v read and p written (16), 40 in all; AdamW's single pass is 28. "By its count": the
compiler's own, with its prefetch copies.
"""
_NOT_ON_TPU = """
Bytes on a TPU were not measured: the extra `tpu` was not installed.
"""


def _explanation(count: int, has_tpu: bool) -> list[str]:
    return (_ON_CPU.format(count=count / 1e6) + (_ON_TPU if has_tpu else _NOT_ON_TPU)).strip().splitlines()


def _transformer_tree() -> PyTree:
    """Random parameters with the shapes of a small language model."""
    shapes: dict[str, Any] = {"embed": (_VOCABULARY, _WIDTH), "norm": (_WIDTH,)}
    for i in range(_DEPTH):
        attention = {name: (_WIDTH, _WIDTH) for name in ("query", "key", "value", "out")}
        mlp = {"gate": (_WIDTH, _MLP), "up": (_WIDTH, _MLP), "down": (_MLP, _WIDTH)}
        shapes[f"block_{i}"] = attention | mlp | {"norm": (_WIDTH,)}
    leaves, structure = jax.tree.flatten(shapes, is_leaf=lambda x: isinstance(x, tuple))
    keys = jax.random.split(jax.random.key(0), len(leaves))
    arrays = [0.05 * jax.random.normal(key, shape) for key, shape in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, arrays)


def _update(case: Case) -> Callable:
    tx = optax.with_extra_args_support(case.tx)

    def update(state, batch):
        (params, opt_state), (grads, extra) = state, batch
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        return (optax.apply_updates(params, updates), opt_state), None

    return update


def _stepper(case: Case, params: PyTree, grads: PyTree) -> timing.Steps:
    state = (params, jax.jit(case.tx.init)(params))
    return timing.stepper(jax.jit(_update(case), donate_argnums=0), state, (grads, case.extra(params)))


def _tpu_bytes(chosen: dict[str, Case]) -> dict[str, tuple[str, str, str]]:
    """Bytes a parameter over fusions and by the compiler's count, and temporaries, for those that compile."""
    if importlib.util.find_spec("libtpu") is None:
        print("  bytes on TPU v5e: not measured, the extra `tpu` is not installed")
        return {}
    device = aot.topology_device()
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in _TPU_SHAPES.items()}
    count = tree.size(shapes)
    result = {}
    compiled_cases = {name: case for name, case in chosen.items() if case.is_compiled}
    for name, case in tqdm.tqdm(compiled_cases.items(), desc="compile for TPU", disable=None, leave=False):
        extra = jax.eval_shape(case.extra, shapes)
        state = (shapes, jax.eval_shape(case.tx.init, shapes))
        compiled = aot.compile_for(device, _update(case), state, (shapes, extra), donate_argnums=(0,))
        try:
            fusions = f"{hlo.fusion_bytes(compiled.as_text()) / count:.1f}"
        except ValueError:  # loops and branches, as the explanation says
            fusions = ""
        counted = compiled.cost_analysis()["bytes accessed"] / count
        temporary = compiled.memory_analysis().temp_size_in_bytes
        result[name] = (fusions, f"{counted:.1f}", f"{temporary / 2**20:.2f}")
    return result
