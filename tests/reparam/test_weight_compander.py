"""The compander: its curve in float64 and by hand, learned curves, and chains."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from steelyard import formats, reparam
from steelyard import tree as tree_lib

KERNEL = 0.3 * jax.random.normal(jax.random.key(0), (8, 6))
PARAMS = {
    "dense": {"kernel": KERNEL, "bias": jnp.ones(6)},
    "conv": {"kernel": (0.3 * jax.random.normal(jax.random.key(1), (2, 2, 4, 3))).astype(jnp.bfloat16)},
    "steps": jnp.ones((2, 2), jnp.int32),
    "nothing": None,
}
EPS = 2.0**-23

compand, expand = jax.jit(reparam.compand), jax.jit(reparam.expand)
values = hnp.arrays(np.float32, 6, elements=st.integers(-256, 256).map(lambda i: i / 64))
positive = st.sampled_from([0.25, 0.7, 1.0, 3.0])


def see(link, stored, state, *, is_training=True):
    return link.apply(stored, state, step=0, rng=None, train=is_training)


def bits_of(x):
    return np.asarray(x).view(f"u{x.dtype.itemsize}")


@settings(max_examples=40, deadline=None)
@given(values, positive, positive)
def test_the_curve_its_bound_and_its_slope(v, a, b):
    w, slope = jax.vjp(lambda v: compand(v, a=a, b=b), v)
    expected = [a * math.atan(float(x) / b) for x in v]
    # A quotient, an arctangent and a product: a few roundings.
    np.testing.assert_allclose(w, expected, rtol=4 * EPS)
    assert np.all(np.abs(w) < a * math.pi / 2)
    np.testing.assert_allclose(slope(jnp.ones(6))[0], [a * b / (b * b + float(x) ** 2) for x in v], rtol=8 * EPS)


@settings(max_examples=40, deadline=None)
@given(values, positive, positive)
def test_odd_and_monotone(v, a, b):
    v = np.sort(v)
    w = np.asarray(compand(v, a=a, b=b))
    np.testing.assert_array_equal(compand(-v, a=a, b=b), -w)
    # Monotone as far as the arctangent is rounded.
    assert np.all(np.diff(w) >= -2 * EPS * np.abs(w[1:]))


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.float32, 6, elements=st.integers(-56, 56).map(lambda i: i / 64)), positive, positive)
def test_compand_undoes_expand(share, a, b):
    """For weights up to 7/8 of the bound; there tan has a condition of 7/8 pi / sin(7/8 pi) = 7.2."""
    w = np.float32(share * a * math.pi / 2)
    v = expand(w, a=a, b=b)
    np.testing.assert_allclose(v, [b * math.tan(float(x) / a) for x in w], rtol=60 * EPS)
    np.testing.assert_allclose(compand(v, a=a, b=b), w, rtol=16 * EPS)


def test_worked_case():
    """arctan 1 = pi / 4, with the slope 1 / (1 + 1)."""
    w, slope = jax.value_and_grad(reparam.compand)(1.0)
    np.testing.assert_allclose([w, slope], [math.pi / 4, 0.5], rtol=EPS)


def test_zero_stays_zero_and_moves_with_slope_a_over_b():
    w, slope = jax.value_and_grad(functools.partial(reparam.compand, a=3.0, b=0.5))(0.0)
    assert (w, slope) == (0, 6)
    assert reparam.expand(0.0) == 0


@pytest.mark.parametrize("b", [4.0, 100.0, 1e4])
def test_a_wide_curve_of_slope_one_is_the_identity(b):
    """|arctan x - x| <= |x|^3 / 3, so |w - v| <= |v|^3 / (3 b^2); and a few roundings of v."""
    v = jnp.linspace(-2, 2, 41)
    error = np.abs(np.asarray(compand(v, a=b, b=b), float) - np.asarray(v, float))
    assert np.all(error <= np.abs(v) ** 3 / (3 * b**2) + 4 * EPS * np.abs(v))


def test_weights_beyond_the_bound_are_clipped_before_they_are_expanded():
    bound = 0.5 * math.pi / 2
    w = jnp.array([bound, -bound, 7.0, -jnp.inf])
    v = expand(w, a=0.5, b=2.0)
    assert np.all(np.isfinite(v))
    # (1 - 1e-6) of the bound, rounded to float32 (6e-8); the tangent there follows the arctangent back.
    np.testing.assert_allclose(compand(v, a=0.5, b=2.0), (1 - 1e-6) * bound * np.array([1, -1, 1, -1]), rtol=2e-7)


def test_half_precision_is_computed_in_float32():
    v = jnp.linspace(-3, 3, 25).astype(jnp.bfloat16)
    for fn, exact in ((compand, np.arctan), (expand, lambda w: np.tan(np.clip(w, -1.57, 1.57)))):
        x = v if fn is compand else v / 4
        assert fn(x).dtype == jnp.bfloat16
        expected = jnp.asarray(exact(np.asarray(x, np.float64)), jnp.bfloat16)
        # One rounding: at worst the neighbour, where the exact value lies between the two.
        np.testing.assert_allclose(np.asarray(fn(x), float), np.asarray(expected, float), rtol=2.0**-8)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(a=0.0), r"a=0\.0 must lie in \(0, inf\)"),
        (dict(a=-1.0), r"a=-1\.0"),
        (dict(b=0.0), r"b=0\.0 must lie in \(0, inf\)"),
        (dict(b=float("nan")), "b=nan"),
    ],
)
@pytest.mark.parametrize(
    "fn", [functools.partial(reparam.compand, 1.0), functools.partial(reparam.expand, 1.0), reparam.weight_compander]
)
def test_refuses(fn, options, text):
    with pytest.raises(ValueError, match=text):
        fn(**options)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("preserve_init", [False, True])
def test_what_is_stored_and_what_is_seen(learn, preserve_init):
    link = reparam.weight_compander(a=0.8, b=0.4, learn=learn, preserve_init=preserve_init)
    stored, state = jax.jit(link.init)(PARAMS, jax.random.key(0))
    base = stored["base"] if learn else stored
    seen = jax.jit(lambda s: see(link, s, state))(stored)
    assert state == ()
    assert jax.tree.structure(seen) == jax.tree.structure(PARAMS)
    assert [x.dtype for x in jax.tree.leaves(seen)] == [x.dtype for x in jax.tree.leaves(PARAMS)]
    for kernels in (PARAMS["dense"], base["dense"], seen["dense"]):
        np.testing.assert_array_equal(kernels["bias"], 1)
    inside, outside = (seen, base) if preserve_init else (base, seen)
    np.testing.assert_array_equal(base["steps"], PARAMS["steps"])
    # exp(log a) and exp(log b) are off by a rounding or two.
    np.testing.assert_allclose(inside["dense"]["kernel"], KERNEL, rtol=32 * EPS)
    exact = 0.4 * np.tan(np.asarray(KERNEL, float) / 0.8) if preserve_init else 0.8 * np.arctan(KERNEL / 0.4)
    np.testing.assert_allclose(outside["dense"]["kernel"], exact, rtol=32 * EPS)


def test_learned_curves_stand_beside_the_weights_and_train():
    link = reparam.weight_compander(a=2.0, b=0.5, learn=True)
    stored, state = link.init(PARAMS, None)
    assert tree_lib.paths(stored) == [
        "base/conv/kernel", "base/dense/bias", "base/dense/kernel", "base/steps",
        "weight_compander/conv/kernel/log_a", "weight_compander/conv/kernel/log_b",
        "weight_compander/dense/kernel/log_a", "weight_compander/dense/kernel/log_b",
    ]  # fmt: skip
    assert all(x.dtype == jnp.float32 and x.shape == () for x in jax.tree.leaves(stored["weight_compander"]))
    dense = {"dense": stored["base"]["dense"]}
    curve = stored["weight_compander"]["dense"]["kernel"]

    def total(curve):
        both = {"base": dense, "weight_compander": {"dense": {"kernel": curve, "bias": None}}}
        return jnp.sum(see(link, both, state)["dense"]["kernel"])

    gradient = jax.grad(total)(curve)
    v = np.asarray(dense["dense"]["kernel"], float)
    # w = a arctan(v / b): dw / dlog a = w and dw / dlog b = -a (v / b) / (1 + (v / b)^2).
    expected = (2 * np.arctan(v / 0.5)).sum(), (-2 * (v / 0.5) / (1 + (v / 0.5) ** 2)).sum()
    # Sums of 48 terms that cancel: 1e-5 of their size, 0.5.
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * 48 * 0.5)


def test_only_some_leaves_learn():
    link = reparam.only(reparam.weight_compander(learn=True), r"dense/kernel")
    stored, state = link.init(PARAMS, None)
    assert tree_lib.paths(stored.selected["weight_compander"]) == ["dense/kernel/log_a", "dense/kernel/log_b"]
    np.testing.assert_allclose(see(link, stored, state)["dense"]["kernel"], KERNEL, rtol=32 * EPS)


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize(
    "tree", [{}, {"a": None}, jnp.float32(3), jnp.ones(4), 0.5 * jnp.ones((3, 1)), jnp.zeros((1, 3))]
)
def test_awkward_trees(tree, learn):
    link = reparam.weight_compander(learn=learn)
    stored, state = link.init(tree, None)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=16 * EPS), see(link, stored, state), tree)
    assert jax.tree.structure(link.finish(stored, state)) == jax.tree.structure(tree)


def masks_of(tree):
    return jax.tree.map(lambda x: jnp.arange(x.size).reshape(x.shape) % 3 > 0 if x.ndim > 1 else None, tree)


CHAINS = {
    "alone": lambda learn: reparam.weight_compander(a=0.7, b=0.3, learn=learn),
    "mask, curve": lambda learn: reparam.chain(reparam.masked(masks_of), CHAINS["alone"](learn)),
    "curve, mask": lambda learn: reparam.chain(CHAINS["alone"](learn), reparam.masked(masks_of)),
    "nm, curve": lambda learn: reparam.chain(reparam.nm_sparse(2, 4), CHAINS["alone"](learn)),
    "curve, int8": lambda learn: reparam.chain(CHAINS["alone"](learn), reparam.fake_quant("int8")),
    "nm, curve, int8": lambda learn: reparam.chain(
        reparam.nm_sparse(2, 4), CHAINS["alone"](learn), reparam.fake_quant("int8")
    ),
    "curve, nm, cast": lambda learn: reparam.chain(
        CHAINS["alone"](learn), reparam.nm_sparse(2, 4), reparam.cast(jnp.bfloat16)
    ),
    "curve, norm": lambda learn: reparam.chain(
        reparam.only(CHAINS["alone"](learn), r".*/direction"), reparam.weight_norm()
    ),
    "norm, curve": lambda learn: reparam.chain(reparam.weight_norm(), CHAINS["alone"](learn)),
}


@pytest.mark.parametrize("learn", [False, True])
@pytest.mark.parametrize("name", CHAINS)
def test_chains_finish_as_shown(name, learn):
    link = CHAINS[name](learn)
    stored, state = link.init({"dense": PARAMS["dense"]}, jax.random.key(0))
    stored = jax.tree.map(lambda x: 0.3 - 1.2 * x, stored)
    finished = link.finish(stored, state)["dense"]["kernel"]
    shown = see(link, stored, state, is_training=False)["dense"]["kernel"]
    np.testing.assert_array_equal(
        *(np.asarray(x).view(f"u{x.dtype.itemsize}") for x in (formats.dense(finished), shown))
    )
    assert isinstance(finished, formats.NMSparse) == ("nm" in name)
    assert isinstance(getattr(finished, "values", finished), formats.Quantized) == ("int8" in name)


@pytest.mark.parametrize("method", ["range", "lsq"])
def test_finish_refuses_a_grid(method):
    link = reparam.chain(reparam.fake_quant(method=method), reparam.weight_compander())
    stored, state = link.init({"kernel": KERNEL}, None)
    with pytest.raises(ValueError, match=r"kernel is stored as Quantized.*Put weight_compander before"):
        link.finish(stored, state)


def test_a_learned_curve_before_a_constraint_is_refused():
    link = reparam.chain(reparam.weight_compander(learn=True), reparam.masked(masks_of, backward="chain"))
    with pytest.raises(ValueError, match="Put link 1 first"):
        link.init({"kernel": KERNEL}, None)


def test_in_float64():
    with jax.enable_x64(True):
        w = np.random.default_rng(0).uniform(-1, 1, (8, 6))
        link = reparam.weight_compander(learn=True)
        stored, state = link.init(w, None)
        assert stored["weight_compander"].log_a.dtype == jnp.float64
        np.testing.assert_allclose(see(link, stored, state), w, rtol=1e-14)
