"""Resetting moments: whole leaves and entries, of any rule, quantized, and on a mesh."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from steelyard import formats, optim, tree
from steelyard.train import sharding

PARAMS = {"a": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}, "b": {"kernel": jnp.ones((4, 6)), "none": None}}
ENTRIES = jnp.arange(24).reshape(4, 6) % 3 == 0
MASKS = {"a": {"kernel": ENTRIES, "bias": None}, "b": {"kernel": None, "none": None}}

# Factored where both axes have 4 entries.
FACTORED = optax.adafactor(0.1, min_dim_size_to_factor=4, momentum=0.9)


def filled(tx, params=PARAMS):
    """A state whose moments are all one."""
    return optax.tree.map_params(tx, jnp.ones_like, tx.init(params))


def by_end(state, end):
    return {path: np.asarray(x) for path, x in tree.flatten(state) if path.endswith(end)}


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Module:
    weight: jax.Array

    def __call__(self, x):
        return self.weight * x


TRANSFORMS = {
    "adam": optax.adam(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "adamp": optim.adamp(0.1),
    "chain": optax.chain(optax.clip(1.0), optax.rmsprop(0.1), optax.ema(0.9)),
    "injected": optax.inject_hyperparams(optax.adam)(0.1),
    "loss scale": optim.dynamic_loss_scale(optax.adam(0.1)),
    "accumulated": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "partitioned": optim.by_path({".*/bias": optax.adam(0.2), ".*": optax.adam(0.1)}),
    "half": optax.adam(0.1, mu_dtype=jnp.bfloat16),
}


@pytest.mark.parametrize("tx", TRANSFORMS.values(), ids=TRANSFORMS)
def test_whole_leaves(tx):
    state = filled(tx)
    new = jax.jit(lambda s: optim.reset(s, "a/.*", tx=tx))(state)
    assert jax.tree.structure(new) == jax.tree.structure(state)
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state)
    for end, value in (("a/kernel", 0), ("a/bias", 0), ("b/kernel", 1)):
        found = by_end(new, end)
        assert found
        assert all(np.all(x == value) for x in found.values())
    # Counters, scales and hyperparameters are as they were.
    moments = ("kernel", "bias")
    assert [x for p, x in tree.flatten(new) if not p.endswith(moments)] == [
        x for p, x in tree.flatten(state) if not p.endswith(moments)
    ]


@pytest.mark.parametrize("tx", TRANSFORMS.values(), ids=TRANSFORMS)
def test_entries(tx):
    state = filled(tx)
    new = jax.jit(lambda s, m: optim.reset(s, m, tx=tx))(state, MASKS)
    for x in by_end(new, "a/kernel").values():
        np.testing.assert_array_equal(x.astype(np.float32), ~ENTRIES)
    for x in (by_end(new, "a/bias") | by_end(new, "b/kernel")).values():
        np.testing.assert_array_equal(x.astype(np.float32), 1)


def test_factored_moments_are_reset_with_the_whole_leaf_only():
    state = filled(FACTORED)
    entries = optim.reset(state, MASKS, tx=FACTORED)
    whole = optim.reset(state, "a/kernel", tx=FACTORED)
    bools = optim.reset(state, tree.select(PARAMS, "a/kernel"), tx=FACTORED)
    shapes = {path: x.shape for path, x in by_end(state, "a/kernel").items()}
    assert {(4,), (6,), (4, 6)} <= set(shapes.values())
    for path, x in by_end(entries, "a/kernel").items():
        np.testing.assert_array_equal(x, ~ENTRIES if x.shape == ENTRIES.shape else 1, err_msg=path)
    for new in (whole, bools):
        assert all(np.all(x == 0) for x in by_end(new, "a/kernel").values())
        assert all(np.all(x == 1) for x in by_end(new, "b/kernel").values())


@pytest.mark.parametrize(
    "where", ["", ".*", True, lambda path, moment: True], ids=["empty", "regex", "bool", "function"]
)
def test_a_bare_scalar(where):
    tx = optax.sgd(0.1, momentum=0.9)
    assert optim.reset(filled(tx, jnp.ones(())), where, tx=tx)[0].trace == 0


def test_a_function_sees_path_and_moment():
    tx = optax.adam(0.1)
    new = optim.reset(filled(tx), lambda path, moment: path[0] == "a" and moment.ndim == 2, tx=tx)
    assert {p: float(np.max(x)) for p, x in tree.flatten(new[0].mu)} == {"a/kernel": 0, "a/bias": 1, "b/kernel": 1}


def test_a_callable_tree_of_masks_is_a_tree():
    """As an Equinox module of parameters is."""
    tx = optax.sgd(0.1, momentum=0.9)
    new = optim.reset(filled(tx, Module(jnp.ones(3))), Module(jnp.asarray([True, False, True])), tx=tx)
    np.testing.assert_array_equal(new[0].trace.weight, [0, 1, 0])


def test_states_without_moments_stay_as_they_are():
    for tx, params in ((optax.sgd(lambda count: 0.1), PARAMS), (optax.adam(0.1), {})):
        state = tx.init(params)
        assert optim.reset(state, "a/.*", tx=tx) == state


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("a/kernels", "where='a/kernels' matches none of the 3 parameters.*Nearest paths: a/kernel"),
        ("(", r"where='\(' is not a regular expression"),
    ],
)
def test_bad_patterns(where, message):
    with pytest.raises(ValueError, match=message):
        optim.reset(filled(optax.adam(0.1)), where, tx=optax.adam(0.1))


def test_a_leaf_that_starts_anew_moves_as_a_new_one():
    """Momentum: with the trace at zero the update is the gradient's alone, while the other leaf keeps its speed."""
    tx = optax.sgd(1.0, momentum=0.5)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    _, state = tx.update(grads, tx.init(PARAMS), PARAMS)
    updates, _ = tx.update(grads, optim.reset(state, "a/.*", tx=tx), PARAMS)
    np.testing.assert_array_equal(updates["a"]["kernel"], -1.0)
    np.testing.assert_array_equal(updates["b"]["kernel"], -1.5)


# Quantized moments. The transformation keeps none of its own: its state is made of them.


def quantized_state(format, node):
    """A state of momentum whose trace is `node`."""
    tx = optax.sgd(0.1, momentum=0.9)
    params = {"w": jnp.zeros(node.shape), "v": jnp.zeros(3)}
    state = tx.init(params)
    return tx, (state[0]._replace(trace={"w": node, "v": jnp.ones(3)}), *state[1:])


# With 7 rows two codes do not share a byte.
@pytest.mark.parametrize(("format", "rows"), [("int8", 8), ("int4", 8), ("int4", 7), ("nf4", 8), ("fp8_e4m3", 8)])
def test_quantized_moments(format, rows):
    dense = np.random.default_rng(0).normal(size=(rows, 6)).astype(np.float32) + 3
    symmetric = not format.startswith("int")
    node = formats.Quantized.from_dense(dense, format, symmetric=symmetric)
    tx, state = quantized_state(format, node)
    entries = np.random.default_rng(1).random((rows, 6)) < 0.4
    reset = jax.jit(lambda s, where: optim.reset(s, where, tx=tx))
    new = reset(state, {"w": entries, "v": None})[0].trace["w"]
    assert jax.tree.structure(new) == jax.tree.structure(node)
    assert [x.dtype for x in jax.tree.leaves(new)] == [x.dtype for x in jax.tree.leaves(node)]
    np.testing.assert_array_equal(new.dense(), np.where(entries, 0, node.dense()))
    for where in ("w", {"w": True, "v": None}):
        whole = optim.reset(state, where, tx=tx)[0].trace
        np.testing.assert_array_equal(whole["w"].dense(), 0)
        np.testing.assert_array_equal(whole["w"].scale, node.scale)
        np.testing.assert_array_equal(whole["v"], 1)


@pytest.mark.parametrize("bits", [8, 4])
def test_low_bit_state(bits):
    params = {"a": jnp.ones((16, 6)), "b": jnp.ones((16, 6))}
    grads = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)
    tx = optim.low_bit_state(optax.adam(0.1), bits=bits, min_size=16)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    entries = jnp.arange(96).reshape(16, 6) % 3 == 0
    new = jax.jit(lambda s, m: optim.reset(s, m, tx=tx))(state, {"a": entries, "b": None})
    for moment in ("mu", "nu"):
        was, now = (optax.tree.get(s, moment) for s in (state, new))
        assert isinstance(now["a"], formats.Quantized)
        np.testing.assert_array_equal(now["a"].dense(), np.where(entries, 0, was["a"].dense()))
        np.testing.assert_array_equal(now["b"].dense(), was["b"].dense())
    whole = optim.reset(state, "a", tx=tx)
    assert not np.any(optax.tree.get(whole, "nu")["a"].dense())


@pytest.mark.parametrize("stack", [False, True], ids=["one", "stack"])
def test_outliers_of_a_quantized_moment(stack):
    codes, index, outliers = np.ones((4, 3), np.int8), np.array([1, 5]), np.array([7.0, 8.0], np.float32)
    codes.ravel()[index] = 0
    scale = np.ones((1, 3), np.float32)
    arrays = (codes, scale, None, outliers, index.astype(np.int32))
    arrays = [None if x is None else jnp.stack([jnp.asarray(x)] * 2) if stack else jnp.asarray(x) for x in arrays]
    node = formats.Quantized(*arrays, format="int8")
    entries = np.zeros((4, 3), bool)
    entries[0] = True  # holds the outlier at 1, and not that at 5
    entries = np.stack([entries, ~entries]) if stack else entries
    tx, state = quantized_state("int8", node)
    new = optim.reset(state, {"w": entries, "v": None}, tx=tx)[0].trace["w"]
    np.testing.assert_array_equal(new.dense(), np.where(entries, 0, node.dense()))


def test_another_weight_node_is_refused():
    node = formats.NMSparse.from_dense(jnp.ones((4, 4)), n=2, m=4)
    tx, state = quantized_state("int8", node)
    with pytest.raises(ValueError, match="not NMSparse"):
        optim.reset(state, "w", tx=tx)


@pytest.mark.parametrize("where", ["a/.*", "masks"])
def test_shardings_are_kept(where):
    tx = optax.adam(0.1)
    mesh = sharding.make_mesh({"fsdp": 8})
    place = NamedSharding(mesh, PartitionSpec("fsdp"))
    params = {"a": {"kernel": jnp.ones((16, 4))}, "b": {"kernel": jnp.ones((8, 2))}}
    state = jax.tree.map(lambda x: jax.device_put(x, place) if x.ndim else x, filled(tx, params))
    masks = jax.device_put(jax.tree.map(lambda p: jnp.ones(p.shape, bool), params), place)
    new = jax.jit(lambda s, m: optim.reset(s, m if where == "masks" else where, tx=tx))(state, masks)
    for path, leaf in tree.flatten(new):
        if leaf.ndim:
            assert leaf.sharding.is_equivalent_to(place, leaf.ndim), path
            np.testing.assert_array_equal(leaf, 1 if path.endswith("b/kernel") and where != "masks" else 0)
