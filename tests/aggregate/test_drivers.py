"""One rule, three drivers: every rule that has several modes gives the same update in each of them.

The rules are those of the contract table, so that a new one is tested by being listed.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import aggregate
from tests import contracts

P = jax.sharding.PartitionSpec
RULES = {entry.name: entry.make for entry in contracts.ENTRIES if entry.kind == "aggregator"}
ON_GRAM = [name for name, make in RULES.items() if getattr(make(), "gram_weights", None) is not None]
ON_LOSSES = [name for name, make in RULES.items() if getattr(make(), "weights", None) is not None]
TASKS = 3


def make_params():
    rng = np.random.default_rng(0)
    return {
        "kernel": jnp.asarray(rng.standard_normal((8, 5)) / 2, jnp.float32),
        "heads": jnp.asarray(rng.standard_normal((5, TASKS)), jnp.float32),
        "frozen": None,
    }


def losses_fn(params, x, y):
    """Losses of different sizes, whose gradients share the kernel and conflict there."""
    outputs = jnp.tanh(x @ params["kernel"]) @ params["heads"]
    return jnp.mean((outputs - y) ** 2, axis=0) * jnp.array([1.0, 5.0, 0.2])


def make_batch(size=16):
    rng = np.random.default_rng(1)
    return rng.standard_normal((size, 8)).astype(np.float32), rng.standard_normal((size, TASKS)).astype(np.float32)


def updates(rule, mode, steps=3, **options):
    """The updates of some steps of equal length, so that states matter too."""
    fn = aggregate.value_and_grad(losses_fn, rule, mode=mode, **options)

    def step(carry, _):
        params, state = carry
        _, update, state = fn(params, state, *make_batch())
        length = 8 * jnp.maximum(optax.tree.norm(update), 1e-6)
        return (jax.tree.map(lambda p, u: p - u / length, params, update), state), update

    params = make_params()
    return jax.jit(lambda: jax.lax.scan(step, (params, rule.init(params)), length=steps)[1])()


def assert_close(found, expected):
    """To float32 rounding, relative to the update of the step: solvers start from Gram matrices that differ by it."""
    for step in range(3):
        scale = np.sqrt(sum(np.sum(np.square(x[step])) for x in jax.tree.leaves(expected)))
        jax.tree.map(
            lambda a, b, s=step, size=scale: np.testing.assert_allclose(a[s], b[s], atol=1e-4 * size, rtol=0),
            found,
            expected,
        )


@pytest.mark.parametrize("name", ON_GRAM)
def test_lean_is_stacked(name):
    rule = RULES[name]()
    assert_close(updates(rule, "lean"), updates(rule, "stacked"))


@pytest.mark.parametrize("name", ON_LOSSES)
def test_weights_is_stacked(name):
    rule = RULES[name]()
    assert_close(updates(rule, "weights"), updates(rule, "stacked"))


@functools.cache
def rows_and_losses():
    params, batch = make_params(), make_batch()
    return jax.jit(jax.jacrev(losses_fn))(params, *batch), losses_fn(params, *batch)


@pytest.mark.parametrize("name", sorted({*ON_GRAM, *ON_LOSSES}))
def test_the_driver_is_the_rules_own_update(name):
    """`update` on the stacked gradients, which chains with an optimizer, against what the train step calls."""
    rule, params, batch = RULES[name](), make_params(), make_batch()
    rows, losses = rows_and_losses()
    expected, _ = jax.jit(lambda: rule.update(rows, rule.init(params), params, losses=losses))()
    _, found, _ = jax.jit(aggregate.value_and_grad(losses_fn, rule, mode="stacked"))(params, rule.init(params), *batch)
    scale = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(expected)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * scale, rtol=0), found, expected)


@pytest.mark.parametrize("name", ["aggregate.conflict_free", "aggregate.from_gram"])
def test_on_a_mesh_the_gram_matrix_costs_one_all_reduce(name):
    """Tasks stacked, every parameter sharded over all 8 devices; the other sums are of the losses and the gradients."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = {"kernel": P("fsdp"), "heads": P(None, None), "frozen": None}
    shardings = jax.tree.map(lambda s: jax.sharding.NamedSharding(mesh, s), specs, is_leaf=lambda s: isinstance(s, P))
    rule, params = RULES[name](), make_params()
    batch = jax.device_put(make_batch(), jax.sharding.NamedSharding(mesh, P("fsdp")))
    drive = aggregate.value_and_grad(losses_fn, rule, mode="stacked", mesh=mesh, specs=specs)
    fn = jax.jit(lambda params, state, *batch: drive(params, state, *batch)[1])
    text = fn.lower(jax.device_put(params, shardings), rule.init(params), *batch).compile().as_text()
    sums = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    assert sum(shapes.count(f"f32[{TASKS},{TASKS}]") for shapes in sums) == 1, sums
    found = fn(jax.device_put(params, shardings), rule.init(params), *batch)
    _, expected, _ = jax.jit(aggregate.value_and_grad(losses_fn, rule))(params, rule.init(params), *make_batch())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected)


def test_mesh_and_specs_go_together():
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="mesh and specs must be given together"):
        aggregate.value_and_grad(losses_fn, aggregate.mean(), mesh=mesh)
    with pytest.raises(ValueError, match="mesh and specs must be given together"):
        aggregate.value_and_grad_at(None, None, aggregate.mean(), specs=P())
