"""Error bounds of the rules that solve a problem on the Gram matrix, against float64, over many hard Gram matrices.

The rules see float32 Gram matrices, and so do the references, which take the same numbers as float64. An entry of such
a matrix is known to `eps |g_k| |g_l|`, so no bound can be less than what that error does to the solution; all of them
are multiples of it. Coefficients are not unique where gradients are dependent: bounded is what they are chosen for.
"""

import functools

import jax
import numpy as np
import pytest
import scipy.optimize

from steelyard import aggregate

EPS = 2.0**-23
COUNTS = (2, 5, 16)
KINDS = ("plain", "conditioned", "dependent", "opposite", "near", "cancelling", "lengths", "line", "small", "large")
PER_KIND = 20
RULES = {
    "mgda": aggregate.mgda(),
    "cagrad": aggregate.cagrad(c=0.5, rescale=0),
    "far": aggregate.cagrad(c=2.0, rescale=0),
    "nash": aggregate.nash(max_norm=None, normalize=False),
    "conflict_free": aggregate.conflict_free(),
}


def gradients(rng, kind, count, size=24):
    x = rng.standard_normal((count, size))
    common = rng.standard_normal(size)
    if kind == "conditioned":  # condition 1e8 of the Gram matrix
        left, _, right = np.linalg.svd(x, full_matrices=False)
        return left @ np.diag(np.logspace(0, -4, count)) @ right
    if kind == "dependent":
        rank = max(1, count // 2)
        return rng.standard_normal((count, rank)) @ x[:rank]
    if kind == "opposite":
        return np.where(np.arange(count) % 2, 1, -1)[:, None] * common + 10.0 ** rng.uniform(-6, -1) * x
    if kind == "near":
        return common + 10.0 ** rng.uniform(-6, -1) * x
    if kind == "cancelling":  # a convex combination is zero
        return x - rng.dirichlet(np.ones(count)) @ x
    if kind == "lengths":
        return x * 10.0 ** rng.uniform(-6, 6, (count, 1))
    if kind == "line":
        return (rng.standard_normal((count, 1)) * common + 0.3 * x) * 10.0 ** rng.uniform(-2, 2, (count, 1))
    return x * {"plain": 1, "small": 1e-12, "large": 1e12}[kind]


@functools.cache
def grams(count):
    """Float32 Gram matrices of all kinds, `[cases, K, K]`."""
    rng = np.random.default_rng(count)
    rows = [gradients(rng, kind, count).astype(np.float32) for kind in KINDS for _ in range(PER_KIND)]
    return np.stack([(x.astype(np.float64) @ x.T).astype(np.float32) for x in rows])


@functools.cache
def solved(count):
    """Name of a rule -> its weights for `grams(count)`, and for a zero gradient among others, and for zeros alone."""
    cases = np.concatenate([grams(count), grams(count)[:1] * _without_first(count), np.zeros((1, count, count))])
    run = jax.jit(jax.vmap(lambda gram: {name: rule.gram_weights(gram, None, ())[0] for name, rule in RULES.items()}))
    return jax.tree.map(lambda w: np.asarray(w, np.float64), run(cases.astype(np.float32)))


def _without_first(count):
    there = np.arange(count) > 0
    return there[:, None] & there


def problems(count, name):
    """Kind, Gram matrix in float64, norms, cosines, weights."""
    for i, (gram, weights) in enumerate(zip(grams(count).astype(np.float64), solved(count)[name], strict=False)):
        norms = np.sqrt(np.diag(gram))
        yield KINDS[i // PER_KIND], gram, norms, gram / np.outer(norms, norms), weights


def factor(matrix):
    """B with `B^T B` the nearest positive semidefinite matrix: float32 Gram matrices may be slightly indefinite."""
    values, vectors = np.linalg.eigh(matrix)
    return np.sqrt(np.maximum(values, 0))[:, None] * vectors.T


def shortest(norms, cosines):
    """Weights of the shortest convex combination, by non-negative least squares `|B y|^2 + (<q, y> - 1)^2`."""
    normal = norms.min() / norms
    y, _ = scipy.optimize.nnls(np.vstack([factor(cosines), normal]), np.append(np.zeros(len(norms)), 1), maxiter=9999)
    return y * normal / (y @ normal)


def best_worst_gain(norms, cosines, toward):
    """The greatest t with `u = B x, |u| <= 1` and `<u_k, u> + toward_k >= t q_k`, by bisection on t.

    The shortest u for a t is that of the least `x^T C x / 2 - <t q - toward, x>` over `x >= 0`.
    """
    normal = norms.min() / norms
    shift = max(0.0, -2 * np.linalg.eigvalsh(cosines)[0]) + 1e-13
    root = np.linalg.cholesky(cosines + shift * np.eye(len(norms)))

    def excess(t):
        x, _ = scipy.optimize.nnls(root.T, np.linalg.solve(root, t * normal - toward), maxiter=9999)
        return np.linalg.norm(root.T @ x) - 1

    low, high = np.min(toward / normal), np.min((toward + np.sqrt(1 + shift)) / normal)
    if excess(high) < 0:
        return high * norms.min()
    return scipy.optimize.brentq(excess, low, high, xtol=1e-13, rtol=1e-13) * norms.min()


@pytest.mark.parametrize("count", COUNTS)
def test_every_solver_stays_finite(count):
    for weights in solved(count).values():
        assert np.isfinite(weights).all()


@pytest.mark.parametrize("count", COUNTS)
def test_a_zero_gradient_and_zeros_alone(count):
    """MGDA stops at a zero gradient, the others leave it out; nothing is the answer to nothing."""
    gram = (grams(count)[0] * _without_first(count)).astype(np.float64)
    for name, weights in solved(count).items():
        assert name in ("cagrad", "far", "mgda") or weights[-2][0] == 0
        assert (name == "mgda") == (weights[-2] @ gram @ weights[-2] == 0)
        assert np.abs(weights[-1]).max() <= 1


@pytest.mark.parametrize("count", COUNTS)
def test_mgda_is_nearly_shortest(count):
    """|update|^2 is bounded from above by the least plus `K eps (sum_k a_k |g_k|)^2`.

    A relative error eps of the entries of G changes `a^T G a` by up to `eps (sum_k a_k |g_k|)^2` at the solution a,
    and the solver works on cosines whose diagonal is raised by (K + 4) eps; twice that bounds both.
    """
    for kind, gram, norms, cosines, weights in problems(count, "mgda"):
        best = shortest(norms, cosines)
        assert weights.min() >= 0
        np.testing.assert_allclose(weights.sum(), 1, atol=4 * count * EPS)
        limit = 2 * (count + 4) * EPS * (best @ norms) ** 2
        assert weights @ gram @ weights <= best @ gram @ best + limit, kind


@pytest.mark.parametrize("count", COUNTS)
def test_mgda_is_exact_in_the_norm_where_the_norm_is_known(count):
    """An error e of |update|^2 is e / (2 |update|) of the norm: below 1e-4 unless the gradients nearly cancel."""
    seen = 0
    for kind, gram, norms, cosines, weights in problems(count, "mgda"):
        best = shortest(norms, cosines)
        least = np.sqrt(max(best @ gram @ best, 0))
        if least > 0.03 * (best @ norms):
            seen += 1
            assert np.sqrt(weights @ gram @ weights) <= least + 1e-4 * (best @ norms), kind
    assert seen > 3 * PER_KIND


@pytest.mark.parametrize("c", [0.5, 2.0])
@pytest.mark.parametrize("count", COUNTS)
def test_cagrad_serves_the_worst_task_nearly_best(count, c):
    """`min_k <d, g_k>` is bounded from below by the optimum, relative to `phi |g_k|`; `|d - g_0|` by phi.

    Where `g_w` is not near zero the error is that of K rounded products, of coefficients whose size is `sum_k |x_k|`
    in units of phi. Where it is, the term `K eps` under the root costs up to its root; phi itself, `c |g_0|`, is
    known from G to `sqrt(K eps)` of the longest gradient, so both are bounded relative to c times that one.
    """
    rounding = (count + 4) * EPS
    for kind, gram, norms, cosines, weights in problems(count, "cagrad" if c < 1 else "far"):
        phi = c * np.sqrt(max(gram.mean(), 0))
        x = (weights - 1 / count) * norms
        assert np.sqrt(max(x @ cosines @ x, 0)) <= phi + np.sqrt(rounding) * c * norms.max(), kind
        if phi < 3e-3 * c * norms.max():
            continue  # the mean is within rounding of zero: G does not know phi
        optimum = best_worst_gain(norms, cosines, gram.mean(axis=1) / norms / phi)
        missing = np.max((optimum * phi - gram @ weights) / norms)
        assert missing <= 2 * np.sqrt(rounding) * c * norms.max(), kind
        if kind in ("plain", "near", "lengths", "line", "small", "large"):
            assert missing <= 2 * rounding * (phi / c + np.abs(x).sum()), kind


@pytest.mark.parametrize("count", COUNTS)
def test_nash_gives_equal_gains(count):
    """`y_k (C y)_k - 1`, y = alpha |g|, is bounded by what errors `(K + 4) eps` of C do to it."""
    for kind, _, norms, cosines, weights in problems(count, "nash"):
        y = weights * norms
        assert y.min() > 0
        assert np.all(np.abs(y * (cosines @ y) - 1) <= 2 * (count + 4) * EPS * (1 + y * y.sum())), kind


@pytest.mark.parametrize("count", COUNTS)
def test_conflict_free_fits_equal_cosines(count):
    """The residual of `C a = 1` is bounded by that of the float64 solution which drops four times as many eigenvalues.

    ConFIG cuts at `K eps` times the largest eigenvalue; which of those near the cut it drops is a matter of rounding.
    Beyond that, errors `K eps` of C move the residual by as much times |a|.
    """
    for kind, _, norms, cosines, weights in problems(count, "conflict_free"):
        values, vectors = np.linalg.eigh(cosines)
        cut = count * EPS * values[-1]
        best = np.sqrt(np.sum((vectors.T @ np.ones(count))[values <= 4 * cut] ** 2))
        a = weights * norms
        fitted = cosines @ a
        factor_ = fitted.sum() / max(fitted @ fitted, 1e-300)
        assert np.linalg.norm(factor_ * fitted - 1) <= best + 4 * cut * (1 + np.linalg.norm(factor_ * a)), kind
