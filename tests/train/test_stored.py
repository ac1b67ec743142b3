"""Arrays by path, checksums and the record of a checkpoint, without any storage."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import tree
from steelyard.train import stored


def test_paths_and_back():
    given = {"a": {"b": 1, "c": [2, None, 3]}, "d": 4}
    flat = stored.by_path(given)
    assert flat == {"a/b": 1, "a/c/0": 2, "a/c/2": 3, "d": 4}
    assert dict(tree.flatten(stored.nest(flat))) == flat


@pytest.mark.parametrize("clash", [{"a.b": 1, "a": {"b": 2}}, {"a/b": 1, "a": {"b": 2}}, {"a.b": 1, "a": 2}])
def test_paths_that_are_one_on_disk(clash):
    with pytest.raises(ValueError, match="more than one leaf: a"):
        stored.by_path(clash)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_keys_as_arrays_and_as_shapes(impl):
    key = jax.random.split(jax.random.key(3, impl=impl), 2)
    flat = {"rng": key, "x": jnp.ones(2)}
    shapes = jax.eval_shape(lambda: flat)
    data = stored.key_data(flat)
    assert jax.tree.map(jnp.shape, stored.key_data(shapes)) == jax.tree.map(jnp.shape, data)
    back = stored.wrap_keys(data, shapes)
    assert back["rng"].dtype == key.dtype
    np.testing.assert_array_equal(jax.random.key_data(back["rng"]), jax.random.key_data(key))
    assert stored.type_str(key).startswith("key<")


def test_leaves_must_be_arrays():
    with pytest.raises(ValueError, match=r"not: step \(int\)"):
        stored.key_data({"step": 1, "x": jnp.ones(1)})


def words(x):
    """The bits of a host array as unsigned integers, one for each entry (two for 64 bits)."""
    unsigned = {1: np.uint8, 2: np.uint16}.get(x.dtype.itemsize, np.uint32)
    return np.ascontiguousarray(x).view(unsigned).astype(np.uint64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "int8", "uint32", "float8_e4m3fn"])
def test_checksum_is_the_sum_of_the_words(dtype):
    x = np.random.default_rng(0).normal(size=(5, 7)) * 100
    x = np.asarray(jnp.asarray(x, jnp.float32).astype(dtype))
    sums, finite = stored.digest({"x": jnp.asarray(x)})
    assert sums["x"] == int(words(x).sum()) % 2**32
    assert finite["x"] == bool(np.isfinite(x.astype(np.float32)).all())


def test_checksum_of_other_types():
    arrays = {
        "bool": jnp.array([True, False, True]),
        "int4": jnp.array([-8, 7, 1], jnp.int4),
        "complex": jnp.array([1 + 2j, 0.5j], jnp.complex64),
    }
    with jax.enable_x64(True):
        arrays["wide"] = jnp.array([1.5, -2.0], jnp.float64)
        sums, finite = stored.digest(arrays)
    as_float = {"bool": [1.0, 0.0, 1.0], "int4": [-8.0, 7.0, 1.0], "complex": [1.0, 0.0, 2.0, 0.5]}
    for name, values in as_float.items():
        assert sums[name] == int(words(np.array(values, np.float32)).sum()) % 2**32
    assert sums["wide"] == int(words(np.array([1.5, -2.0])).sum()) % 2**32
    assert all(finite.values())
    assert stored.digest({}) == ({}, {})


@hypothesis.settings(max_examples=20, deadline=None)
@hypothesis.given(entry=st.integers(0, 15), bit=st.integers(0, 31))
def test_one_flipped_bit_is_noticed(entry, bit):
    x = np.linspace(-1, 1, 16, dtype=np.float32)
    bits = x.view(np.uint32).copy()
    bits[entry] ^= np.uint32(1 << bit)
    record = stored.record({"x": x}, stored.digest({"x": x})[0])
    stored.require_same_bits(record, {"x": x})
    with pytest.raises(ValueError, match=r"not those that were saved: x"):
        stored.require_same_bits(record, {"x": bits.view(np.float32)})


def test_nonfinite_entries_are_found():
    given = {"fine": jnp.ones(3), "nan": jnp.array([1, jnp.nan]), "inf": jnp.array([jnp.inf], jnp.bfloat16)}
    assert stored.digest(given)[1] == {"fine": True, "nan": False, "inf": False}


def test_empty_arrays():
    given = {"none": jnp.zeros((0, 3)), "some": jnp.ones(1), "scalar": jnp.ones(())}
    assert list(stored.nonempty(given)) == ["some", "scalar"]
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    made = stored.empty(jax.ShapeDtypeStruct((0, 3), jnp.bfloat16, sharding=sharding))
    assert (made.shape, made.dtype, made.sharding) == ((0, 3), jnp.bfloat16, sharding)


def test_what_does_not_fit_is_listed():
    saved = {f"old_{i}": ["float32[1]", 0] for i in range(7)} | {"both": ["float32[3]", 0], "same": ["int32[]", 0]}
    wanted = {"new": jnp.ones(2), "both": jnp.ones(4, jnp.bfloat16), "same": jnp.zeros((), jnp.int32)}
    with pytest.raises(ValueError) as error:
        stored.require_fit("checkpoint 3", saved, wanted)
    assert str(error.value).splitlines() == [
        "checkpoint 3 does not fit this state:",
        "  not in the checkpoint: new",
        "  only in the checkpoint: old_0, old_1, old_2, old_3, old_4 and 2 more",
        "  of another type there: both (float32[3], here bfloat16[4])",
    ]
    stored.require_fit("checkpoint 3", {"same": ["int32[]", 0]}, {"same": wanted["same"]})
