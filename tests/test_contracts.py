"""One set of tests over everything exported: see `contracts.CONTRACTS` for what holds, `contracts.ENTRIES` for whom."""

import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from steelyard import tree
from steelyard.losses import pairs
from steelyard.train import sharding, stored
from tests import contracts

# One tree for most tests, so that an entry is compiled once: None, a scalar, length 1 and half precision are in it.
SHAPES = {
    "dense": {"kernel": ((8, 4), "float32"), "bias": ((4,), "float32"), "none": None},
    "half": ((8, 4), "bfloat16"),
    "one": {"kernel": ((1, 1), "float32"), "bias": ((1,), "float32")},
    "scalar": ((), "float32"),
}
MATRIX = ((8, 4), "float32")


def shapes_of(spec):
    return jax.tree.map(lambda s: jax.ShapeDtypeStruct(*s), spec, is_leaf=lambda s: isinstance(s, tuple))


def numbers(shapes, seed):
    """Numbers in (0.2, 1) of either sign: far from where masks, rounding and norms decide."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.uniform(0.2, 1, s.shape) * rng.choice([-1, 1], s.shape), s.dtype), shapes
    )


def spec_of(entry):
    return MATRIX if entry.kind in ("array", "loss", "batch_loss") else SHAPES


def params_and_grads(entry, seed=0):
    shapes = shapes_of(spec_of(entry))
    return numbers(shapes, 2 * seed), numbers(shapes, 2 * seed + 1)


class Run:
    """An entry's program, compiled once, and what two steps of it have given."""

    def __init__(self, entry):
        self.program = entry.program()
        self.params, self.grads = params_and_grads(entry)
        self.step = jax.jit(self.program.step)
        self.start = self.program.init(self.params)
        self.outputs, self.carry = self.step(self.start, self.grads)
        _, self.second = self.step(self.carry, self.grads)


@functools.cache
def run(name):
    return Run(next(entry for entry in contracts.ENTRIES if entry.name == name))


def over(contract):
    """The scope puts the tests of an entry side by side, so that one worker compiles its programs and runs them all."""
    entries = contracts.under(contract)
    return pytest.mark.parametrize("entry", entries, ids=lambda entry: entry.name, scope="module")


def assert_close(got, expected):
    """Differently compiled sums of a few dozen float32 numbers near 1; bfloat16 may be rounded the other way."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for (path, a), (_, b) in zip(tree.flatten(got), tree.flatten(expected), strict=True):
        tolerance = 2.0**-7 if a.dtype == jnp.bfloat16 else 2e-5
        a, b = (np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else as_bits(x) for x in (a, b))
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, err_msg=path)


def as_bits(x):
    x = jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return np.asarray(x)


def assert_like_params(outputs, params):
    expected = {path: (x.shape, x.dtype) for path, x in tree.flatten(params)}
    assert {path: (x.shape, x.dtype) for path, x in tree.flatten(outputs)} == expected
    assert jax.tree.structure(outputs) == jax.tree.structure(params)


def avals(carry):
    return [(x.shape, x.dtype, getattr(x, "weak_type", False)) for x in jax.tree.leaves(carry)]


def traced(entry, shapes):
    """Shapes of outputs and of two carries, without running anything."""
    program = entry.program()
    start = jax.eval_shape(program.init, shapes)
    outputs, carry = jax.eval_shape(program.step, start, shapes)
    return outputs, start, carry


# The table itself.


@pytest.mark.parametrize("room", contracts.ROOMS)
def test_the_table_lists_what_is_exported(room):
    listed = [name for place, _, name in (e.name.rpartition(".") for e in contracts.ENTRIES) if place == room]
    assert sorted(listed) == sorted(contracts.ROOMS[room].__all__)


def test_every_contract_has_a_test_and_holds_for_something():
    assert set().union(*contracts.KINDS.values()) == set(contracts.CONTRACTS)
    assert all(f"test_{contract}" in globals() for contract in contracts.CONTRACTS)


def test_every_excuse_is_for_a_contract_and_has_a_reason():
    for entry in contracts.ENTRIES:
        allowed = contracts.KINDS[entry.kind] or {"all"}
        assert set(entry.excuses) <= allowed, entry.name
        assert all(len(reason) > 10 for reason in entry.excuses.values()), entry.name
        assert entry.kind != "host" or entry.excuses, entry.name


@pytest.mark.parametrize("entry", contracts.ENTRIES, ids=lambda entry: entry.name)
def test_every_export_is_what_the_table_says(entry):
    room, _, name = entry.name.rpartition(".")
    export = getattr(contracts.ROOMS[room], name)
    if entry.kind == "constant":
        assert isinstance(export, float)
        return
    assert export.__doc__
    assert isinstance(export, type) == (entry.kind == "type")
    assert callable(export)


# Contracts that one compiled program shows.


@over("jit")
def test_jit(entry):
    done = run(entry.name)
    assert_close(done.program.step(done.start, done.grads), (done.outputs, done.carry))


@over("recompile")
def test_recompile(entry):
    done = run(entry.name)
    assert done.step._cache_size() == 1
    assert avals(done.second) == avals(done.carry) == avals(done.start)


@over("zero")
def test_zero(entry):
    done = run(entry.name)
    zeros = jax.tree.map(jnp.zeros_like, done.grads)
    outputs, carry = done.step(done.start, zeros)
    _, carry = done.step(carry, zeros)
    for path, x in tree.flatten((outputs, carry)):
        assert np.all(np.isfinite(as_bits(x).astype(np.float64))), path


@over("none")
def test_none(entry):
    done = run(entry.name)
    if entry.like_params:
        assert done.outputs["dense"]["none"] is None
        assert jax.tree.structure(done.outputs) == jax.tree.structure(done.params)


@over("length_one")
def test_length_one(entry):
    done = run(entry.name)
    if entry.like_params:
        assert done.outputs["one"]["kernel"].shape == (1, 1)
        assert done.outputs["one"]["bias"].shape == (1,)
    assert all(np.all(np.isfinite(as_bits(x).astype(np.float64))) for x in jax.tree.leaves(done.second))


@over("vmap")
def test_vmap(entry):
    done = run(entry.name)
    params, grads = params_and_grads(entry, seed=1)
    start = done.program.init(params)
    both = jax.tree.map(lambda *xs: jnp.stack(xs), (done.start, done.grads), (start, grads))
    results = jax.jit(jax.vmap(done.program.step))(*both)
    assert_close(jax.tree.map(lambda x: x[0], results), (done.outputs, done.carry))
    assert_close(jax.tree.map(lambda x: x[1], results), done.step(start, grads))


# Contracts about shapes and dtypes: tracing shows them.


@over("dtype")
def test_dtype(entry):
    spec = (MATRIX[0], "bfloat16") if spec_of(entry) == MATRIX else SHAPES
    shapes = shapes_of(spec)
    outputs, start, carry = traced(entry, shapes)
    if entry.like_params:
        assert_like_params(outputs, shapes)
    assert avals(carry) == avals(start)


@over("x64")
def test_x64(entry):
    spec = jax.tree.map(
        lambda s: s if s[1] == "bfloat16" or len(s[0]) == 1 else (s[0], "float64"),
        spec_of(entry),
        is_leaf=lambda s: isinstance(s, tuple),
    )
    with jax.enable_x64(True):
        shapes = shapes_of(spec)
        outputs, start, carry = traced(entry, shapes)
    if entry.like_params and "dtype" not in entry.excuses:
        assert_like_params(outputs, shapes)
    if entry.kind in ("loss", "batch_loss"):
        assert {x.dtype for x in outputs} == {jnp.dtype("float64")}
    assert avals(carry) == avals(start)


@over("scalar")
def test_scalar(entry):
    shapes = jax.ShapeDtypeStruct((), "float32")
    outputs, start, carry = traced(entry, shapes)
    if entry.like_params:
        assert (outputs.shape == ()) or "dtype" in entry.excuses
    assert avals(carry) == avals(start)


@over("empty")
def test_empty(entry):
    for shapes in ({}, {"none": None}):
        outputs, start, carry = traced(entry, shapes)
        assert outputs == shapes or not entry.like_params
        assert avals(carry) == avals(start)


class Nested(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 2, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(2, 2, rngs=rngs)])


@functools.cache
def framework_params():
    haiku = hk.transform(lambda x: hk.Linear(2)(x))
    return {
        "nnx": nnx.state(Nested(nnx.Rngs(0)), nnx.Param),
        "equinox": eqx.filter(eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0)), eqx.is_array),
        "haiku": haiku.init(jax.random.key(0), jnp.ones((1, 4))),
    }


@over("frameworks")
def test_frameworks(entry):
    params = framework_params()
    outputs, start, carry = traced(entry, params)
    if entry.like_params:
        assert jax.tree.structure(outputs) == jax.tree.structure(params)
    assert jax.tree.structure(carry) == jax.tree.structure(start)
    assert avals(carry) == avals(start)


# Losses.


def batches_of_scores(targets):
    """Scores [case, 8, 5] from harmless to extreme, and targets for them: each case once mixed, once of one class."""
    rng = np.random.default_rng(0)
    ties = np.zeros((8, 5))
    ramp = np.linspace(-1, 1, 40).reshape(8, 5)
    scores = np.stack([rng.normal(size=(8, 5)), ties, *(scale * ramp for scale in (30.0, -1e3, 1e4)), ties + 1e4])
    if targets == "probabilities":
        scores = np.clip(scores, 0, 1)
    if targets == "labels":
        kinds = [rng.integers(0, 5, 8), np.full(8, 2)]
    else:
        kinds = [rng.integers(0, 2, (8, 5)), np.zeros((8, 5)), np.ones((8, 5))]
    kinds = np.stack(kinds).astype(np.int32 if targets == "labels" else np.float32)
    return jnp.asarray(np.repeat(scores, len(kinds), 0), jnp.float32), jnp.asarray(
        np.tile(kinds, (6,) + (1,) * (kinds.ndim - 1))
    )


@functools.cache
def over_scores(name):
    """The gradients and losses of all of `batches_of_scores`, in float32 and with scores in bfloat16."""
    entry = next(entry for entry in contracts.ENTRIES if entry.name == name)
    scores, targets = batches_of_scores(entry.targets)
    half = scores.astype(jnp.bfloat16)
    fn = jax.jit(jax.vmap(contracts.summed(entry.make())))
    return fn(scores, targets), fn(half, targets), fn(half.astype(jnp.float32), targets)


@over("extremes")
def test_extremes(entry):
    for gradients, losses in over_scores(entry.name):
        assert np.all(np.isfinite(np.asarray(losses))), np.flatnonzero(
            ~np.isfinite(losses.reshape(len(losses), -1)).all(1)
        )
        finite = np.isfinite(np.asarray(gradients, np.float32)).all((1, 2))
        assert np.all(finite), np.flatnonzero(~finite)


@over("rows")
def test_rows(entry):
    scores, targets = batches_of_scores(entry.targets)
    _, losses = over_scores(entry.name)[0]
    assert losses.shape[:2] == scores.shape[:2]
    fn = entry.make()
    alone = jax.jit(jax.vmap(lambda s, t: fn(s[None], t[None])[0]))(scores[0], targets[0])
    np.testing.assert_allclose(losses[0], alone, rtol=1e-5, atol=1e-6)


@over("half")
def test_half(entry):
    _, (gradients, losses), (wide_gradients, wide_losses) = over_scores(entry.name)
    assert losses.dtype == jnp.float32
    assert gradients.dtype == jnp.bfloat16
    scores, _ = batches_of_scores(entry.targets)
    for case, got, expected in zip(scores, losses, wide_losses, strict=True):
        # Differences of scores are rounded like the scores.
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6 + 2**-22 * np.abs(case).max())
    np.testing.assert_allclose(gradients.astype(jnp.float32), wide_gradients, rtol=2**-8, atol=1e-30)


def batch_of_16(entry):
    rng = np.random.default_rng(1)
    scores = jnp.asarray(rng.uniform(0.1, 0.9, (16, 5)), jnp.float32)
    targets = rng.integers(0, 4, 16) if entry.targets == "labels" else rng.integers(0, 2, (16, 5)).astype(np.float32)
    return scores, jnp.asarray(targets)


def assert_same_losses(got, expected):
    """Sums in another order, of terms that a temperature has multiplied."""
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


@over("shards")
def test_shards(entry, monkeypatch):
    """Against the whole on one device; there a table of pairs is held as a whole, too, which over devices is cut."""
    fn = entry.make()
    assert getattr(contracts.ROOMS["losses"], entry.name.partition(".")[2]).batch_dependent
    scores, targets = batch_of_16(entry)
    expected = jax.jit(contracts.summed(fn))(scores, targets)
    assert expected[1].shape == ((16,) if entry.per_anchor else expected[1].shape)
    monkeypatch.setattr(pairs, "_WHOLE", 8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, everywhere = PartitionSpec("data"), PartitionSpec()
    args = jax.device_put((scores, targets), NamedSharding(mesh, split))
    assert_same_losses(jax.jit(contracts.summed(fn))(*args), expected)
    mapped = jax.shard_map(
        functools.partial(fn, axis_name="data"),
        mesh=mesh,
        in_specs=(split, split),
        out_specs=split if entry.per_anchor else everywhere,
    )
    assert_same_losses(jax.jit(contracts.summed(mapped))(*args), expected)


@over("padding")
def test_padding(entry):
    fn = jax.jit(contracts.summed(entry.make()))
    scores, targets = batch_of_16(entry)
    where = np.arange(16) % 3 != 1
    gradient, losses = fn(scores, targets, where=jnp.asarray(where))
    scale = 1 if entry.targets == "probabilities" else 100
    for rest in (scores, jnp.where(where[:, None], scores, scale * scores[::-1])):
        again = fn(rest, targets, where=jnp.asarray(where))
        assert_same_losses(again, (gradient, losses))
    np.testing.assert_array_equal(gradient[~where], 0)
    alone = fn(scores[where], targets[where])
    assert_same_losses((gradient[where], losses[where] if entry.per_anchor else losses), alone)
    if entry.per_anchor:
        np.testing.assert_array_equal(losses[~where], 0)


# Extra arguments.


@over("extra_args")
def test_extra_args(entry):
    seen = {}

    def update(updates, state, params=None, **extra_args):
        seen.update(extra_args)
        return updates, state

    tx = entry.chained(optax.GradientTransformationExtraArgs(optax.init_empty_state, update))
    params, grads = params_and_grads(entry)
    if entry.kind == "aggregator":
        grads = contracts.rows(params, grads)

    def step(params, grads):
        extra = {**entry.extra(params), "unknown": jnp.ones(3)}
        return tx.update(grads, tx.init(params), params, **extra)[0]

    jax.eval_shape(step, params, grads)
    assert "unknown" in seen


# Sharding.


@pytest.fixture(scope="module")
def place():
    return NamedSharding(sharding.make_mesh({"fsdp": 8}), PartitionSpec("fsdp"))


@over("sharding")
def test_sharding(entry, place):
    shapes = {"kernel": jax.ShapeDtypeStruct((16, 4), "float32"), "bias": jax.ShapeDtypeStruct((8,), "float32")}
    known = {s.shape for s in shapes.values()}
    replicated = NamedSharding(place.mesh, PartitionSpec())
    program = entry.program()
    params, grads = numbers(shapes, 0), numbers(shapes, 1)
    args = (program.init(params), grads)
    shardings = jax.tree.map(lambda x: place if x.shape in known else replicated, args)
    outputs, carry = jax.jit(program.step, in_shardings=shardings)(*jax.device_put(args, shardings))
    for path, x in tree.flatten((outputs, carry)):
        if x.shape in known:
            assert x.sharding.is_equivalent_to(place, x.ndim), f"{path}: {x.sharding}"


@over("donate")
def test_donate(entry):
    program = entry.program()
    params, _ = params_and_grads(entry)
    _, state = program.init(params)
    arrays = [x for _, x in tree.flatten(stored.key_data(stored.by_path(state))) if isinstance(x, jax.Array) and x.size]
    places = [x.unsafe_buffer_pointer() for x in arrays]
    assert len(set(places)) == len(places)


# Saving and restoring.


@pytest.fixture(scope="module")
def checkpointer():
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        yield checkpointer


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@over("restore")
def test_restore(entry, checkpointer, tmp_path):
    """A state after two steps, as `train.checkpoint` would store it."""
    state = stored.nonempty(stored.key_data(stored.by_path(run(entry.name).second)))
    checkpointer.save(tmp_path / "state", stored.nest(state))
    found = dict(tree.flatten(checkpointer.restore(tmp_path / "state")))
    assert found.keys() == state.keys()
    for path, x in state.items():
        assert (found[path].shape, found[path].dtype) == (x.shape, x.dtype), path
        assert np.asarray(found[path]).tobytes() == np.asarray(x).tobytes(), path
