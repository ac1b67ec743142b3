"""Block rules against their formulas in float64 loops, and on quadratics, where progress is known."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard import optim

BLOCKS = np.array([[0, 1], [2, 3], [4, 5], [1, 4]])
N = 6
# Solves of 2 x 2 systems whose condition is below 100, in float32.
CLOSE = dict(rtol=1e-4, atol=1e-6)


def problem(seed, n=N):
    """A positive definite matrix and a gradient."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(n, n))
    return root @ root.T / n + 0.3 * np.eye(n), rng.normal(size=n)


def bounds(hessian):
    """The constants of the three cheaper rules: top eigenvalues, and block size times the diagonal."""
    lipschitz = np.array([np.linalg.eigvalsh(hessian[np.ix_(b, b)])[-1] for b in BLOCKS])
    return dict(lipschitz=lipschitz, diagonal=BLOCKS.shape[1] * np.diag(hessian), hessian=hessian)


def reference_score(rule, g, index, lipschitz, diagonal, hessian):
    b = BLOCKS[index]
    if rule == "gs":
        return np.sqrt(sum(g[i] ** 2 for i in b))
    if rule == "gsl":
        return np.sqrt(sum(g[i] ** 2 for i in b) / lipschitz[index])
    if rule == "gsd":
        return np.sqrt(sum(g[i] ** 2 / diagonal[i] for i in b))
    return np.sqrt(g[b] @ np.linalg.inv(hessian[np.ix_(b, b)]) @ g[b])


ARGUMENT = {"gs": (), "gsl": ("lipschitz",), "gsd": ("diagonal",), "gsq": ("hessian",)}
SCORES = jax.jit(optim.block_scores, static_argnames="rule")
DIRECTION = jax.jit(optim.block_direction)


def scores(rule, g, given, blocks=BLOCKS):
    arrays = {name: jnp.asarray(given[name], jnp.float32) for name in ARGUMENT[rule]}
    return SCORES(jnp.asarray(g, jnp.float32), blocks, rule=rule, **arrays)


@pytest.mark.parametrize("rule", list(ARGUMENT))
def test_scores(rule):
    """The fourth block overlaps two others."""
    for seed in range(3):
        hessian, g = problem(seed)
        expected = [reference_score(rule, g, i, **bounds(hessian)) for i in range(len(BLOCKS))]
        np.testing.assert_allclose(scores(rule, g, bounds(hessian)), expected, **CLOSE)


def test_rules_agree_where_they_should():
    _, g = problem(0)
    same = dict(lipschitz=np.full(len(BLOCKS), 2.5), hessian=2.5 * np.eye(N))
    gs, gsl, gsq = (scores(rule, g, same) for rule in ("gs", "gsl", "gsq"))
    np.testing.assert_array_equal(np.argsort(gs), np.argsort(gsl))
    np.testing.assert_allclose(gsq, gsl, **CLOSE)
    single, constants = np.arange(N)[:, None], np.linspace(0.5, 3.0, N)
    given = dict(lipschitz=constants, diagonal=constants, hessian=np.diag(constants))
    gsl, gsd, gsq = (scores(rule, g, given, single) for rule in ("gsl", "gsd", "gsq"))
    np.testing.assert_allclose(gsd, gsl, **CLOSE)
    np.testing.assert_allclose(gsq, gsl, **CLOSE)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_decrease_is_at_least_half_the_squared_score(seed):
    """f(x + d) - f(x) = g'd + d'Hd/2 on a quadratic; exactly -score^2/2 for the true Hessian."""
    hessian, g = problem(seed)
    given = bounds(hessian)
    steps = {
        "gsl": lambda i: dict(lipschitz=given["lipschitz"][i]),
        "gsd": lambda i: dict(hessian=np.diag(given["diagonal"])),
        "gsq": lambda i: dict(hessian=hessian),
    }
    for rule, step in steps.items():
        score = np.asarray(scores(rule, g, given), np.float64)
        best = int(np.argmax(score))
        arguments = {name: jnp.asarray(value, jnp.float32) for name, value in step(best).items()}
        d = np.asarray(DIRECTION(jnp.asarray(g, jnp.float32), BLOCKS[best], **arguments), np.float64)
        assert set(np.flatnonzero(d)) <= set(BLOCKS[best])
        change = g @ d + d @ hessian @ d / 2
        slack = 1e-4 * score[best] ** 2
        assert change <= -(score[best] ** 2) / 2 + slack
        if rule == "gsq":
            assert change >= -(score[best] ** 2) / 2 - slack


def test_directions():
    hessian, g = problem(3)
    block = np.array([4, 1])
    plain = optim.block_direction(jnp.asarray(g, jnp.float32), block, lipschitz=2.0)
    matrix = optim.block_direction(jnp.asarray(g, jnp.float32), block, hessian=jnp.asarray(hessian, jnp.float32))
    expected = np.zeros((2, N))
    expected[0, block] = -g[block] / 2
    expected[1, block] = -np.linalg.inv(hessian[np.ix_(block, block)]) @ g[block]
    np.testing.assert_allclose(plain, expected[0], **CLOSE)
    np.testing.assert_allclose(matrix, expected[1], **CLOSE)


def test_one_block_is_a_full_step():
    hessian, g = problem(4)
    everything = np.arange(N)
    newton = DIRECTION(jnp.asarray(g, jnp.float32), everything, hessian=jnp.asarray(hessian, jnp.float32))
    np.testing.assert_allclose(newton, -np.linalg.solve(hessian, g), **CLOSE)
    assert scores("gs", g, {}, everything[None]).shape == (1,)


def test_zero_gradient_and_ties():
    hessian, _ = problem(5)
    zero = jnp.zeros(N)
    for rule in ARGUMENT:
        result = scores(rule, zero, bounds(hessian))
        np.testing.assert_array_equal(result, 0)
        assert jnp.argmax(result) == 0
    np.testing.assert_array_equal(optim.block_direction(zero, BLOCKS[0], lipschitz=1.0), 0)
    np.testing.assert_array_equal(DIRECTION(zero, BLOCKS[0], hessian=jnp.asarray(hessian, jnp.float32)), 0)
    assert optim.greedy_block(zero, 2, diagonal=jnp.ones(N)).tolist() == [0, 1]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.integers(1, N))
def test_greedy_block_is_the_best_of_all(seed, size):
    hessian, g = problem(seed)
    diagonal = size * np.diag(hessian)
    block = np.asarray(
        optim.greedy_block(jnp.asarray(g, jnp.float32), size, diagonal=jnp.asarray(diagonal, jnp.float32))
    )
    expected = sorted(range(N), key=lambda i: -abs(g[i]) / np.sqrt(diagonal[i]))[:size]
    assert block.tolist() == expected


def test_dtypes_vmap_and_grad():
    hessian, g = problem(6)
    half = jnp.asarray(g, jnp.bfloat16)
    assert optim.block_scores(half, BLOCKS, rule="gs").dtype == jnp.float32
    assert optim.block_direction(half, BLOCKS[0], lipschitz=1.0).dtype == jnp.bfloat16
    # 4096 squares of 1 have the root 64; summed in bfloat16 they would stop at 256, the square of 16.
    assert optim.block_scores(jnp.ones(4096, jnp.bfloat16), jnp.arange(4096)[None], rule="gs") == 64
    gs = jnp.asarray(np.stack([g, -2 * g]), jnp.float32)
    many = jax.vmap(lambda g: optim.block_scores(g, BLOCKS, rule="gs"))(gs)
    np.testing.assert_allclose(many[1], 2 * many[0], rtol=1e-6)
    h = jnp.asarray(hessian, jnp.float32)
    slope = jax.grad(lambda g: jnp.sum(optim.block_direction(g, BLOCKS[0], hessian=h)))(gs[0])
    inverse = np.linalg.inv(hessian[:2, :2])
    np.testing.assert_allclose(slope, np.append(-inverse.sum(0), np.zeros(N - 2)), **CLOSE)
    with jax.enable_x64(True):
        given = {name: jnp.asarray(value) for name, value in bounds(hessian).items()}
        exact = optim.block_scores(jnp.asarray(g), BLOCKS, rule="gsq", hessian=given["hessian"])
        expected = [reference_score("gsq", g, i, **bounds(hessian)) for i in range(len(BLOCKS))]
        np.testing.assert_allclose(exact, expected, rtol=1e-12)


GRADS = {"a": jnp.asarray([3.0, 4.0]), "b": None, "c": jnp.asarray(-6.0), "d": jnp.zeros((0, 2))}
CONSTANTS = {"a": 1.0, "b": None, "c": 4.0, "d": 1.0}


@pytest.mark.parametrize(("rule", "best"), [("gs", "c"), ("gsl", "a")])
def test_transform_updates_one_leaf(rule, best):
    """Norms 5 and 6; with L = 1 and 4 scores 5 and 3. The direction is g / L with both rules."""
    tx = optim.block_coordinate(rule=rule, lipschitz=CONSTANTS)
    update = jax.jit(lambda g: tx.update(g, tx.init(g), g, value=0.0)[0])
    updates = update(GRADS)
    assert updates["b"] is None
    expected = {"a": [0.0, 0.0], "c": 0.0} | {best: GRADS[best] / CONSTANTS[best]}
    for name, value in expected.items():
        np.testing.assert_array_equal(updates[name], value)


def test_transform_edge_cases():
    tx = optim.block_coordinate()
    assert tx.update({}, tx.init({}))[0] == {}
    assert tx.update(jnp.asarray(3.0), ())[0] == 3.0
    tied, _ = tx.update([jnp.ones(1, jnp.bfloat16), jnp.ones(1)], ())
    assert [leaf.dtype for leaf in tied] == [jnp.bfloat16, jnp.float32]
    assert [leaf.item() for leaf in tied] == [1.0, 0.0]
    zero, _ = tx.update([jnp.zeros(2), jnp.zeros(1)], ())
    np.testing.assert_array_equal(jnp.concatenate(zero), 0)
    with jax.enable_x64(True):
        mixed, _ = tx.update([jnp.ones(1, jnp.float32), 2 * jnp.ones(1)], ())
        assert [leaf.dtype for leaf in mixed] == [jnp.float32, jnp.float64]


def test_transform_follows_block_direction():
    """A quadratic whose blocks are the leaves: the same run by hand."""
    hessian, _ = problem(7)
    parts = {"a": np.arange(2), "b": np.arange(2, 6)}
    lipschitz = {name: np.linalg.eigvalsh(hessian[np.ix_(b, b)])[-1] for name, b in parts.items()}
    h = jnp.asarray(hessian, jnp.float32)
    tx = optax.chain(optim.block_coordinate(lipschitz=lipschitz), optax.scale_by_learning_rate(1.0))

    @jax.jit
    def step(params):
        point = jnp.concatenate([params["a"], params["b"]])
        grads = {name: (h @ point)[b] for name, b in parts.items()}
        return optax.apply_updates(params, tx.update(grads, tx.init(params))[0])

    params, x = {name: jnp.ones(len(b)) for name, b in parts.items()}, np.ones(N)
    for _ in range(8):
        params, g = step(params), hessian @ x
        best = max(parts, key=lambda name: np.linalg.norm(g[parts[name]]) / np.sqrt(lipschitz[name]))
        x[parts[best]] -= g[parts[best]] / lipschitz[best]
        np.testing.assert_allclose(jnp.concatenate([params["a"], params["b"]]), x, rtol=1e-4, atol=1e-5)


def test_l1_problem_finds_its_zeros():
    """With the proximal step after each update, a separable lasso is solved by one visit to each block."""
    target, strength = jnp.asarray([3.0, -0.5, 0.2, -2.0]), 1.0
    x = jnp.zeros(4)
    for i in range(4):
        d = optim.block_direction(x - target, jnp.asarray([i]), lipschitz=1.0)
        moved = x + d
        x = x.at[i].set(jnp.sign(moved[i]) * jnp.maximum(jnp.abs(moved[i]) - strength, 0))
    np.testing.assert_allclose(x, [2.0, 0.0, 0.0, -1.0])


ONES, GRAD = jnp.ones(len(BLOCKS)), jnp.ones(N)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: optim.block_scores(GRAD, BLOCKS, rule="gsk"), "rule='gsk'.*did you mean"),
        (lambda: optim.block_scores(GRAD, BLOCKS, rule="gsl"), "rule='gsl' needs lipschitz"),
        (lambda: optim.block_scores(GRAD, BLOCKS, rule="gsd"), "rule='gsd' needs diagonal"),
        (lambda: optim.block_scores(GRAD, BLOCKS, rule="gsq"), "rule='gsq' needs hessian"),
        (lambda: optim.block_scores(GRAD, BLOCKS, lipschitz=0 * ONES), r"lipschitz=0.0 .*\(0, inf\)"),
        (lambda: optim.block_scores(GRAD, BLOCKS, lipschitz=ONES[:2]), r"lipschitz has shape \(2,\).*\(4,\)"),
        (lambda: optim.block_scores(GRAD, BLOCKS, rule="gsd", diagonal=-GRAD), "diagonal=-1.0"),
        (lambda: optim.block_scores(GRAD, BLOCKS, rule="gsq", hessian=jnp.eye(2)), r"hessian has shape \(2, 2\)"),
        (lambda: optim.block_scores(GRAD, BLOCKS[0], rule="gs"), r"blocks has shape \(2,\)"),
        (lambda: optim.block_scores(jnp.eye(2), BLOCKS, rule="gs"), r"grad has shape \(2, 2\)"),
        (lambda: optim.block_direction(GRAD, BLOCKS[0]), "needs lipschitz .* or hessian"),
        (lambda: optim.block_direction(GRAD, BLOCKS[0], lipschitz=1.0, hessian=jnp.eye(N)), "not both"),
        (lambda: optim.block_direction(GRAD, BLOCKS[0], lipschitz=-1.0), "lipschitz=-1.0"),
        (lambda: optim.greedy_block(GRAD, 0, diagonal=GRAD), r"size=0 .*\[1, 6\]"),
        (lambda: optim.greedy_block(GRAD, 7, diagonal=GRAD), "size=7"),
        (lambda: optim.greedy_block(GRAD, 2, diagonal=0 * GRAD), "diagonal=0.0"),
        (lambda: optim.block_coordinate(rule="gsq"), "rule='gsq'.*gs, gsl"),
        (lambda: optim.block_coordinate(lipschitz={"a": 1.0, "b": -2.0}), "lipschitz=-2.0"),
        (lambda: optim.block_coordinate(lipschitz=[1.0]).update([GRAD, GRAD], ()), "1 leaves.*gradient has 2"),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()
