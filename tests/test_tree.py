"""Paths, selection and sizes over the trees that people have."""

import re

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from steelyard import tree


def test_paths_of_dicts_lists_and_none():
    params = {"block": [{"kernel": 1, "bias": None}, {"kernel": 2, "bias": 3}], "scale": (4,)}
    assert tree.paths(params) == ["block/0/kernel", "block/1/bias", "block/1/kernel", "scale/0"]


def test_paths_of_a_bare_leaf():
    assert tree.paths(3.0) == [""]


def test_paths_of_nnx_equinox_and_haiku_parameters():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.dense = nnx.Linear(2, 3, rngs=rngs)
            self.blocks = nnx.List([nnx.Linear(3, 3, rngs=rngs)])

    nnx_paths = ["blocks/0/bias", "blocks/0/kernel", "dense/bias", "dense/kernel"]
    assert tree.paths(nnx.state(Model(nnx.Rngs(0)), nnx.Param)) == nnx_paths
    module = eqx.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))
    assert tree.paths(eqx.filter(module, eqx.is_array)) == [
        f"layers/{i}/{n}" for i in (0, 1) for n in ("weight", "bias")
    ]
    haiku = hk.transform(lambda x: hk.Linear(3)(x)).init(jax.random.key(0), jnp.ones((1, 2)))
    assert tree.paths(haiku) == ["linear/b", "linear/w"]


def test_a_box_named_value_does_not_hide_a_parameter_named_value():
    assert tree.paths({"value": 1, "attention": {"value": {"kernel": 2}}}) == ["attention/value/kernel", "value"]


names = st.sampled_from(["kernel", "bias", "scale"])
trees = st.recursive(
    st.none() | st.integers(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(names, children, max_size=3),
    max_leaves=8,
)


@given(trees)
def test_map_with_path_visits_each_leaf_once_under_its_path(params):
    seen = []
    mapped = tree.map_with_path(lambda path, x: seen.append((path, x)) or x, params)
    assert mapped == params
    assert seen == tree.flatten(params)


@given(trees, st.sampled_from([lambda path, x: x % 2 == 0, lambda path, x: path.endswith("kernel")]))
def test_partition_and_combine_undo_each_other(params, where):
    inside, outside = tree.partition(params, where)
    assert tree.combine(inside, outside) == params
    assert all(where(path, leaf) for path, leaf in tree.flatten(inside))
    assert not any(where(path, leaf) for path, leaf in tree.flatten(outside))


def test_select_matches_the_whole_path():
    params = {"dense": {"kernel": 1, "bias": 2}, "kernel_norm": 3}
    assert tree.select(params, r".*kernel") == {"dense": {"kernel": True, "bias": False}, "kernel_norm": False}


def test_a_pattern_that_matches_nothing_names_near_paths():
    with pytest.raises(ValueError, match=r"decay='dense/kernels' matches none of the 2 parameters.*dense/kernel"):
        tree.select({"dense": {"kernel": 1, "bias": 2}}, "dense/kernels", name="decay")
    with pytest.raises(ValueError, match="no leaves"):
        tree.select({}, "kernel")


def test_a_malformed_pattern_is_named():
    with pytest.raises(ValueError, match=re.escape("where='(' is not a regular expression")):
        tree.select({"a": 1}, "(")


def test_a_function_may_select_nothing():
    assert tree.select({"a": 1, "b": None}, lambda path, leaf: False) == {"a": False, "b": None}


def test_sizes():
    params = {"a": np.zeros((3, 4), np.float32), "b": jax.ShapeDtypeStruct((5,), jnp.bfloat16), "c": None}
    assert tree.size(params) == 17
    assert tree.nbytes(params) == 3 * 4 * 4 + 5 * 2


@pytest.mark.parametrize(
    ("axis", "expected"), [(-1, (0, 1)), (0, (1, 2)), ((-2, -1), (0,)), (None, (0, 1, 2)), ((0, -3), (1, 2))]
)
def test_axes_except(axis, expected):
    assert tree.axes_except(np.zeros((2, 3, 4)), axis) == expected


def test_axes_except_refuses_an_axis_that_is_not_there():
    with pytest.raises(ValueError, match=re.escape("axis 3 is not an axis of an array of shape (2, 3)")):
        tree.axes_except(np.zeros((2, 3)), 3)
