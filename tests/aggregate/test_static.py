"""Weights that never change."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.experimental import aggregating

from steelyard import aggregate


def rows(count=3, dtype=np.float32):
    rng = np.random.default_rng(0)
    return {"w": jnp.asarray(rng.standard_normal((count, 4, 2)), dtype), "n": None, "b": jnp.ones((count,), dtype)}


def assert_trees_close(left, right, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), **tolerance), left, right)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_mean_equals_the_average_of_optax(count):
    reference = aggregating.average_per_element_updates()
    expected, _ = reference.update(rows(count), reference.init(None))
    rule = aggregate.mean()
    out, _ = rule.update(rows(count), rule.init(None), losses=jnp.ones(count))
    assert_trees_close(out, expected, atol=count * 2.0**-23)  # a rounding for each product and each sum


def test_mean_of_one_gradient_is_that_gradient():
    rule = aggregate.mean()
    out, _ = rule.update(rows(1), rule.init(None))
    assert_trees_close(out, jax.tree.map(lambda x: x[0], rows(1)), atol=0)


def test_ones_are_count_times_the_mean():
    total, _ = aggregate.static(np.ones(3)).update(rows(), optax.EmptyState())
    mean, _ = aggregate.mean().update(rows(), optax.EmptyState())
    assert_trees_close(total, jax.tree.map(lambda x: 3 * x, mean), rtol=3 * 2.0**-23, atol=1e-6)


def test_static_is_not_normalised_and_may_be_negative():
    out, _ = aggregate.static([2.0, -1.0]).update(jnp.array([[1.0, 10.0], [3.0, 20.0]]), optax.EmptyState())
    np.testing.assert_array_equal(out, [2 * 1 - 3, 2 * 10 - 20])


def test_static_of_the_wrong_length_names_both_lengths():
    rule = aggregate.static([1.0, 2.0])
    with pytest.raises(ValueError, match="2 weights, but there are 3 gradients"):
        rule.update(rows(3), rule.init(None))
    with pytest.raises(ValueError, match="2 weights, but there are 3 gradients"):
        jax.jit(rule.weights)(jnp.ones(3), rule.init(None))


@pytest.mark.parametrize("bad", [1.0, [[1.0, 2.0]]])
def test_static_wants_a_vector(bad):
    with pytest.raises(ValueError, match="vector"):
        aggregate.static(bad)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_static_needs_finite_weights_and_takes_negative_ones(bad):
    with pytest.raises(ValueError, match="weights must be finite"):
        aggregate.static([1.0, bad])
    update, _ = aggregate.static([1.0, -2.0]).update(jnp.array([[3.0], [5.0]]), optax.EmptyState())
    np.testing.assert_array_equal(update, [-7.0])


def test_what_each_rule_can_do():
    state = optax.EmptyState()
    np.testing.assert_allclose(aggregate.mean().weights(jnp.ones(4), state)[0], 0.25)
    np.testing.assert_allclose(aggregate.mean().gram_weights(jnp.eye(4), None, state)[0], 0.25)
    assert aggregate.static([1.0]).gram_weights is None


def test_the_gradient_in_weights_mode_is_that_of_the_weighted_loss():
    weights, x = jnp.array([0.3, -2.0, 5.0]), jnp.array([0.5, -1.0])
    matrix = jnp.array([[1.0, 2.0], [0.0, 1.0], [3.0, -1.0]])

    def losses_fn(p):
        return jnp.tanh(matrix @ p) ** 2

    rule = aggregate.static(weights)
    _, update, _ = aggregate.value_and_grad(losses_fn, rule, mode="weights")(x, rule.init(x))
    np.testing.assert_allclose(update, jax.grad(lambda p: weights @ losses_fn(p))(x), rtol=1e-6)


@pytest.mark.parametrize("rule", [aggregate.mean(), aggregate.static([1.0, 0.0, 0.5])])
def test_dtype_none_leaves_jit_and_zero_gradients(rule):
    for dtype in (jnp.bfloat16, jnp.float32):
        plain, _ = rule.update(rows(3, dtype), optax.EmptyState())
        compiled, _ = jax.jit(rule.update)(rows(3, dtype), optax.EmptyState())
        assert plain["n"] is None
        assert plain["w"].dtype == compiled["w"].dtype == dtype
        assert_trees_close(plain, compiled, rtol=float(jnp.finfo(dtype).eps))
    zero, _ = rule.update(jax.tree.map(jnp.zeros_like, rows()), optax.EmptyState())
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(zero))


def test_weights_may_be_traced():
    x = jnp.array([[1.0], [3.0]])
    out = jax.vmap(lambda w: aggregate.static(w).update(x, optax.EmptyState())[0])(jnp.eye(2))
    np.testing.assert_array_equal(out, x)
