"""Dynamic sparse training: which weights go and come, and that their number is constant."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import formats, optim, reparam, train
from tests.reparam.conftest import BATCH, best, forward, losses

in_python = pytest.mark.usefixtures("no_jit", "selection_by_sorting")
PARAMS = {
    "a": {"kernel": jax.random.normal(jax.random.key(0), (8, 6)), "bias": jnp.ones(6)},
    "b": jax.random.normal(jax.random.key(1), (6, 4)),
    "none": None,
}
SMALL = {"w": PARAMS["b"]}
GRADS = {"w": jax.random.normal(jax.random.key(2), (6, 4))}
link_of = functools.partial(reparam.dynamic_sparse, "uniform", sparsity=0.5, every=2, end=8, drop_fraction=0.5)


def moved(link, step=2, seed=3, params=SMALL, grads=GRADS):
    """Masks before and after an update, with the stored weights."""
    stored, state = link.init(params, jax.random.key(seed))
    new = link.update(state, stored, grads, step=step, rng=jax.random.key(9))
    return jax.tree.map(np.asarray, (state.masks, new.masks, stored))


def replaced(mask, worth, hope, step):
    """By the definition, with the cosine from 0.5 at step 0 to 0 at step 8."""
    kept = round(mask.sum() * (1 - 0.25 * (1 + math.cos(math.pi * step / 8))))
    survivors = best(np.where(mask, worth, -np.inf), kept)
    return survivors | best(np.where(survivors, -np.inf, hope), mask.sum() - kept)


@in_python
@pytest.mark.parametrize("drop", ["magnitude", "taylor"])
@pytest.mark.parametrize("step", [2, 6, 8])
def test_gradient_growth(drop, step):
    before, after, stored = moved(link_of(grow="gradient", drop=drop), step)
    w, g = np.abs(stored["w"]), np.abs(np.asarray(GRADS["w"]))
    expected = replaced(before["w"], w if drop == "magnitude" else w * g, g, step)
    np.testing.assert_array_equal(after["w"], expected)
    assert (after["w"] != before["w"]).any() == (step < 8)


@in_python
@pytest.mark.parametrize(("step", "moves"), [(0, False), (1, False), (2, True), (3, False), (8, True), (10, False)])
def test_the_mask_moves_when_it_is_due(step, moves):
    before, after, _ = moved(link_of(grow="gradient", drop_fraction=lambda step: 0.5), step)
    assert (after["w"] != before["w"]).any() == moves


@in_python
def test_random_growth_draws_from_the_key_of_the_step():
    before, after, stored = moved(link_of(grow="random"))
    kept = replaced(before["w"], np.abs(stored["w"]), np.zeros((6, 4)), 2) & before["w"]
    assert after["w"].sum() == before["w"].sum() == 12
    assert (after["w"] & kept).sum() >= 12 - round(12 * 0.25 * (1 + math.cos(math.pi / 4)))


@in_python
def test_momentum_growth_averages_gradients():
    link = link_of(grow="momentum", decay=0.75)
    stored, state = link.init(SMALL, jax.random.key(3))
    g = np.asarray(GRADS["w"])
    for step in (1, 2):
        before = np.asarray(state.masks["w"])
        state = link.update(state, stored, {"w": g * step}, step=step, rng=None)
    mean = 0.75 * 0.25 * g + 0.25 * 2 * g
    np.testing.assert_allclose(state.momentum["w"], mean, rtol=1e-6)
    expected = replaced(before, np.abs(np.asarray(stored["w"])), np.abs(np.asarray(state.momentum["w"])), 2)
    np.testing.assert_array_equal(state.masks["w"], expected)


@in_python
def test_static_masks_stay():
    before, after, stored = moved(link_of())
    np.testing.assert_array_equal(before["w"], after["w"])
    np.testing.assert_array_equal(stored["w"] != 0, before["w"])
    other = moved(link_of(), seed=4)[0]
    assert (other["w"] != before["w"]).any()


@in_python
def test_initial_masks():
    """ERK of [8, 6] and [6, 4] at 0.5: 36 weights in the proportion 14 to 10."""
    _, state = reparam.dynamic_sparse(sparsity=0.5).init(PARAMS, jax.random.key(0))
    assert (state.masks["a"]["kernel"].sum(), state.masks["b"].sum()) == (21, 15)
    assert state.masks["a"]["bias"] is state.masks["none"] is None
    link = reparam.dynamic_sparse("global", sparsity=0.5, initial="magnitude", where="a/kernel|b")
    _, state = link.init(PARAMS, None)
    flat = np.append(PARAMS["a"]["kernel"], PARAMS["b"])
    np.testing.assert_array_equal(np.append(state.masks["a"]["kernel"], state.masks["b"]), best(np.abs(flat), 36))


@in_python
def test_a_global_budget_moves_between_leaves():
    grads = jax.tree.map(lambda w: jnp.full(w.shape, 10.0 if w.shape == (6, 4) else 0.1), PARAMS)
    before, after, _ = moved(link_of(grow="gradient", scope="global"), params=PARAMS, grads=grads)
    counts = [(m["a"]["kernel"].sum(), m["b"].sum()) for m in (before, after)]
    assert counts[0] == (24, 12)
    assert sum(counts[1]) == 36
    # round(36 * 0.427) weights go; the gradient of b is larger, so that it gets all of them while it has room.
    assert counts[1][1] > 20


@in_python
def test_no_row_loses_its_minimum():
    params = {"w": jnp.array([[1e-3, 2e-3, 3e-3, 4e-3]] + 3 * [[1.0, 2.0, 3.0, 4.0]])}
    grads = {"w": jnp.array([[0.0] * 4] + 3 * [[1.0] * 4])}
    first_row = []
    for min_kept in (0, 1):
        for seed in range(3):
            # round(8 * 0.573) = 5 weights stay: the small ones of the first row only where they are protected.
            masks = moved(link_of(grow="gradient", min_kept=min_kept), params=params, grads=grads, seed=seed)[:2]
            assert all(mask["w"].sum() == 8 and mask["w"].sum(1).min() >= min_kept for mask in masks)
            first_row.append(masks[1]["w"][0].sum())
    assert first_row == [0, 0, 0, 1, 1, 1]


@in_python
def test_finish_stores_what_evaluation_shows():
    link = reparam.dynamic_sparse("uniform", sparsity=0.5)
    stored, state = link.init(SMALL, jax.random.key(0))
    shown = link.apply(stored, state, step=3, rng=None, train=False)["w"]
    np.testing.assert_array_equal(link.finish(stored, state)["w"], shown)
    assert np.count_nonzero(shown) == 12
    with pytest.raises(ValueError, match="w is already stored as Quantized"):
        link.finish({"w": formats.Quantized.from_dense(stored["w"], "int8")}, state)


def test_rigl_in_the_train_step():
    """Counts, zeros and moments at every step; what grows is where the gradient of the dense weight is largest."""
    link = link_of(grow="gradient", where="b")
    # The step after which the mask moves leaves the weights alone.
    tx = optax.conditionally_mask(optim.sparse(optax.adam(0.1)), lambda step: step % 2 != 0)
    state = train.init_state(PARAMS, tx, rng=jax.random.key(0), reparam=link)
    step = jax.jit(train.make_step(forward, losses, tx, reparam=link))
    dense = jax.jit(jax.grad(lambda p: jnp.mean(losses(forward(p, BATCH, rng=None, train=True), BATCH)["loss"])))
    for t in range(6):
        old = state
        g = np.abs(np.asarray(dense(state.params)["b"]))  # stored entries outside of the mask are zero
        state, _ = step(state, BATCH)
        before, after = np.asarray(old.reparam_state.masks["b"]), np.asarray(state.reparam_state.masks["b"])
        assert after.sum() == 12
        np.testing.assert_array_equal(np.asarray(state.params["b"])[~before], 0)
        for name in ("mu", "nu"):
            moment = np.asarray(optax.tree.get(state.opt_state, name)["b"])
            assert not moment[after & ~before].any()
        moves = t in (2, 4)
        assert (after != before).any() == moves
        if t % 2 == 0:
            np.testing.assert_array_equal(state.params["b"], old.params["b"])
        if moves:
            grown, rest = after & ~before, ~after & ~before
            assert g[grown].min() >= g[rest].max()
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"allocation": "erk"}, "allocation='erk'"),
        ({"sparsity": -1}, r"sparsity=-1 must lie in \[0, 1\]"),
        ({"initial": "randm"}, "did you mean 'random'"),
        ({"scope": "layers"}, "did you mean 'layer'"),
        ({"drop": "tailor"}, "did you mean 'taylor'"),
        ({"grow": "grad"}, "did you mean 'gradient'"),
        ({"drop_fraction": 1.5}, r"drop_fraction=1.5 must lie in \[0, 1\]"),
        ({"every": 0}, "every=0"),
        ({"every": 10, "end": 9}, r"end=9 must lie in \[10, inf\)"),
        ({"grow": "random", "end": None}, "end is needed"),
        ({"decay": 1.0}, r"decay=1.0 must lie in \[0, 1\)"),
        ({"min_kept": 0.5}, "min_kept=0.5"),
    ],
)
def test_refuses_at_construction(options, text):
    with pytest.raises(ValueError, match=text):
        reparam.dynamic_sparse(**({"sparsity": 0.5, "end": 100} | options))


@in_python
def test_refuses_later():
    with pytest.raises(ValueError, match=r"kernl.*kernel"):
        link_of(where="a/kernl").init(PARAMS, jax.random.key(0))
    link = link_of(grow="gradient")
    stored, state = link.init(SMALL, jax.random.key(0))
    with pytest.raises(ValueError, match="put dynamic_sparse first"):
        link.update(state, stored, None, step=0, rng=None)
