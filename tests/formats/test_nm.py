"""N:M storage against masks, dense products and NumPy; and, quantized, against fake quantization bit for bit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from steelyard import formats, quant, tree


def data(shape=(16, 5), seed=0, dtype=np.float32):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def numpy_mask(w, n, m):
    """True for the n largest |w| of every m rows; the lower row wins ties, and padding loses them."""
    k = w.shape[-2]
    scores = np.pad(np.abs(w), [(0, 0)] * (w.ndim - 2) + [(0, -k % m), (0, 0)], constant_values=-1)
    groups = scores.reshape(*w.shape[:-2], -1, m, w.shape[-1])
    rank = np.argsort(np.argsort(-groups, axis=-2, kind="stable"), axis=-2)
    return (rank < n).reshape(scores.shape)[..., :k, :]


def numpy_storage(w, keep, n, m):
    """Values and positions, group by group: the kept entries and the lowest others, ascending."""
    k, columns = w.shape
    groups = -(-k // m)
    values, positions = np.zeros((groups * n, columns), w.dtype), np.zeros((groups * n, columns), int)
    for g in range(groups):
        for c in range(columns):
            kept = [i for i in range(m) if g * m + i < k and keep[g * m + i, c]]
            others = [i for i in range(m) if i not in kept]
            for slot, i in enumerate(sorted(kept + others[: n - len(kept)])):
                positions[g * n + slot, c] = i
                if i in kept:
                    values[g * n + slot, c] = w[g * m + i, c]
    return values, positions


def numpy_packed(positions, m):
    bits = next(b for b in (0, 1, 2, 4, 8) if 2**b >= m)
    rows, columns = positions.shape
    out = np.zeros((-(-rows * bits // 8), columns), np.uint8)
    for r in range(rows if bits else 0):
        out[r * bits // 8] += (positions[r] << (bits * (r % (8 // bits)))).astype(np.uint8)
    return out


# Every width of a position (0, 1, 2, 4 and 8 bits), whole groups and a ragged tail, nothing and everything kept.
PATTERNS = [(2, 4, 16), (2, 4, 13), (1, 2, 13), (1, 1, 5), (3, 5, 13), (4, 4, 16), (0, 4, 13), (3, 17, 20)]


@pytest.mark.parametrize(("n", "m", "k"), PATTERNS)
def test_storage_matches_numpy(n, m, k):
    w = data((k, 5))
    s = formats.NMSparse.from_dense(w, n=n, m=m)
    keep = numpy_mask(w, n, m)
    values, positions = numpy_storage(w, keep, n, m)
    index, dense, mask = jax.jit(lambda s: (s.index(), s.dense(), s.mask()))(s)
    np.testing.assert_array_equal(s.values, values)
    np.testing.assert_array_equal(index, positions)
    assert index.dtype == jnp.int32
    np.testing.assert_array_equal(s.indices, numpy_packed(positions, m))
    assert s.indices.dtype == jnp.uint8
    np.testing.assert_array_equal(dense, w * keep)
    assert s.shape == w.shape
    assert s.dtype == w.dtype
    assert np.all(np.asarray(mask) >= keep)
    assert np.asarray(mask).sum() <= values.size


def test_worked_byte_counts():
    s = formats.NMSparse.from_dense(data((16, 5)), n=2, m=4)
    assert s.values.nbytes == 8 * 5 * 4 == 160
    assert s.nbytes == 160 + 10 == 170
    assert s.size * 4 == 320
    half = jnp.zeros((64, 32), jnp.bfloat16)
    for n, m, share in ((2, 4, 0.5 + 1 / 16), (1, 8, 0.125 + 1 / 32), (1, 32, 1 / 32 + 1 / 64)):
        shapes = jax.eval_shape(lambda w, n=n, m=m: formats.NMSparse.from_dense(w, n=n, m=m), half)
        assert shapes.nbytes == share * half.nbytes
    # int4 values of 2:4: half a byte each, two bits of position, one float32 scale a column.
    assert s.quantize("int4").nbytes == 4 * 5 + 10 + 5 * 4


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([(2, 4), (3, 5)]), st.integers(0, 2**31), st.floats(0, 1))
def test_sparser_masks_are_filled_with_zeros(pattern, seed, density):
    n, m = pattern
    w = data((13, 3), seed)
    keep = numpy_mask(w, n, m) & (np.random.default_rng(seed).random(w.shape) < density)
    s = formats.NMSparse.from_dense(w, n=n, m=m, mask=keep)
    values, positions = numpy_storage(w, keep, n, m)
    np.testing.assert_array_equal(s.values, values)
    np.testing.assert_array_equal(s.index(), positions)
    np.testing.assert_array_equal(s.dense(), np.where(keep, w, 0))


def test_kept_values_keep_their_bits():
    w = np.float32([[-0.0], [1.0], [2.0], [np.inf]])
    s = formats.NMSparse.from_dense(w, n=2, m=4, mask=np.array([[True], [False], [False], [True]]))
    np.testing.assert_array_equal(np.signbit(s.dense()[:, 0]), [True, False, False, False])
    np.testing.assert_array_equal(s.dense()[:, 0], [0, 0, 0, np.inf])


@pytest.mark.parametrize(
    ("format", "dtype"),
    [(format, "float32") for format in ("int8", "int4", "fp8_e4m3", "nf4")] + [("int4", "bfloat16")],
)
def test_quantized_is_what_fake_quantization_of_the_masked_weight_gives(format, dtype):
    w = jnp.asarray(data((16, 6)), dtype)
    mask = numpy_mask(data((16, 6)), 2, 4)

    def fake(w):
        return quant.fake_quantize(w * mask, format, *quant.calibrate(w * mask, format))

    expected = fake(w)
    packed = formats.NMSparse.from_dense(w * mask, n=2, m=4, mask=mask).quantize(format)
    unsigned = f"u{expected.dtype.itemsize}"
    bits = np.asarray(expected).view(unsigned)
    for dense in (packed.dense(), jax.jit(fake)(w)):
        assert dense.dtype == w.dtype
        np.testing.assert_array_equal(np.asarray(dense).view(unsigned), bits)
    x = jnp.asarray(data((3, 16), 1), dtype)
    np.testing.assert_array_equal(
        np.asarray(jax.jit(formats.matmul)(x, packed), np.float32),
        np.asarray(jax.jit(jnp.matmul)(x, expected), np.float32),
    )


@pytest.mark.parametrize(
    "options",
    [
        {"block": (8, 1)},
        {"block": (8, 2), "symmetric": False},
        {"method": "rms", "factor": 2.0},
        {"method": "percentile", "q": 90.0},
        {"power_of_two": True, "bound": "max"},
    ],
)
def test_quantize_options_are_those_of_the_dense_weight(options):
    w = jnp.asarray(data((16, 6)))
    s = formats.NMSparse.from_dense(w, n=2, m=4)
    scale, zero_point = quant.calibrate(s.dense(), "int4", **options)
    expected = quant.fake_quantize(s.dense(), "int4", scale, zero_point)
    np.testing.assert_array_equal(s.quantize("int4", **options).dense(), expected)
    np.testing.assert_array_equal(s.quantize("int4", scale=scale, zero_point=zero_point).dense(), expected)


def test_values_may_be_replaced_by_a_quantized_node():
    s = formats.NMSparse.from_dense(data((16, 6)), n=2, m=4)
    replaced = dataclasses.replace(s, values=formats.Quantized.from_dense(s.values, "int4"))
    np.testing.assert_array_equal(replaced.dense(), s.quantize("int4").dense())
    assert replaced.shape == (16, 6)
    assert replaced.values.packed
    paths = tree.paths({"kernel": replaced})
    assert paths == ["kernel/values/codes", "kernel/values/scale", "kernel/indices"]


def test_quantize_errors():
    s = formats.NMSparse.from_dense(data((16, 6)), n=2, m=4)
    with pytest.raises(ValueError, match=r"not whole groups of m=4"):
        s.quantize("int4", block=(2, 1))
    with pytest.raises(ValueError, match="nothing to calibrate"):
        s.quantize("int4", scale=jnp.ones((1, 6)), block=(8, 1))
    ragged = formats.NMSparse.from_dense(data((14, 6)), n=2, m=4)
    np.testing.assert_allclose(ragged.quantize("int8").dense(), ragged.dense(), atol=0.02)
    with pytest.raises(ValueError, match=r"14 rows into 2 blocks"):
        ragged.quantize("int4", block=(7, 1))


@pytest.mark.parametrize("quantized", [False, True])
def test_product_and_gradients(quantized):
    w, x, weights = data((13, 5)), data((2, 3, 13), 1), data((2, 3, 5), 2)
    s = formats.NMSparse.from_dense(w, n=2, m=4)
    s = s.quantize("int8") if quantized else s
    dense = np.asarray(s.dense(), np.float64)
    np.testing.assert_allclose(formats.matmul(x, s), x @ dense, rtol=1e-5, atol=1e-5)

    def loss(x, s):
        return jnp.sum(formats.matmul(x, s) * weights)

    dx, ds = jax.jit(jax.grad(loss, (0, 1), allow_int=True))(x, s)
    np.testing.assert_allclose(dx, weights @ dense.T, rtol=1e-5, atol=1e-5)
    assert ds.indices.dtype == jax.dtypes.float0
    dw = np.einsum("abk,abn->kn", x.astype(np.float64), weights)
    if quantized:
        steps = dense / np.asarray(s.values.scale, np.float64)
        np.testing.assert_allclose(ds.values.scale, np.sum(dw * steps, axis=0, keepdims=True), rtol=1e-4, atol=1e-3)
    else:
        # The gradient of a stored entry is that of its place; padding has none.
        padded = np.concatenate([dw, np.zeros((3, 5))]).reshape(4, 4, 5)
        expected = np.take_along_axis(padded, np.asarray(s.index()).reshape(4, 2, 5), axis=1)
        np.testing.assert_allclose(ds.values, expected.reshape(8, 5), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("quantized", [False, True])
def test_stacks_scan_vmap_and_slice(quantized):
    stack = formats.NMSparse.from_dense(data((3, 8, 8)), n=2, m=4)
    stack = stack.quantize("int4", block=(1, -1, 1)) if quantized else stack
    assert stack.shape == (3, 8, 8)
    x = jnp.asarray(data((2, 8), 1))
    out, shapes = jax.lax.scan(lambda x, s: (jnp.tanh(formats.matmul(x, s)), s.dense()), x, stack)
    expected = np.asarray(x)
    for layer in np.asarray(stack.dense()):
        expected = np.tanh(expected @ layer)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(shapes, stack.dense())
    np.testing.assert_array_equal(jax.vmap(lambda s: s.dense())(stack), stack.dense())
    assert jax.tree.map(lambda a: a[0], stack).shape == (8, 8)


def test_from_dense_under_jit_and_vmap():
    w = jnp.asarray(data((3, 8, 6)))
    eager = formats.NMSparse.from_dense(w, n=2, m=4)
    for made in (
        jax.jit(lambda w: formats.NMSparse.from_dense(w, n=2, m=4))(w),
        jax.vmap(lambda w: formats.NMSparse.from_dense(w, n=2, m=4))(w),
    ):
        jax.tree.map(np.testing.assert_array_equal, made, eager)
    concrete = np.asarray(eager.mask())
    made = jax.jit(lambda w: formats.NMSparse.from_dense(w, n=2, m=4, mask=concrete))(w)
    jax.tree.map(np.testing.assert_array_equal, made, eager)
    with pytest.raises(ValueError, match="mask= is traced"):
        jax.jit(lambda w, mask: formats.NMSparse.from_dense(w, n=2, m=4, mask=mask))(w, concrete)


def test_sharded_over_eight_devices():
    mesh = jax.make_mesh((2, 4), ("k", "n"), axis_types=(AxisType.Auto,) * 2)
    # 32 rows of 2:4 are 16 stored rows, 4 bytes of positions: two whole bytes on each half.
    s = formats.NMSparse.from_dense(data((32, 8)), n=2, m=4)
    sharding = NamedSharding(mesh, P("k", "n"))
    placed = jax.device_put(s, sharding)
    dense = jax.jit(lambda s: s.dense(), out_shardings=sharding)
    np.testing.assert_array_equal(dense(placed), s.dense())
    assert "all-gather" not in dense.lower(placed).compile().as_text()
    x = jnp.asarray(data((3, 32), 1))
    np.testing.assert_allclose(
        jax.jit(formats.matmul)(x, placed), np.asarray(x) @ np.asarray(s.dense()), rtol=1e-5, atol=1e-5
    )


def test_rebuilt_with_anything():
    s = formats.NMSparse.from_dense(data(), n=2, m=4).quantize("int8")
    leaves, structure = jax.tree.flatten(s)
    for child in (object(), None, False, P(), jax.ShapeDtypeStruct((2, 2), jnp.float32)):
        assert type(jax.tree.unflatten(structure, [child] * len(leaves))) is formats.NMSparse
    shapes = jax.eval_shape(lambda: s)
    assert (shapes.shape, shapes.nbytes, shapes.dtype) == (s.shape, s.nbytes, s.dtype)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 5, "m": 4}, r"n=5, m=4"),
        ({"n": -1, "m": 4}, "n=-1"),
        ({"n": 0, "m": 0}, "m=0"),
        ({"n": 1, "m": 257}, "m=257"),
        ({"n": 2, "m": 4, "mask": np.ones((16, 5), bool)}, "keeps 4 entries of a group of 4, but 2:4"),
        ({"n": 2, "m": 4, "mask": np.zeros((8, 5), bool)}, r"\(8, 5\).*\(16, 5\)"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        formats.NMSparse.from_dense(data(), **arguments)


def test_one_axis_is_refused():
    with pytest.raises(ValueError, match=r"\(16,\)"):
        formats.NMSparse.from_dense(data((16,)), n=2, m=4)
