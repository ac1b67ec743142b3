"""Masks against plain Python loops that state the rule entry by entry."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from steelyard.sparsity import masks

quick = hypothesis.settings(max_examples=25, deadline=None)

# Few distinct values, so that ties are the rule; with NaN, infinities and negative scores.
VALUES = st.sampled_from([-math.inf, -2.0, -1.0, 0.0, 0.5, 1.0, 3.0, math.inf, math.nan])
DTYPES = st.sampled_from(["float32", "float16", "bfloat16", "int32"])
# Few, so that little is compiled: m divides the 12 rows or does not, or is more than there are.
PATTERNS = st.sampled_from([(1, 1), (1, 2), (2, 4), (3, 5), (6, 8), (4, 16)])

nm_mask = jax.jit(masks.nm_mask, static_argnums=(1, 2, 3))
selected_nm_mask = jax.jit(lambda *args: masks.nm_mask(*args), static_argnums=(1, 2, 3))
topk_mask = jax.jit(masks.topk_mask, static_argnames="min_kept")
topk_mask_along = jax.jit(masks.topk_mask_along)


def as_scores(values, dtype):
    return jnp.asarray(np.nan_to_num(values, posinf=9, neginf=-9) if dtype == "int32" else values, dtype)


def keep_loop(values, k):
    """The k largest of a list: NaN is minus infinity, equal values keep the lower index."""
    values = [-math.inf if v != v else v for v in values]
    kept = sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]
    return [i in kept for i in range(len(values))]


def nm_loop(scores, n, m):
    """N:M along axis -2 of a matrix, group by group; a group may be short."""
    scores = np.asarray(scores, np.float64)
    mask = np.zeros(scores.shape, bool)
    for column in range(scores.shape[1]):
        for start in range(0, scores.shape[0], m):
            mask[start : start + m, column] = keep_loop(list(scores[start : start + m, column]), n)
    return mask


MATRICES = hnp.arrays(np.float32, (12, 3), elements=VALUES)


@quick
@hypothesis.given(MATRICES, DTYPES, PATTERNS)
def test_nm_mask_is_the_loop(values, dtype, pattern):
    scores = as_scores(values, dtype)
    np.testing.assert_array_equal(nm_mask(scores, *pattern), nm_loop(scores, *pattern))


@quick
@hypothesis.given(MATRICES, st.sampled_from(["float32", "bfloat16"]), st.sampled_from([(3, 5), (4, 16)]))
def test_nm_mask_by_selection_is_the_loop(values, dtype, pattern):
    """Groups that are too long to compare go through the selection; here all of them do."""
    scores = as_scores(values, dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masks, "_MAX_COMPARED", 0)
        np.testing.assert_array_equal(selected_nm_mask(scores, *pattern), nm_loop(scores, *pattern))


@pytest.mark.parametrize(("n", "m"), [(3, 70), (100, 256)])
def test_nm_mask_of_large_groups(n, m):
    scores = jnp.round(jax.random.normal(jax.random.key(0), (2 * m + 5, 2)) * 4)
    np.testing.assert_array_equal(masks.nm_mask(scores, n, m), nm_loop(scores, n, m))


def test_nm_mask_hand_case():
    """Groups (3 1 2 2) and (5): the tie of the twos goes to the first, the short group keeps what it has."""
    scores = jnp.array([3.0, 1.0, 2.0, 2.0, 5.0])
    assert masks.nm_mask(scores, 2, 4, axis=0).tolist() == [True, False, True, False, True]


def test_nm_mask_keeps_nan_only_when_nothing_else_is_left():
    scores = jnp.array([jnp.nan, -jnp.inf, jnp.nan, 1.0])
    # NaN counts as minus infinity, so that it ties with it and index 0 comes first.
    assert masks.nm_mask(scores, 2, 4, axis=0).tolist() == [True, False, False, True]
    assert masks.nm_mask(jnp.full(4, jnp.nan), 3, 4, axis=0).tolist() == [True, True, True, False]


def test_nm_mask_axes_and_leading_axes():
    shape = (3, 2, 8, 6)
    scores = jax.random.normal(jax.random.key(1), shape)
    for axis in (0, -2, -1):
        moved = np.moveaxis(np.asarray(scores), axis, -2)
        expected = np.stack([nm_loop(s, 2, 4) for s in moved.reshape(-1, *moved.shape[-2:])]).reshape(moved.shape)
        np.testing.assert_array_equal(nm_mask(scores, 2, 4, axis), np.moveaxis(expected, -2, axis))


def test_nm_mask_trivial_patterns():
    scores = jnp.ones((6, 2))
    assert not masks.nm_mask(scores, 0, 4).any()
    assert not masks.nm_mask(scores, 0, 1).any()
    assert masks.nm_mask(scores, 4, 4).all()
    assert masks.nm_mask(scores, 1, 1).all()
    assert masks.nm_mask(jnp.zeros((0, 3)), 2, 4).shape == (0, 3)
    assert masks.nm_mask(jnp.zeros((3, 0)), 2, 4).shape == (3, 0)


def test_nm_mask_group_longer_than_the_axis():
    assert masks.nm_mask(jnp.array([[1.0], [3.0], [2.0]]), 2, 8)[:, 0].tolist() == [False, True, True]
    assert masks.nm_mask(jnp.array([[1.0], [3.0], [2.0]]), 5, 8).all()


@pytest.mark.parametrize(("n", "m"), [(-1, 4), (0, 0), (5, 4), (2, 1)])
def test_nm_mask_refuses_impossible_patterns(n, m):
    with pytest.raises(ValueError, match=f"n={n}, m={m}"):
        masks.nm_mask(jnp.ones((4, 4)), n, m)


def test_nm_mask_refuses_a_missing_axis():
    with pytest.raises(ValueError, match=r"axis=-2 .* \(4,\)"):
        masks.nm_mask(jnp.ones(4), 2, 4)


def test_nm_mask_under_jit_vmap_and_grad():
    scores = jax.random.normal(jax.random.key(2), (3, 8, 2))
    mask = functools.partial(masks.nm_mask, n=2, m=4)
    expected = mask(scores)
    np.testing.assert_array_equal(jax.jit(mask)(scores), expected)
    np.testing.assert_array_equal(jax.jit(jax.vmap(mask))(scores), expected)
    gradient = jax.jit(jax.grad(lambda s: jnp.sum(s * mask(s))))(scores)
    np.testing.assert_array_equal(gradient, expected)


def test_nm_mask_needs_no_array_of_pairs():
    """The m comparisons of an entry are fused: what is allocated beside them is less than one array more."""
    scores = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    memory = jax.jit(lambda s: masks.nm_mask(s, 2, 4)).lower(scores).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 64 * 128 * 4


@quick
@hypothesis.given(MATRICES, DTYPES, st.integers(0, 64), st.sampled_from([0, 3]))
def test_topk_mask_is_the_loop(values, dtype, removed, min_kept):
    """A sparsity in 64ths, so that its product with 36 is exact in float32 too and ties in rounding occur."""
    scores, sparsity = as_scores(values, dtype), removed / 64
    k = min(max(min_kept, round(scores.size * (1 - sparsity))), scores.size)
    mask = topk_mask(scores, sparsity, min_kept=min_kept)
    np.testing.assert_array_equal(np.ravel(mask), keep_loop(np.asarray(scores, np.float64).ravel().tolist(), k))


@quick
@hypothesis.given(MATRICES, st.integers(0, 64))
def test_topk_mask_along_is_the_loop(values, removed):
    sparsity = removed / 64
    k = len(values) - math.floor(len(values) * sparsity + 1e-9)
    expected = np.stack([keep_loop(column.tolist(), k) for column in values.T], axis=1)
    np.testing.assert_array_equal(topk_mask_along(values, sparsity), expected)


def test_topk_mask_of_a_traced_sparsity_counts_exactly():
    scores = jnp.zeros((10, 10))
    counts = jax.jit(jax.vmap(lambda s: jnp.count_nonzero(masks.topk_mask(scores, s))))(
        jnp.array([0.0, 0.25, 0.5, 1.0])
    )
    assert counts.tolist() == [100, 75, 50, 1]
    along = jax.jit(masks.topk_mask_along)(scores, jnp.float32(0.5))
    assert along.sum(0).tolist() == [5] * 10


def test_topk_mask_of_a_python_sparsity_is_computed_in_float64():
    """100 * (1 - 0.145) is 85.5 in decimals, 85.5 in float64 too, and that goes to the even 86."""
    assert round(100 * (1 - 0.145)) == masks.topk_mask(jnp.zeros(100), 0.145).sum()


def test_topk_mask_edges():
    scores = jnp.array([1.0, 3.0, 2.0])
    assert masks.topk_mask(scores, 0.0).all()
    assert masks.topk_mask(scores, 1.0).tolist() == [False, True, False]
    assert masks.topk_mask(scores, 1.0, min_kept=0).tolist() == [False] * 3
    # 3 * 0.5 = 1.5 and 5 * 0.5 = 2.5 both round to the even 2.
    assert masks.topk_mask(scores, 0.5).sum() == masks.topk_mask(jnp.arange(5.0), 0.5).sum() == 2
    assert masks.topk_mask(jnp.zeros(()), 0.9).tolist() is True
    assert masks.topk_mask(jnp.zeros((0, 2)), 0.5).shape == (0, 2)
    for sparsity in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="sparsity="):
            masks.topk_mask(scores, sparsity)


def test_topk_mask_compares_in_the_dtype_of_the_scores():
    """1 + 2^-9 and 1 are one number in bfloat16 (8 bits of precision): the lower index wins there."""
    scores = jnp.array([1.0, 1.0 + 2.0**-9])
    assert masks.topk_mask(scores, 0.5).tolist() == [False, True]
    assert masks.topk_mask(scores.astype(jnp.bfloat16), 0.5).tolist() == [True, False]


@quick
@hypothesis.given(st.sampled_from([(), (8,), (3, 5), (2, 1, 0)]).flatmap(lambda shape: hnp.arrays(bool, shape)))
def test_packing_is_numpys_and_undone(mask):
    packed = masks.pack_bits(jnp.asarray(mask))
    np.testing.assert_array_equal(packed, np.packbits(mask.ravel()))
    np.testing.assert_array_equal(masks.unpack_bits(packed, mask.shape), mask)


@pytest.mark.parametrize(("shape", "axis"), [((3, 16), -1), ((9, 5), 0), ((2, 3, 11), 2), ((4, 8, 3), -2)])
def test_packing_along_an_axis_is_numpys_and_undone(shape, axis):
    mask = np.random.default_rng(0).integers(0, 2, shape).astype(bool)
    packed = masks.pack_bits(jnp.asarray(mask), axis)
    np.testing.assert_array_equal(packed, np.packbits(mask, axis=axis))
    np.testing.assert_array_equal(masks.unpack_bits(packed, shape, axis), mask)


def test_unpacking_names_both_shapes():
    with pytest.raises(ValueError, match=r"\(1,\).*\(3, 4\).*\(2,\)"):
        masks.unpack_bits(jnp.zeros(1, jnp.uint8), (3, 4))


def test_apply_passes_none_and_gives_clean_zeros():
    params = {"a": jnp.array([-1.0, jnp.inf, 2.0]), "b": jnp.ones(2), "c": None}
    out = masks.apply(params, {"a": jnp.array([False, False, True]), "b": None, "c": None})
    assert out["a"].tolist() == [0.0, 0.0, 2.0]
    assert not np.signbit(out["a"]).any()
    assert out["b"] is params["b"]
    assert out["c"] is None
    assert masks.apply(jnp.ones(2, jnp.bfloat16), jnp.array([True, False])).dtype == jnp.bfloat16


def test_summarize_and_overlap():
    params = {"a": {"kernel": jnp.array([[0.0, 1.0], [0.0, 0.0]]), "bias": None}, "b": jnp.array([1.0, 2.0])}
    # 3 of 4 zeros, 0 of 2; together 3 of 6.
    assert masks.summarize(params) == {"a/kernel": 0.75, "b": 0.0, "total": 0.5, "nonzero": 3, "size": 6}
    a = {"x": jnp.array([True, True, False]), "y": None, "z": jnp.array([False])}
    b = {"x": jnp.array([True, False, True]), "y": None, "z": jnp.array([True])}
    shares = jax.jit(masks.overlap)(a, b)
    assert {path: float(x) for path, x in shares.items()} == {"x": 0.5, "z": 0.0, "total": 0.5}


# Blocks, channels, and whole trees.


def block_loop(scores, sparsity, shape, pool):
    """Every block pooled by itself over what is there, then the best of them by a stable sort."""
    rows, columns = (-(-size // step) for size, step in zip(scores.shape, shape, strict=False))
    pooled = [
        pool(scores[a * shape[0] : (a + 1) * shape[0], b * shape[1] : (b + 1) * shape[1]])
        for a in range(rows)
        for b in range(columns)
    ]
    kept = np.reshape(keep_loop(pooled, max(1, round(len(pooled) * (1 - sparsity)))), (rows, columns))
    place = np.ix_(*(np.arange(size) // step for size, step in zip(scores.shape[:2], shape, strict=True)))
    return kept[place]


@pytest.mark.parametrize("shape", [(4, 4), (2, 3), (1, 9), (8, 8)])
@pytest.mark.parametrize("pool", ["mean", "max"])
def test_blocks_are_the_loop_whatever_the_remainder(shape, pool):
    """Seven rows and nine columns: remainders of any size, less and more than half a block."""
    scores = np.random.default_rng(0).integers(0, 50, (7, 9)).astype(np.float32)
    expected = block_loop(scores, 0.5, shape, {"mean": np.mean, "max": np.max}[pool])
    np.testing.assert_array_equal(masks.block_mask(scores, 0.5, shape, pool=pool), expected)


def test_blocks_pool_later_axes_and_take_a_vector_as_a_row():
    scores = np.random.default_rng(1).uniform(size=(4, 6, 3)).astype(np.float32)
    expected = block_loop(scores.mean(-1), 0.5, (2, 2), np.mean)
    got = masks.block_mask(scores, 0.5, (2, 2))
    np.testing.assert_array_equal(got, np.repeat(expected[..., None], 3, -1))
    assert masks.block_mask(jnp.array([1.0, 1.0, 3.0, 3.0, 2.0]), 0.5, (4, 2)).tolist() == [
        False,
        False,
        True,
        True,
        True,
    ]


def test_a_block_of_one_entry_is_no_block():
    scores = jax.random.normal(jax.random.key(0), (5, 6))
    np.testing.assert_array_equal(masks.block_mask(scores, 0.7, (1, 1)), masks.topk_mask(scores, 0.7))


def test_channels_go_by_the_sum_of_their_scores():
    scores = jnp.array([[1.0, 5.0, 2.0], [4.0, 1.0, 2.0]])
    assert masks.channel_mask(scores, 1 / 3).tolist() == [[True, True, False]] * 2
    assert masks.channel_mask(scores, 0.5, axis=0).tolist() == [[True] * 3, [False] * 3]
    assert masks.channel_mask(scores, 1.0).tolist() == [[False, True, False]] * 2  # one stays


def test_mask_chooses_by_the_pattern():
    scores = jax.random.uniform(jax.random.key(0), (8, 6))
    for text, expected in {
        "unstructured": masks.topk_mask(scores, 0.5),
        "2:4": masks.nm_mask(scores, 2, 4),
        "1:3:-1": masks.nm_mask(scores, 1, 3, -1),
        "block:2x3": masks.block_mask(scores, 0.5, (2, 3)),
        "block:2x3:max": masks.block_mask(scores, 0.5, (2, 3), pool="max"),
        "channel:0": masks.channel_mask(scores, 0.5, 0),
    }.items():
        np.testing.assert_array_equal(masks.mask(scores, 0.5, text), expected)
    for nothing in (0, 0.0, None, jnp.float32(0)):
        assert masks.mask(scores, nothing, "2:4").all()
    traced = jax.jit(lambda s: masks.mask(scores, s, "2:4"))
    assert traced(0.0).all()
    np.testing.assert_array_equal(traced(0.3), masks.nm_mask(scores, 2, 4))


def test_masks_of_a_tree():
    scores = {"a": jnp.arange(4.0), "b": jnp.arange(6.0), "none": None}
    got = masks.masks(scores, {"a": 0.5, "b": None, "none": None})
    assert got["a"].tolist() == [False, False, True, True]
    assert got["b"] is None
    assert got["none"] is None
    assert masks.masks(scores, 0.5)["b"].tolist() == [False] * 3 + [True] * 3


@quick
@hypothesis.given(st.integers(0, 99), st.floats(0, 1))
def test_global_masks_keep_the_rounded_count_and_ignore_a_common_scale(seed, sparsity):
    rng = np.random.default_rng(seed)
    scores = {"a": rng.uniform(size=(6, 5)).astype(np.float32), "b": rng.uniform(size=17).astype(np.float32), "n": None}
    got = masks.global_masks(scores, sparsity)
    assert sum(int(x.sum()) for x in jax.tree.leaves(got)) == round(47 * (1 - sparsity))
    scaled = masks.global_masks(jax.tree.map(lambda x: 8 * x, scores), sparsity)
    jax.tree.map(np.testing.assert_array_equal, got, scaled)


def test_global_masks_move_the_budget_to_the_leaf_of_larger_scores_unless_normalized():
    scores = {"large": 100 * jnp.arange(1.0, 5.0), "small": jnp.arange(1.0, 5.0)}
    assert [int(x.sum()) for x in jax.tree.leaves(masks.global_masks(scores, 0.5))] == [4, 0]
    assert [int(x.sum()) for x in jax.tree.leaves(masks.global_masks(scores, 0.5, normalize=True))] == [2, 2]


@pytest.mark.parametrize("compile", [lambda fn: fn, jax.jit])
def test_global_masks_with_a_minimum_leave_no_leaf_empty(compile):
    """Without it the small leaf is emptied. Of 60 removed, 20 are its own; it keeps 5, so that the other loses 45."""
    scores = {"large": jnp.arange(1.0, 81.0) + 1000, "small": jnp.arange(1.0, 21.0)}
    plain = compile(lambda s: masks.global_masks(s, 0.6))(scores)
    kept = compile(lambda s: masks.global_masks(s, 0.6, min_kept=5))(scores)
    share = compile(lambda s: masks.global_masks(s, 0.6, min_kept=0.05))(scores)
    assert not plain["small"].any()
    assert int(kept["small"].sum()) == 5
    assert int(kept["large"].sum()) == 35
    assert kept["small"].tolist() == [False] * 15 + [True] * 5
    jax.tree.map(np.testing.assert_array_equal, kept, share)


def test_activation_keeps_the_largest_magnitudes_and_their_gradients():
    x = jnp.array([[3.0, -4.0, 0.5, 1.0]])
    value, pull = jax.vjp(lambda x: masks.activation(x, 0.5, "2:4:-1"), x)
    assert value.tolist() == [[3.0, -4.0, 0.0, 0.0]]
    assert pull(jnp.ones_like(x))[0].tolist() == [[1.0, 1.0, 0.0, 0.0]]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda s: masks.block_mask(s, 1.5), "sparsity=1.5"),
        (lambda s: masks.block_mask(s, 0.5, (0, 2)), "shape=\\(0, 2\\)"),
        (lambda s: masks.block_mask(s, 0.5, pool="men"), "did you mean 'mean'"),
        (lambda s: masks.channel_mask(s, -0.1), "sparsity=-0.1"),
        (lambda s: masks.channel_mask(s, 0.5, axis=2), "axis=2"),
        (lambda s: masks.mask(s, None, "channel"), "sparsity=None"),
        (lambda s: masks.mask(s, 0.5, "unstructurd"), "did you mean 'unstructured'"),
        (lambda s: masks.mask(s, 1.5, "2:4"), "sparsity=1.5"),
        (lambda s: masks.global_masks({"a": s}, 2.0), "sparsity=2.0"),
        (lambda s: masks.global_masks({"a": s}, 0.9, min_kept=-1), "min_kept=-1"),
        (lambda s: masks.global_masks({"a": s, "b": s}, 0.9, min_kept=5), "min_kept=5"),
    ],
)
def test_what_masks_refuse(call, text):
    with pytest.raises(ValueError, match=text):
        call(jnp.ones((4, 4)))
