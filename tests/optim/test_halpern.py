"""Halpern iterations against float64 loops on affine operators, and their bound on the last residual."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import optim

# Twenty steps of contractions: rounding errors of 6e-8 do not grow.
CLOSE = dict(rtol=1e-4, atol=1e-5)
STEPS = 20


def affine(seed=0, n=4):
    """F(u) = A u - b with a symmetric positive definite A, and its constant: the top eigenvalue."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(n, n))
    matrix = root @ root.T / n
    return matrix, rng.normal(size=n), np.linalg.eigvalsh(matrix)[-1]


def reference(matrix, b, u0, lipschitz, num_steps, weight=lambda k: 1 / (k + 2), step=2.0):
    u, residuals = u0, [np.linalg.norm(matrix @ u0 - b)]
    for k in range(num_steps):
        u = weight(k) * u0 + (1 - weight(k)) * (u - step / lipschitz * (matrix @ u - b))
        residuals.append(np.linalg.norm(matrix @ u - b))
    return u, residuals


def operator(u, matrix, b):
    """The affine operator on a tree: two halves of the vector, and a leaf that is None."""
    flat = jnp.concatenate([u["first"], u["second"]])
    value = matrix @ flat - b
    return {"first": value[:2], "none": None, "second": value[2:]}


def split(u):
    u = jnp.asarray(u, jnp.float32)
    return {"first": u[:2], "none": None, "second": u[2:]}


def join(tree):
    return np.concatenate([tree["first"], tree["second"]])


def test_follows_the_recursion_and_its_bound():
    matrix, b, lipschitz = affine()
    u0 = np.array([3.0, -1.0, 0.0, 2.0])

    @jax.jit
    def solve(u0, lipschitz):
        a, c = jnp.asarray(matrix, jnp.float32), jnp.asarray(b, jnp.float32)
        return optim.halpern(lambda u: operator(u, a, c), u0, lipschitz=lipschitz, num_steps=STEPS)

    result = solve(split(u0), lipschitz)
    expected, residuals = reference(matrix, b, u0, lipschitz, STEPS)
    assert result.solution["none"] is None
    np.testing.assert_allclose(join(result.solution), expected, **CLOSE)
    assert result.residuals.shape == (STEPS + 1,)
    np.testing.assert_allclose(result.residuals, residuals, **CLOSE)
    distance = np.linalg.norm(u0 - np.linalg.solve(matrix, b))
    assert np.all(result.residuals <= (1 + 1e-5) * lipschitz * distance / np.arange(1, STEPS + 2))


def game(u):
    """The bilinear game min_x max_y x y: F = (y, -x), a rotation."""
    return jnp.stack([u[1], -u[0]])


def test_bilinear_game_needs_the_resolvent():
    start, eta, num_steps = jnp.asarray([1.0, 0.5]), 1.0, 50
    assert optim.halpern(game, start, lipschitz=1.0, num_steps=num_steps).residuals[-1] > 1e3
    inverse = np.linalg.inv(np.eye(2) + eta * np.array([[0.0, 1.0], [-1.0, 0.0]])).astype(np.float32)
    result = optim.halpern(lambda u: u - inverse @ u, start, lipschitz=2.0, num_steps=num_steps)
    u = np.asarray(start, np.float64)
    for k in range(num_steps):
        u = np.asarray(start) / (k + 2) + (1 - 1 / (k + 2)) * inverse @ u
    np.testing.assert_allclose(result.solution, u, **CLOSE)
    assert result.residuals[-1] <= 2 * np.linalg.norm(start) / (num_steps + 1)


def components(seed=1, n=9, d=3):
    """Affine components A_i u - b_i, their mean, and the largest of their constants."""
    rng = np.random.default_rng(seed)
    roots = rng.normal(size=(n, d, d))
    matrices = np.einsum("nij,nkj->nik", roots, roots) / d
    offsets = rng.normal(size=(n, d))
    lipschitz = max(np.linalg.eigvalsh(m)[-1] for m in matrices)
    return matrices, offsets, lipschitz


def component_operator(matrices, offsets):
    a, b = jnp.asarray(matrices, jnp.float32), jnp.asarray(offsets, jnp.float32)
    return lambda u, indices: jnp.mean(jnp.einsum("nij,j->ni", a[indices], u) - b[indices], axis=0)


def test_variance_reduced_follows_the_recursion():
    """The same coins and batches, in float64 loops."""
    matrices, offsets, lipschitz = components()
    n, num_steps, rng, u0 = len(matrices), 15, jax.random.key(3), np.array([2.0, -1.0, 1.0])
    result = jax.jit(
        lambda u0: optim.variance_reduced_halpern(
            component_operator(matrices, offsets),
            u0,
            num_components=n,
            lipschitz=lipschitz,
            num_steps=num_steps,
            rng=rng,
        )
    )(jnp.asarray(u0, jnp.float32))

    def mean_of(u, indices):
        return np.mean([matrices[i] @ u - offsets[i] for i in indices], axis=0)

    u, estimate = u0, mean_of(u0, range(n))
    residuals, fulls = [np.linalg.norm(estimate)], 0
    for k in range(num_steps):
        weight = 2 / (k + 4)
        new = weight * u0 + (1 - weight) * (u - estimate / (4 * lipschitz))
        coin, draw = jax.random.split(jax.random.fold_in(rng, k))
        probability = 4 / (k + 1 + 5) if k + 1 <= math.sqrt(n) else 4 / (math.sqrt(n) + 5)
        if jax.random.uniform(coin) < probability:
            estimate, fulls = mean_of(new, range(n)), fulls + 1
        else:
            batch = np.asarray(jax.random.randint(draw, (math.ceil(math.sqrt(n)),), 0, n))
            estimate = estimate + mean_of(new, batch) - mean_of(u, batch)
        u = new
        residuals.append(np.linalg.norm(estimate))
    assert 0 < fulls < num_steps
    np.testing.assert_allclose(result.solution, u, **CLOSE)
    np.testing.assert_allclose(result.residuals, residuals, **CLOSE)


def test_one_component_is_exact():
    matrices, offsets, lipschitz = components(n=1)
    u0 = np.array([1.0, 2.0, 3.0])
    options = dict(num_components=1, lipschitz=lipschitz, num_steps=STEPS, rng=jax.random.key(0))
    result = optim.variance_reduced_halpern(
        component_operator(matrices, offsets), jnp.asarray(u0, jnp.float32), **options
    )
    u, residuals = reference(matrices[0], offsets[0], u0, lipschitz, STEPS, lambda k: 2 / (k + 4), 1 / 4)
    np.testing.assert_allclose(result.solution, u, **CLOSE)
    np.testing.assert_allclose(result.residuals, residuals, **CLOSE)


def test_variance_reduced_converges_and_a_long_run_begins_like_a_short_one():
    matrices, offsets, lipschitz = components()
    rng, u0 = jax.random.key(0), jnp.zeros(3)

    def solve(num_steps):
        options = dict(num_components=9, lipschitz=lipschitz, num_steps=num_steps, rng=rng, batch_size=2)
        return optim.variance_reduced_halpern(component_operator(matrices, offsets), u0, **options)

    short, long = solve(10), solve(2000)
    np.testing.assert_allclose(long.residuals[:11], short.residuals, **CLOSE)
    true = matrices.mean(0) @ np.asarray(long.solution) - offsets.mean(0)
    # Of the order L |u_0 - u*| / k, and not much less: the pull to the start fades no faster.
    distance = np.linalg.norm(np.linalg.solve(matrices.mean(0), offsets.mean(0)))
    assert np.linalg.norm(true) <= 10 * lipschitz * distance / 2000


def solve_either(name, operator, init, *, num_steps=5, **options):
    if name == "plain":
        return optim.halpern(operator, init, lipschitz=2.0, num_steps=num_steps, **options)
    options = dict(num_components=4, rng=jax.random.key(0)) | options
    return optim.variance_reduced_halpern(lambda u, i: operator(u), init, lipschitz=2.0, num_steps=num_steps, **options)


@pytest.mark.parametrize("name", ["plain", "reduced"])
def test_edge_cases(name):
    tree = {"a": jnp.asarray([1.0, 2.0], jnp.bfloat16), "b": None, "c": jnp.asarray(3.0), "d": jnp.zeros((0, 2))}
    still = solve_either(name, lambda u: jax.tree.map(jnp.zeros_like, u), tree)
    assert still.solution["b"] is None
    assert still.solution["a"].dtype == jnp.bfloat16
    # Weights 1/(k+2) and 1 - 1/(k+2) sum to 1 up to rounding.
    for leaf in ("a", "c"):
        np.testing.assert_allclose(
            np.asarray(still.solution[leaf], np.float32), tree[leaf].astype(np.float32), rtol=1e-6
        )
    np.testing.assert_array_equal(still.residuals, 0)
    none = solve_either(name, lambda u: u, jnp.asarray([3.0, 4.0]), num_steps=0)
    np.testing.assert_array_equal(none.solution, [3.0, 4.0])
    np.testing.assert_array_equal(none.residuals, [5.0])
    empty = solve_either(name, lambda u: u, {})
    assert empty.solution == {}
    np.testing.assert_array_equal(empty.residuals, np.zeros(6))
    scalar = solve_either(name, lambda u: u, 2.0)
    assert scalar.solution.shape == ()
    batch = jax.vmap(lambda u: solve_either(name, lambda u: u, u).solution)(jnp.asarray([2.0, 4.0]))
    np.testing.assert_allclose(batch, [scalar.solution, 2 * scalar.solution], rtol=1e-6)
    # The map is linear in u here, so its slope is its value at 1.
    slope = jax.grad(lambda u: solve_either(name, lambda u: u, u).solution)(jnp.asarray(1.0))
    np.testing.assert_allclose(slope, scalar.solution / 2, rtol=1e-6)


@pytest.mark.parametrize("name", ["plain", "reduced"])
def test_half_and_double_precision(name):
    """bfloat16 iterates are kept in float32: small steps are not lost, and only the result is rounded."""
    init = jnp.asarray([1.0, 4.0], jnp.bfloat16)

    def constant(u):
        assert u.dtype == jnp.bfloat16
        return jnp.full_like(u, 1e-3)

    wide = solve_either(name, lambda u: jnp.full_like(u, 1e-3), init.astype(jnp.float32), num_steps=30)
    half = solve_either(name, constant, init, num_steps=30)
    np.testing.assert_allclose(half.solution.astype(jnp.float32), wide.solution, rtol=2**-8)
    with jax.enable_x64(True):
        tree = {"a": jnp.ones(1, jnp.float32), "b": jnp.ones(1)}
        result = solve_either(name, lambda u: u, tree)
        assert (result.solution["a"].dtype, result.solution["b"].dtype) == (jnp.float32, jnp.float64)


@pytest.mark.parametrize(
    ("name", "kwargs", "words"),
    [
        ("halpern", dict(lipschitz=0.0), r"lipschitz=0.0 .*\(0, inf\)"),
        ("halpern", dict(lipschitz=float("nan")), "lipschitz=nan"),
        ("halpern", dict(num_steps=-1), r"num_steps=-1 .*\[0, inf\)"),
        ("variance_reduced_halpern", dict(lipschitz=-1.0), "lipschitz=-1.0"),
        ("variance_reduced_halpern", dict(num_steps=-1), "num_steps=-1"),
        ("variance_reduced_halpern", dict(num_components=0), r"num_components=0 .*\[1, inf\)"),
        ("variance_reduced_halpern", dict(batch_size=0), r"batch_size=0 .*\[1, inf\)"),
    ],
)
def test_bad_arguments(name, kwargs, words):
    defaults = dict(lipschitz=1.0, num_steps=3)
    if name != "halpern":
        defaults |= dict(num_components=4, rng=jax.random.key(0))
    with pytest.raises(ValueError, match=words):
        getattr(optim, name)(lambda u, *args: u, jnp.ones(2), **(defaults | kwargs))
