"""Curvature against matrices whose eigenvalues are known, and the loss landscape against its definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard import train

KEY = jax.random.key(0)

# Products of a few dozen float32 numbers beside eigenvalues of at most 10: 10 * 64 * 2^-24 = 4e-5, much less as a rule.
CLOSE = dict(rtol=2e-5, atol=2e-5)


def symmetric(spectrum, seed=0):
    """A symmetric matrix with these eigenvalues, in float64."""
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(len(spectrum), len(spectrum))))
    return basis * np.asarray(spectrum) @ basis.T


def quadratic(matrix):
    """x'Ax/2 plus a linear term, which has no curvature."""
    return lambda x: 0.5 * x @ (jnp.asarray(matrix, x.dtype) @ x) + jnp.sum(x)


def eigenvalues(matrix, num_steps, point=None):
    point = jnp.ones(len(matrix)) if point is None else point
    return train.hessian_eigenvalues(quadratic(matrix), point, num_steps=num_steps, rng=KEY)


@functools.partial(jax.jit, static_argnames="num_steps")
def top_eigenvalue(matrix, key=KEY, num_steps=20):
    """Compiled once for all matrices of a size."""
    return train.hessian_top_eigenvalue(quadratic(matrix), jnp.ones(len(matrix)), num_steps=num_steps, rng=key)


def test_hvp_equals_the_hessian_times_the_vector():
    def loss(p):
        return jnp.sum(jnp.exp(p["a"]) * p["b"] ** 2)

    params = {"a": jnp.asarray([0.0, 1.0]), "b": jnp.asarray(3.0), "none": None}
    tangent = {"a": jnp.asarray([1.0, -2.0]), "b": jnp.asarray(0.5), "none": None}
    product = jax.jit(functools.partial(train.hvp, loss))(params, tangent)
    # d2/da2 = e^a b^2 (diagonal), d2/dadb = 2 e^a b, d2/db2 = 2 sum e^a.
    a, b, u, v = np.array([0.0, 1.0]), 3.0, np.array([1.0, -2.0]), 0.5
    np.testing.assert_allclose(product["a"], np.exp(a) * b**2 * u + 2 * np.exp(a) * b * v, rtol=1e-6)
    np.testing.assert_allclose(product["b"], 2 * b * np.exp(a) @ u + 2 * np.exp(a).sum() * v, rtol=1e-6)
    assert product["none"] is None


def test_hvp_keeps_half_precision_and_scalars():
    product = train.hvp(lambda x: x**3, jnp.asarray(2.0, jnp.bfloat16), jnp.asarray(1.0, jnp.bfloat16))
    assert (product.dtype, product.shape, float(product)) == (jnp.bfloat16, (), 12.0)


def numpy_lanczos(matrix, start, num_steps):
    """The same recursion with a list of vectors, in float64."""
    basis, alphas, betas = [start / np.linalg.norm(start)], [], []
    for _ in range(num_steps):
        w = matrix @ basis[-1]
        alphas.append(basis[-1] @ w)
        for _ in range(2):
            for q in basis:
                w = w - (q @ w) * q
        betas.append(np.linalg.norm(w))
        basis.append(w / betas[-1])
    return alphas, betas[:-1]


def test_lanczos_follows_the_recursion():
    matrix, start = symmetric(np.linspace(-1, 2, 8)), np.random.default_rng(1).normal(size=8)
    alphas, betas = numpy_lanczos(matrix, start, 5)
    run = jax.jit(lambda a, v: train.lanczos(lambda x: a @ x, v, num_steps=5))
    result = run(jnp.asarray(matrix, jnp.float32), jnp.asarray(start, jnp.float32))
    np.testing.assert_allclose(result[0], alphas, **CLOSE)
    np.testing.assert_allclose(result[1], betas, **CLOSE)
    # The length of the start is divided out; a power of two exactly.
    again = run(jnp.asarray(matrix, jnp.float32), 64 * jnp.asarray(start, jnp.float32))
    jax.tree.map(np.testing.assert_array_equal, again, result)


def test_lanczos_in_half_precision_accumulates_in_float32():
    alphas, betas = train.lanczos(lambda v: 2 * v, jnp.ones(3, jnp.bfloat16), num_steps=2)
    assert (alphas.dtype, betas.dtype) == (jnp.float32, jnp.float32)
    np.testing.assert_allclose(alphas, [2.0, 2.0], rtol=1e-6)


def test_an_exhausted_start_leaves_the_rest_of_the_matrix_harmless():
    """From (1, 1, 0, 0) only the eigenvalues 1 and 3 of diag(1, 3, 5, 7) can be seen: alpha = 2, 2 and beta = 1."""
    start, diagonal = jnp.asarray([1.0, 1.0, 0.0, 0.0]), jnp.asarray([1.0, 3.0, 5.0, 7.0])
    alphas, betas = train.lanczos(lambda v: diagonal * v, start, num_steps=4)
    np.testing.assert_allclose(alphas, [2.0, 2.0, 2.0, 2.0], rtol=1e-6)
    np.testing.assert_allclose(betas, [1.0, 0.0, 0.0], rtol=1e-6)


@pytest.mark.parametrize("spectrum", [np.linspace(0.1, 10, 12), [-2.0, -1.0, 0.5]])
def test_as_many_steps_as_dimensions_find_all_eigenvalues(spectrum):
    found = eigenvalues(symmetric(spectrum), num_steps=100)
    assert (found.dtype, found.shape) == (jnp.float32, (len(spectrum),))
    np.testing.assert_allclose(found, spectrum, **CLOSE)


def test_fifteen_steps_find_a_top_that_stands_apart():
    """Its gap is a quarter of the rest of the spectrum, so the error falls by about 7 a step."""
    spectrum = np.append(np.linspace(-0.5, 4.0, 63), 5.125)
    found = eigenvalues(symmetric(spectrum), num_steps=15)
    assert found.shape == (15,)
    np.testing.assert_allclose(found[-1], 5.125, atol=1e-3)
    assert np.all(np.diff(found) > 0)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_ritz_values_lie_inside_and_widen(seed):
    rng = np.random.default_rng(seed)
    matrix = rng.normal(size=(10, 10))
    matrix = matrix + matrix.T
    top = np.linalg.eigvalsh(matrix)[-1]
    estimates = [float(top_eigenvalue(jnp.asarray(matrix), jax.random.key(seed), n)) for n in (3, 10)]
    assert np.all(np.diff(estimates) >= -1e-4)
    assert estimates[-1] <= top + 1e-4
    np.testing.assert_allclose(estimates[-1], top, rtol=1e-3)


def test_power_iteration_agrees_on_the_dominant_one():
    matrix = jnp.asarray(symmetric([0.1, 0.5, 1.0, 2.0, 4.0]), jnp.float32)
    dominant, _ = optax.power_iteration(matrix, num_iters=200, error_tolerance=1e-7)
    np.testing.assert_allclose(top_eigenvalue(matrix), dominant, rtol=1e-5)


@pytest.mark.parametrize(("factor", "diverges"), [(1.98, False), (2.02, True)])
def test_gradient_descent_diverges_above_two_over_the_top_eigenvalue(factor, diverges):
    matrix = jnp.asarray(symmetric([0.2, 0.7, 0.9, 1.3, 3.0]), jnp.float32)
    lr = factor / top_eigenvalue(matrix)
    # The part along the top is multiplied by |1 - factor| = 0.98 or 1.02 a step; 500 times that is 4e-5 or 2e4.
    point = jax.lax.fori_loop(0, 500, lambda _, x: x - lr * matrix @ x, jnp.ones(5))
    assert (jnp.linalg.norm(point) > 2.0) == diverges


def test_zero_hessian():
    np.testing.assert_array_equal(eigenvalues(np.zeros((5, 5)), num_steps=4), [0.0])
    assert top_eigenvalue(jnp.zeros((5, 5))) == 0.0


def test_low_rank_hessian():
    """Two eigenvalues and many zeros: three different values, and nothing else however many steps are allowed."""
    found = eigenvalues(symmetric([-3.0, 1.0, *[0.0] * 10]), num_steps=9)
    # Once the three are found, what is left of a direction is rounding, near the bound that stops: its value is zero.
    assert 3 <= len(found) <= 9
    np.testing.assert_allclose(found, [-3.0, *[0.0] * (len(found) - 2), 1.0], **CLOSE)


@pytest.mark.parametrize("spectrum", [[3.0, 1.0, 0, 0, 0], [-3.0, 1.0, 0, 0, 0], [-3.0, -1.0, 0, 0, 0], [-2.0] * 5])
def test_top_of_a_hessian_of_few_values(spectrum):
    """Under jit, with steps left over that must not add a value of their own."""
    np.testing.assert_allclose(top_eigenvalue(jnp.asarray(symmetric(spectrum))), max(spectrum), **CLOSE)


def test_a_repeated_eigenvalue_is_found_once():
    np.testing.assert_allclose(eigenvalues(-2 * np.eye(6), num_steps=5), [-2.0], rtol=1e-6)


def test_one_dimension_bare_scalars_and_none_leaves():
    np.testing.assert_allclose(eigenvalues([[-3.0]], num_steps=20), [-3.0], rtol=1e-6)
    cube = train.hessian_eigenvalues(lambda x: x**3, 2.0, rng=KEY)
    np.testing.assert_allclose(cube, [12.0], rtol=1e-6)
    tree = {"a": jnp.ones((2, 1)), "b": None, "c": jnp.ones(())}
    found = train.hessian_eigenvalues(lambda p: jnp.sum(p["a"] ** 2) + 3 * p["c"] ** 2, tree, rng=KEY)
    np.testing.assert_allclose(found, [2.0, 6.0], rtol=1e-5)


def test_half_precision_parameters_are_widened():
    """1 + 2^-10 is no bfloat16 number: products of the loss would be rounded, were it run in bfloat16."""
    matrix = np.diag([1 + 2.0**-10, 3.0])
    found = eigenvalues(matrix, num_steps=2, point=jnp.ones(2, jnp.bfloat16))
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.diag(matrix), rtol=1e-6)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        spectrum = np.linspace(-1, 3, 8)
        found = eigenvalues(symmetric(spectrum), num_steps=8)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, spectrum, atol=1e-12)
        narrow = train.hessian_eigenvalues(quadratic(symmetric(spectrum)), jnp.ones(8, jnp.float32), rng=KEY)
        assert narrow.dtype == jnp.float32


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_a_loss_that_is_not_finite_gives_nan(value):
    matrix = np.eye(5)
    matrix[1, 2] = value
    assert np.all(np.isnan(eigenvalues(matrix, num_steps=3)))
    assert np.isnan(top_eigenvalue(jnp.asarray(matrix)))


def test_jit_vmap_and_eager_agree():
    matrices = jnp.stack(
        [jnp.asarray(symmetric(s), jnp.float32) for s in ([0.1, 1, 2, 3, 4], [0.0] * 5, [-1.0, 5, 5, 5, 5])]
    )
    batched = jax.vmap(top_eigenvalue)(matrices)
    np.testing.assert_allclose(batched, [4.0, 0.0, 5.0], **CLOSE)
    eager = train.hessian_top_eigenvalue(quadratic(matrices[0]), jnp.ones(5), rng=KEY)
    np.testing.assert_allclose(eager, top_eigenvalue(matrices[0]), rtol=1e-5)


def test_relu_network():
    """Of relu(x a) b with squared error: one hidden unit, whose Hessian can be written down where it is active."""
    rng = np.random.default_rng(0)
    x, y, a, b = rng.normal(size=(20, 2)), rng.normal(size=20), rng.normal(size=2), 0.7

    def loss(p):
        return jnp.mean((jax.nn.relu(jnp.asarray(x, jnp.float32) @ p["a"]) * p["b"] - jnp.asarray(y, jnp.float32)) ** 2)

    params = {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b)}
    active = np.where((x @ a > 0)[:, None], x, 0)
    hidden = active @ a
    residual = hidden * b - y
    mixed = 2 * (b * active.T @ hidden + active.T @ residual) / 20
    expected = np.block([[2 * b**2 * active.T @ active / 20, mixed[:, None]], [mixed, 2 * hidden @ hidden / 20]])
    expected = np.linalg.eigvalsh(expected)
    found = train.hessian_eigenvalues(loss, params, rng=KEY)
    np.testing.assert_allclose([found[0], found[-1]], [expected[0], expected[-1]], rtol=1e-4, atol=1e-4)


def class_loss(params, batch):
    """Mean over the examples d of d_i (p_i - 1)^2 / 2: the Hessian is the diagonal of mean d."""
    return 0.5 * jnp.mean(batch @ jnp.square(params - 1))


def test_class_curvature():
    batches = [jnp.asarray([[1.0, -2.0], [3.0, 0.0]]), jnp.asarray([[4.0, 1.0]]), jnp.zeros((1, 2))]
    run = jax.jit(lambda p, b: train.class_curvature(class_loss, p, b, num_steps=5, rng=KEY))
    result = run(jnp.ones(2), batches)
    # Means: (2, -1), (4, 1) and (0, 0).
    np.testing.assert_allclose(result.min, [-1.0, 1.0, 0.0], **CLOSE)
    np.testing.assert_allclose(result.max, [2.0, 4.0, 0.0], **CLOSE)
    np.testing.assert_allclose(result.ratio, [0.5, 0.25, 0.0], **CLOSE)


def test_class_curvature_compiles_equal_shapes_once():
    traced = []

    def loss(params, batch):
        traced.append(batch.shape)
        return class_loss(params, batch)

    def run(*scales):
        traced.clear()
        batches = [scale * jnp.asarray([[3.0, -1.0]]) for scale in scales]
        return train.class_curvature(loss, jnp.ones(2), batches, num_steps=2, rng=KEY)

    run(1.0)
    once = len(traced)
    result = run(1.0, 2.0, 3.0)
    assert len(traced) == once
    np.testing.assert_allclose(result.max, [3.0, 6.0, 9.0], **CLOSE)
    np.testing.assert_allclose(result.ratio, [1 / 3] * 3, **CLOSE)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_distance_from_init(dtype):
    init = {"a": jnp.ones((2, 2), dtype), "b": None, "c": jnp.asarray(1.0, dtype)}
    params = jax.tree.map(lambda x: x + 2, init)
    # Five entries have moved by 2.
    distance = jax.jit(train.distance_from_init)(params, init)
    assert (distance.dtype, distance.shape) == (jnp.float32, ())
    np.testing.assert_allclose(distance, np.sqrt(20), rtol=1e-6)
    assert train.distance_from_init(init, init) == 0
    assert train.distance_from_init({}, {}) == 0
    assert train.distance_from_init(3.0, 1.0) == 2.0


def test_distance_from_init_in_half_precision_adds_in_float32():
    """4096 ones; a sum of squares in bfloat16 would stop at 256."""
    assert train.distance_from_init(jnp.ones(4096, jnp.bfloat16), jnp.zeros(4096, jnp.bfloat16)) == 64.0


LANDSCAPE_DIFFERENCE = jax.jit(train.landscape_difference)


def numpy_landscape_difference(losses):
    losses = np.asarray(losses, np.float64)
    means = [losses[: k + 1].mean(axis=0) for k in range(len(losses))]
    return np.array([np.mean((means[k + 1] - means[k]) ** 2) for k in range(len(losses) - 1)])


@settings(max_examples=20, deadline=None)
@given(
    shape=st.sampled_from([(2, 1), (7, 3), (20, 5)]), seed=st.integers(0, 10**6), shift=st.sampled_from([0.0, 100.0])
)
def test_landscape_difference_follows_the_definition(shape, seed, shift):
    losses = (np.random.default_rng(seed).exponential(size=shape) + shift).astype(np.float32)
    # The shift cancels, but for what rounding to float32 has put into the losses, which both sides see.
    result = LANDSCAPE_DIFFERENCE(losses)
    np.testing.assert_allclose(result, numpy_landscape_difference(losses), rtol=1e-3, atol=1e-9)
    k = np.arange(1, shape[0])
    means = np.cumsum(losses, axis=0, dtype=np.float64)[:-1] / k[:, None]
    assert np.all(k**2 * np.asarray(result) <= np.max((losses[1:] - means) ** 2) * (1 + 1e-3))


def test_two_examples_and_equal_examples():
    np.testing.assert_array_equal(train.landscape_difference(jnp.asarray([[1.0], [4.0]])), [2.25])
    equal = jnp.tile(jnp.asarray([[0.1, 1 / 3, 1e4]]), (1000, 1))
    np.testing.assert_array_equal(LANDSCAPE_DIFFERENCE(equal), np.zeros(999))


def test_landscape_difference_of_many_examples():
    """2^18 losses near 1: a running float32 sum would be off by 2^-7 at its end, as much as a loss differs from 1."""
    losses = (1 + 0.01 * np.random.default_rng(0).normal(size=(2**18, 1))).astype(np.float32)
    wide = losses.astype(np.float64)
    k = np.arange(1, len(losses))[:, None]
    expected = np.mean(((wide[1:] - np.cumsum(wide, axis=0)[:-1] / k) / (k + 1)) ** 2, axis=1)
    result = np.asarray(LANDSCAPE_DIFFERENCE(losses), np.float64)
    # Relative to the scale 1 / k^2, as single differences may vanish.
    np.testing.assert_allclose(k[:, 0] ** 2 * result, k[:, 0] ** 2 * expected, rtol=1e-4, atol=1e-8)


def test_landscape_difference_dtypes():
    assert train.landscape_difference(jnp.ones((3, 2), jnp.bfloat16)).dtype == jnp.float32
    batched = jax.vmap(LANDSCAPE_DIFFERENCE)(jnp.ones((4, 3, 2)))
    assert batched.shape == (4, 2)
    with jax.enable_x64(True):
        assert train.landscape_difference(jnp.ones((3, 2))).dtype == jnp.float64


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: train.lanczos(lambda v: v, jnp.ones(2), num_steps=0), r"num_steps=0 must lie in \[1, inf\)"),
        (lambda: train.lanczos(lambda v: v, jnp.ones((2, 2)), num_steps=1), r"init has shape \(2, 2\)"),
        (lambda: train.lanczos(lambda v: v, jnp.ones(0), num_steps=1), r"init has shape \(0,\)"),
        (lambda: eigenvalues(np.eye(2), num_steps=0), "num_steps=0"),
        (lambda: train.hessian_top_eigenvalue(jnp.sum, jnp.ones(2), num_steps=-1, rng=KEY), "num_steps=-1"),
        (lambda: train.hessian_eigenvalues(lambda p: 0.0, {}, rng=KEY), "no entries"),
        (lambda: jax.jit(lambda p: train.hessian_eigenvalues(jnp.sum, p, rng=KEY))(jnp.ones(2)), "top_eigenvalue"),
        (lambda: train.class_curvature(class_loss, jnp.ones(2), [], rng=KEY), "batches_by_class is empty"),
        (lambda: train.class_curvature(class_loss, jnp.ones(2), [jnp.ones(2)], num_steps=0, rng=KEY), "num_steps=0"),
        (lambda: train.landscape_difference(jnp.ones((1, 3))), r"losses has shape \(1, 3\)"),
        (lambda: train.landscape_difference(jnp.ones((3, 0))), r"losses has shape \(3, 0\)"),
        (lambda: train.landscape_difference(jnp.ones(3)), r"losses has shape \(3,\)"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()
