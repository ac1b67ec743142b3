"""Fake quantization: the grids by hand, the gradients by formula, and what is deployed to the last bit."""

import functools
import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from steelyard import formats, quant, reparam

quick = hypothesis.settings(max_examples=20, deadline=None)

PARAMS = {
    "first": {"kernel": jax.random.normal(jax.random.key(0), (16, 6)), "bias": jnp.ones(6)},
    "conv": {"kernel": jax.random.normal(jax.random.key(1), (2, 2, 8, 4)).astype(jnp.bfloat16)},
    "nothing": {"kernel": None},
}
KERNEL = {"kernel": PARAMS["first"]["kernel"]}


def bits_of(x):
    return np.asarray(x).view({2: "u2", 4: "u4"}[x.dtype.itemsize])


def assert_finishes_as_shown(link, params=PARAMS):
    """`finish` decodes to what `apply(train=False)` shows, to the last bit; returns both."""
    stored, state = jax.jit(link.init)(params, jax.random.key(0))
    shown = jax.jit(functools.partial(link.apply, step=0, rng=None, train=False))(stored, state)
    finished = jax.jit(link.finish)(stored, state)
    dense = jax.jit(unpacked)(finished)
    for a, b in zip(jax.tree.leaves(dense), jax.tree.leaves(shown), strict=True):
        np.testing.assert_array_equal(bits_of(a), bits_of(b))
    return shown, finished


def unpacked(finished):
    return jax.tree.map(formats.dense, finished, is_leaf=formats.is_weight)


def lsq_by_formula(x, scale, g, low, high):
    """Value and both gradients in float64, one scale for everything."""
    v = x / scale
    inside = (v >= low) & (v <= high)
    slope = np.where(inside, np.round(v) - v, np.where(v < low, low, high))
    return np.round(np.clip(v, low, high)) * scale, g * inside, (g * slope).sum() / math.sqrt(high * x.size)


@quick
@hypothesis.given(
    hnp.arrays(np.float32, (3, 4), elements=st.integers(-40, 40).map(lambda i: i / 8)),
    st.sampled_from([0.25, 0.5, 1.0]),
    st.sampled_from([(3, True), (1, False)]),
)
def test_lsq_is_the_formula(x, scale, grid):
    """Eighths and a power of two: divisions are exact, so that ties and borders are met and decided alike."""
    bits, signed = grid
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    g = np.arange(12, dtype=np.float32).reshape(3, 4)
    quantize = jax.jit(functools.partial(reparam.lsq, bits=bits, signed=signed))
    y, pullback = jax.vjp(quantize, jnp.asarray(x), jnp.asarray(scale))
    expected = lsq_by_formula(x.astype(float), scale, g.astype(float), low, high)
    np.testing.assert_array_equal(y, expected[0])
    dx, ds = pullback(jnp.asarray(g))
    np.testing.assert_array_equal(dx, expected[1])
    # One float32 rounding of the factor and one of the product; the sum of eighths is exact.
    np.testing.assert_allclose(ds, expected[2], rtol=1e-6)


def test_lsq_hand_case():
    """x = 0.7, s = 0.5, 3 bits: x / s = 1.4 rounds to 1, high = 3, and a scalar is a block of one."""
    y, (dx, ds) = jax.value_and_grad(functools.partial(reparam.lsq, bits=3), argnums=(0, 1))(0.7, 0.5)
    assert (float(y), float(dx)) == (0.5, 1.0)
    np.testing.assert_allclose(ds, (1 - 1.4) / math.sqrt(3), rtol=1e-6)


def test_lsq_blocks_are_independent():
    """A scale for every 2 rows and every column equals one call for each block."""
    x, scale = jax.random.normal(jax.random.key(0), (4, 3)), jax.random.uniform(jax.random.key(1), (2, 3), minval=0.1)
    g = jax.random.normal(jax.random.key(2), (4, 3))
    y, pullback = jax.vjp(functools.partial(reparam.lsq, bits=4), x, scale)
    dx, ds = pullback(g)
    blocks = (np.asarray(a, np.float64).reshape(2, 2, 3).transpose(0, 2, 1).reshape(6, 2) for a in (x, g, y, dx))
    for xb, gb, yb, dxb, s, dsb in zip(*blocks, np.ravel(scale).astype(float), np.ravel(ds), strict=True):
        expected = lsq_by_formula(xb, s, gb, -8, 7)
        np.testing.assert_allclose(yb, expected[0], rtol=1e-6)
        np.testing.assert_array_equal(dxb, expected[1])
        np.testing.assert_allclose(dsb, expected[2], rtol=1e-5, atol=1e-6)


def test_lsq_values_lie_on_the_grid_and_keep_the_dtype():
    x = (3 * jax.random.normal(jax.random.key(0), (50,))).astype(jnp.bfloat16)
    y, pullback = jax.vjp(functools.partial(reparam.lsq, bits=3), x, jnp.float32(0.5))
    assert y.dtype == jnp.bfloat16
    assert set((np.asarray(y, float) / 0.5).tolist()) <= set(range(-4, 4))
    dx, ds = pullback(y)
    assert (dx.dtype, ds.dtype) == (jnp.bfloat16, jnp.float32)


def test_lsq_under_vmap():
    x, scale = jax.random.normal(jax.random.key(0), (3, 5)), jnp.array([0.1, 0.2, 0.3])
    quantize = functools.partial(reparam.lsq, bits=4)
    expected = jnp.stack([quantize(row, s) for row, s in zip(x, scale, strict=True)])
    np.testing.assert_array_equal(jax.vmap(quantize)(x, scale), expected)


def test_lsq_init():
    """2 mean |x| / sqrt(high): signed 3 bits have high = 3, unsigned 2 bits too."""
    x = jnp.array([[1.0, -2.0, 0.0], [3.0, 2.0, 0.0]])
    root = math.sqrt(3)
    np.testing.assert_allclose(reparam.lsq_init(x, bits=3), [[4 / root, 4 / root, 1]], rtol=1e-6)
    np.testing.assert_allclose(
        reparam.lsq_init(x, bits=2, signed=False, block=(1, -1)), [[2 / root], [10 / 3 / root]], rtol=1e-6
    )
    np.testing.assert_allclose(reparam.lsq_init(x[0], bits=3), [2 / root], rtol=1e-6)
    np.testing.assert_allclose(reparam.lsq_init(2.0, bits=3), 4 / root, rtol=1e-6)
    assert reparam.lsq_init(x.astype(jnp.bfloat16), bits=3).dtype == jnp.float32


@pytest.mark.parametrize(("bits", "signed"), [(1, True), (0, True), (0, False)])
def test_lsq_refuses_a_grid_without_positive_points(bits, signed):
    with pytest.raises(ValueError, match=f"bits={bits}, signed={signed}"):
        reparam.lsq(jnp.ones(2), 1.0, bits=bits, signed=signed)
    with pytest.raises(ValueError, match=f"bits={bits}, signed={signed}"):
        reparam.lsq_init(jnp.ones(2), bits=bits, signed=signed)


def test_lsq_names_both_shapes():
    with pytest.raises(ValueError, match=r"\(3,\).*\(4, 4\)"):
        reparam.lsq(jnp.ones((4, 4)), jnp.ones(3), bits=4)


def test_range_by_hand():
    """Column ranges 7 and 3.5 on int4 with `bound="max"`: steps of 1 and 1/2. A column of zeros stays zero."""
    w = jnp.array([[7.0, 1.3, 0.0], [-2.4, -3.5, 0.0], [2.5, 0.2, 0.0]])
    link = reparam.fake_quant()
    stored, state = link.init({"kernel": w}, None)
    assert stored["kernel"] is w
    seen, pullback = jax.vjp(lambda s: link.apply(s, state, step=0, rng=None, train=True), stored)
    assert seen["kernel"].tolist() == [[7, 1.5, 0], [-2, -3.5, 0], [2, 0, 0]]
    # Straight-through, and nothing through the scale.
    assert pullback({"kernel": w})[0]["kernel"].tolist() == w.tolist()


def test_range_on_the_edge_clips():
    """`bound="edge"` has a step of 7 / 7.5: the largest value 7 lies half a step beyond the last grid point."""
    w = jnp.array([[7.0], [3.0]])
    for gradient, expected in (("identity", [[1], [1]]), ("clipped", [[0], [1]])):
        link = reparam.fake_quant(bound="edge", gradient=gradient)
        total = jax.grad(
            lambda w, link=link: link.apply({"kernel": w}, (), step=0, rng=None, train=True)["kernel"].sum()
        )
        assert total(w).tolist() == expected


def test_other_leaves_pass():
    link = reparam.fake_quant()
    seen = link.apply(*link.init(PARAMS, None), step=0, rng=None, train=True)
    assert seen["first"]["bias"] is PARAMS["first"]["bias"]
    assert seen["nothing"]["kernel"] is None
    assert seen["conv"]["kernel"].dtype == jnp.bfloat16


def test_learned_scales_are_stored_beside_and_trained():
    link = reparam.fake_quant("int3", method="lsq")
    stored, state = link.init(PARAMS, jax.random.key(0))
    assert stored["base"] is PARAMS
    assert set(stored["fake_quant"]) == {"first.kernel.scale", "conv.kernel.scale"}
    scale = stored["fake_quant"]["first.kernel.scale"]
    np.testing.assert_array_equal(scale, reparam.lsq_init(PARAMS["first"]["kernel"], bits=3))

    def seen(stored):
        return link.apply(stored, state, step=0, rng=None, train=True)["first"]["kernel"]

    y, pullback = jax.vjp(seen, stored)
    expected, by_hand = jax.vjp(functools.partial(reparam.lsq, bits=3), PARAMS["first"]["kernel"], scale)
    np.testing.assert_array_equal(y, expected)
    gradient = pullback(y)[0]
    np.testing.assert_array_equal(gradient["base"]["first"]["kernel"], by_hand(y)[0])
    np.testing.assert_array_equal(gradient["fake_quant"]["first.kernel.scale"], by_hand(y)[1])


def test_project_keeps_scales_positive_and_the_gradient_still_reaches_them():
    link = reparam.fake_quant(method="lsq")
    stored, state = link.init(KERNEL, None)
    stored["fake_quant"] = {"kernel.scale": jnp.array([[-1.0, 0.0, 1e-6, 1e-5, 0.1, 2.0]])}
    expected = np.array([[1e-5, 1e-5, 1e-5, 1e-5, 0.1, 2.0]], np.float32)
    np.testing.assert_array_equal(link.project(stored, state)["fake_quant"]["kernel.scale"], expected)
    assert link.project(stored, state)["base"] is stored["base"]

    def total(scale):
        moved = stored | {"fake_quant": {"kernel.scale": scale}}
        return link.apply(moved, state, step=0, rng=None, train=True)["kernel"].sum()

    raw, kept = (jax.grad(total)(jnp.asarray(s)) for s in (stored["fake_quant"]["kernel.scale"], expected))
    np.testing.assert_array_equal(raw, kept)


@pytest.mark.parametrize("method", ["range", "lsq"])
def test_finish_is_what_evaluation_shows(method):
    link = reparam.fake_quant("int4", method=method)
    shown, finished = assert_finishes_as_shown(link)
    node = finished["first"]["kernel"]
    assert (node.format, node.scale.shape, node.dtype) == ("int4", (1, 6), jnp.float32)
    assert finished["conv"]["kernel"].dtype == jnp.bfloat16
    assert finished["nothing"]["kernel"] is None
    training = link.apply(*link.init(PARAMS, None), step=0, rng=None, train=True)
    jax.tree.map(np.testing.assert_array_equal, training, shown)


def test_nothing_changes_when_it_is_compiled():
    link = reparam.fake_quant("int4", method="range", where="first/kernel")
    shown, finished = assert_finishes_as_shown(link)
    plain = link.apply(PARAMS, (), step=0, rng=None, train=False)["first"]["kernel"]
    np.testing.assert_array_equal(bits_of(plain), bits_of(shown["first"]["kernel"]))
    again = link.finish(PARAMS, ())["first"]["kernel"]
    np.testing.assert_array_equal(again.codes, finished["first"]["kernel"].codes)
    np.testing.assert_array_equal(again.scale, finished["first"]["kernel"].scale)


@pytest.mark.parametrize("is_masked", [False, True])
def test_every_format_finishes_as_shown(is_masked):
    params = {name: KERNEL for name in quant.FORMATS}
    link = reparam.fake_quant(overrides={f"{name}/kernel": name for name in quant.FORMATS})
    link = reparam.chain(reparam.nm_sparse(1, 4), link) if is_masked else link
    shown, finished = assert_finishes_as_shown(link, params)
    for name in quant.FORMATS:
        node = finished[name]["kernel"]
        assert (node.values if is_masked else node).format == name
        kept = np.count_nonzero(np.asarray(shown[name]["kernel"]).reshape(4, 4, 6), axis=1)
        assert (kept <= 1).all() or not is_masked


@pytest.mark.parametrize("method", ["range", "lsq"])
@pytest.mark.parametrize("block", [None, (8, 3)])
def test_finish_after_a_mask(method, block):
    """One node with both: the positions of the mask, and codes with the scales of the masked dense weight."""
    link = reparam.chain(reparam.nm_sparse(2, 4), reparam.fake_quant("int4", method=method, block=block))
    _, finished = assert_finishes_as_shown(link, KERNEL)
    node = finished["kernel"]
    assert isinstance(node, formats.NMSparse)
    assert isinstance(node.values, formats.Quantized)
    assert node.values.shape == (8, 6)


def test_finish_after_a_mask_on_a_ragged_axis():
    params = {"kernel": jax.random.normal(jax.random.key(3), (10, 4))}
    assert_finishes_as_shown(reparam.chain(reparam.nm_sparse(1, 4), reparam.fake_quant("int8")), params)


@pytest.mark.parametrize("method", ["range", "lsq"])
def test_finish_refuses_scales_that_cut_groups(method):
    """A scale for every 2 rows changes inside a group of 4."""
    link = reparam.chain(reparam.nm_sparse(2, 4), reparam.fake_quant(method=method, block=(2, 1)))
    stored, state = link.init(KERNEL, None)
    with pytest.raises(ValueError, match=r"8 blocks.*m=4"):
        link.finish(stored, state)


def test_finish_refuses_other_nodes():
    link = reparam.fake_quant()
    twice = link.finish(KERNEL, ())
    with pytest.raises(ValueError, match="Quantized"):
        link.finish(twice, ())


def test_overrides():
    """The first layer in 8 bits, the convolution in full: the last matching pattern decides."""
    link = reparam.fake_quant("int4", overrides={"(first|conv)/.*": None, "first/kernel": "int8"})
    shown, finished = assert_finishes_as_shown(link)
    assert finished["first"]["kernel"].format == "int8"
    np.testing.assert_array_equal(shown["conv"]["kernel"], PARAMS["conv"]["kernel"])
    learned = reparam.fake_quant("int4", method="lsq", overrides={"conv/.*": None, "first/.*": "int8"})
    stored, _ = learned.init(PARAMS, None)
    assert set(stored["fake_quant"]) == {"first.kernel.scale"}
    np.testing.assert_array_equal(
        stored["fake_quant"]["first.kernel.scale"], reparam.lsq_init(PARAMS["first"]["kernel"], bits=8)
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"format": "int44"}, "int4"),
        ({"method": "lsqq"}, "'lsq'"),
        ({"bound": "maxx"}, "'max'"),
        ({"gradient": "identical"}, "'identity'"),
        ({"overrides": {".*": "imt8"}}, "int8"),
        ({"format": "nf4", "method": "lsq"}, "nf4"),
    ],
)
def test_refuses_at_construction(options, text):
    with pytest.raises(ValueError, match=text):
        reparam.fake_quant(**options)


@pytest.mark.parametrize("method", ["range", "lsq"])
def test_refuses_at_init(method):
    for options, text in (
        ({"where": ".*kernl"}, r"where='\.\*kernl'"),
        ({"overrides": {"frist/.*": "int8"}}, r"overrides='frist/\.\*'"),
        # The bias exists, but is not among the leaves that are quantized.
        ({"overrides": {"first/bias": "int8"}}, "overrides='first/bias'"),
        ({"block": (5, 1), "where": "first/kernel"}, r"first/kernel: .*5 .*axis 0"),
    ):
        with pytest.raises(ValueError, match=text):
            reparam.fake_quant(method=method, **options).init(PARAMS, None)


def test_refuses_scales_that_would_collide():
    params = {"a.b": {"kernel": jnp.ones((2, 2))}, "a": {"b": {"kernel": jnp.ones((2, 2))}}}
    with pytest.raises(ValueError, match="collide"):
        reparam.fake_quant(method="lsq").init(params, None)


def test_eight_bits_hardly_move_a_logit():
    """Two layers on digits: rounding to 8 bits changes no logit by more than 1% of the largest."""
    digits = pytest.importorskip("sklearn.datasets").load_digits().data[:32] / 16
    params = {
        f"layer_{i}": {"kernel": jax.nn.initializers.he_normal()(jax.random.key(i), shape)}
        for i, shape in enumerate([(64, 32), (32, 10)])
    }
    link = reparam.fake_quant("int8")

    def logits(p):
        return jax.nn.relu(digits @ p["layer_0"]["kernel"]) @ p["layer_1"]["kernel"]

    exact, rounded = jax.jit(lambda p: (logits(p), logits(link.apply(p, (), step=0, rng=None, train=True))))(params)
    assert 0 < jnp.max(jnp.abs(exact - rounded)) < 0.01 * jnp.max(jnp.abs(exact))
