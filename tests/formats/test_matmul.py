"""Dispatch on how a weight is stored."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import formats, tree


def data(shape, seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def nodes(shape=(16, 6)):
    w = jnp.asarray(data(shape))
    sparse = formats.NMSparse.from_dense(w, n=2, m=4)
    return {
        "array": w,
        "int4": formats.Quantized.from_dense(w, "int4"),
        "fp8": formats.Quantized.from_dense(w, "fp8_e4m3"),
        "sparse": sparse,
        "sparse int8": sparse.quantize("int8"),
    }


KINDS = ("array", "int4", "fp8", "sparse", "sparse int8")


@pytest.mark.parametrize("kind", KINDS)
def test_matmul_is_the_dense_product(kind):
    w, x = nodes()[kind], data((2, 3, 16), 1)
    expected = x.astype(np.float64) @ np.asarray(formats.dense(w), np.float64)
    np.testing.assert_allclose(formats.matmul(x, w), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(formats.matmul(x[0, 0], w), expected[0, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["array", "int4", "sparse"])
def test_dtype_is_what_both_promote_to(kind):
    w = nodes()[kind]
    half = w.astype(jnp.bfloat16) if kind == "array" else as_half(w)
    for x_dtype, weight, expected in (
        ("float32", w, "float32"),
        ("bfloat16", w, "float32"),
        ("bfloat16", half, "bfloat16"),
        ("float32", half, "float32"),
        ("float16", half, "float32"),
    ):
        y = formats.matmul(jnp.ones((2, 16), x_dtype), weight)
        assert y.dtype == jnp.result_type(x_dtype, weight.dtype) == expected


def as_half(w):
    if isinstance(w, formats.Quantized):
        return dataclasses.replace(w, dtype="bfloat16")
    values = w.values
    return dataclasses.replace(w, values=as_half(values) if formats.is_weight(values) else values.astype(jnp.bfloat16))


def test_sums_are_accumulated_in_float32():
    x, ones = jnp.ones((1, 1024), jnp.bfloat16), jnp.ones((1024, 1), jnp.bfloat16)
    # A bfloat16 sum of ones stops at 256. In 2:4 storage half of the ones are left.
    sparse = formats.NMSparse.from_dense(ones, n=2, m=4)
    assert float(formats.matmul(x, ones)[0, 0]) == 1024
    assert float(formats.matmul(x, sparse)[0, 0]) == 512
    for format in ("int8", "int4", "fp8_e4m3"):
        w = formats.Quantized.from_dense(ones, format, bound="max")
        # 1 is the largest value, so its code times the scale is 1 to float32 rounding: the sum is 1024 in bfloat16.
        assert float(formats.matmul(x, w)[0, 0]) == 1024


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_in_x(kind):
    w, x, weights = nodes()[kind], data((3, 16), 1), data((3, 6), 2)
    gradient = jax.grad(lambda x: jnp.sum(formats.matmul(x, w) * weights))(x)
    np.testing.assert_allclose(gradient, weights @ np.asarray(formats.dense(w)).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["int4", "fp8", "sparse"])
def test_backward_keeps_the_stored_weight_only(kind):
    w = nodes((64, 64))[kind]
    _, pullback = jax.vjp(lambda x: formats.matmul(x, w), jnp.ones((1, 64)))
    assert max(leaf.nbytes for leaf in jax.tree.leaves(pullback)) < 64 * 64 * 4


@pytest.mark.parametrize("kind", KINDS)
def test_take(kind):
    w, indices = nodes()[kind], np.int32([[3, 0], [15, 3]])
    np.testing.assert_array_equal(formats.take(w, indices), np.asarray(formats.dense(w))[indices])


@pytest.mark.parametrize(
    ("kind", "strides", "padding"),
    [("array", 1, "SAME"), ("int4", (2, 1), "VALID"), ("sparse", 1, [(1, 0), (0, 1)]), ("fp8", 2, "SAME")],
)
def test_conv(kind, strides, padding):
    w, x = nodes((2, 2, 4, 3))[kind], data((1, 5, 4, 4), 1)
    y = formats.conv(x, w, strides=strides, padding=padding)
    np.testing.assert_allclose(y, numpy_conv(x, np.asarray(formats.dense(w)), strides, padding), rtol=1e-4, atol=1e-5)


def numpy_conv(x, w, strides, padding):
    strides = (strides, strides) if isinstance(strides, int) else strides
    # A window of 2 with stride 1 needs one more entry to keep the size; it goes to the end.
    pads = (
        {"SAME": [(0, 1), (0, 1)], "VALID": [(0, 0), (0, 0)]}.get(padding, padding)
        if isinstance(padding, str)
        else padding
    )
    x = np.pad(x.astype(np.float64), [(0, 0), *pads, (0, 0)])
    sizes = [(x.shape[1 + i] - w.shape[i]) // strides[i] + 1 for i in range(2)]
    out = np.zeros((x.shape[0], *sizes, w.shape[3]))
    for i in range(sizes[0]):
        for j in range(sizes[1]):
            top, left = i * strides[0], j * strides[1]
            window = x[:, top : top + w.shape[0], left : left + w.shape[1]]
            out[:, i, j] = np.einsum("bhwi,hwio->bo", window, w)
    return out


def test_conv_of_mixed_dtypes_and_gradient():
    w, x = nodes((2, 2, 4, 3))["int4"], jnp.asarray(data((1, 4, 4, 4)), jnp.bfloat16)
    assert formats.conv(x, w).dtype == jnp.float32
    x = x.astype(jnp.float32)
    gradient, scales = jax.grad(lambda x, w: jnp.sum(formats.conv(x, w) ** 2), (0, 1), allow_int=True)(x, w)
    expected = jax.grad(lambda x: jnp.sum(formats.conv(x, w.dense()) ** 2))(x)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-5)
    assert scales.codes.dtype == jax.dtypes.float0


def test_is_weight_and_nbytes():
    params = {"a": nodes()["int4"], "b": nodes()["sparse"], "c": jnp.zeros((3,)), "d": None}
    kinds = jax.tree.map(formats.is_weight, params, is_leaf=formats.is_weight)
    assert kinds == {"a": True, "b": True, "c": False, "d": None}
    assert not formats.is_weight(np.zeros(3))
    expected = 8 * 6 + 6 * 4 + (8 * 6 * 4 + 2 * 6) + 12
    assert formats.nbytes(params) == tree.nbytes(params) == expected
    assert formats.nbytes(jax.eval_shape(lambda: params)) == expected


def test_a_tree_of_nodes_survives_tree_functions():
    params = {"a": nodes()["int4"], "b": nodes()["sparse int8"]}
    dense = jax.tree.map(formats.dense, params, is_leaf=formats.is_weight)
    assert {name: leaf.shape for name, leaf in dense.items()} == {"a": (16, 6), "b": (16, 6)}
    assert "a/codes" in tree.paths(params)


def test_explain_says_path_reason_and_bytes():
    w = nodes()
    assert formats.explain(w["array"]) == "array float32 (16, 6): jnp.matmul; 384 bytes"
    assert formats.explain(w["int4"]) == (
        "Quantized float32 (16, 6): int4, quant_matmul with 4-bit codes; 72 bytes (18.8 % of 384)"
    )
    assert "not an integer grid" in formats.explain(w["fp8"])
    assert formats.explain(w["sparse int8"]).startswith("NMSparse float32 (16, 6): 2:4 int8 values expanded")
    stack = formats.Quantized.from_dense(data((2, 8, 6)), "int4")
    assert "3 axes" in formats.explain(stack)


@pytest.mark.parametrize("kind", ["int4", "fp8", "sparse"])
def test_shape_errors_name_both_shapes(kind):
    with pytest.raises(ValueError, match=r"\(2, 8\).*\(16, 6\)"):
        formats.matmul(jnp.ones((2, 8)), nodes()[kind])
    with pytest.raises(ValueError, match=r"\(1, 4, 4, 3\).*\(2, 2, 4, 3\)"):
        formats.conv(jnp.ones((1, 4, 4, 3)), nodes((2, 2, 4, 3))[kind])
