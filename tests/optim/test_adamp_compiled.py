"""What compilers make of the update: bytes of the passes over a leaf (TPU), temporaries and collectives (CPU)."""

import importlib.util

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from launch import aot, hlo
from steelyard import optim, tree

needs_tpu_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install 'jax[tpu]'"
)

SHAPES = {"large": (4096, 4096), "conv": (3, 3, 64, 128), "bias": (4096,)}
STACKED = {"scanned": (4, 256, 512)}


@pytest.fixture(scope="module")
def device():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPU_SKIP_MDS_QUERY", "1")
        patch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
        yield aot.topology_device("v5e:1x1")


def compile_update(device, tx, shapes, dtype=jnp.float32):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = {name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}
    return aot.compile_for(device, step, params, jax.eval_shape(tx.init, params), params, donate_argnums=(0, 1)), params


def bytes_per_parameter(device, name, tx, shapes, dtype=jnp.float32):
    compiled, params = compile_update(device, tx, shapes, dtype)
    size = tree.size(params)
    counted = hlo.fusion_bytes(compiled.as_text()) / size
    accessed = compiled.cost_analysis()["bytes accessed"] / size
    temporary = compiled.memory_analysis().temp_size_in_bytes
    print(f"{name}: fusions {counted:.2f} B, cost analysis {accessed:.2f} B a parameter, temporaries {temporary} B")
    return counted, temporary


def largest(shapes, itemsize):
    return max(tree.nbytes(jax.ShapeDtypeStruct(s, f"V{itemsize}")) for s in shapes.values())


@needs_tpu_compiler
def test_adamw_is_one_pass(device):
    """The control of the counter: reads p, g, m, v and writes p, m, v once, 7 arrays of 4 bytes."""
    counted, _ = bytes_per_parameter(device, "adamw", optax.adamw(1e-3), {"large": (4096, 4096)})
    assert counted == pytest.approx(28, abs=0.1)


@needs_tpu_compiler
def test_adamp_is_two_passes_without_temporaries(device):
    """At best: p, g, m, v read and m, v written (24 bytes); then p, m, v read and p written (16)."""
    counted, temporary = bytes_per_parameter(device, "adamp", optim.adamp(1e-3, weight_decay=0.1), SHAPES)
    assert counted <= 45
    assert temporary < largest(SHAPES, 4) / 8


@needs_tpu_compiler
@pytest.mark.parametrize(
    ("name", "tx", "dtype", "limit"),
    [
        # Two bytes an array instead of four.
        ("adamp bf16", optim.adamp(1e-3, weight_decay=0.1, stack_axes=0), jnp.bfloat16, 22.5),
        # As AdamP: the gradient is read again, the second moment is not there.
        ("sgdp nesterov", optim.sgdp(1e-3, nesterov=True, stack_axes=0), jnp.float32, 33),
    ],
)
def test_relatives_are_two_passes_too(device, name, tx, dtype, limit):
    counted, temporary = bytes_per_parameter(device, name, tx, STACKED, dtype)
    assert counted <= limit
    assert temporary < largest(STACKED, jnp.dtype(dtype).itemsize) / 8


@pytest.mark.parametrize(
    "tx", [optim.adamp(1e-3, weight_decay=0.1), optim.adamp(1e-3, nesterov=True), optim.sgdp(1e-3)]
)
def test_cpu_stores_no_direction(tx):
    """A stored direction would be new memory in each step, and its page faults dearer than all arithmetic."""
    shapes = {"a": (512, 256), "b": (256, 512)}
    compiled, _ = compile_update(jax.devices("cpu")[0], tx, shapes)
    assert compiled.memory_analysis().temp_size_in_bytes < largest(shapes, 4) / 8


def test_sharded_leaves_are_never_gathered():
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    tx = optim.adamp(1e-3, weight_decay=0.1)
    leaf = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("x", "y")))
    state = jax.tree.map(lambda s: leaf if s.shape == leaf.shape else s, jax.eval_shape(tx.init, leaf))
    text = jax.jit(tx.update).lower(leaf, state, leaf).compile().as_text()
    assert "all-reduce" in text
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))
