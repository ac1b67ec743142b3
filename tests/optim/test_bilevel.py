"""The penalty gradient against quadratics that are solved by hand, and the loop against float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import optim

C = np.array([[1.0, 0.5], [-0.3, 0.8], [0.2, 0.1]])
X = np.array([0.4, -1.2])


def upper(x, y):
    return 0.5 * jnp.sum((y - 1) ** 2) + 0.05 * jnp.sum(x**2)


def lower(x, y):
    return 0.5 * jnp.sum((y - jnp.asarray(C, y.dtype) @ x) ** 2)


def minimizers(sigma):
    """Of sigma f + g and of g, for the fixed X."""
    return (sigma + C @ X) / (1 + sigma), C @ X


def psi(x, sigma):
    y, z = (sigma + C @ x) / (1 + sigma), C @ x
    f = 0.5 * np.sum((y - 1) ** 2) + 0.05 * np.sum(x**2)
    return f + (0.5 * np.sum((y - C @ x) ** 2) - 0.5 * np.sum((z - C @ x) ** 2)) / sigma


TRUE = 0.1 * X + C.T @ (C @ X - 1)


def arrays(*values):
    return [jnp.asarray(value, jnp.float32) for value in values]


@pytest.mark.parametrize("sigma", [1.0, 0.1, 0.01])
def test_closed_form_and_distance_to_the_true_gradient(sigma):
    y, z = minimizers(sigma)
    x32, y32, z32 = arrays(X, y, z)
    gradient = jax.jit(lambda s: optim.bilevel_penalty_gradient(upper, lower, x32, y32, z32, penalty=s))(sigma)
    # The difference of two gradients near 1 has an error of 1e-7, and is divided by sigma.
    close = dict(rtol=0, atol=3e-7 / sigma)
    np.testing.assert_allclose(gradient, 0.1 * X - C.T @ (y - z) / sigma, **close)
    # y - z = sigma (1 - C X) / (1 + sigma): the gap is C'(1 - C X) sigma / (1 + sigma).
    gap = C.T @ (1 - C @ X) * sigma / (1 + sigma)
    np.testing.assert_allclose(gradient - TRUE, gap, **close)


def test_is_the_gradient_of_psi():
    sigma, h = 0.1, 1e-6
    with jax.enable_x64(True):
        gradient = optim.bilevel_penalty_gradient(upper, lower, X, *minimizers(sigma), penalty=sigma)
    numeric = [(psi(X + h * e, sigma) - psi(X - h * e, sigma)) / (2 * h) for e in np.eye(2)]
    # Central differences: rounding 1e-16 / h, truncation h^2.
    np.testing.assert_allclose(gradient, numeric, rtol=1e-7)


def test_equal_copies_leave_the_gradient_of_the_upper_objective():
    x, y = arrays(X, np.ones(3))
    np.testing.assert_array_equal(
        optim.bilevel_penalty_gradient(upper, lower, x, y, y, penalty=1e-3), jax.grad(upper)(x, y)
    )
    # If f does not see y, the minimizers are equal, and the rule is exact for any sigma.
    (z,) = arrays(C @ X)
    blind = optim.bilevel_penalty_gradient(lambda x, y: jnp.sum(x**2), lower, x, z, z, penalty=0.5)
    np.testing.assert_array_equal(blind, 2 * x)


def test_constants_are_constant():
    """d/dt of the gradient at (y(t), z(t)) is that of its formula alone; here g's cross derivative, over sigma."""
    x, y = arrays(X, np.ones(3))
    slope = jax.jacobian(lambda y: optim.bilevel_penalty_gradient(upper, lower, x, y, 0 * y, penalty=0.5))(y)
    np.testing.assert_allclose(slope, -C.T / 0.5, rtol=1e-6)


@pytest.mark.parametrize("project", [False, True])
def test_step_follows_the_loop(project):
    sigma, outer_lr, inner_lr, inner_steps = 0.2, 0.1, 0.3, 4
    x, y, z = X, np.zeros(3), np.ones(3)
    clip_x, clip_y = (lambda v: np.clip(v, -0.5, 0.3)), (lambda v: np.clip(v, -0.2, 0.6))
    options = dict(project_x=lambda v: jnp.clip(v, -0.5, 0.3), project_y=lambda v: jnp.clip(v, -0.2, 0.6))
    rates = dict(penalty=sigma, outer_lr=outer_lr, inner_lr=inner_lr, inner_steps=inner_steps)
    step = jax.jit(
        lambda state: optim.bilevel_penalty_step(upper, lower, state, **rates, **(options if project else {}))
    )
    state = optim.BilevelState(*arrays(x, y, z))
    for _ in range(3):
        state = step(state)
        for _ in range(inner_steps):
            y = y - inner_lr * (sigma * (y - 1) + (y - C @ x))
            z = z - inner_lr * (z - C @ x)
            y, z = (clip_y(y), clip_y(z)) if project else (y, z)
        x = x - outer_lr * (0.1 * x + (C.T @ (C @ x - y) - C.T @ (C @ x - z)) / sigma)
        x = clip_x(x) if project else x
        for got, expected in zip(state, (x, y, z), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert step._cache_size() == 1


@pytest.mark.parametrize(("inner_steps", "outer_lr", "outer_steps"), [(20, 0.2, 200), (1, 0.02, 2000)])
def test_finds_the_solution(inner_steps, outer_lr, outer_steps):
    """The minimizer of psi solves 0.1 x = C'(y - z) / sigma = C'(1 - C x) / (1 + sigma); double and single loop."""
    sigma = 0.1
    expected = np.linalg.solve(0.1 * (1 + sigma) * np.eye(2) + C.T @ C, C.T @ np.ones(3))

    @jax.jit
    def run(state):
        def body(state, _):
            rates = dict(penalty=sigma, outer_lr=outer_lr, inner_lr=0.5, inner_steps=inner_steps)
            return optim.bilevel_penalty_step(upper, lower, state, **rates), None

        return jax.lax.scan(body, state, length=outer_steps)[0]

    state = run(optim.BilevelState(*arrays(X, np.zeros(3), np.zeros(3))))
    np.testing.assert_allclose(state.x, expected, rtol=1e-3)


def tree_upper(x, y):
    return jnp.sum(y["w"].astype(jnp.float32)) * x["a"] + jnp.sum(x["b"].astype(jnp.float32) ** 2)


def tree_lower(x, y):
    return 0.5 * jnp.sum((y["w"].astype(jnp.float32) - x["a"]) ** 2) + 0.5 * jnp.sum(y["v"] ** 2)


def test_trees_and_dtypes():
    x = {"a": jnp.asarray(2.0), "b": jnp.ones(2, jnp.bfloat16), "none": None}
    y = {"w": jnp.ones(3, jnp.bfloat16), "v": jnp.ones(()), "none": None, "empty": jnp.zeros((0,))}
    state = optim.BilevelState(x, y, y)
    options = dict(penalty=0.5, outer_lr=0.1, inner_lr=0.1, inner_steps=2)
    result = jax.jit(lambda s: optim.bilevel_penalty_step(tree_upper, tree_lower, s, **options))(state)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), result) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    assert result.x["none"] is None
    empty = optim.BilevelState({}, {}, {})
    assert optim.bilevel_penalty_step(lambda x, y: 1.0, lambda x, y: 1.0, empty, **options) == empty
    scalar = optim.BilevelState(1.0, 2.0, 2.0)
    moved = optim.bilevel_penalty_step(lambda x, y: x * y, lambda x, y: 0.5 * (y - x) ** 2, scalar, **options)
    assert moved.x.shape == ()
    still = optim.bilevel_penalty_step(lambda x, y: 0 * x, lambda x, y: 0 * x * y, scalar, **options)
    assert tuple(map(float, still)) == (1.0, 2.0, 2.0)


def test_vmap_traced_rates_and_float32_under_x64():
    xs = jnp.asarray(np.stack([X, -X]), jnp.float32)
    (y,) = arrays(np.ones(3))

    def step(x, penalty, rate):
        state = optim.BilevelState(x, y, y)
        return optim.bilevel_penalty_step(upper, lower, state, penalty=penalty, outer_lr=rate, inner_lr=rate).x

    many = jax.vmap(step, (0, None, None))(xs, 0.3, 0.1)
    np.testing.assert_allclose(many, [step(x, 0.3, 0.1) for x in xs], rtol=1e-5)
    with jax.enable_x64(True):
        assert jax.jit(step)(xs[0], 0.3, 0.1).dtype == jnp.float32


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (dict(penalty=0.0), r"penalty=0.0 .*\(0, inf\)"),
        (dict(penalty=-1.0), "penalty=-1.0"),
        (dict(outer_lr=-0.1), r"outer_lr=-0.1 .*\[0, inf\)"),
        (dict(inner_lr=-0.1), "inner_lr=-0.1"),
        (dict(inner_steps=-1), "inner_steps=-1"),
    ],
)
def test_bad_arguments(kwargs, words):
    x, y = arrays(X, np.ones(3))
    options = dict(penalty=0.1, outer_lr=0.1, inner_lr=0.1) | kwargs
    with pytest.raises(ValueError, match=words):
        optim.bilevel_penalty_step(upper, lower, optim.BilevelState(x, y, y), **options)
    if "penalty" in kwargs:
        with pytest.raises(ValueError, match=words):
            optim.bilevel_penalty_gradient(upper, lower, x, y, y, **kwargs)
