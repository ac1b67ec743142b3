"""The straight-through family and fixed masks."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from steelyard import formats, reparam

quick = hypothesis.settings(max_examples=20, deadline=None)
FLOATS = st.floats(-8, 8, width=16, allow_subnormal=False)


@st.composite
def weights(draw):
    """A weight, its mask and the gradient of what is seen, all of one shape."""
    shape = draw(st.sampled_from([(), (4, 3)]))
    w, g = (draw(hnp.arrays(np.float32, shape, elements=FLOATS)) for _ in range(2))
    dtype = draw(st.sampled_from(["float32", "bfloat16"]))
    return jnp.asarray(w, dtype), jnp.asarray(draw(hnp.arrays(bool, shape))), jnp.asarray(g, dtype)


def value_and_vjp(fn, w, g):
    value, pullback = jax.vjp(fn, w)
    return value, pullback(g)[0]


def rounded(expected, like):
    """A float64 result rounded once to the dtype of an array."""
    return np.asarray(jnp.asarray(np.asarray(expected), jnp.float32).astype(like.dtype), np.float64)


def as_float64(*arrays):
    return (np.asarray(x, np.float64) for x in arrays)


@quick
@hypothesis.given(weights())
def test_straight_through(case):
    w, mask, g = case
    value, gradient = value_and_vjp(lambda w: reparam.straight_through(w, mask), w, g)
    np.testing.assert_array_equal(value, np.where(mask, w, 0))
    assert not np.signbit(np.asarray(value, np.float32)[~np.asarray(mask)]).any()
    np.testing.assert_array_equal(gradient, g)
    assert value.dtype == gradient.dtype == w.dtype


@quick
@hypothesis.given(weights(), st.sampled_from([0.0, 2.0**-5, 2.0**-12]))
def test_sr_ste(case, decay):
    w, mask, g = case
    value, gradient = value_and_vjp(lambda w: reparam.sr_ste(w, mask, decay), w, g)
    np.testing.assert_array_equal(value, np.where(mask, w, 0))
    w64, g64 = as_float64(w, g)
    # float32 first: the sum of two float16 numbers, one scaled by a power of two, may need more than 24 bits.
    expected = rounded(g64 + decay * (1 - np.asarray(mask, float)) * w64, w)
    np.testing.assert_array_equal(np.asarray(gradient, np.float64), expected)


@quick
@hypothesis.given(weights(), st.sampled_from([0.0, 0.25, 0.3, 1.0]), st.sampled_from(["straight_through", "chain"]))
def test_soft_masked_rounds_once(case, flow, backward):
    w, mask, g = case
    fn = jax.jit(lambda w, flow: reparam.soft_masked(w, mask, flow, backward=backward))
    value, gradient = value_and_vjp(lambda w: fn(w, flow), w, g)
    w64, g64 = as_float64(w, g)
    c = np.where(mask, 1, np.float64(np.float32(flow)))
    np.testing.assert_array_equal(np.asarray(value, np.float64), rounded(w64 * c, w))
    np.testing.assert_array_equal(np.asarray(gradient, np.float64), rounded(g64 * c, w) if backward == "chain" else g64)


def test_half_flow_shows_half():
    w, mask = jnp.array([4.0, 6.0]), jnp.array([True, False])
    assert reparam.soft_masked(w, mask, 0.5).tolist() == [4.0, 3.0]


def test_flow_and_decay_get_no_gradient():
    w, mask = jnp.ones(3), jnp.array([True, False, True])
    assert jax.grad(lambda flow: reparam.soft_masked(w, mask, flow).sum())(0.5) == 0
    assert jax.grad(lambda decay: reparam.sr_ste(w, mask, decay).sum())(0.5) == 0


def test_family_under_vmap_and_scan():
    w = jax.random.normal(jax.random.key(0), (4, 3))
    mask = w > 0
    for fn in (reparam.straight_through, reparam.sr_ste, lambda w, m: reparam.soft_masked(w, m, 0.5, backward="chain")):
        each = jax.grad(lambda w, fn=fn: jnp.sum(fn(w, mask) ** 2))(w)
        mapped = jax.grad(lambda w, fn=fn: jnp.sum(jax.vmap(fn)(w, mask) ** 2))(w)
        np.testing.assert_array_equal(mapped, each)

        def scanned(w, fn=fn):
            return jnp.sum(jax.lax.scan(lambda c, x: (c, fn(*x) ** 2), None, (w, mask))[1])

        np.testing.assert_array_equal(jax.jit(jax.grad(scanned))(w), each)


def test_family_refuses():
    w = jnp.ones((2, 3))
    for fn in (reparam.straight_through, reparam.sr_ste, lambda w, m: reparam.soft_masked(w, m, 0.5)):
        with pytest.raises(ValueError, match=r"\(2, 3\).*\(3,\)"):
            fn(w, jnp.ones(3, bool))
    with pytest.raises(ValueError, match="'chain'"):
        reparam.soft_masked(w, jnp.ones((2, 3), bool), 0.5, backward="chains")


PARAMS = {"kernel": jnp.array([[1.0, -2.0], [3.0, -4.0]]), "bias": jnp.array([5.0]), "none": None}
MASKS = {"kernel": jnp.array([[True, False], [False, True]]), "bias": None, "none": None}


def one_step(link):
    """Seen parameters, gradient of their sum, and stored parameters after a step of `stored - 1` everywhere."""
    stored, state = link.init(PARAMS, jax.random.key(0))

    def total(stored):
        return sum(jnp.sum(x) for x in jax.tree.leaves(link.apply(stored, state, step=0, rng=None, train=True)))

    seen = link.apply(stored, state, step=0, rng=None, train=True)
    moved = link.project(jax.tree.map(lambda x: x - 1, stored), state)
    return seen, jax.grad(total)(stored), moved


def test_masked_straight_through_lets_removed_entries_move():
    seen, gradient, moved = one_step(reparam.masked(MASKS))
    assert seen["kernel"].tolist() == [[1, 0], [0, -4]]
    assert gradient["kernel"].tolist() == [[1, 1], [1, 1]]
    assert moved["kernel"].tolist() == [[0, -3], [2, -5]]
    assert (seen["bias"].tolist(), moved["bias"].tolist(), seen["none"]) == ([5], [4], None)


def test_masked_chain_is_a_veto():
    link = reparam.masked(MASKS, backward="chain")
    seen, gradient, moved = one_step(link)
    assert link.init(PARAMS, None)[0]["kernel"].tolist() == [[1, 0], [0, -4]]
    assert seen["kernel"].tolist() == [[1, 0], [0, -4]]
    assert gradient["kernel"].tolist() == [[1, 0], [0, 1]]
    assert moved["kernel"].tolist() == [[0, 0], [0, -5]]


@pytest.mark.parametrize("backward", ["straight_through", "chain"])
def test_masked_shows_what_it_finishes(backward):
    link = reparam.masked(lambda params: MASKS, backward=backward)
    stored, state = link.init(PARAMS, None)
    finished = link.finish(stored, state)
    jax.tree.map(np.testing.assert_array_equal, finished, link.apply(stored, state, step=9, rng=None, train=False))
    assert finished["kernel"].tolist() == [[1, 0], [0, -4]]
    jax.tree.map(np.testing.assert_array_equal, link.masks(stored, state, step=0), MASKS)


def test_masked_refuses():
    with pytest.raises(ValueError, match="backward='veto'"):
        reparam.masked(MASKS, backward="veto")
    with pytest.raises(ValueError, match="none"):
        reparam.masked({"kernel": None, "bias": None}).init(PARAMS, None)
    with pytest.raises(ValueError, match=r"kernel .*\(2,\).*\(2, 2\)"):
        reparam.masked(MASKS | {"kernel": jnp.ones(2, bool)}).init(PARAMS, None)
    link = reparam.masked(MASKS)
    stored, state = link.init(PARAMS, None)
    packed = stored | {"kernel": formats.Quantized.from_dense(stored["kernel"], "int8")}
    with pytest.raises(ValueError, match="Quantized"):
        link.finish(packed, state)


def test_masked_under_jit():
    link = reparam.masked(MASKS, backward="chain")
    stored, state = jax.jit(link.init)(PARAMS, None)
    seen = jax.jit(lambda *a, step: link.apply(*a, step=step, rng=None, train=True))(stored, state, step=3)
    assert seen["kernel"].tolist() == [[1, 0], [0, -4]]
