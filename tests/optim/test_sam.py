"""The sharpness-aware gradient against closed forms and optax's own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import optim

A = np.diag([1.0, 2.0, 5.0])
POINT = np.array([0.5, -1.0, 2.0])


def quadratic(p):
    return 0.5 * p @ jnp.asarray(A, p.dtype) @ p


@pytest.mark.parametrize("rho", [0.05, 1.0])
@pytest.mark.parametrize("adaptive", [False, True])
def test_quadratic(rho, adaptive):
    """f = p'Ap/2 has the gradient A(p + e)."""
    g = A @ POINT
    d = np.abs(POINT) * g if adaptive else g
    e = rho / np.linalg.norm(d) * (POINT**2 * g if adaptive else g)
    fn = optim.sam_value_and_grad(jax.value_and_grad(quadratic), rho=rho, adaptive=adaptive)
    value, grads = jax.jit(fn)(jnp.asarray(POINT, jnp.float32))
    np.testing.assert_allclose(value, POINT @ g / 2, rtol=1e-6)
    np.testing.assert_allclose(grads, A @ (POINT + e), rtol=1e-5)


def test_norm_is_over_the_whole_tree_and_none_stays():
    params = {"a": jnp.asarray([3.0]), "b": None, "c": jnp.asarray(4.0)}

    def loss(p):
        return 0.5 * (jnp.sum(p["a"] ** 2) + p["c"] ** 2)

    _, grads = optim.sam_value_and_grad(jax.value_and_grad(loss), rho=5.0)(params)
    # g = p has length 5, so e = p.
    assert grads["b"] is None
    np.testing.assert_allclose(grads["a"], [6.0], rtol=1e-6)
    np.testing.assert_allclose(grads["c"], 8.0, rtol=1e-6)


def test_rho_zero_and_zero_gradient_give_the_ordinary_gradient():
    p = jnp.asarray(POINT, jnp.float32)
    ordinary = jax.value_and_grad(quadratic)
    for point, rho in ((p, 0.0), (0 * p, 0.5)):
        for got, expected in zip(optim.sam_value_and_grad(ordinary, rho=rho)(point), ordinary(point), strict=True):
            np.testing.assert_array_equal(got, expected)


def test_rho_may_be_traced():
    def grads(rho):
        return optim.sam_value_and_grad(jax.value_and_grad(quadratic), rho=rho)(jnp.asarray(POINT, jnp.float32))[1]

    np.testing.assert_allclose(jax.jit(grads)(0.3), grads(0.3), rtol=1e-6)


def test_adaptive_does_not_see_the_scale_of_a_parameter():
    """f(p) and h(q) = f(q / c) at q = c p are the same function; their gradients differ by the factor c alone."""
    c, p = 8.0, jnp.asarray(POINT, jnp.float32)
    plain = jax.value_and_grad(lambda p: jnp.sum(jnp.cosh(p)))
    scaled = jax.value_and_grad(lambda q: jnp.sum(jnp.cosh(q / c)))
    value, grads = optim.sam_value_and_grad(plain, rho=0.5, adaptive=True)(p)
    other_value, other = optim.sam_value_and_grad(scaled, rho=0.5, adaptive=True)(c * p)
    np.testing.assert_allclose(other_value, value, rtol=1e-6)
    np.testing.assert_allclose(c * other, grads, rtol=1e-5)


def test_equals_one_step_of_optax_sam():
    p, lr, rho = jnp.asarray(POINT, jnp.float32), 0.1, 0.3
    theirs = optax.contrib.sam(optax.sgd(lr), optax.chain(optax.contrib.normalize(), optax.sgd(rho)), opaque_mode=True)
    grad = jax.grad(quadratic)
    expected, _ = theirs.update(grad(p), theirs.init(p), p, grad_fn=lambda p, _: grad(p))
    _, grads = optim.sam_value_and_grad(jax.value_and_grad(quadratic), rho=rho)(p)
    np.testing.assert_allclose(-lr * grads, expected, rtol=1e-5)


def test_aux_comes_from_the_unmoved_point_and_arguments_are_the_same_at_both():
    seen = []

    def loss(p, batch, *, key):
        seen.append((batch, key))
        return jnp.sum((p * batch) ** 2), {"p": p}

    fn = optim.sam_value_and_grad(jax.value_and_grad(loss, has_aux=True), rho=0.5)
    p, batch, key = jnp.asarray([1.0, 2.0]), jnp.asarray([3.0, 4.0]), jax.random.key(0)
    (value, aux), _ = fn(p, batch, key=key)
    np.testing.assert_array_equal(aux["p"], p)
    np.testing.assert_array_equal(value, jnp.sum((p * batch) ** 2))
    assert all(b is batch and k is key for b, k in seen)
    assert len(seen) == 2


def test_bfloat16_norm_is_taken_in_float32():
    """4096 gradients of 1 have length 64; summed in bfloat16 their squares would stop at 256."""
    p = jnp.zeros(4096, jnp.bfloat16)
    points = []

    def value_and_grad(p):
        points.append(p)
        return jnp.float32(0), jnp.ones_like(p)

    _, grads = optim.sam_value_and_grad(value_and_grad, rho=64.0)(p)
    assert grads.dtype == points[1].dtype == jnp.bfloat16
    np.testing.assert_array_equal(points[1].astype(jnp.float32), 1.0)


def test_no_gradient_flows_through_the_move():
    """With e constant, d/dt of the gradient t A (p + e) is A (p + e) / t."""
    p, rho = jnp.asarray(POINT, jnp.float32), 0.5

    def grads(t):
        return optim.sam_value_and_grad(jax.value_and_grad(lambda p: t * quadratic(p)), rho=rho)(p)[1]

    e = rho * (A @ POINT) / np.linalg.norm(A @ POINT)
    np.testing.assert_allclose(jax.jacobian(grads)(2.0), A @ (POINT + e), rtol=1e-5)


def test_batch_statistics_come_from_the_first_pass_alone():
    """The running mean of x w has moved once, towards the mean at the parameters and not at the moved ones."""
    x, w, running = jnp.asarray([[1.0, 2.0], [3.0, 4.0]]), jnp.asarray([1.0, -2.0]), jnp.asarray(10.0)

    def loss(w, running):
        y = x @ w
        return jnp.mean(y**2), 0.9 * running + 0.1 * jnp.mean(y)

    fn = optim.sam_value_and_grad(jax.value_and_grad(loss, has_aux=True), rho=1.0)
    (_, statistics), _ = jax.jit(fn)(w, running)
    # x w = (-3, -5).
    np.testing.assert_allclose(statistics, 0.9 * 10 + 0.1 * -4, rtol=1e-6)


def test_class_weights_aim_the_move():
    """Two classes that pull at their own parameter: with weight 0 for the first, only the second one's moves."""
    targets = jnp.asarray([1.0, 3.0])
    moved = []

    def value_and_grad(p, weights):
        moved.append(p)
        return jax.value_and_grad(lambda p: jnp.sum(weights * (p - targets) ** 2) / 2)(p)

    _, grads = optim.sam_value_and_grad(value_and_grad, rho=0.5)(jnp.zeros(2), jnp.asarray([0.0, 2.0]))
    np.testing.assert_allclose(moved[1], [0.0, -0.5], rtol=1e-6)
    np.testing.assert_allclose(grads, [0.0, 2 * (-0.5 - 3)], rtol=1e-6)


@pytest.mark.parametrize("adaptive", [False, True])
def test_odd_trees(adaptive):
    fn = optim.sam_value_and_grad(
        jax.value_and_grad(lambda p: jax.tree.reduce(jnp.add, p, 0.0) ** 2), adaptive=adaptive
    )
    assert fn({})[1] == {}
    assert fn({"a": None})[1] == {"a": None}
    # f(p) = p^2 at 2 has its gradient taken at 2 + rho, or 2 + rho |2| if adaptive.
    np.testing.assert_allclose(fn(jnp.asarray(2.0))[1], 2 * (2 + 0.05 * (2 if adaptive else 1)), rtol=1e-6)
    assert fn([jnp.ones(()), None, jnp.ones(())])[1][1] is None


def test_vmap_gives_each_its_own_norm():
    points = jnp.asarray(POINT, jnp.float32) * jnp.asarray([[1.0], [-3.0], [0.0]])
    fn = optim.sam_value_and_grad(jax.value_and_grad(quadratic), rho=0.7)
    _, grads = jax.vmap(fn)(points)
    np.testing.assert_allclose(grads, [fn(p)[1] for p in points], rtol=1e-6)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        _, grads = optim.sam_value_and_grad(jax.value_and_grad(quadratic), rho=0.3)(jnp.asarray(POINT))
        g = A @ POINT
        assert grads.dtype == jnp.float64
        np.testing.assert_allclose(grads, A @ (POINT + 0.3 * g / np.linalg.norm(g)), rtol=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (dict(rho=-0.1), r"rho=-0.1 must lie in \[0, inf\)"),
        (dict(rho=float("nan")), "rho=nan"),
        (dict(rho=optax.constant_schedule(0.1)), "rho is a function"),
        (dict(eps=0.0), r"eps=0.0 must lie in \(0, inf\)"),
    ],
)
def test_bad_arguments(kwargs, words):
    with pytest.raises(ValueError, match=words):
        optim.sam_value_and_grad(jax.value_and_grad(quadratic), **kwargs)
