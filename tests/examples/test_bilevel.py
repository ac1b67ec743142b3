"""One step ahead: the weigher's gradient against finite differences in float64, and cases by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import examples

X = np.array([[1.0, 0.5, -0.3], [0.2, -1.0, 0.8], [-0.7, 0.4, 1.1], [0.9, 0.9, 0.1]])
Y = np.array([0.5, -0.2, 1.0, 0.3])
X_OUT = np.array([[0.3, -0.6, 0.2], [1.2, 0.1, -0.5]])
Y_OUT = np.array([0.1, -0.4])
START, WEIGHER = np.array([0.2, -0.4, 0.1]), np.array([0.3, -1.0, 0.5, 0.0])


def inner_loss(params, weigher, batch):
    """Weighed squared errors of a network of one tanh unit."""
    x, y = batch
    return jnp.mean(jax.nn.sigmoid(weigher) * (jnp.tanh(x @ params) - y) ** 2)


def outer_loss(params, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ params) - y) ** 2)


def start(outer_tx, params=START, weigher=WEIGHER):
    params, weigher = jnp.asarray(params, jnp.float32), jnp.asarray(weigher, jnp.float32)
    return examples.BilevelStepState(params, weigher, outer_tx.init(weigher))


def batches():
    return tuple(jnp.asarray(a, jnp.float32) for a in (X, Y)), tuple(
        jnp.asarray(a, jnp.float32) for a in (X_OUT, Y_OUT)
    )


def step_once(rate, outer_tx, state=None):
    step = jax.jit(examples.bilevel_step(inner_loss, outer_loss, inner_rate=rate, outer_tx=outer_tx))
    return step(start(outer_tx) if state is None else state, *batches())


def ahead_in_float64(weigher, rate):
    """The parameters after the inner step, with the gradient by hand."""
    out = np.tanh(X @ START)
    share = 1 / (1 + np.exp(-weigher))
    grad = (share * 2 * (out - Y) * (1 - out**2)) @ X / len(Y)
    return START - rate * grad


def outer_in_float64(params):
    return np.mean((np.tanh(X_OUT @ params) - Y_OUT) ** 2)


def finite_differences(rate, h=1e-5):
    shifts = h * np.eye(len(WEIGHER))
    judged = [[outer_in_float64(ahead_in_float64(WEIGHER + sign * d, rate)) for sign in (1, -1)] for d in shifts]
    return np.array([(up - down) / (2 * h) for up, down in judged])


@pytest.mark.parametrize("rate", [0.1, 1.0])
def test_the_gradient_of_the_weigher_is_that_of_finite_differences(rate):
    """Gradient descent of rate 1 shows the gradient; the float32 subtraction costs an ulp of the weights."""
    state, _ = step_once(rate, optax.sgd(1.0))
    np.testing.assert_allclose(WEIGHER - state.weigher, finite_differences(rate), rtol=1e-3, atol=2.0**-23)


def test_the_parameters_take_the_step_with_the_new_weigher():
    state, (inner, outer) = step_once(0.5, optax.sgd(20.0))
    assert np.abs(np.asarray(state.weigher) - WEIGHER).max() > 0.1
    expected = ahead_in_float64(np.asarray(state.weigher, np.float64), 0.5)
    np.testing.assert_allclose(state.params, expected, rtol=1e-5)
    share = 1 / (1 + np.exp(-WEIGHER))
    np.testing.assert_allclose(inner, np.mean(share * (np.tanh(X @ START) - Y) ** 2), rtol=1e-5)
    np.testing.assert_allclose(outer, outer_in_float64(ahead_in_float64(WEIGHER, 0.5)), rtol=1e-5)


def test_without_an_inner_step_nothing_moves():
    state, _ = step_once(0.0, optax.sgd(1.0))
    np.testing.assert_array_equal(state.weigher, start(optax.sgd(1.0)).weigher)
    np.testing.assert_array_equal(state.params, start(optax.sgd(1.0)).params)


def test_an_optimizer_with_a_state_is_carried_and_sees_the_value():
    def update(updates, state, params=None, *, value):
        del params
        return jax.tree.map(jnp.negative, updates), state + value

    tx = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros(()), update)
    state, (_, outer) = step_once(0.5, tx)
    np.testing.assert_array_equal(state.outer, outer)
    adam = optax.adam(0.1)
    state, _ = step_once(0.5, adam)
    state, _ = step_once(0.5, adam, state)
    assert optax.tree.get(state.outer, "count") == 2


def test_the_inner_rate_may_be_traced():
    def once(rate):
        step = examples.bilevel_step(inner_loss, outer_loss, inner_rate=rate, outer_tx=optax.sgd(1.0))
        return step(start(optax.sgd(1.0)), *batches())[0].params

    np.testing.assert_allclose(jax.jit(once)(0.5), step_once(0.5, optax.sgd(1.0))[0].params, rtol=1e-6)


def test_half_precision_and_missing_leaves_keep_their_kind():
    params = {"w": jnp.ones(3, jnp.bfloat16), "none": None}
    weigher = {"s": jnp.zeros(4, jnp.bfloat16), "none": None}
    tx = optax.sgd(1.0)
    step = examples.bilevel_step(
        lambda p, w, batch: inner_loss(p["w"].astype(jnp.float32), w["s"].astype(jnp.float32), batch),
        lambda p, batch: outer_loss(p["w"].astype(jnp.float32), batch),
        inner_rate=0.5,
        outer_tx=tx,
    )
    before = examples.BilevelStepState(params, weigher, tx.init(weigher))
    after, _ = jax.eval_shape(step, before, *batches())
    assert jax.tree.structure(after) == jax.tree.structure(before)
    assert [x.dtype for x in jax.tree.leaves(after)] == [x.dtype for x in jax.tree.leaves(before)]


def test_weights_of_mislabelled_examples_fall():
    """Two of six targets of y = 2 x have the wrong sign; weights start at 1/2 and clean examples judge."""
    x = jnp.array([1.0, -0.5, 2.0, 0.7, 1.5, -1.0])
    wrong = np.array([False, True, False, False, True, False])
    y = jnp.where(wrong, -2 * x, 2 * x)
    clean = jnp.array([0.5, -1.5, 1.0])

    def inner(p, w, batch):
        del batch
        return jnp.mean(jax.nn.sigmoid(w) * (p * x - y) ** 2)

    tx = optax.sgd(1.0)
    step = examples.bilevel_step(
        inner, lambda p, batch: jnp.mean((p * batch - 2 * batch) ** 2), inner_rate=0.1, outer_tx=tx
    )
    state = examples.BilevelStepState(jnp.zeros(()), jnp.zeros(6), tx.init(jnp.zeros(6)))
    state, _ = jax.jit(lambda s: jax.lax.scan(lambda c, _: step(c, None, clean), s, length=50))(state)
    assert np.max(state.weigher[wrong]) < 0 < np.min(state.weigher[~wrong])


@pytest.mark.parametrize("rate", [-0.1, float("nan")])
def test_bad_arguments(rate):
    with pytest.raises(ValueError, match=r"inner_rate=.* must lie in \[0, inf\)"):
        examples.bilevel_step(inner_loss, outer_loss, inner_rate=rate, outer_tx=optax.sgd(1.0))
