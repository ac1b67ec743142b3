"""Sharding rules against the definition, branch by branch, and the presets on the names of our models."""

import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from steelyard import models, tree
from steelyard.train import rules

SIZES = {"replica": 1, "data": 2, "fsdp": 8, "context": 1, "tensor": 4, "expert": 2}


def choose(shape, entries, sizes=SIZES, *, path="kernel", fill=None, min_size=1, **kwargs):
    rule_set = rules.RuleSet([(".*", entries)] if entries is not None else (), fill)
    return rules.choose(path, shape, rule_set, sizes, min_size=min_size, **kwargs)


# shape, entries, spec, reasons for what was dropped
TABLE = {
    "as wished": ((16, 8), ("fsdp", "tensor"), P("fsdp", "tensor"), ()),
    "no rule": ((16, 8), None, P(), ()),
    "None at the end goes": ((16, 8), ("fsdp", None), P("fsdp"), ()),
    "None in front stays": ((16, 8), (None, "fsdp"), P(None, "fsdp"), ()),
    "two axes on one dimension": ((32, 8), (("fsdp", "tensor"), None), P(("fsdp", "tensor")), ()),
    "a tuple of one is a bare name": ((16,), (("fsdp",),), P("fsdp"), ()),
    "not divisible": ((510, 8), ("tensor", "fsdp"), P(None, "fsdp"), ("tensor (510 % 4)",)),
    "the last of two is dropped": ((24, 8), (("fsdp", "tensor"), None), P("fsdp"), ("tensor (24 % 8*4)",)),
    "then the first": ((4,), (("fsdp", "tensor"),), P(), ("tensor (4 % 8*4)", "fsdp (4 % 8)")),
    "size 1 is no sharding": ((16, 8), ("context", "fsdp"), P(None, "fsdp"), ()),
    "size 1 in a tuple": ((16,), (("replica", "fsdp"),), P("fsdp"), ()),
    "used by an earlier dimension": ((16, 8), ("fsdp", "fsdp"), P("fsdp"), ("fsdp (already used)",)),
    "twice in a dimension": ((16,), (("fsdp", "fsdp"),), P("fsdp"), ("fsdp (already used)",)),
    "dropped is not used": ((7, 8), ("fsdp", "fsdp"), P(None, "fsdp"), ("fsdp (7 % 8)",)),
    "ellipsis for none": ((16, 8), (..., "fsdp", "tensor"), P("fsdp", "tensor"), ()),
    "ellipsis for two": ((3, 5, 16, 8), (..., "fsdp", "tensor"), P(None, None, "fsdp", "tensor"), ()),
    "ellipsis in the middle": ((16, 3, 8), ("fsdp", ..., "tensor"), P("fsdp", None, "tensor"), ()),
    "ellipsis alone": ((3, 5), (...,), P(), ()),
    "ellipsis on a scalar": ((), (...,), P(), ()),
    "scalar": ((), (), P(), ()),
    "empty array": ((0, 8), ("fsdp", None), P("fsdp"), ()),
}


@pytest.mark.parametrize("name", TABLE)
def test_table(name):
    shape, entries, spec, dropped = TABLE[name]
    choice = choose(shape, entries)
    assert (choice.spec, choice.dropped) == (spec, dropped)


# shape, entries, fill, min_size, spec
FILL = {
    "largest dimension": ((8, 16, 8), None, "fsdp", 1, P(None, "fsdp")),
    "the first of equals": ((16, 16), None, "fsdp", 1, P("fsdp")),
    "largest that divides": ((9, 8), None, "fsdp", 1, P(None, "fsdp")),
    "largest free one": ((64, 16), ("tensor", None), "fsdp", 1, P("tensor", "fsdp")),
    "in use already": ((64, 16), (None, "fsdp"), "fsdp", 1, P(None, "fsdp")),
    "one of two in use": ((64, 64), (None, "fsdp"), ("fsdp", "tensor"), 1, P(None, "fsdp")),
    "takes all": ((32, 8), None, ("fsdp", "tensor"), 1, P(("fsdp", "tensor"))),
    "all or nothing": ((8, 8), None, ("fsdp", "tensor"), 1, P()),
    "after a drop": ((12, 16), ("fsdp", None), "fsdp", 1, P(None, "fsdp")),
    "small": ((16, 16), None, "fsdp", 257, P()),
    "just large enough": ((16, 16), None, "fsdp", 256, P("fsdp")),
    "axis of size 1": ((16, 16), None, "context", 1, P()),
    "axis not in the mesh": ((16, 16), None, ("fsdp", "replica"), 1, P("fsdp")),
}


@pytest.mark.parametrize("name", FILL)
def test_fill(name):
    shape, entries, fill, min_size, spec = FILL[name]
    choice = choose(shape, entries, fill=fill, min_size=min_size)
    assert choice.spec == spec


def test_fill_that_fits_nowhere_is_reported():
    assert "fill: no free dimension" in choose((9, 9), None, fill="fsdp").dropped[0]


def test_an_axis_that_the_mesh_lacks_is_dropped():
    assert choose((16, 8), ("tensor", "fsdp"), {"fsdp": 8}).spec == P(None, "fsdp")


def test_foreign_mesh_axes_work():
    assert choose((16, 8), ("model", None), {"model": 4}).spec == P("model")


def test_first_match_wins_and_the_whole_path_counts():
    given = rules.RuleSet([("kernel", ("data",)), (r".*/kernel", ("fsdp",)), (r".*", ("tensor",))])
    assert rules.choose("a/kernel", (64,), given, SIZES).spec == P("fsdp")
    assert rules.choose("kernel", (64,), given, SIZES).rule == 0
    assert rules.choose("a/bias", (64,), given, SIZES).spec == P("tensor")


def test_another_rank_is_an_error_with_both():
    with pytest.raises(ValueError, match=r"a/kernel has shape \(2, 3, 4\).*3 dimensions"):
        choose((2, 3, 4), ("fsdp", None), path="a/kernel")
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        choose((4,), (..., "fsdp", "tensor"))


def test_another_rank_is_passed_over_where_it_is_no_parameter():
    assert choose((16,), ("fsdp", "tensor"), lenient=True).spec == P()
    assert choose((16,), ("fsdp", "tensor"), lenient=True, fill="fsdp").spec == P("fsdp")


def test_arrays_in_a_weight_node_obey_its_rule():
    given = rules.RuleSet([(r".*/kernel", (..., "fsdp", "tensor"))])
    assert rules.choose("dense/kernel/codes", (16, 8), given, SIZES).spec == P("fsdp", "tensor")
    assert rules.choose("dense/kernel/scale", (8,), given, SIZES).spec == P()
    assert rules.choose("dense/kernel/a/b", (16, 8), given, SIZES).spec == P()


def test_misspelt_axis():
    with pytest.raises(ValueError, match="did you mean 'fsdp'"):
        choose((16,), ("fdsp",))


@pytest.mark.parametrize(
    ("pattern", "entries", "text"),
    [
        ("(", (None,), "regular expression"),
        (".*", "fsdp", "tuple"),
        (".*", (..., None, ...), "at most one"),
        (".*", (3,), "3 is not"),
    ],
)
def test_malformed_rules(pattern, entries, text):
    with pytest.raises(ValueError, match=text):
        rules.RuleSet([(pattern, entries)])


AXIS = st.one_of(st.none(), st.sampled_from(rules.AXES), st.lists(st.sampled_from(rules.AXES), max_size=3).map(tuple))


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    dims=st.lists(st.tuples(st.integers(1, 64), AXIS), max_size=4),
    sizes=st.fixed_dictionaries({axis: st.sampled_from([1, 2, 3, 4]) for axis in rules.AXES}),
    fill=AXIS,
)
def test_every_choice_is_valid(dims, sizes, fill):
    shape = tuple(size for size, _ in dims)
    choice = choose(shape, tuple(axes for _, axes in dims), sizes, fill=fill)
    used = [name for entry in choice.entries for name in entry]
    assert len(choice.entries) == len(shape)
    assert len(used) == len(set(used))
    assert all(sizes[name] > 1 for name in used)
    for size, entry in zip(shape, choice.entries, strict=True):
        assert size % math.prod(sizes[name] for name in entry) == 0


def specs_of(model, *inputs, sizes=SIZES):
    shapes = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    return {p: rules.choose(p, x.shape, rules.TRANSFORMER, sizes).spec for p, x in tree.flatten(shapes)}


def test_transformer_preset_on_the_transformer():
    model = models.Transformer(vocab_size=256, width=64, depth=1, heads=4, mlp_width=128)
    specs = specs_of(model, jnp.zeros((1, 8), jnp.int32))
    into, out = P("fsdp", "tensor"), P("tensor", "fsdp")
    assert specs["embed/embedding"] == out
    for name in ("attention/query", "attention/key", "attention/value", "mlp/up", "mlp/gate"):
        assert specs[f"block_0/{name}/kernel"] == into
    for name in ("attention/out", "mlp/down"):
        assert specs[f"block_0/{name}/kernel"] == out
    assert specs["block_0/attention_norm/scale"] == P()


def test_transformer_preset_on_the_resnet():
    model = models.ResNet(num_classes=16, width=16)
    specs = specs_of(model, jnp.zeros((1, 8, 8, 3)))
    assert specs["stage_0_block_0/conv_0/kernel"] == P(None, None, "fsdp", "tensor")
    assert specs["stem/kernel"] == P(None, None, None, "tensor")  # 3 input channels have no 8 parts
    assert specs["logits/kernel"] == P("fsdp", "tensor")


def test_transformer_preset_on_stacks_and_experts():
    def spec(path, shape):
        return rules.choose(path, shape, rules.TRANSFORMER, SIZES).spec

    assert spec("layers/mlp/up/kernel", (12, 64, 128)) == P(None, "fsdp", "tensor")
    assert spec("block_0/moe/up", (4, 64, 128)) == P("expert", "fsdp", "tensor")
    assert spec("block_0/moe/down", (4, 128, 64)) == P("expert", "tensor", "fsdp")
    assert spec("layers/experts/gate/kernel", (12, 4, 64, 128)) == P(None, "expert", "fsdp", "tensor")
    assert spec("position", (1, 1024, 64)) == P(None, "fsdp")  # no rule, filled
    assert spec("base/block_0/mlp/up/kernel", (64, 128)) == P("fsdp", "tensor")


def test_presets_by_name():
    assert rules.preset("transformer") is rules.TRANSFORMER
    assert rules.choose("x", (512, 512), rules.REPLICATE, SIZES).spec == P()
    assert rules.choose("x", (512, 512), rules.FSDP, SIZES).spec == P("fsdp")
    with pytest.raises(ValueError, match="did you mean 'fsdp'"):
        rules.preset("fspd")


def test_plain_pairs_and_an_override_of_fill():
    assert rules.as_rule_set([("a", (None,))]).fill is None
    assert rules.as_rule_set(rules.FSDP, "data") == rules.RuleSet((), "data")
    assert rules.as_rule_set(rules.FSDP) is rules.FSDP
