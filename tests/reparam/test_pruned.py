"""Pruning while training: masks step by step against NumPy, and what is seen, projected and stored."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import formats, optim, reparam, train
from steelyard.sparsity import masks, schedules, scores
from tests.reparam.conftest import BATCH, best, forward, losses

# `test_trains_sparse` compiles what the other tests run in Python.
in_python = pytest.mark.usefixtures("no_jit", "selection_by_sorting")

STEPS = 9
PARAMS = {
    "a": {"kernel": jax.random.normal(jax.random.key(0), (8, 6)), "bias": jnp.ones(6)},
    "b": jax.random.normal(jax.random.key(1), (6, 4)),
    "none": None,
}
SMALL = {"w": PARAMS["b"]}
at_step = functools.partial(dict, rng=None, train=True)


def walk(params, seed):
    """Numbers that move in time: a tree like the parameters with a leading axis of steps."""
    keys = jax.random.split(jax.random.key(seed), STEPS + 1)
    noise = jax.tree.map(lambda p: jax.vmap(lambda key: jax.random.normal(key, p.shape))(keys), params)
    return jax.tree.map(lambda p, n: p + jnp.cumsum(n, 0) / 4, params, noise)


WEIGHTS, GRADS = walk(PARAMS, 2), walk(PARAMS, 3)


def at(step, tree):
    return jax.tree.map(lambda x: x[step], tree)


def masks_of(link, weights, grads):
    """The masks of each step, where the weights after step t are `weights[t + 1]`."""
    weights, grads = jax.tree.map(np.asarray, (weights, grads))
    _, state = link.init(at(0, weights), jax.random.key(4))
    found = []
    for t in range(STEPS):
        stored, gradient = at(t + 1, weights), at(t, grads)
        found.append(link.masks(stored, state, step=t))
        state = link.update(state, stored, gradient, step=t, rng=None)
    return jax.tree.map(lambda *xs: np.stack(xs), *found)


def small(tree):
    return {"w": tree["b"]}


def seen_and_gradient(link, stored, state):
    """Seen parameters, and the gradient of their sum with respect to the stored ones."""
    seen, pullback = jax.vjp(lambda s: link.apply(s, state, **at_step(step=0)), stored)
    return seen, pullback(jax.tree.map(jnp.ones_like, seen))[0]


@in_python
def test_by_default_the_mask_is_that_of_the_current_weights():
    found = masks_of(reparam.pruned(0.75), WEIGHTS, GRADS)
    assert found["a"]["bias"] is found["none"] is None
    for t in range(STEPS):
        for leaf, name in ((WEIGHTS["a"]["kernel"], "a"), (WEIGHTS["b"], "b")):
            mask = found["b"] if name == "b" else found["a"]["kernel"]
            expected = best(np.abs(np.asarray(leaf[t], np.float64)), leaf[t].size // 4)
            np.testing.assert_array_equal(mask[t], expected)


@in_python
def test_a_schedule_scales_the_allocation():
    """Refreshed after the steps 2, 4, 6, with the sparsity of 3, 5, 7; the leaves share it as ERK does at the target.

    ERK: p = (8 + 6) / 48 and (6 + 4) / 24, so that p n = 14 and 10, of which c = 18 / 24 stays with 18 of 72 weights.
    """
    schedule = schedules.polynomial(0.75, start=0, end=8, power=1)
    link = reparam.pruned(0.75, allocation="erdos_renyi", schedule=schedule, every=2, start=2, end=6)
    found = masks_of(link, WEIGHTS, GRADS)
    cases = (
        (WEIGHTS["a"]["kernel"], found["a"]["kernel"], 48, 10.5),
        (WEIGHTS["b"], found["b"], 24, 7.5),
    )
    for leaf, mask, size, kept in cases:
        for t in range(STEPS):
            refreshed = max((s for s in (3, 5, 7) if s <= t), default=None)
            if refreshed is None:
                assert mask[t].all()
                continue
            share = (1 - kept / size) * refreshed / 8
            expected = best(np.abs(np.asarray(leaf[refreshed], np.float64)), round(size * (1 - share)))
            np.testing.assert_array_equal(mask[t], expected)


@in_python
@pytest.mark.parametrize("start", [0, 4])
def test_one_shot(start):
    found = masks_of(reparam.pruned(0.5, every=None, start=start), small(WEIGHTS), small(GRADS))["w"]
    first = start + 1 if start else 0
    assert found[:first].all()
    expected = best(np.abs(np.asarray(WEIGHTS["b"][first])), 12)
    np.testing.assert_array_equal(found[first:], np.broadcast_to(expected, found[first:].shape))


@in_python
@pytest.mark.parametrize(
    ("score", "formula"),
    [
        ("saliency", lambda w, g: np.abs(w * g)),
        (scores.movement, lambda w, g: -w * g),
        (lambda params, grads, rng: None if grads is None else grads, lambda w, g: g),
    ],
)
def test_scores_from_gradients_begin_after_the_first_step(score, formula):
    found = masks_of(reparam.pruned(0.5, score=score, every=2), small(WEIGHTS), small(GRADS))["w"]
    assert found[0].all()
    w, g = (np.asarray(tree["b"], np.float64) for tree in (WEIGHTS, GRADS))
    for t in range(1, STEPS):
        refreshed = t if t % 2 else t - 1  # after step 0, 2, ...
        np.testing.assert_array_equal(found[t], best(formula(w[refreshed], g[refreshed - 1]), 12))


@in_python
def test_random_masks_are_nested():
    link = reparam.pruned(0.75, score="random", schedule=lambda t: 0.75 * t / 8)
    found = np.asarray(masks_of(link, small(WEIGHTS), small(GRADS))["w"])
    assert found.sum((1, 2)).tolist() == [round(24 * (1 - 0.75 * t / 8)) for t in range(STEPS)]
    assert not (found[1:] & ~found[:-1]).any()
    assert (found[-1] != best(np.abs(WEIGHTS["b"][8]), 6)).any()


@in_python
def test_phases_take_turns():
    """Sparse in [1, 3), [5, 7) and from 8 on; the mask of a phase is that of its first weights."""
    phase = schedules.alternating(sparse_steps=2, dense_steps=2, start=1, end=8)
    found = masks_of(reparam.pruned(0.5, phase=phase, every=None), small(WEIGHTS), small(GRADS))["w"]
    for t in range(STEPS):
        first = next((s for s, end in ((1, 3), (5, 7), (8, 9)) if s <= t < end), None)
        expected = np.ones((6, 4)) if first is None else best(np.abs(np.asarray(WEIGHTS["b"][first])), 12)
        np.testing.assert_array_equal(found[t], expected)


@in_python
def test_global_ranks_all_leaves_together():
    link = reparam.pruned(0.75, allocation="global", schedule=lambda t: t / 8 * 0.75, every=4)
    found = masks_of(link, WEIGHTS, GRADS)
    for t, refreshed in ((0, 0), (4, 1), (5, 5)):
        weights, mask = (
            np.append(tree["a"]["kernel"][at], tree["b"][at]) for tree, at in ((WEIGHTS, refreshed), (found, t))
        )
        np.testing.assert_array_equal(mask, best(np.abs(weights), round(72 * (1 - 0.75 * refreshed / 8))))


@in_python
def test_global_normalizes_and_leaves_a_minimum_and_an_override():
    params = {"big": 100 * PARAMS["a"]["kernel"], "tiny": PARAMS["b"], "own": PARAMS["b"]}

    def counts(link):
        return jax.tree.map(jnp.sum, link.init(params, None)[1].masks)

    options = {"allocation": "global", "override": {"own": 0.25}}
    assert counts(reparam.pruned(0.75, **options)) == {"big": 18, "tiny": 0, "own": 18}
    assert counts(reparam.pruned(0.75, min_kept=5, **options)) == {"big": 13, "tiny": 5, "own": 18}
    unit = {name: np.abs(params[name]) / np.linalg.norm(params[name]) for name in ("big", "tiny")}
    kept = best(np.concatenate([np.ravel(x) for x in unit.values()]), 18)
    expected = {"big": kept[:48].sum(), "tiny": kept[48:].sum(), "own": 18}
    assert counts(reparam.pruned(0.75, normalize=True, **options)) == expected


@in_python
def test_where_and_override():
    link = reparam.pruned(0.5, where=r"a/kernel|b", override={"b": 0.25})
    state = link.init(PARAMS, None)[1]
    assert (state.masks["a"]["kernel"].sum(), state.masks["b"].sum(), state.masks["a"]["bias"]) == (24, 18, None)

    def only_the_first(params, sparsity):
        return jax.tree.map(lambda w: 1 - sparsity / 2 if w.shape == (8, 6) else None, params)

    state = reparam.pruned(0.5, allocation=only_the_first).init(PARAMS, None)[1]
    assert (state.masks["a"]["kernel"].sum(), state.masks["b"]) == (12, None)


@in_python
def test_straight_through_and_chain():
    mask = best(np.abs(np.asarray(SMALL["w"])), 12)
    for backward in ("straight_through", "chain"):
        link = reparam.pruned(0.5, every=None, backward=backward)
        stored, state = link.init(SMALL, None)
        seen, gradient = seen_and_gradient(link, stored, state)
        moved = link.project(jax.tree.map(lambda w: w + 1, stored), state)["w"]
        np.testing.assert_array_equal(seen["w"], np.where(mask, SMALL["w"], 0))
        is_chain = backward == "chain"
        np.testing.assert_array_equal(gradient["w"], mask if is_chain else np.ones((6, 4)))
        np.testing.assert_array_equal(stored["w"], np.where(mask, SMALL["w"], 0) if is_chain else SMALL["w"])
        np.testing.assert_array_equal(moved, np.where(mask, SMALL["w"] + 1, 0) if is_chain else SMALL["w"] + 1)


@pytest.mark.usefixtures("selection_by_sorting")
@pytest.mark.parametrize(
    ("pattern", "packed"),
    [("unstructured", True), ("2:4", True), ("1:2:-1", False), ("channel:-1", False)],
)
def test_finish_stores_what_evaluation_shows(pattern, packed):
    link = reparam.pruned(0.5, pattern=pattern, packed=packed, where="b", every=None)
    stored, state = link.init(PARAMS, None)
    shown = link.apply(stored, state, step=7, rng=None, train=False)
    finished = link.finish(stored, state)
    assert isinstance(finished["b"], formats.NMSparse) == (pattern == "2:4")
    np.testing.assert_array_equal(*(np.asarray(formats.dense(x["b"])).view("u4") for x in (finished, shown)))
    np.testing.assert_array_equal(finished["a"]["kernel"], PARAMS["a"]["kernel"])
    expected = masks.mask(jnp.abs(PARAMS["b"]), 0.5, pattern)
    np.testing.assert_array_equal(shown["b"] != 0, expected)
    np.testing.assert_array_equal(link.masks(stored, state, step=0)["b"], expected)
    assert state.masks["b"].dtype == (jnp.uint8 if packed else bool)
    assert state.masks["b"].shape == ((6, 1) if packed else (6, 4))


@in_python
def test_finish_before_the_first_refresh_is_dense():
    link = reparam.pruned(0.5, pattern="2:4", start=3)
    np.testing.assert_array_equal(link.finish(*link.init(SMALL, None))["w"], SMALL["w"])


def test_trains_sparse():
    """Gradual pruning in the train step: counts are exact, what is removed stays at zero, with no moments."""
    schedule = schedules.polynomial(0.75, start=0, end=4, power=1)
    link = reparam.pruned(0.75, schedule=schedule, every=2, backward="chain")
    tx = optim.sparse(optax.adam(0.1))
    state = train.init_state(PARAMS, tx, rng=jax.random.key(0), reparam=link)
    step = jax.jit(train.make_step(forward, losses, tx, reparam=link))
    for t in range(7):
        used = state.reparam_state.masks
        state, _ = step(state, BATCH)
        assert used["b"].sum() == round(24 * (1 - 0.75 * min({0: 0, 1: 1, 2: 1, 3: 3, 4: 3}.get(t, 5), 4) / 4))
        moments = (optax.tree.get(state.opt_state, name) for name in ("mu", "nu"))
        for tree in (state.params, *moments):
            np.testing.assert_array_equal(np.asarray(tree["b"])[~np.asarray(used["b"])], 0)
            assert np.count_nonzero(tree["a"]["bias"]) > 0
    assert step._cache_size() == 1
    assert masks.summarize(link.finish(state.params, state.reparam_state))["b"] == 0.75


@pytest.mark.parametrize("packed", [False, True])
def test_masks_lie_like_their_leaves_and_nothing_is_gathered(packed):
    """Eight devices cut the output axis of 128 entries, so that each has two whole bytes of every row of the mask."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = jax.NamedSharding(mesh, jax.P(None, "data"))
    link = reparam.pruned(0.5, packed=packed, every=1)

    def step(stored, state):
        seen, pull = jax.vjp(lambda s: link.apply(s, state, step=0, rng=None, train=True), stored)
        return seen, link.update(state, stored, pull(seen)[0], step=0, rng=None)

    w = jax.random.normal(jax.random.key(0), (4, 128))
    stored, state = link.init({"w": w}, None)
    cut = ({"w": place}, jax.tree.map(lambda x: place if x.ndim == 2 else jax.NamedSharding(mesh, jax.P()), state))
    compiled = jax.jit(step, in_shardings=cut).lower(stored, state).compile()
    assert not re.findall("all-gather|all-to-all|collective-permute", compiled.as_text())
    seen, new = compiled(*jax.device_put((stored, state), cut))
    np.testing.assert_array_equal(seen["w"], np.where(masks.topk_mask(abs(w), 0.5), w, 0))
    assert new.masks["w"].sharding.is_equivalent_to(place, 2)
    np.testing.assert_array_equal(new.masks["w"], state.masks["w"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"sparsity": 1.5}, r"sparsity=1.5 must lie in \[0, 1\]"),
        ({"score": "magnitud"}, "did you mean 'magnitude'"),
        ({"score": scores.fisher}, "score='fisher' has the arguments params, second_moment"),
        ({"allocation": "erdos"}, "did you mean 'erdos_renyi'"),
        ({"pattern": "2;4"}, "2:4"),
        ({"backward": "chains"}, "did you mean 'chain'"),
        ({"every": 0}, "every=0"),
        ({"start": -1}, "start=-1"),
        ({"start": 5, "end": 4}, r"end=4 must lie in \[5, inf\)"),
        ({"every": 10, "start": 1, "end": 9}, "never refreshed"),
        ({"normalize": True}, 'normalize=True.*"global"'),
        ({"min_kept": 3}, 'min_kept=3.*"global"'),
        ({"allocation": "global", "pattern": "2:4"}, '"unstructured"'),
    ],
)
def test_refuses_at_construction(options, text):
    with pytest.raises(ValueError, match=text):
        reparam.pruned(**({"sparsity": 0.5} | options))


@in_python
def test_refuses_later():
    with pytest.raises(ValueError, match=r"kernl.*kernel"):
        reparam.pruned(0.5, where=r"a/kernl").init(PARAMS, None)
    with pytest.raises(ValueError, match=r"override='c'"):
        reparam.pruned(0.5, override={"c": 0.1}).init(PARAMS, None)
    with pytest.raises(ValueError, match=r"allocation: the sparsity of w=2"):
        reparam.pruned(0.5, allocation=lambda params, sparsity: {"w": 2.0}).init(SMALL, None)
    with pytest.raises(ValueError, match="needs gradients"):
        reparam.pruned(0.5, score="saliency", every=None).init(SMALL, None)
    link = reparam.pruned(0.5, score="saliency")
    stored, state = link.init(SMALL, None)
    with pytest.raises(ValueError, match="put the link first"):
        link.update(state, stored, None, step=0, rng=None)
    packed = {"w": formats.Quantized.from_dense(SMALL["w"], "int8")}
    with pytest.raises(ValueError, match="w is already stored as Quantized"):
        link.finish(packed, state)
