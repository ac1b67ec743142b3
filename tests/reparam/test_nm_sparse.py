"""N:M recipes: what is seen and what of the gradient comes back, step by step, against a table in NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import formats, reparam
from steelyard.sparsity import masks, schedules

RATE, PULL, DENSE, TUNE, TOTAL = 0.01, 0.03, 10, 20, 100
# Three frames share the 70 steps between the phases: they start at 10, 33 and 56.
STEPS = (0, DENSE - 1, DENSE, DENSE + 1, 32, 33, 55, 56, TOTAL - TUNE - 1, TOTAL - TUNE, TOTAL)
RECIPES = (
    *("dense", "masked", "ste", "sr_ste", "mdgf_linear", "mdgf_exponential"),
    *("sdgf_stepwise", "sdgf_geometric", "sdgf_densify"),
)
PARAMS = {
    "block": {"kernel": jax.random.normal(jax.random.key(0), (2, 20, 3)), "bias": jnp.ones(3)},
    "short": {"kernel": jnp.arange(4.0)},
    "nothing": {"kernel": None},
}
UPSTREAM = jax.tree.map(lambda x: jax.random.normal(jax.random.key(2), x.shape), PARAMS)


def link_of(recipe, **options):
    defaults = {
        "decay_rate": RATE,
        "sr_ste_decay": PULL,
        "dense_steps": DENSE,
        "fine_tune_steps": TUNE,
        "total_steps": TOTAL,
        "frames": 3,
    }
    return reparam.nm_sparse(1, 4, recipe=recipe, **(defaults | options))


def seen_and_gradient(link, stored, state, step):
    seen, pullback = jax.vjp(lambda s: link.apply(s, state, step=step, rng=None, train=True), stored)
    return seen, pullback(UPSTREAM)[0]


def nm(w, n, m):
    return np.asarray(masks.nm_mask(jnp.abs(w), n, m))


def table(recipe, w, g, step, backward):
    """What is seen and the gradient of the stored weight, in float64, straight from the definitions."""
    mask = nm(w, 1, 4)
    w, g = np.asarray(w, np.float64), np.asarray(g, np.float64)
    if recipe == "dense" or step < DENSE:
        return w, g
    if recipe == "masked":
        return w * mask, g * mask
    if recipe == "ste":
        return w * mask, g
    if recipe == "sr_ste":
        return w * mask, g + PULL * (1 - mask) * w
    if recipe.startswith("mdgf"):
        spent = RATE * (step - DENSE)
        flow = max(1 - spent, 0) if recipe == "mdgf_linear" else math.exp(-spent)
        if step >= TOTAL - TUNE:
            return w * mask, g
        c = mask + flow * (1 - mask)
        return w * c, g * c if backward == "chain" else g
    patterns = {
        "sdgf_stepwise": [(3, 4), (2, 4), (1, 4)],
        "sdgf_geometric": [(4, 16), (2, 8), (1, 4)],
        "sdgf_densify": [(1, 16), (1, 8), (1, 4)],
    }[recipe]
    frame = sum(step >= DENSE + i * 70 // 3 for i in range(1, 3))
    return w * nm(w, *patterns[frame]), g


@pytest.mark.parametrize(
    ("recipe", "backward"),
    [(recipe, "straight_through") for recipe in RECIPES] + [("mdgf_linear", "chain"), ("mdgf_exponential", "chain")],
)
def test_recipes_at_every_boundary(recipe, backward):
    link = link_of(recipe, backward=backward)
    stored, state = link.init(PARAMS, jax.random.key(0))
    assert state == ()
    traced = jax.jit(functools.partial(seen_and_gradient, link))
    w, g = PARAMS["block"]["kernel"], UPSTREAM["block"]["kernel"]
    for step in STEPS:
        seen, gradient = traced(stored, state, step)
        expected = table(recipe, w, g, step, backward)
        # float32: the decay, one product and one sum of numbers of order 1.
        np.testing.assert_allclose(seen["block"]["kernel"], expected[0], rtol=3e-6, atol=3e-7)
        np.testing.assert_allclose(gradient["block"]["kernel"], expected[1], rtol=3e-6, atol=3e-7)
        for name, leaf in (("block", "bias"), ("short", "kernel")):
            np.testing.assert_array_equal(seen[name][leaf], PARAMS[name][leaf])
            np.testing.assert_array_equal(gradient[name][leaf], UPSTREAM[name][leaf])
        assert seen["nothing"]["kernel"] is None


@pytest.mark.parametrize(
    ("recipe", "steps"), [("mdgf_exponential", (9, 10, 79, 80)), ("sdgf_stepwise", (9, 32, 33, 56))]
)
def test_traced_steps_equal_python_steps(recipe, steps):
    link = link_of(recipe)
    apply = functools.partial(link.apply, rng=None, train=True)
    traced = jax.jit(apply)
    for step in steps:
        a, b = traced(PARAMS, (), step=step)["block"]["kernel"], apply(PARAMS, (), step=step)["block"]["kernel"]
        # The decay itself may be rounded once less when it is compiled; the masks must be equal.
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=0)
        np.testing.assert_array_equal(a == 0, b == 0)


@pytest.mark.parametrize("kind", ["linear", "exponential"])
def test_limits_of_the_decay_rate(kind):
    """Rate 0 never fades; an infinite rate is straight-through from the first sparse step on."""
    never, at_once = (link_of(f"mdgf_{kind}", decay_rate=rate, fine_tune_steps=0) for rate in (0.0, math.inf))
    for step in (0, DENSE, TOTAL):
        seen, _ = seen_and_gradient(never, PARAMS, (), step)
        jax.tree.map(np.testing.assert_array_equal, seen, PARAMS)
        same = seen_and_gradient(at_once, PARAMS, (), step), seen_and_gradient(link_of("ste"), PARAMS, (), step)
        jax.tree.map(np.testing.assert_array_equal, *same)


def test_no_pull_is_straight_through():
    same = (seen_and_gradient(link_of(r, sr_ste_decay=0.0), PARAMS, (), 50) for r in ("sr_ste", "ste"))
    jax.tree.map(np.testing.assert_array_equal, *same)


def test_half_the_decay_shows_half():
    """Linear at rate 1/100 is 1/2 after 50 sparse steps."""
    link = link_of("mdgf_linear", fine_tune_steps=0, dense_steps=0)
    seen, _ = seen_and_gradient(link, PARAMS, (), 50)
    w = np.asarray(PARAMS["block"]["kernel"])
    np.testing.assert_allclose(seen["block"]["kernel"], np.where(nm(w, 1, 4), w, w / 2), rtol=1e-6)


def test_restricting_the_straight_through_gradient_is_the_chain_rule():
    ste, chain = (link_of("mdgf_exponential", backward=b) for b in ("straight_through", "chain"))
    step = DENSE + 30
    _, g = seen_and_gradient(ste, PARAMS, (), step)
    _, expected = seen_and_gradient(chain, PARAMS, (), step)
    kept = ste.masks(PARAMS, (), step=step)
    flow = schedules.exponential_decay(RATE, DENSE)(step)
    restricted = jax.tree.map(lambda g, mask: g if mask is None else jnp.where(mask, g, flow * g), g, kept)
    jax.tree.map(np.testing.assert_array_equal, restricted, expected)


@pytest.mark.parametrize(
    ("recipe", "refresh_every"), [("dense", 1), ("dense", 3), ("mdgf_linear", 1), ("sdgf_geometric", 3)]
)
def test_finish_stores_what_evaluation_shows(recipe, refresh_every):
    link = link_of(recipe, refresh_every=refresh_every)
    stored, state = link.init(PARAMS, None)
    shown = jax.jit(lambda s, t: link.apply(s, state, step=t, rng=None, train=False))(stored, 0)
    finished = jax.jit(link.finish)(stored, state)
    assert isinstance(finished["block"]["kernel"], formats.NMSparse)
    unpacked = jax.tree.map(formats.dense, finished, is_leaf=formats.is_weight)
    for dense, seen in zip(jax.tree.leaves(unpacked), jax.tree.leaves(shown), strict=True):
        np.testing.assert_array_equal(np.asarray(dense).view("u4"), np.asarray(seen).view("u4"))
    groups = np.asarray(unpacked["block"]["kernel"]).reshape(2, 5, 4, 3)
    assert (np.count_nonzero(groups, axis=2) <= 1).all()


def test_finish_of_a_ragged_axis():
    """The last of the groups of 4 among 10 rows has 2 entries, and keeps one of them."""
    w = jax.random.normal(jax.random.key(1), (2, 2, 10, 2))
    finished = jax.jit(reparam.nm_sparse(1, 4).finish)({"kernel": w}, ())["kernel"]
    assert np.count_nonzero(finished.dense(), axis=-2).tolist() == [[[3, 3]] * 2] * 2


def test_equal_n_and_m_is_dense():
    for recipe in RECIPES:
        link = reparam.nm_sparse(4, 4, recipe=recipe, dense_steps=1, total_steps=10)
        for step in (0, 5):
            seen = link.apply(PARAMS, (), step=step, rng=None, train=True)
            jax.tree.map(np.testing.assert_array_equal, seen, PARAMS)


def test_bfloat16_is_masked_and_rounded_in_its_own_precision():
    w = PARAMS["block"]["kernel"].astype(jnp.bfloat16)
    link = reparam.nm_sparse(2, 4, decay_rate=0.3)
    seen = link.apply({"kernel": w}, (), step=1, rng=None, train=True)["kernel"]
    assert seen.dtype == jnp.bfloat16
    faded = np.asarray(w, np.float32) * np.asarray(schedules.exponential_decay(0.3)(1))
    expected = np.where(nm(w, 2, 4), w, jnp.asarray(faded).astype(jnp.bfloat16))
    np.testing.assert_array_equal(seen, expected)


def test_other_axis_keeps_an_array():
    link = reparam.nm_sparse(1, 3, axis=-1, where="block/kernel")
    finished = link.finish(PARAMS, ())["block"]["kernel"]
    assert np.count_nonzero(finished, axis=-1).tolist() == [[1] * 20] * 2
    np.testing.assert_array_equal(finished, link.apply(PARAMS, (), step=0, rng=None, train=False)["block"]["kernel"])
    same_axis = reparam.nm_sparse(1, 4, axis=1, where="block/kernel").finish(PARAMS, ())
    assert isinstance(same_axis["block"]["kernel"], formats.NMSparse)


def test_refreshed_masks_are_kept_between():
    """Refreshed after steps 0, 3, 6, ...; between, the seen mask is the stored one, whatever the weights do."""
    link = reparam.nm_sparse(1, 2, recipe="ste", refresh_every=3)
    w = [{"kernel": jnp.array([[1.0], [2.0]])}, {"kernel": jnp.array([[3.0], [2.0]])}]
    state = link.init(w[0], None)[1]
    assert state.masks["kernel"].ravel().tolist() == [False, True]
    update = jax.jit(link.update)
    for step, kept in ((1, [False, True]), (2, [False, True]), (3, [True, False])):
        state = update(state, w[1], None, step=step, rng=None)
        assert state.masks["kernel"].ravel().tolist() == kept
        seen = link.apply(w[1], state, step=step + 1, rng=None, train=True)["kernel"]
        assert (seen.ravel() != 0).tolist() == kept
        assert link.masks(w[1], state, step=step + 1)["kernel"].ravel().tolist() == kept


def test_refresh_takes_the_pattern_of_the_next_step():
    link = reparam.nm_sparse(1, 4, recipe="sdgf_densify", frames=2, total_steps=8, refresh_every=1)
    lazy = reparam.nm_sparse(1, 4, recipe="sdgf_densify", frames=2, total_steps=8, refresh_every=3)
    params = {"kernel": PARAMS["block"]["kernel"][0]}
    stored, state = lazy.init(params, None)
    assert state.masks["kernel"].sum() == 3 * 3  # 20 rows are three groups of 8, each with one entry a column
    state = lazy.update(state, stored, None, step=3, rng=None)  # the second frame starts at step 4
    expected = link.masks(params, (), step=4)["kernel"]
    np.testing.assert_array_equal(state.masks["kernel"], expected)


def test_masks_for_the_optimizer():
    assert reparam.nm_sparse(1, 4, recipe="dense").masks(PARAMS, (), step=0) is None
    link = link_of("mdgf_linear")
    before, after = (link.masks(PARAMS, (), step=t) for t in (DENSE - 1, DENSE))
    assert before["block"]["kernel"].all()
    np.testing.assert_array_equal(after["block"]["kernel"], nm(PARAMS["block"]["kernel"], 1, 4))
    assert after["block"]["bias"] is after["short"]["kernel"] is after["nothing"]["kernel"] is None


def test_masks_keep_the_sharding_of_the_weights():
    mesh = jax.make_mesh((8,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    w = jax.device_put(jax.random.normal(jax.random.key(0), (8, 16)), sharding)
    link = reparam.nm_sparse(2, 4)
    seen = jax.jit(lambda w: link.apply({"kernel": w}, (), step=1, rng=None, train=True)["kernel"])
    compiled = seen.lower(w).compile()
    assert seen(w).sharding.is_equivalent_to(sharding, 2)
    assert "all-" not in compiled.as_text()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"recipe": "mdgf_expo"}, "mdgf_exponential"),
        ({"recipe": "sdgf_stepwise"}, "total_steps is needed"),
        ({"fine_tune_steps": 3}, "total_steps is needed"),
        ({"dense_steps": 5, "fine_tune_steps": 5, "total_steps": 10}, "leave nothing"),
        ({"dense_steps": 10, "total_steps": 10}, "leave nothing"),
        ({"dense_steps": -1}, "dense_steps=-1"),
        ({"backward": "straight"}, "straight_through"),
        ({"refresh_every": 0}, "refresh_every=0"),
        ({"decay_rate": -1.0}, "rate=-1"),
        ({"n": 0}, "n=0"),
        ({"n": 5}, "n=5, m=4"),
    ],
)
def test_refuses_at_construction(options, text):
    with pytest.raises(ValueError, match=text):
        reparam.nm_sparse(**({"n": 1, "m": 4} | options))


def test_refuses_at_init_and_finish():
    with pytest.raises(ValueError, match=r"kernl.*kernel"):
        reparam.nm_sparse(2, 4, where=r".*kernl").init(PARAMS, None)
    packed = {"kernel": formats.Quantized.from_dense(PARAMS["block"]["kernel"], "int8")}
    with pytest.raises(ValueError, match=r"kernel is already stored as Quantized"):
        reparam.nm_sparse(2, 4).finish(packed, ())
