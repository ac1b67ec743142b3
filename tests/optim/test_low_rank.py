"""Low-rank directions and full magnitudes: the rule in float64 NumPy, GaLore and Adam as special cases."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import optim
from steelyard import tree as tree_lib

SHAPES = {"tall": (6, 4), "wide": (3, 5), "row": (1, 4), "bias": (4,), "stack": (2, 3, 3), "scalar": ()}
LR, SCALE = 0.05, 0.25


def normal(seed, shape):
    return np.random.default_rng(seed).normal(size=shape)


PARAMS = {name: normal(i, shape) for i, (name, shape) in enumerate(SHAPES.items())}
GRADS = [{name: normal(100 * t + i, shape) for i, (name, shape) in enumerate(SHAPES.items())} for t in range(1, 5)]


def as_float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


class Adam:
    """In float64."""

    def __init__(self, b1=0.9, b2=0.999, eps=1e-6):
        self.b1, self.b2, self.eps, self.t, self.m, self.v = b1, b2, eps, 0, 0.0, 0.0

    def __call__(self, g, live=True):
        self.t += 1
        self.m = np.where(live, self.b1 * self.m + (1 - self.b1) * g, self.m)
        self.v = np.where(live, self.b2 * self.v + (1 - self.b2) * g * g, self.v)
        m, v = self.m / (1 - self.b1**self.t), self.v / (1 - self.b2**self.t)
        return m / (np.sqrt(v) + self.eps)


class ByHand:
    """One leaf of the rule in float64, by columns in loops where the rule says columns."""

    def __init__(self, rank, update_every=200, scale=SCALE, weight_decay=0.0):
        self.rank, self.update_every, self.scale, self.weight_decay = rank, update_every, scale, weight_decay
        self.direction, self.magnitude, self.count, self.p = Adam(), Adam(), 0, None

    def update(self, w, g, lr):
        if w.ndim != 2:
            return -lr * self.direction(g)
        rows, columns = w.shape
        norm = np.array([np.sqrt((w[:, j] ** 2).sum()) for j in range(columns)])
        live = norm > 0
        unit = np.stack([w[:, j] / norm[j] if live[j] else 0 * w[:, j] for j in range(columns)], 1)
        along = np.array([(g[:, j] * unit[:, j]).sum() for j in range(columns)])
        across = g - unit * along
        if self.count % self.update_every == 0:
            left, _, right = np.linalg.svd(across, full_matrices=False)
            self.p = left[:, : self.rank] if rows >= columns else right[: self.rank].T
        self.count += 1
        if rows >= columns:
            step = self.scale * self.p @ self.direction(self.p.T @ across)
        else:
            step = self.scale * self.direction(across @ self.p) @ self.p.T
        lengths = norm - lr * self.magnitude(along, live)
        v = w - lr * step
        new = np.stack(
            [lengths[j] * v[:, j] / np.sqrt((v[:, j] ** 2).sum()) if live[j] else v[:, j] for j in range(columns)], 1
        )
        return new - w - lr * self.weight_decay * w


def run(tx, params, grads):
    """Updates of every step, the last parameters and state, from a step that must compile once."""
    update = jax.jit(lambda *args: tx.update(*args))  # a function of its own has a cache of its own
    state, history = tx.init(params), []
    for g in grads:
        u, state = update(g, state, params)
        params = optax.apply_updates(params, u)
        history.append(u)
    assert update._cache_size() == 1
    return history, params, state


@pytest.mark.parametrize(("rank", "weight_decay"), [(2, 0.0), (128, 0.3)])
@pytest.mark.parametrize("is_schedule", [False, True])
def test_the_rule_in_float64(rank, weight_decay, is_schedule):
    """Before the second refresh: Adam is odd, so that the signs of singular vectors do not matter."""
    lr = (lambda t: LR / (1 + t)) if is_schedule else LR
    tx = optim.grad_norm_low_rank(lr, rank=rank, weight_decay=weight_decay)
    history, _, _ = run(tx, as_float32(PARAMS), as_float32(GRADS))
    for name, w in PARAMS.items():
        rule = ByHand(rank, weight_decay=weight_decay)
        for t, g in enumerate(GRADS):
            expected = rule.update(w, g[name], lr(t) if is_schedule else lr)
            w = w + expected
            # float32 singular vectors are good to 1e-6 over their gap; W' - W cancels all but 1e-2 of |W|.
            np.testing.assert_allclose(history[t][name], expected, atol=2e-5, err_msg=f"{name}, step {t}")


def test_the_subspace_is_renewed_every_update_every_steps():
    params = as_float32({"w": PARAMS["tall"]})
    tx = optim.grad_norm_low_rank(LR, rank=2, update_every=2)
    update, state, projectors = jax.jit(tx.update), tx.init(params), []
    for g in GRADS:
        u, state = update(as_float32({"w": g["tall"]}), state, params)
        params = optax.apply_updates(params, u)
        projectors.append(np.asarray(state.direction.projector["w"]))
    for p in projectors:
        np.testing.assert_allclose(p.T @ p, np.eye(2), atol=1e-6)
    np.testing.assert_array_equal(projectors[0], projectors[1])
    np.testing.assert_array_equal(projectors[2], projectors[3])
    assert np.abs(projectors[1] - projectors[2]).max() > 0.1
    # Moments are kept over the refresh, so after it Adam still counts.
    assert int(state.direction.count) == int(state.magnitude.count) == 4


def test_full_rank_with_diagonal_gradients_is_adam():
    """The singular vectors of a diagonal matrix are unit vectors: the rotated basis is the basis.

    The columns are zero on the diagonal: nothing lies along them, and their length stays.
    """
    w, g = jnp.ones((4, 4)) - jnp.eye(4), jnp.diag(jnp.arange(1.0, 5.0))
    (got,), _, _ = run(optim.grad_norm_low_rank(LR, rank=4, scale=1.0), w, [g])
    adam = optax.adam(LR, eps=1e-6)
    v = w + adam.update(g, adam.init(w))[0]
    np.testing.assert_allclose(got, v / jnp.linalg.norm(v, axis=0) * jnp.linalg.norm(w, axis=0) - w, atol=1e-6)


def test_a_gradient_of_rank_one_needs_one_vector():
    """Columns that are orthogonal to what they are tested with: the gradient across stays of rank one."""
    x, y = np.array([3.0, 4.0, 0, 0]), np.array([1.0, -2.0, 0.5])
    w = as_float32(np.array([[0, 0, 0], [0, 0, 0], [1.0, 2.0, 0.5], [0.5, 1.0, 3.0]]))
    g = [as_float32(np.outer(x, y))]
    one, full = (run(optim.grad_norm_low_rank(LR, rank=r), w, g)[0][0] for r in (1, 3))
    # The other directions of the full basis get a gradient of rounding errors, whose size Adam does not see; eps does:
    # entries of 1e-6 against eps 1e-6 move by up to lr scale / 2. With exact zeros below they do not move.
    expected = ByHand(1).update(np.asarray(w, float), np.outer(x, y), LR)
    np.testing.assert_allclose(one, expected, atol=1e-6)
    assert np.abs(np.asarray(full) - expected).max() <= LR * SCALE * np.sqrt(2)


def test_lengths_of_scale_invariant_columns_stay():
    """A loss of v / |v| alone: g is zero, so every column keeps its length whatever the steps are."""
    target = as_float32(normal(9, (6, 4)))

    def loss(w):
        return jnp.sum((w / jnp.linalg.norm(w, axis=0) - target) ** 2)

    w = as_float32(PARAMS["tall"])
    # The gradient along is a rounding error of 1e-7; a large eps keeps Adam from blowing it up.
    tx = optim.grad_norm_low_rank(LR, rank=2, eps=1.0)
    state, update = tx.init(w), jax.jit(lambda s, w: tx.update(jax.grad(loss)(w), s, w))
    for _ in range(3):
        u, state = update(state, w)
        np.testing.assert_allclose(jnp.linalg.norm(w + u, axis=0), jnp.linalg.norm(w, axis=0), rtol=1e-6)
        assert np.abs(u).max() > 1e-4
        w = w + u


def test_columns_have_the_length_that_adam_gives_them():
    w, g = (as_float32(tree["tall"]) for tree in (PARAMS, GRADS[0]))
    norm = jnp.linalg.norm(w, axis=0)
    along = jnp.sum(g * w / norm, 0)
    (u,), _, _ = run(optim.grad_norm_low_rank(10.0, rank=2), w, [g])
    # Adam's first step is the sign: with a rate of 10 the lengths of some columns turn negative.
    lengths = norm - 10 * along / (jnp.abs(along) + 1e-6)
    assert lengths.min() < 0 < lengths.max()
    np.testing.assert_allclose(jnp.linalg.norm(w + u, axis=0), jnp.abs(lengths), rtol=1e-5)


def test_a_column_of_zeros_becomes_the_direction_and_its_moments_stay():
    w = as_float32(PARAMS["tall"]).at[:, 1].set(0)
    tx = optim.grad_norm_low_rank(LR, rank=4, scale=1.0)
    first = tx.init(w)._replace(magnitude=optax.ScaleByAdamState(jnp.int32(0), jnp.ones((1, 4)), jnp.ones((1, 4))))
    g = as_float32(GRADS[0]["tall"])
    u, state = jax.jit(tx.update)(g, first, w)
    for moment in (state.magnitude.mu, state.magnitude.nu):
        assert moment[0, 1] == 1
        assert np.all(moment[0, [0, 2, 3]] != 1)
    rule = ByHand(4, scale=1.0)
    rule.magnitude.m, rule.magnitude.v = np.ones(4), np.ones(4)
    np.testing.assert_allclose(u, rule.update(np.asarray(w, float), np.asarray(g, float), LR), atol=2e-5)
    # v = 0 - lr D; its gradient is the raw one.
    assert np.linalg.norm(u[:, 1]) > 0.5 * LR


def test_a_zero_gradient_moves_nothing():
    params = as_float32({name: PARAMS[name] for name in ("tall", "bias")})
    history, _, state = run(optim.grad_norm_low_rank(LR, rank=2), params, 2 * [jax.tree.map(jnp.zeros_like, params)])
    for u, w in zip(jax.tree.leaves(history[-1]), jax.tree.leaves(params), strict=True):
        # n v / |v| gives W back but for a few roundings.
        assert np.all(np.abs(u) <= 1e-6 * np.abs(w))
    assert bool(optim.all_finite(state))


@pytest.mark.parametrize(("shape", "rank"), [((32, 8), 4), ((8, 32), 4), ((16, 16), 128)])
def test_the_state_is_as_small_as_stated(shape, rank):
    state = optim.grad_norm_low_rank(0.1, rank=rank).init({"w": jnp.ones(shape)})
    r = min(rank, *shape)
    counters = 3  # of GaLore, and of both Adams
    assert tree_lib.size(state) == 2 * r * min(shape) + r * max(shape) + 2 * shape[1] + counters


def test_none_leaves_empty_trees_and_a_bare_scalar():
    tx = optim.grad_norm_low_rank(LR, rank=2)
    params = {"w": as_float32(PARAMS["tall"]), "none": None, "inner": {"none": None, "b": jnp.ones(3)}}
    history, _, state = run(tx, params, 2 * [params])
    assert jax.tree.structure(history[0]) == jax.tree.structure(params)
    assert jax.tree.structure(state.direction.projector) == jax.tree.structure(params)
    for empty in ({}, {"none": None}):
        assert tx.update(empty, tx.init(empty), empty) == (empty, tx.init(empty))
    history, _, _ = run(tx, jnp.float32(2), 2 * [jnp.float32(3)])
    np.testing.assert_allclose(history[0], -LR, rtol=1e-5)


def test_half_precision_has_moments_in_float32():
    params, g = (
        {name: jnp.asarray(tree[name], jnp.bfloat16) for name in ("tall", "bias")} for tree in (PARAMS, GRADS[0])
    )
    history, new, state = run(optim.grad_norm_low_rank(LR, rank=2), params, [g, g])
    for leaf in jax.tree.leaves((history, new)):
        assert leaf.dtype == jnp.bfloat16
    assert {x.dtype.name for x in jax.tree.leaves(state)} == {"int32", "float32"}
    for name, w in params.items():
        expected = ByHand(2).update(np.asarray(w, float), np.asarray(g[name], float), LR)
        np.testing.assert_allclose(np.asarray(history[0][name], float), expected, rtol=2.0**-8, atol=2e-5)


def test_in_float64_the_step_compiles_once_too():
    with jax.enable_x64(True):
        params, *grads = ({name: jnp.asarray(tree[name]) for name in ("tall", "bias")} for tree in (PARAMS, *GRADS[:2]))
        history, _, state = run(optim.grad_norm_low_rank(lambda t: LR / (1 + t), rank=2), params, grads)
        assert {x.dtype.name for x in jax.tree.leaves(state)} == {"int32", "float64"}
        # The decomposition is still float32.
        expected = ByHand(2).update(PARAMS["tall"], GRADS[0]["tall"], LR)
        np.testing.assert_allclose(history[0]["tall"], expected, atol=1e-6)


def test_vmap_over_runs():
    tx = optim.grad_norm_low_rank(LR, rank=2)
    w, g = (jnp.stack([as_float32(normal(s + i, (6, 4))) for i in range(2)]) for s in (0, 10))
    for i, u in enumerate(jax.jit(jax.vmap(lambda g, w: tx.update(g, tx.init(w), w)[0]))(g, w)):
        expected = ByHand(2).update(np.asarray(w[i], float), np.asarray(g[i], float), LR)
        np.testing.assert_allclose(u, expected, atol=2e-5)


def test_masks_reach_moments_of_whole_leaves():
    """`optim.sparse` finds what belongs to a parameter in this state, and extra arguments are let through."""
    tx = optim.sparse(optim.grad_norm_low_rank(LR, rank=2))
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    masks = {"w": None, "b": jnp.array([True, False, True])}
    updates, state = jax.jit(tx.update)(params, tx.init(params), params, masks=masks, value=1.0)
    assert updates["b"].tolist()[1] == 0
    assert state.direction.base_optimizer_state.mu["b"].tolist()[1] == 0


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(rank=0), r"rank=0 must lie in \[1, inf\)"),
        (dict(update_every=0), r"update_every=0 must lie in \[1, inf\)"),
        (dict(scale=-1.0), r"scale=-1\.0"),
        (dict(b1=1.0), r"b1=1\.0 must lie in \[0, 1\)"),
        (dict(b2=-0.1), r"b2=-0\.1"),
        (dict(eps=-1e-8), "eps=-1e-08"),
        (dict(weight_decay=-1.0), r"weight_decay=-1\.0"),
    ],
)
def test_refuses(options, text):
    with pytest.raises(ValueError, match=text):
        optim.grad_norm_low_rank(0.1, **options)


def test_update_needs_params():
    tx = optim.grad_norm_low_rank(0.1)
    with pytest.raises(ValueError, match="update needs params"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
