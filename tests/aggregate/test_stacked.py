"""Gram matrices, weighted sums and the builders, against NumPy in float64."""

import functools
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.experimental import aggregating

from steelyard import aggregate

P = jax.sharding.PartitionSpec
# Contractions here are over fewer than 200 entries of size about 1: float32 rounding stays below 200 * 2^-24 = 1.2e-5.
TOLERANCE = 1.2e-5


def random_tree(rows, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    shapes = {"kernel": (rows, 4, 3), "bias": (rows, 3), "scale": (rows,), "one": (rows, 1)}
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()} | {"frozen": None}


def flat(stacked):
    """Rows as float64 vectors."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(stacked)]
    return np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def first_two(gram, losses, state):
    """A rule that looks at everything it is given."""
    base = jnp.arange(1.0, gram.shape[0] + 1)
    return base + jnp.diagonal(gram) + (0 if losses is None else losses), state + 1


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_gram_is_all_inner_products(rows):
    stacked = random_tree(rows)
    x = flat(stacked)
    np.testing.assert_allclose(aggregate.gram(stacked), x @ x.T, atol=TOLERANCE)
    np.testing.assert_allclose(jax.jit(aggregate.gram)(stacked), x @ x.T, atol=TOLERANCE)


def test_gram_skips_none_and_masked_leaves_and_takes_a_bare_array():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    expected = x @ x.T
    np.testing.assert_array_equal(aggregate.gram(x), expected)
    np.testing.assert_array_equal(aggregate.gram((x, None, optax.MaskedNode())), expected)
    np.testing.assert_array_equal(aggregate.gram(x[:, 0]), np.outer(x[:, 0], x[:, 0]))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_gram_is_float32_whatever_the_leaves(dtype):
    stacked = jax.tree.map(lambda x: jnp.asarray(x, dtype), random_tree(3))
    x = flat(stacked)
    gram = aggregate.gram(stacked)
    assert gram.dtype == jnp.float32
    # The entries are rounded before the reference sees them, and products of half-precision numbers are exact.
    np.testing.assert_allclose(gram, x @ x.T, atol=TOLERANCE)


def test_gram_of_float64_leaves():
    with jax.enable_x64(True):
        stacked = jax.tree.map(jnp.asarray, random_tree(3, dtype=np.float64))
        x = flat(stacked)
        gram = aggregate.gram(stacked)
        combined = aggregate.combine(jnp.asarray([1.0, 2.0, 3.0], jnp.float32), stacked)
        assert gram.dtype == jnp.float32
        assert combined["kernel"].dtype == jnp.float64
        # One rounding to float32, of numbers below 64.
        np.testing.assert_allclose(gram, x @ x.T, atol=64 * 2.0**-24)
        np.testing.assert_allclose(flat(jax.tree.map(lambda y: y[None], combined))[0], [1, 2, 3] @ x, rtol=1e-13)


def test_centred_gram_keeps_the_digits_that_a_plain_one_loses():
    rng = np.random.default_rng(1)
    noise = rng.integers(-8, 9, (3, 50)).astype(np.float32) / 8
    x = 1000 + noise  # multiples of 1/8 below 2^11: exact in float32
    centred = x.astype(np.float64) - x.astype(np.float64).mean(0)
    expected = centred @ centred.T
    np.testing.assert_allclose(aggregate.gram(x, center=True), expected, atol=50 * 1e-4)
    plain = np.asarray(aggregate.gram(x), np.float64)
    middle = np.eye(3) - 1 / 3
    # The plain matrix has entries of 5e7, so its rounding alone is above 1.
    assert np.abs(middle @ plain @ middle - expected).max() > np.abs(aggregate.gram(x, center=True) - expected).max()


@hypothesis.given(rows=st.integers(1, 5), seed=st.integers(0, 1000), shift=st.floats(-3, 3))
@hypothesis.settings(max_examples=20, deadline=None)
def test_gram_is_symmetric_and_positive_and_its_centred_form_ignores_a_shift(rows, seed, shift):
    x = np.random.default_rng(seed).standard_normal((rows, 7)).astype(np.float32)
    gram = np.asarray(aggregate.gram({"x": x}), np.float64)
    np.testing.assert_allclose(gram, gram.T, atol=TOLERANCE)
    assert np.linalg.eigvalsh((gram + gram.T) / 2).min() > -5 * TOLERANCE
    moved = aggregate.gram({"x": x + np.float32(shift)}, center=True)
    # Entries of up to 7 are rounded before centring: 7 * 2^-24 each, times 7 products with entries up to 4, twice.
    np.testing.assert_allclose(moved, aggregate.gram({"x": x}, center=True), atol=7 * 2 * 4 * 7 * 2.0**-24)
    np.testing.assert_allclose(np.asarray(moved).sum(0), 0, atol=1e-4)


SPECS = {
    "kernel": P(None, ("data", "model"), None),
    "bias": P(None, "data"),
    "scale": P(),
    "wide": P(None, None, "model"),
    "frozen": None,
}


def sharded_tree(mesh):
    rng = np.random.default_rng(2)
    shapes = {"kernel": (3, 8, 2), "bias": (3, 4), "scale": (3, 5), "wide": (3, 1, 6)}
    host = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    place = {name: jax.device_put(x, jax.sharding.NamedSharding(mesh, SPECS[name])) for name, x in host.items()}
    return place | {"frozen": None}, flat(host)


@pytest.mark.parametrize("axis_type", ["Auto", "Explicit"])
@pytest.mark.parametrize("center", [False, True])
def test_gram_on_a_mesh_sums_with_one_all_reduce(axis_type, center):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(getattr(jax.sharding.AxisType, axis_type),) * 2)
    stacked, x = sharded_tree(mesh)
    x = x - x.mean(0) if center else x
    fn = jax.jit(lambda tree: aggregate.gram(tree, center=center, mesh=mesh, specs=SPECS))
    np.testing.assert_allclose(fn(stacked), x @ x.T, atol=TOLERANCE)
    text = fn.lower(stacked).compile().as_text()
    assert len(re.findall(r" all-reduce(?:-start)?\(", text)) == 1
    assert not re.findall(r" (?:all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text)


def test_gram_of_replicated_leaves_on_a_mesh_counts_them_once():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_array_equal(aggregate.gram(x, mesh=mesh, specs=P()), x @ x.T)
    pair = (x, x)
    np.testing.assert_array_equal(aggregate.gram(pair, mesh=mesh, specs=(P(), P(None, "data"))), 2 * x @ x.T)


def test_gram_on_a_mesh_refuses_specs_that_do_not_fit():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x = np.ones((4, 2), np.float32)
    with pytest.raises(ValueError, match="leading axis K"):
        aggregate.gram(x, mesh=mesh, specs=P("data"))
    with pytest.raises(ValueError, match="1 specs for 2 leaves"):
        aggregate.gram((x, x), mesh=mesh, specs=(P(),))
    with pytest.raises(ValueError, match="together"):
        aggregate.gram(x, mesh=mesh)


def test_combine_is_the_weighted_sum():
    stacked = random_tree(3)
    weights = np.array([0.5, -2.0, 3.0], np.float32)
    out = aggregate.combine(weights, stacked)
    assert out["frozen"] is None
    assert out["scale"].shape == ()
    for name in ("kernel", "bias", "scale", "one"):
        expected = np.tensordot(weights.astype(np.float64), stacked[name].astype(np.float64), axes=1)
        np.testing.assert_allclose(out[name], expected, atol=TOLERANCE)
    np.testing.assert_allclose(aggregate.combine(weights, stacked["scale"]), weights @ stacked["scale"], atol=TOLERANCE)


def test_combine_accumulates_half_precision_in_float32():
    # In bfloat16, 256 + 1 is 256: only a wider sum counts the ones.
    x = jnp.ones((257, 2), jnp.bfloat16).at[0].set(256)
    out = aggregate.combine(jnp.ones(257), x)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out.astype(np.float32), [512, 512])


def test_combine_lets_a_bad_row_be_seen():
    x = jnp.array([[1.0, 2.0], [jnp.nan, jnp.inf]])
    assert not np.isfinite(aggregate.combine(jnp.array([1.0, 1.0]), x)).any()


def test_unequal_leading_axes_are_named_with_both_shapes():
    bad = {"a": np.ones((2, 3)), "b": np.ones((4, 5))}
    for fn in (aggregate.gram, aggregate.count_rows, functools.partial(aggregate.combine, np.ones(2))):
        with pytest.raises(ValueError, match=r"'a' has shape \(2, 3\), 'b' has shape \(4, 5\)"):
            fn(bad)
    with pytest.raises(ValueError, match=r"shape \(\)"):
        aggregate.gram({"a": np.ones((2, 3)), "b": np.float32(1)})
    with pytest.raises(ValueError, match=r"shape \(3,\) but there are 2 gradients"):
        aggregate.combine(np.ones(3), np.ones((2, 5)))
    with pytest.raises(ValueError, match="no array leaves"):
        aggregate.gram({"a": None})


def test_a_rule_on_the_gram_matrix_becomes_an_aggregator():
    rule = aggregate.from_gram(first_two, lambda: jnp.zeros((), jnp.int32))
    assert isinstance(rule, aggregating.Aggregator)
    assert rule.weights is None
    stacked = random_tree(3)
    x, losses = flat(stacked), np.array([1.0, 0.0, -1.0], np.float32)
    state = rule.init({"anything": None})
    out, state = rule.update(stacked, state, losses=losses, unknown_extra=1)
    weights = np.arange(1, 4) + np.diag(x @ x.T) + losses
    np.testing.assert_allclose(flat(jax.tree.map(lambda y: y[None], out))[0], weights @ x, rtol=1e-5, atol=1e-4)
    assert state == 1
    from_matrix, _ = rule.gram_weights(aggregate.gram(stacked), losses, state)
    np.testing.assert_allclose(from_matrix, weights, rtol=1e-5)
    assert rule.update(stacked, state)[1] == 2  # losses are optional


def test_a_centred_rule_sees_centred_rows_and_cannot_run_on_a_plain_gram_matrix():
    seen = []

    def rule(gram, losses, state):
        seen.append(gram)
        return jnp.ones(gram.shape[0]), state

    aggregator = aggregate.from_gram(rule, center=True)
    assert aggregator.gram_weights is None
    x = np.float32([[1, 2], [3, 6]])
    aggregator.update(x, aggregator.init(None))
    # Rows minus their mean are -(1, 2) and (1, 2).
    np.testing.assert_array_equal(seen[0], [[5, -5], [-5, 5]])


def halves(losses, state):
    return losses / 2, state


def test_a_rule_on_losses_becomes_an_aggregator_and_asks_for_them_by_name():
    rule = aggregate.from_losses(halves)
    assert rule.gram_weights is None
    state = rule.init(None)
    assert jax.tree.leaves(state) == []
    x = np.float32([[1, 2], [3, 4]])
    out, _ = rule.update(x, state, losses=np.float32([2, 4]))
    np.testing.assert_array_equal(out, 1 * x[0] + 2 * x[1])
    with pytest.raises(ValueError, match="halves needs the losses"):
        rule.update(x, state)


def test_nothing_differentiates_through_the_weights():
    rule = aggregate.from_losses(lambda losses, state: (losses, state))
    x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
    by_losses = jax.grad(lambda losses: rule.update(x, rule.init(None), losses=losses)[0].sum())(jnp.ones(2))
    np.testing.assert_array_equal(by_losses, [0, 0])
    squares = aggregate.from_gram(lambda gram, losses, state: (jnp.diagonal(gram), state))
    by_rows = jax.grad(lambda x: squares.update(x, squares.init(None))[0].sum())(x)
    # Only the explicit factor g_k of w_k g_k is differentiated: each entry of row k gets w_k = |g_k|^2.
    np.testing.assert_array_equal(by_rows, [[5, 5], [25, 25]])


def test_an_aggregator_without_attributes_has_none():
    plain = aggregate.Aggregator(optax.init_empty_state, lambda updates, state, params=None: (updates, state))
    assert plain.weights is None
    assert plain.gram_weights is None
    assert plain._replace(init=optax.init_empty_state).gram_weights is None
    assert isinstance(plain, optax.GradientTransformationExtraArgs)


def test_gram_under_vmap():
    x = np.random.default_rng(3).standard_normal((4, 3, 5)).astype(np.float32)
    np.testing.assert_allclose(jax.vmap(aggregate.gram)(x), x @ x.swapaxes(1, 2), atol=TOLERANCE)
