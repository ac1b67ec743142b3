"""The mesh, the layout of a whole state, and that the ways to parallelise differ in nothing but layout."""

import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from steelyard import tree
from steelyard.train import rules, sharding


class State(NamedTuple):
    step: Any
    params: Any
    references: Any
    reparam_state: Any
    opt_state: Any
    model_state: Any
    example_state: Any
    rng: Any


TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def make_params():
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / 5, jnp.float32)

    return {
        "embed": {"embedding": normal(32, 16)},
        "mlp": {
            "up": {"kernel": normal(16, 32), "bias": jnp.zeros(32)},
            "down": {"kernel": normal(32, 16), "bias": None},
        },
    }


def make_state(params, tx=TX, **fields):
    given = {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "references": {"teacher": make_params()},
        "reparam_state": {"mask": jax.tree.map(lambda p: p > 0, make_params()), "count": jnp.zeros((), jnp.int32)},
        "opt_state": tx.init(params),
        "model_state": None,
        "example_state": {"loss": jnp.zeros(24), "odd": jnp.zeros((6, 3)), "scale": jnp.zeros(())},
        "rng": jax.random.key(1),
    }
    return State(**given | fields)


def shapes_of(tx=TX, wrap=lambda params: params, **fields):
    return jax.eval_shape(lambda: make_state(wrap(make_params()), tx, **fields))


def specs(shardings):
    return {path: leaf.spec for path, leaf in tree.flatten(shardings)}


# The mesh.


def test_mesh_has_all_axes_and_they_are_auto():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    assert tuple(mesh.axis_names) == sharding.AXES
    assert dict(mesh.shape) == {"replica": 1, "data": 1, "fsdp": 4, "context": 1, "tensor": 2, "expert": 1}
    assert mesh.axis_types == (AxisType.Auto,) * 6
    assert mesh.devices.reshape(4, 2)[1, 1] == jax.devices()[3]  # the last axis is the nearest


def test_mesh_takes_the_rest_and_some_devices():
    assert sharding.make_mesh({"data": 2, "fsdp": -1}).shape["fsdp"] == 4
    assert sharding.make_mesh({"fsdp": -1}, devices=jax.devices()[:3]).shape["fsdp"] == 3


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ({"data": 3, "fsdp": 2}, r"multiply to 6.*must be the 8 devices.*4, 8"),
        ({"data": 3, "fsdp": -1}, r"multiply to 3.*must divide the 8 devices.*2, 4"),
        ({"data": 2}, "multiply to 2"),
        ({"data": -1, "fsdp": -1}, "at most one is -1"),
        ({"data": 0}, "positive"),
        ({"fdsp": 8}, "did you mean 'fsdp'"),
    ],
)
def test_mesh_errors(shape, text):
    with pytest.raises(ValueError, match=text):
        sharding.make_mesh(shape)


class Sliced:
    """A CPU device that says on which slice it is."""

    def __init__(self, device, slice_index):
        self.device, self.slice_index = device, slice_index

    def __getattr__(self, name):
        return getattr(self.device, name)


def sliced():
    return [Sliced(device, i // 4) for i, device in enumerate(jax.devices())]


@pytest.mark.parametrize(
    ("shape", "slices", "axis"),
    [({"fsdp": -1}, None, 0), ({"replica": 2, "fsdp": 4}, None, 0), ({"data": 4, "fsdp": 2}, {"data": 2}, 1)],
)
def test_slices_lie_along_replica_or_as_asked(shape, slices, axis, monkeypatch):
    # Only the layout is of interest: a Mesh of devices that are not JAX's own cannot be made.
    monkeypatch.setattr(sharding, "Mesh", lambda layout, axes, axis_types: layout)
    layout = sharding.make_mesh(shape, devices=sliced(), slices=slices)
    slice_of = np.vectorize(lambda device: device.slice_index)(layout)
    near, far = np.split(np.moveaxis(slice_of, axis, 0), 2)
    np.testing.assert_array_equal(near, 0)
    np.testing.assert_array_equal(far, 1)


def test_slices_that_do_not_fit():
    with pytest.raises(ValueError, match=r"axis replica has size 1.*2 slices"):
        sharding.make_mesh({"replica": 1, "fsdp": 8}, devices=sliced())
    with pytest.raises(ValueError, match="multiply to 4, but there are 2 slices"):
        sharding.make_mesh({"fsdp": 8}, devices=sliced(), slices={"fsdp": 4})


# The batch.


def test_batch_is_split_over_the_batch_axes():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    x = jax.device_put(np.arange(8.0).reshape(8, 1), sharding.batch_sharding(mesh))
    assert {shard.data.shape for shard in x.addressable_shards} == {(2, 1)}
    assert sharding.batch_spec(mesh) == P(("replica", "data", "fsdp", "expert"))


def test_batches_that_fit_and_that_do_not():
    mesh = sharding.make_mesh({"data": 3}, devices=jax.devices()[:3])
    sharding.check_batch(9, mesh)
    with pytest.raises(ValueError, match=r"batch=8 .* multiple of 3.*\(data 3\).*batch of 6 or 9.*multiply to 2 or 4"):
        sharding.check_batch(8, mesh)
    with pytest.raises(ValueError, match=r"batch of 3"):
        sharding.check_batch(0, mesh)


# Specs of a state.


def test_spec_is_the_choice():
    got = sharding.spec("a/kernel", (16, 8), [(r".*/kernel", ("fsdp", "tensor"))], {"fsdp": 8, "tensor": 4})
    assert got == P("fsdp", "tensor")
    assert sharding.spec("a", (256, 256), rules.FSDP, {"fsdp": 8}) == P("fsdp")
    assert sharding.spec("a", (256, 255), rules.FSDP, {"fsdp": 8}) == P()  # below 2^16 entries
    assert sharding.spec("a", (64,), (), {"data": 8}, fill="data", min_size=1) == P("data")


def test_params_follow_the_rules():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    got = sharding.tree_specs(jax.eval_shape(make_params), rules.TRANSFORMER, mesh)
    assert got["embed"]["embedding"] == P("tensor", "fsdp")
    assert got["mlp"]["up"] == {"kernel": P("fsdp", "tensor"), "bias": P()}
    assert got["mlp"]["down"] == {"kernel": P("tensor", "fsdp"), "bias": None}


@pytest.mark.parametrize("tx", [TX, None], ids=["by optax", "by path"])
def test_a_state_lies_like_its_parameters(tx):
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    shapes = shapes_of()
    got = sharding.state_shardings(shapes, rules.TRANSFORMER, mesh, tx)
    assert jax.tree.structure(got) == jax.tree.structure(shapes)
    assert all(isinstance(leaf, NamedSharding) for leaf in jax.tree.leaves(got))
    flat = specs(got)
    up = P("fsdp", "tensor")
    moments = [spec for path, spec in flat.items() if re.fullmatch(r"opt_state/.*/(mu|nu)/mlp/up/kernel", path)]
    assert moments == [up, up]
    assert flat["references/teacher/mlp/up/kernel"] == flat["reparam_state/mask/mlp/up/kernel"] == up
    replicated = ["step", "rng", "reparam_state/count", *(path for path in flat if path.endswith("count"))]
    assert all(flat[path] == P() for path in replicated)


def test_rows_of_examples_lie_over_the_batch_axes_as_far_as_these_divide():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    flat = specs(sharding.state_shardings(shapes_of(), rules.FSDP, mesh, TX))
    assert flat["example_state/loss"] == P(("data", "fsdp"))  # 24 rows in 8 parts
    assert flat["example_state/odd"] == P("data")  # 6 rows: not 8 parts, but 2
    assert flat["example_state/scale"] == P()


def test_stored_trees_with_more_in_them():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})

    def wrap(params):
        return {"base": params, "fake_quant": {"mlp": {"up": {"kernel": {"step_size": jnp.ones(32)}}}}}

    flat = specs(sharding.state_shardings(shapes_of(wrap=wrap), rules.TRANSFORMER, mesh, TX))
    up = P("fsdp", "tensor")
    assert flat["params/base/mlp/up/kernel"] == up
    assert flat["params/fake_quant/mlp/up/kernel/step_size"] == P()
    assert [spec for path, spec in flat.items() if path.endswith("mu/base/mlp/up/kernel")] == [up]
    assert flat["references/teacher/mlp/up/kernel"] == up


def test_weight_nodes_obey_the_rule_of_the_weight():
    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})

    class Packed(NamedTuple):
        codes: Any
        scale: Any

    node = Packed(jax.ShapeDtypeStruct((8, 32), jnp.int8), jax.ShapeDtypeStruct((32,), jnp.float32))
    got = sharding.tree_specs({"mlp": {"up": {"kernel": node}}}, rules.TRANSFORMER, mesh)
    assert got["mlp"]["up"]["kernel"] == Packed(P("fsdp", "tensor"), P())


def test_factored_moments_are_laid_out_on_their_own():
    mesh = sharding.make_mesh({"fsdp": 8})
    tx = optax.adafactor(1e-2, min_dim_size_to_factor=8)
    flat = specs(sharding.state_shardings(shapes_of(tx), rules.TRANSFORMER, mesh, tx, min_size=32))
    # Of the 32x16 embedding: 32 means by fill, though the rule is for rank 2; 16 means are too few to fill.
    assert [spec for path, spec in flat.items() if path.endswith("v_col/embed/embedding")] == [P("fsdp")]
    assert [spec for path, spec in flat.items() if path.endswith("v_row/embed/embedding")] == [P()]


def test_where_two_parameters_end_alike_optax_knows_better_than_paths():
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 4})
    tx = optax.sgd(1e-2, momentum=0.9)
    params = {"mlp": {"w": jnp.zeros((8, 8))}, "trace": {"mlp": {"w": jnp.zeros((8, 8))}}}
    state = jax.eval_shape(lambda: make_state(params, tx, references={}, reparam_state={}))
    given = [("mlp/w", ("fsdp", None)), ("trace/mlp/w", ("tensor", None))]
    flat = specs(sharding.state_shardings(state, given, mesh, tx))
    assert flat["opt_state/0/trace/mlp/w"] == P("fsdp")
    assert flat["opt_state/0/trace/trace/mlp/w"] == P("tensor")


def test_an_optimizer_that_optax_cannot_map_falls_back_to_paths():
    def init(params):
        return {"mu": jax.tree.map(jnp.zeros_like, params), "largest": max(x.size for x in jax.tree.leaves(params))}

    mesh = sharding.make_mesh({"fsdp": 4, "tensor": 2})
    shapes = shapes_of()._replace(opt_state={"mu": jax.eval_shape(make_params)})
    tx = optax.GradientTransformation(init, None)  # `max` of nothing fails on a placeholder
    flat = specs(sharding.state_shardings(shapes, rules.TRANSFORMER, mesh, tx))
    assert flat["opt_state/mu/mlp/up/kernel"] == P("fsdp", "tensor")


def test_a_bare_array_is_a_state_too():
    mesh = sharding.make_mesh({"fsdp": 8})
    fields = {"params": jnp.zeros(16), "opt_state": {"mu": jnp.zeros(16)}, "step": jnp.zeros(())}
    got = sharding.state_shardings(fields, rules.FSDP, mesh, min_size=1)
    assert {name: leaf.spec for name, leaf in tree.flatten(got)} == {
        "params": P("fsdp"),
        "opt_state/mu": P("fsdp"),
        "step": P(),
    }


# Layout changes nothing but layout.


def forward(params, tokens):
    x = params["embed"]["embedding"][tokens]
    y = jax.nn.gelu(x @ params["mlp"]["up"]["kernel"] + params["mlp"]["up"]["bias"])
    return (x + y @ params["mlp"]["down"]["kernel"]) @ params["embed"]["embedding"].T


def train_step(state, tokens):
    def loss_of(params):
        logits = forward(params, tokens[:, :-1])
        return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = TX.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state._replace(step=state.step + 1, params=params, opt_state=opt_state), loss


WAYS = {
    "data parallel": ({"data": 8}, rules.REPLICATE, None),
    "zero-1": ({"data": 8}, rules.REPLICATE, "data"),
    "fsdp": ({"fsdp": 8}, rules.FSDP, None),
    "fsdp and tensor": ({"fsdp": 4, "tensor": 2}, rules.TRANSFORMER, None),
    "context": ({"fsdp": 2, "context": 2, "tensor": 2}, rules.TRANSFORMER, None),
    "expert": ({"fsdp": 2, "tensor": 2, "expert": 2}, rules.TRANSFORMER, None),
}


def losses_of(mesh, shardings, batch, steps=3):
    step = jax.jit(
        train_step,
        in_shardings=(shardings, batch),
        out_shardings=(shardings, None),
        donate_argnums=0,
        compiler_options={"xla_backend_optimization_level": 0},  # it is run three times
    )
    state = jax.device_put(make_state(make_params()), shardings)
    tokens = np.random.default_rng(0).integers(0, 32, (steps, 16, 9))
    losses = []
    for row in tokens:
        state, loss = step(state, jax.device_put(row, batch))
        losses.append(float(loss))
    return losses, state


@pytest.fixture(scope="module")
def alone():
    mesh = sharding.make_mesh({}, devices=jax.devices()[:1])
    shardings = sharding.state_shardings(shapes_of(), rules.REPLICATE, mesh, TX)
    return losses_of(mesh, shardings, sharding.batch_sharding(mesh))[0]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("error:.*donated buffers.*")
def test_all_ways_give_the_losses_of_one_device(way, alone):
    sizes, rule_set, optimizer_fill = WAYS[way]
    mesh = sharding.make_mesh(sizes)
    shardings = sharding.state_shardings(shapes_of(), rule_set, mesh, TX, optimizer_fill=optimizer_fill, min_size=1)
    losses, state = losses_of(mesh, shardings, sharding.batch_sharding(mesh))
    # float32 sums in another order: a few ulp of a loss of 3.5 a step, which training then carries on.
    np.testing.assert_allclose(losses, alone, rtol=1e-5)
    assert jax.tree.map(lambda x: x.sharding, state) == shardings
    moment = state.opt_state[1][0].mu["mlp"]["up"]["kernel"]
    share = {"data parallel": 1, "zero-1": 8, "fsdp": 8, "fsdp and tensor": 8, "context": 4, "expert": 4}[way]
    assert moment.addressable_shards[0].data.size == moment.size // share
    kernel = state.params["mlp"]["up"]["kernel"]
    assert kernel.is_fully_replicated == (way in ("data parallel", "zero-1"))


def test_with_shardings():
    mesh = sharding.make_mesh({"fsdp": 8})
    shapes = shapes_of()
    shardings = sharding.state_shardings(shapes, rules.FSDP, mesh, TX, min_size=1)
    both = sharding.with_shardings(shapes, shardings)
    assert jax.tree.map(lambda x: x.sharding, both) == shardings
    assert jax.tree.map(lambda x: (x.shape, x.dtype), both) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)


# Explaining it.


def test_explain_tells_all():
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 4})
    params = {"a": {"kernel": jnp.zeros((6, 16))}, "b": {"kernel": jnp.zeros((4, 510))}, "c": jnp.zeros((30, 2))}
    given = rules.RuleSet([(r".*/kernel", ("fsdp", "tensor")), ("nothing", (None,))], fill="fsdp")
    text = sharding.explain(params, given, mesh, min_size=60).splitlines()
    assert text[0] == f"a/kernel  (6, 16)  rule 0  {P('fsdp', 'tensor')}  48 B/device"  # 96 * 4 / 8
    assert text[1] == f"b/kernel  (4, 510)  rule 0  {P('fsdp')}  4080 B/device  dropped: tensor (510 % 4)"
    assert text[2] == f"c  (30, 2)  no rule + fill  {P('fsdp')}  120 B/device"
    assert text[3] == "rule 1 matched nothing: nothing"
    assert text[4] == "0.0 % of parameter bytes are replicated over fsdp"


def test_explain_warns_of_what_is_replicated():
    mesh = sharding.make_mesh({"fsdp": 8})
    params = {"a": jnp.zeros((30, 30)), "b": jnp.zeros((8, 10)), "c": None}
    # 900 of 980 entries have no dimension that 8 divides.
    text = sharding.explain(params, rules.FSDP, mesh, min_size=1)
    assert "warning: 91.8 % of parameter bytes are replicated over fsdp" in text
    with pytest.raises(ValueError, match=r"91.8 %.*at most 2.0 %"):
        sharding.explain(params, rules.FSDP, mesh, min_size=1, strict=True)
    sharding.explain(params, rules.FSDP, mesh, min_size=1, strict=True, tolerance=0.92)


def test_explain_of_an_unsharded_mesh_says_nothing_of_replication():
    mesh = sharding.make_mesh({"data": 8})
    assert "replicated over" not in sharding.explain({"a": jnp.zeros(3)}, rules.FSDP, mesh, strict=True)
    assert sharding.explain({}, rules.REPLICATE, mesh) == ""
