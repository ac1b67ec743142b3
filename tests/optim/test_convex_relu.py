"""The convex program: its ADMM against dense float64 algebra, and its optimum against duality and gradient descent."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import optim

BETA = 0.05
SOLVE = jax.jit(optim.convex_relu_admm)


def data(seed=0, n=7):
    """One feature and a constant, so that hidden units are directions in the plane."""
    rng = np.random.default_rng(seed)
    x = np.stack([np.sort(rng.normal(size=n)), np.ones(n)], axis=1)
    return x, np.sin(3 * x[:, 0]) + 0.3 * rng.normal(size=n)


def all_patterns(x):
    """Every pattern of units in the plane: one between every two neighbouring critical angles."""
    critical = np.sort([(np.arctan2(-a, b) + k * np.pi) % (2 * np.pi) for a, b in x for k in (0, 1)])
    middles = (critical + np.append(critical[1:], critical[0] + 2 * np.pi)) / 2
    return np.unique([x @ np.array([np.cos(t), np.sin(t)]) >= 0 for t in middles], axis=0)


def network_objective(x, y, hidden, output, beta):
    error = np.maximum(x @ np.asarray(hidden), 0) @ np.asarray(output) - y
    return error @ error / 2 + beta / 2 * (np.sum(np.square(hidden)) + np.sum(np.square(output)))


def reference_admm(x, y, patterns, beta, rho, dual_step, num_steps):
    """Dense matrices, as the program is written."""
    n, d = x.shape
    size = len(patterns)
    F = np.concatenate([D[:, None] * x for D in patterns] + [-D[:, None] * x for D in patterns], axis=1)
    G = np.zeros((2 * size * n, 2 * size * d))
    for i, D in enumerate(itertools.chain(patterns, patterns)):
        G[i * n : (i + 1) * n, i * d : (i + 1) * d] = (2 * D[:, None] - 1) * x
    inverse = np.linalg.inv(np.eye(2 * size * d) + F.T @ F / rho + G.T @ G)
    q = lam = np.zeros(2 * size * d)
    s = nu = np.zeros(2 * size * n)
    for _ in range(num_steps):
        u = inverse @ (F.T @ y / rho + q - lam + G.T @ (s - nu))
        q = np.zeros_like(u)
        for i in range(2 * size):
            group = slice(i * d, (i + 1) * d)
            norm = np.linalg.norm((u + lam)[group])
            q[group] = (u + lam)[group] * max(1 - beta / (rho * norm), 0) if norm else 0
        s = np.maximum(G @ u + nu, 0)
        lam, nu = lam + dual_step * (u - q), nu + dual_step * (G @ u - s)
    return q.reshape(2, size, d)


@pytest.fixture(scope="module")
def optimum():
    """Converged in float64: data, patterns and the point."""
    x, y = data()
    with jax.enable_x64(True):
        patterns = jnp.asarray(all_patterns(x))
        point = SOLVE(x, y, patterns, beta=BETA, num_steps=100_000)
        objective = float(optim.convex_relu_objective(x, y, patterns, *point, beta=BETA))
    return x, y, np.asarray(patterns), optim.ConvexRelu(*map(np.asarray, point)), objective


def test_patterns():
    x, _ = data()
    patterns = optim.convex_relu_patterns(x, 5000, jax.random.key(0))
    assert patterns.dtype == bool
    found = {tuple(row) for row in np.asarray(patterns).tolist()}
    assert len(found) == len(patterns) <= 5000
    # With 5000 draws all 2n of them appear, and no others exist: in the plane there are 2 sum_{k<2} C(n-1, k) = 2n.
    assert found == {tuple(row) for row in all_patterns(x).tolist()}
    assert len(found) == 2 * len(x)
    np.testing.assert_array_equal(optim.convex_relu_patterns(x, 5000, jax.random.key(0)), patterns)
    assert optim.convex_relu_patterns(x, 1, jax.random.key(1)).shape == (1, len(x))


@pytest.mark.parametrize(("beta", "rho", "dual_step", "num_steps"), [(0.05, 0.1, 1.0, 30), (0.3, 1.0, 1.5, 7)])
def test_follows_dense_algebra(beta, rho, dual_step, num_steps):
    x, y = data(1, n=5)
    patterns = all_patterns(x)
    options = dict(beta=beta, rho=rho, dual_step=dual_step, num_steps=num_steps)
    expected = reference_admm(x, y, patterns.astype(float), **options)
    single = SOLVE(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32), patterns, **options)
    # The two systems that are solved have condition numbers up to 2 P / rho = 200, times 1e-7, for some tens of steps.
    np.testing.assert_allclose(jnp.stack(single), expected, atol=1e-3)
    with jax.enable_x64(True):
        double = SOLVE(x, y, patterns, **options)
        np.testing.assert_allclose(jnp.stack(double), expected, rtol=1e-9, atol=1e-11)


def test_network_has_the_objective_of_the_program(optimum):
    x, y, patterns, point, objective = optimum
    with jax.enable_x64(True):
        hidden, output = optim.convex_relu_network(*point)
    assert hidden.shape == (2, len(output))
    assert 0 < len(output) < 2 * len(patterns)
    for i, D in enumerate(patterns):
        for u in (point.v[i], point.w[i]):
            assert np.min((2 * D - 1) * (x @ u)) > -1e-6
    np.testing.assert_allclose(network_objective(x, y, hidden, output, BETA), objective, rtol=1e-5)


def test_duality_gap_is_closed(optimum):
    """The minimum over networks is the maximum of y'r - r'r/2 over r with |r' relu(X u)| <= beta for all unit u.

    In the plane the constraint is seen by going round the circle, without any patterns.
    """
    x, y, patterns, point, objective = optimum
    predicted = sum(D * (x @ (v - w)) for D, v, w in zip(patterns, *point, strict=True))
    r = y - predicted
    angles = np.linspace(0, 2 * np.pi, 100_001)
    reached = np.abs(r @ np.maximum(x @ np.stack([np.cos(angles), np.sin(angles)]), 0)).max()
    r = r * min(1, BETA / reached)
    assert reached < BETA * 1.001
    np.testing.assert_allclose(y @ r - r @ r / 2, objective, rtol=1e-3)
    assert y @ r - r @ r / 2 <= objective * (1 + 1e-6)


def test_gradient_descent_never_gets_below(optimum):
    x, y, _, _, objective = optimum
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)

    def loss(params):
        error = jax.nn.relu(x @ params["hidden"]) @ params["output"] - y
        return jnp.sum(error**2) / 2 + BETA / 2 * optax.tree.norm(params, squared=True)

    def train(key):
        k1, k2 = jax.random.split(key)
        params = {"hidden": jax.random.normal(k1, (2, 30)) / 2, "output": jax.random.normal(k2, (30,)) / 6}
        step = jax.lax.scan(
            lambda p, _: (jax.tree.map(lambda a, g: a - 0.02 * g, p, jax.grad(loss)(p)), None), params, length=5000
        )
        return loss(step[0])

    losses = np.asarray(jax.jit(jax.vmap(train))(jax.random.split(jax.random.key(0), 4)))
    assert losses.min() > objective * (1 - 1e-5)
    assert losses.min() < objective * 1.02


def test_objective_falls_in_the_long_run(optimum):
    x, y, patterns, _, objective = optimum
    x, y = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)

    def gap(num_steps):
        point = SOLVE(x, y, patterns, beta=BETA, num_steps=num_steps)
        return jnp.abs(optim.convex_relu_objective(x, y, patterns, *point, beta=BETA) - objective)

    gaps = [float(gap(steps)) for steps in (1, 4, 16, 64, 1000)]
    assert gaps == sorted(gaps, reverse=True)
    # Within the rounding of a sum of about ten float32 terms.
    assert gaps[-1] < 1e-6


def test_large_beta_gives_zero_and_an_empty_network():
    """Zero is optimal if no unit vector reaches beta: |X' D_i y| bounds y' D_i X u."""
    x, y = data(2)
    patterns = all_patterns(x)
    largest = max(np.linalg.norm(x.T @ (D * y)) for D in patterns)
    with jax.enable_x64(True):
        point = SOLVE(x, y, patterns, beta=1.01 * largest, num_steps=20_000)
        np.testing.assert_array_equal(jnp.stack(point), 0)
        hidden, output = optim.convex_relu_network(*point)
    assert (hidden.shape, output.shape) == ((2, 0), (0,))
    point = np.zeros((2, len(patterns), 2), np.float32)
    np.testing.assert_allclose(optim.convex_relu_objective(x, y, patterns, *point, beta=1.0), y @ y / 2, rtol=1e-6)


def test_one_pattern():
    """All units active, and y = X (1, 2) > 0: the constraint is slack, so this is ridge-like in one vector.

    Stationarity of |X v - y|^2 / 2 + beta |v|: X'(X v - y) + beta v / |v| = 0.
    """
    x = np.array([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]])
    y, beta = x @ np.array([1.0, 2.0]), 0.5
    with jax.enable_x64(True):
        v, w = SOLVE(x, y, np.ones((1, 3), bool), beta=beta, num_steps=5000)
    np.testing.assert_array_equal(w, 0)
    v = np.asarray(v[0])
    np.testing.assert_allclose(x.T @ (x @ v - y) + beta * v / np.linalg.norm(v), 0, atol=1e-6)


def test_network_by_hand():
    hidden, output = optim.convex_relu_network(
        jnp.asarray([[3.0, 4.0], [0.0, 0.0]]), jnp.asarray([[0.0, 0.0], [0.0, 4.0]])
    )
    np.testing.assert_allclose(output, [np.sqrt(5), -2.0], rtol=1e-6)
    np.testing.assert_allclose(hidden, np.stack([[3 / np.sqrt(5), 4 / np.sqrt(5)], [0, 2]], axis=1), rtol=1e-6)


def test_many_patterns_need_no_matrix_of_their_number_squared():
    """6000 unknowns: a dense inverse would hold 36 million numbers; the program's temporaries stay below 2 million."""
    n, d, size = 20, 10, 300
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((n, d), (n,), (size, n))]
    compiled = jax.jit(lambda x, y, p: optim.convex_relu_admm(x, y, p, num_steps=5)).lower(*args).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2_000_000


def test_dtypes_vmap_and_grad():
    x, y = (value.astype(np.float32) for value in data(3))
    patterns = all_patterns(x)
    rounded = jnp.asarray(x, jnp.bfloat16), jnp.asarray(y, jnp.bfloat16)
    half = SOLVE(*rounded, patterns, num_steps=3)
    assert half.v.dtype == half.w.dtype == jnp.bfloat16
    hidden, output = optim.convex_relu_network(*half)
    assert hidden.dtype == output.dtype == jnp.bfloat16
    assert optim.convex_relu_objective(x, y, patterns, *half, beta=1.0).dtype == jnp.float32
    ys = jnp.asarray(np.stack([y, -y]))

    def solve(y):
        return SOLVE(x, y, patterns, beta=0.05, num_steps=20)

    many = jax.vmap(solve)(ys)
    # The targets' sign exchanges v and w.
    np.testing.assert_allclose(many.v[0], many.w[1], atol=1e-5)
    np.testing.assert_allclose(many.v[0], solve(ys[0]).v, atol=1e-5)
    slope = jax.jit(jax.grad(lambda v: optim.convex_relu_objective(x, y, patterns, v, 0 * v, beta=1.0)))(many.v[0])
    assert bool(optim.all_finite(slope))
    np.testing.assert_array_equal(jnp.stack(solve(0 * ys[0])), 0)
    # The slope of the whole solver, at targets that give zero: no group may divide by its length.
    through = jax.jit(jax.grad(lambda y: jnp.sum(optim.convex_relu_admm(x, y, patterns, beta=9.0, num_steps=2).v)))
    np.testing.assert_array_equal(through(0 * ys[0]), 0)
    np.testing.assert_array_equal(SOLVE(x, y, patterns, beta=0.05, num_steps=0).v, 0)


PROBLEM = (jnp.ones((3, 2)), jnp.ones(3), jnp.ones((4, 3), bool))
POINT = (jnp.ones((4, 2)), jnp.ones((4, 2)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: optim.convex_relu_patterns(PROBLEM[0], 0, jax.random.key(0)), r"num_patterns=0 .*\[1, inf\)"),
        (lambda: optim.convex_relu_patterns(PROBLEM[1], 5, jax.random.key(0)), r"x has shape \(3,\)"),
        (lambda: optim.convex_relu_admm(*PROBLEM, beta=0.0), r"beta=0.0 .*\(0, inf\)"),
        (lambda: optim.convex_relu_admm(*PROBLEM, rho=-1.0), "rho=-1.0"),
        (lambda: optim.convex_relu_admm(*PROBLEM, dual_step=1.7), r"dual_step=1.7 .*\(0, 1.618\)"),
        (lambda: optim.convex_relu_admm(*PROBLEM, num_steps=-1), "num_steps=-1"),
        (lambda: optim.convex_relu_admm(*PROBLEM[:2], PROBLEM[2].T), r"patterns \(3, 4\)"),
        (lambda: optim.convex_relu_admm(PROBLEM[0], jnp.ones(2), PROBLEM[2]), r"x has shape \(3, 2\), y \(2,\)"),
        (lambda: optim.convex_relu_objective(*PROBLEM, *POINT, beta=0.0), "beta=0.0"),
        (lambda: optim.convex_relu_objective(*PROBLEM, POINT[0], POINT[0][:1], beta=1.0), r"w \(1, 2\)"),
        (lambda: optim.convex_relu_network(POINT[0], POINT[0][:1]), r"v has shape \(4, 2\) and w \(1, 2\)"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()
