"""The normalized logistic gradient against sums written out in float64, and its perceptron limit."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

from steelyard import optim

TX = optim.normalize_by_error()
# Sums of a few float32 terms of size 1, over several steps.
CLOSE = dict(rtol=1e-5, atol=1e-6)


def error_probabilities(w, examples):
    return jax.nn.sigmoid(-examples @ w)


def mean_loss(w, examples):
    """The examples are y_i a_i."""
    return jnp.mean(jax.nn.softplus(-examples @ w))


@jax.jit
def step(w, examples, gamma):
    tx = optax.chain(optim.normalize_by_error(), optax.sgd(gamma))
    error = jnp.mean(error_probabilities(w, examples))
    updates, _ = tx.update(jax.grad(mean_loss)(w, examples), tx.init(w), w, error=error)
    return w + updates


@jax.jit
def plain_step(w, examples, gamma):
    return w - gamma * jax.grad(mean_loss)(w, examples)


def reference_step(w, examples, gamma):
    numerator, denominator = np.zeros_like(w), 0.0
    for example in examples:
        s = 1 / (1 + np.exp(example @ w))
        numerator += s * example
        denominator += s
    return w + gamma * numerator / denominator


def examples_of(seed, n=12, d=3):
    return np.random.default_rng(seed).normal(size=(n, d)) + 0.3


def test_follows_the_sums():
    examples = examples_of(0)
    w = expected = np.zeros(3)
    for _ in range(6):
        w, expected = step(jnp.asarray(w, jnp.float32), examples, 0.7), reference_step(expected, examples, 0.7)
        np.testing.assert_allclose(w, expected, **CLOSE)


def test_equal_margins_give_the_mean_of_the_examples():
    """At w = 0 every s_i is 1/2; at w along the first axis every margin is w_1."""
    examples = np.stack([[1.0, b] for b in (-2.0, 0.5, 3.0)]).astype(np.float32)
    for w in (jnp.zeros(2), jnp.asarray([1.5, 0.0])):
        np.testing.assert_allclose(step(w, examples, 0.3), w + 0.3 * examples.mean(0), **CLOSE)


def test_neither_duplicates_nor_well_classified_examples_count():
    examples, w = examples_of(1).astype(np.float32), jnp.asarray([0.2, -0.4, 0.1])
    once = step(w, examples, 0.5)
    np.testing.assert_allclose(step(w, np.concatenate([examples, examples]), 0.5), once, **CLOSE)
    # A margin of 40: s = e^-40 = 4e-18, below the rounding of the sums.
    right = 40 * w / jnp.sum(w**2)
    more = np.concatenate([examples, right[None]])
    np.testing.assert_allclose(step(w, more, 0.5), once, **CLOSE)
    shrunk = (plain_step(w, examples, 0.5) - w) * len(examples) / len(more)
    np.testing.assert_allclose(plain_step(w, more, 0.5) - w, shrunk, **CLOSE)


def test_large_steps_are_those_of_the_perceptron_over_misclassified_examples():
    examples, gamma = examples_of(2), 1e5
    w, direction = jnp.zeros(3), np.zeros(3)
    np.testing.assert_allclose(plain_step(w, examples, gamma), gamma / 2 * examples.mean(0), rtol=1e-5)
    for i in range(4):
        wrong = examples[examples @ direction < 0] if i else examples
        # Margins that the sigmoid sees are far from 0, so that it is an indicator to all digits.
        assert i == 0 or gamma * np.abs(examples @ direction).min() > 30
        assert len(wrong)
        direction = direction + wrong.mean(0)
        w = step(w, examples, gamma)
        np.testing.assert_allclose(w / gamma, direction, rtol=1e-4)


def test_two_classes_of_a_softmax_are_the_logistic_case():
    examples, w = examples_of(3).astype(np.float32), jnp.asarray([0.3, 0.1, -0.2])
    logits = jnp.stack([jnp.zeros(len(examples)), examples @ w], axis=-1)
    error = jnp.mean(1 - jax.nn.softmax(logits)[:, 1])
    update, _ = TX.update(jax.grad(mean_loss)(w, examples), TX.init(w), error=error)
    np.testing.assert_allclose(w - 0.5 * update, step(w, examples, 0.5), **CLOSE)


def test_error_zero_gives_zero():
    grads = {"a": jnp.zeros(3), "b": jnp.zeros((), jnp.bfloat16)}
    updates, _ = TX.update(grads, TX.init(grads), error=jnp.float32(0))
    jax.tree.map(lambda u: np.testing.assert_array_equal(np.asarray(u, np.float32), 0), updates)


def test_missing_or_wrong_error():
    with pytest.raises(TypeError, match="'error'"):
        TX.update(jnp.ones(3), TX.init(None))
    with pytest.raises(ValueError, match=r"error has shape \(3,\)"):
        TX.update(jnp.ones(3), TX.init(None), error=jnp.ones(3))


def test_odd_trees_and_dtypes():
    grads = {"a": None, "b": [jnp.asarray([3.0, -1.0], jnp.bfloat16), jnp.asarray(2.0)], "c": jnp.zeros((0, 2))}
    update = jax.jit(lambda g, error: TX.update(g, TX.init(g), g, error=error, value=0.0)[0])
    updates = update(grads, 0.25)
    assert updates["a"] is None
    assert updates["b"][0].dtype == jnp.bfloat16
    np.testing.assert_array_equal(updates["b"][0].astype(jnp.float32), [12.0, -4.0])
    np.testing.assert_array_equal(updates["b"][1], 8.0)
    assert update({}, 0.25) == {}
    # The quotient 1/3 is rounded once, to 8 bits, although the error too is bfloat16.
    third = update(jnp.ones(1, jnp.bfloat16), jnp.asarray(3.0, jnp.bfloat16))
    np.testing.assert_array_equal(third, jnp.asarray([1 / 3], jnp.bfloat16))
    with jax.enable_x64(True):
        result = TX.update({"a": jnp.ones(1), "b": jnp.ones(1, jnp.float32)}, (), error=jnp.asarray(3.0))[0]
        np.testing.assert_array_equal(result["a"], 1 / 3)
        assert result["b"].dtype == jnp.float32


def test_vmap_and_grad():
    grads, errors = jnp.arange(6.0).reshape(3, 2), jnp.asarray([0.5, 0.25, 0.0])
    updates = jax.vmap(lambda g, e: TX.update(g, (), error=e)[0])(grads, errors)
    np.testing.assert_allclose(updates[:2], [[0.0, 2.0], [8.0, 12.0]])
    assert jax.grad(lambda e: TX.update(jnp.asarray(3.0), (), error=e)[0])(0.5) == -3.0 / 0.5**2


def test_global_error_under_shard_map():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    examples, w = jnp.asarray(examples_of(4, n=16), jnp.float32), jnp.asarray([0.1, 0.2, -0.3])

    def local(w, examples):
        error = jax.lax.pmean(jnp.mean(error_probabilities(w, examples)), "data")
        grad = jax.lax.pmean(jax.grad(mean_loss)(jax.lax.pcast(w, "data", to="varying"), examples), "data")
        return w - 0.5 * TX.update(grad, (), error=error)[0]

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(PartitionSpec(), PartitionSpec("data")), out_specs=PartitionSpec()
    )
    np.testing.assert_allclose(jax.jit(sharded)(w, examples), step(w, examples, 0.5), **CLOSE)


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan")])
def test_bad_arguments(eps):
    with pytest.raises(ValueError, match=rf"eps={eps} must lie in \(0, inf\)"):
        optim.normalize_by_error(eps)
