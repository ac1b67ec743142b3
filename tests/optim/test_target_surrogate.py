"""The surrogate against its formula in loops, as an upper bound, and its steps against SGD and least squares."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard import optim

# Sums of about twenty float32 terms of size 1.
CLOSE = dict(rtol=1e-5, atol=1e-5)
BATCH, FEATURES, CLASSES = 8, 3, 4


def problem(seed=0):
    rng = np.random.default_rng(seed)
    x, labels = rng.normal(size=(BATCH, FEATURES)), rng.integers(CLASSES, size=BATCH)
    kernel = rng.normal(size=(FEATURES, CLASSES))
    return jnp.asarray(x, jnp.float32), jnp.asarray(labels), jnp.asarray(kernel, jnp.float32)


def cross_entropy(labels):
    return lambda logits: optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def square(y):
    return lambda z: 0.5 * jnp.sum((z - y) ** 2, axis=-1)


def test_surrogate_is_its_formula():
    rng = np.random.default_rng(0)
    z, a, g = rng.normal(size=(3, BATCH, 2, 3))
    expected = 0.0
    for i in range(BATCH):
        moved = (z[i] - a[i]).ravel()
        expected += (g[i].ravel() @ moved + moved @ moved / (2 * 0.7)) / BATCH
    arrays = [jnp.asarray(value, jnp.float32) for value in (z, a, g)]
    np.testing.assert_allclose(optim.target_surrogate(*arrays, step_size=0.7), expected, **CLOSE)
    # A tree of outputs is their concatenation.
    trees = [{"a": value[:, 0], "b": None, "c": value[:, 1]} for value in arrays]
    np.testing.assert_allclose(optim.target_surrogate(*trees, step_size=0.7), expected, **CLOSE)


def test_zero_at_the_anchor_with_the_gradient_of_the_mean_loss():
    x, labels, kernel = problem()
    loss = cross_entropy(labels)
    anchor = x @ kernel
    grads = jax.grad(lambda z: jnp.sum(loss(z)))(anchor)
    surrogate = jax.value_and_grad(lambda k: optim.target_surrogate(x @ k, anchor, grads, step_size=0.3))
    value, slope = jax.jit(surrogate)(kernel)
    assert value == 0
    np.testing.assert_allclose(slope, jax.grad(lambda k: jnp.mean(loss(x @ k)))(kernel), **CLOSE)


def test_no_gradient_reaches_the_anchor():
    z, a, g = jnp.asarray([[2.0]]), jnp.asarray([[1.0]]), jnp.asarray([[3.0]])
    for position in (1, 2):
        np.testing.assert_array_equal(jax.grad(optim.target_surrogate, position)(z, a, g, step_size=1.0), 0)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.sampled_from([0.01, 1.0, 100.0]))
def test_upper_bound_of_smooth_losses(seed, size):
    """Softmax cross entropy and half the squared error are 1-smooth in their outputs."""
    rng = np.random.default_rng(seed)
    anchor = jnp.asarray(rng.normal(size=(BATCH, CLASSES)), jnp.float32)
    z = anchor + size * jnp.asarray(rng.normal(size=(BATCH, CLASSES)), jnp.float32)
    labels = jnp.asarray(rng.integers(CLASSES, size=BATCH))
    for loss in (cross_entropy(labels), square(jax.nn.one_hot(labels, CLASSES))):
        grads = jax.grad(lambda z, loss=loss: jnp.sum(loss(z)))(anchor)
        bound = jnp.mean(loss(anchor)) + optim.target_surrogate(z, anchor, grads, step_size=1.0)
        # The squared error is its own bound, up to the rounding of its largest term.
        assert jnp.mean(loss(z)) <= bound + 1e-6 * (1 + jnp.max(jnp.abs(z)) ** 2)


def test_one_inner_step_is_a_step_of_sgd():
    x, labels, kernel = problem(1)
    loss = cross_entropy(labels)
    stepped = optim.target_surrogate_step(
        lambda k: x @ k, loss, kernel, step_size=0.5, inner_steps=1, inner=optax.sgd(0.2)
    )
    np.testing.assert_allclose(stepped, kernel - 0.2 * jax.grad(lambda k: jnp.mean(loss(x @ k)))(kernel), **CLOSE)


def test_follows_the_loop():
    """Three inner steps of gradient descent on the surrogate, by hand in float64."""
    x, _, kernel = problem(2)
    y = np.random.default_rng(5).normal(size=(BATCH, CLASSES))

    @jax.jit
    def step(params):
        inner = optax.sgd(0.4)
        return optim.target_surrogate_step(
            lambda k: x @ k, square(y), params, step_size=0.6, inner_steps=3, inner=inner
        )

    wide, w = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    for _ in range(2):
        kernel, anchor = step(kernel), wide @ w
        for _ in range(3):
            w = w - 0.4 * wide.T @ ((anchor - y) + (wide @ w - anchor) / 0.6) / BATCH
    np.testing.assert_allclose(kernel, w, **CLOSE)


def test_exact_inner_solution_is_least_squares_in_one_outer_step():
    x, _, kernel = problem(3)
    y = jnp.asarray(np.random.default_rng(6).normal(size=(BATCH, CLASSES)), jnp.float32)
    inverse = jnp.linalg.inv(x.T @ x / BATCH)
    newton = optax.chain(optax.stateless(lambda g, p: inverse @ g), optax.scale_by_learning_rate(1.0))
    stepped = optim.target_surrogate_step(
        lambda k: x @ k, square(y), kernel, step_size=1.0, inner_steps=1, inner=newton
    )
    np.testing.assert_allclose(stepped, np.linalg.lstsq(x, y)[0], rtol=1e-4, atol=1e-4)


def test_counts_of_evaluations():
    """One loss gradient, whatever the number of inner steps: the loss is traced once."""
    x, labels, kernel = problem()
    calls = []

    def loss(z):
        calls.append(z)
        return cross_entropy(labels)(z)

    optim.target_surrogate_step(lambda k: x @ k, loss, kernel, step_size=1.0, inner_steps=7, inner=optax.sgd(0.1))
    assert len(calls) == 1


def test_line_search_gets_what_it_needs():
    x, labels, kernel = problem(4)
    loss = cross_entropy(labels)
    inner = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=10))
    step = jax.jit(
        lambda k: optim.target_surrogate_step(lambda k: x @ k, loss, k, step_size=1.0, inner_steps=3, inner=inner)
    )
    assert jnp.mean(loss(x @ step(kernel))) < jnp.mean(loss(x @ kernel))


def test_edge_cases():
    x, labels, kernel = problem()
    loss, adam = cross_entropy(labels), optax.adam(0.1)

    def step(params, predict, inner_steps=2, loss=loss, step_size=1.0):
        options = dict(step_size=step_size, inner_steps=inner_steps, inner=adam)
        return jax.jit(lambda params: optim.target_surrogate_step(predict, loss, params, **options))(params)

    still = step(kernel, lambda k: x @ k, inner_steps=0)
    np.testing.assert_array_equal(still, kernel)
    tree = {"kernel": kernel.astype(jnp.bfloat16), "none": None, "scale": jnp.asarray(1.0), "empty": jnp.zeros((0, 2))}
    moved = step(tree, lambda p: p["scale"] * (x @ p["kernel"]))
    assert moved["none"] is None
    assert moved["kernel"].dtype == jnp.bfloat16
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, tree)
    scalar = step(2.0, lambda s: s * (x @ kernel))
    assert scalar.shape == ()
    assert step({}, lambda p: x @ kernel) == {}
    # Where the loss is flat nothing moves.
    flat = step(kernel, lambda k: x @ k, loss=lambda z: 0 * z[:, 0])
    np.testing.assert_array_equal(flat, kernel)
    many = jax.vmap(lambda k: step(k, lambda k: x @ k))(jnp.stack([kernel, -kernel]))
    np.testing.assert_allclose(many[0], step(kernel, lambda k: x @ k), **CLOSE)
    traced = jax.jit(lambda k, size: step(k, lambda k: x @ k, step_size=size))(kernel, 1.0)
    np.testing.assert_allclose(traced, many[0], **CLOSE)
    with jax.enable_x64(True):
        single = jax.jit(lambda k, size: step(k, lambda k: x @ k, step_size=size))(kernel, 1.0)
        assert single.dtype == jnp.float32


def test_bfloat16_outputs_are_summed_in_float32():
    """4096 products of 1 sum to 4096, and the squares to half of that; in bfloat16 both would stop at 256."""
    one = jnp.ones((1, 4096), jnp.bfloat16)
    assert optim.target_surrogate(one, 0 * one, one, step_size=1.0) == 4096 + 4096 / 2


def call(predict=lambda p: p, loss=lambda z: z[:, 0], step_size=1.0, inner_steps=1):
    params = jnp.ones((2, 3))
    return optim.target_surrogate_step(
        predict, loss, params, step_size=step_size, inner_steps=inner_steps, inner=optax.sgd(0.1)
    )


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda: call(step_size=0.0), r"step_size=0.0 .*\(0, inf\)"),
        (lambda: call(inner_steps=-1), r"inner_steps=-1 .*\[0, inf\)"),
        (lambda: call(predict=lambda p: jnp.ones((2, 3), int)), "outputs of dtype int32; they must be floating"),
        (lambda: call(loss=jnp.mean), r"loss gives shape \(\); it must be \(2,\)"),
        (lambda: call(predict=lambda p: [p, p[0]], loss=lambda z: z[0][:, 0]), r"\(2, 3\), \(3,\).*\[B, \.\.\.\]"),
        (lambda: optim.target_surrogate(*3 * [jnp.ones((2, 3))], step_size=-1.0), "step_size=-1.0"),
        (lambda: optim.target_surrogate(*3 * [jnp.asarray(1.0)], step_size=1.0), r"\[\(\)\]; all must be \[B"),
        (
            lambda: optim.target_surrogate(jnp.ones((2, 3)), jnp.ones(2), jnp.ones((2, 3)), step_size=1.0),
            r"outputs \(2, 3\), anchor \(2,\)",
        ),
    ],
)
def test_bad_arguments(fn, words):
    with pytest.raises(ValueError, match=words):
        fn()
