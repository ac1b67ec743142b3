"""The k largest by bisection against a stable sort, whole and cut over eight devices."""

import functools
import re

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from steelyard import selection

SHAPES = {"a": (16, 8), "b": (8, 12), "c": (7,), "none": None, "stack": (8, 4, 3)}
SPECS = {
    "a": PartitionSpec("data"),
    "b": PartitionSpec(None, "model"),
    "c": PartitionSpec(),
    "none": None,
    "stack": PartitionSpec(("data", "model"), None),
}
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values() if shape)


def by_sort(tree, k):
    """The definition: a stable sort of all entries in order, NaN as minus infinity."""
    leaves, treedef = jax.tree.flatten(tree)
    values = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves])
    values = np.where(np.isnan(values), -np.inf, values)
    kept = np.zeros(values.size, bool)
    kept[np.argsort(-values, kind="stable")[: max(k, 0)]] = True
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = [part.reshape(leaf.shape) for part, leaf in zip(np.split(kept, ends), leaves, strict=True)]
    return jax.tree.unflatten(treedef, parts)


def scores_of(seed, levels, dtypes=("float32",)):
    """Few levels make ties the rule; 0 levels: none."""
    rng = np.random.default_rng(seed)

    def leaf(shape, dtype):
        values = rng.integers(-levels, levels + 1, shape) if levels else rng.standard_normal(shape)
        return None if shape is None else jnp.asarray(values, dtype)

    return {key: leaf(shape, dtypes[i % len(dtypes)]) for i, (key, shape) in enumerate(SHAPES.items())}


def assert_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


@hypothesis.settings(max_examples=25, deadline=None)
@hypothesis.given(st.integers(0, 99), st.sampled_from([0, 1, 4]), st.integers(-2, SIZE + 2), st.booleans())
def test_a_tree_is_ranked_as_by_a_stable_sort(seed, levels, k, odd):
    scores = scores_of(seed, levels)
    if odd:
        special = jnp.array([jnp.nan, -jnp.inf, 0.0, -0.0, jnp.inf, jnp.nan, 1e-45])
        scores = scores | {"c": special, "a": scores["a"].at[3].set(jnp.nan)}
    assert_equal(selection.top_mask(scores, k), by_sort(scores, k))


@pytest.mark.parametrize("dtypes", [("bfloat16",), ("float16", "float32"), ("int32",), ("bool",)])
def test_every_dtype(dtypes):
    wide = scores_of(0, 3)
    names = {key: dtypes[i % len(dtypes)] for i, key in enumerate(wide)}
    scores = {key: None if x is None else jnp.abs(x).astype(names[key]) for key, x in wide.items()}
    assert_equal(selection.top_mask(scores, 77), by_sort(scores, 77))


def test_float64():
    with jax.enable_x64(True):
        scores = {"a": jnp.array([1.0, 1.0 + 2.0**-50, 1.0 - 2.0**-50]), "b": jnp.float64(1.0)}
        assert_equal(selection.top_mask(scores, 3), by_sort(scores, 3))


def test_a_whole_number_as_a_float_and_a_large_python_int():
    scores = scores_of(1, 2)
    assert_equal(selection.top_mask(scores, jnp.float32(50)), by_sort(scores, 50))
    assert_equal(selection.top_mask(scores, 10**12), by_sort(scores, SIZE))


def test_slices_along_an_axis():
    scores = scores_of(2, 2)["stack"]
    for axis in (0, 1, -1):
        for k in (0, 2, 99):
            expected = np.apply_along_axis(lambda x, k=k: by_sort(x, k), axis, np.asarray(scores))
            np.testing.assert_array_equal(selection.keep_largest(scores, k, axis), expected)


def test_shares_of_ties_beyond_32_bits():
    """Counts in two halves: 5 leaves of 2^30 ties each, of which 2^32 + 3 are wanted."""
    equal = jnp.full(5, 2**30, jnp.int32)
    share = selection._share(selection._count_of(2**32 + 10), selection._count_of(7), equal)
    assert share.tolist() == [2**30] * 4 + [3]
    assert selection._share(selection._count_of(5), selection._count_of(7), equal).tolist() == [0] * 5


def test_refusals():
    with pytest.raises(ValueError, match="come together"):
        selection.top_mask(jnp.ones(3), 1, specs=PartitionSpec())
    with pytest.raises(ValueError, match="2\\^31 entries"):
        jax.eval_shape(lambda x: selection.top_mask(x, 1), jax.ShapeDtypeStruct((2**16, 2**15), "float32"))
    assert selection.top_mask({}, 3) == {}
    assert selection.top_mask(jnp.zeros((0, 2)), 3).shape == (0, 2)


# Cut over eight devices.

MESHES = {
    "4x2": ((4, 2), SPECS),
    "8": ((8, 1), {**SPECS, "a": PartitionSpec(("model", "data")), "b": PartitionSpec("data")}),
}


def cut(shape, specs):
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    return mesh, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def all_reduces(text):
    """All-reduces of the text, and how many numbers each one sums."""
    shapes = [re.split(r" all-reduce(?:-start)?\(", line)[0] for line in text.splitlines() if " all-reduce" in line]
    shapes = [shape for shape in shapes if " = " in shape and "get-tuple-element" not in shape]
    dims = [re.findall(r"\[([\d,]*)\]", shape) for shape in shapes]
    return [sum(int(np.prod([int(n) for n in d.split(",") if n])) for d in each) for each in dims]


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("given", [False, True])
def test_any_sharding_gives_the_mask_of_the_sort(name, given):
    shape, specs = MESHES[name]
    mesh, places = cut(shape, specs)
    where = {"mesh": mesh, "specs": specs} if given else {}
    compiled = jax.jit(functools.partial(selection.top_mask, **where), in_shardings=(places, None))
    for levels, k in ((3, 111), (0, 200)):
        scores = scores_of(3, levels)
        got = compiled(jax.device_put(scores, places), k)
        assert_equal(got, by_sort(scores, k))
        for mask, place in zip(jax.tree.leaves(got), jax.tree.leaves(places), strict=True):
            assert mask.sharding.is_equivalent_to(place, mask.ndim)


@pytest.mark.parametrize("given", [False, True])
def test_a_round_is_one_all_reduce_of_a_few_numbers(given):
    """Four places in the text: the rounds of the threshold, counts above and at it, the rounds of the ties."""
    specs = {
        key: None if shape is None else PartitionSpec("data" if key != "c" else None) for key, shape in SHAPES.items()
    }
    mesh, places = cut((8, 1), specs)
    where = {"mesh": mesh, "specs": specs} if given else {}
    compiled = jax.jit(functools.partial(selection.top_mask, **where), in_shardings=(places, None))
    text = compiled.lower(scores_of(0, 0), 100).compile().as_text()
    assert not re.findall(r"all-gather|all-to-all|collective-permute|reduce-scatter", text)
    counts = all_reduces(text)
    assert 3 <= len(counts) <= 5, counts
    assert max(counts) <= 3 * len(jax.tree.leaves(SPECS, is_leaf=lambda x: isinstance(x, PartitionSpec)))
    rounds = [int(n) for n in re.findall(r'"known_trip_count":\{"n":"(\d+)"\}', text)]
    assert 32 in rounds  # bits of the threshold
    assert sum(sorted(rounds)[-2:]) + len(counts) - 2 <= 40, (rounds, counts)
