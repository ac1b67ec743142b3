"""Soft shrinkage against loops in float64, at both ends of `retain`, by schedule, path and pattern."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import optim
from tests.models.helpers import compiled, normal

PARAMS = {"head": {"kernel": normal(6, 2), "bias": normal(2)}, "none": None}
UPDATES = jax.tree.map(lambda p: 0.3 * normal(*p.shape, seed=9), PARAMS)
ZEROS = jax.tree.map(jnp.zeros_like, PARAMS)
TWO = {"conv": {"kernel": normal(4, 5), "bias": normal(5)}, **PARAMS}


@compiled
def step(params, updates, state, sparsity, retain):
    """One program for all numbers."""
    changes, state = optim.soft_shrinkage(sparsity, retain=retain).update(updates, state, params)
    return optax.apply_updates(params, changes), changes, state


def run(sparsity, retain, params=PARAMS, updates=UPDATES, steps=1):
    """The parameters after some steps with the same update, and the updates of the last."""
    state = optim.soft_shrinkage(sparsity).init(params)
    for _ in range(steps):
        params, changes, state = step(params, updates, state, sparsity, retain)
    return params, changes


def one_step(tx, params=PARAMS):
    """The parameters after one step, with which nothing else is shared."""
    updates = jax.tree.map(lambda p: 0.3 * normal(*p.shape, seed=9), params)
    changes, _ = compiled(tx.update)(updates, tx.init(params), params)
    return optax.apply_updates(params, changes)


def nonzeros(params):
    return [np.count_nonzero(params[name]["kernel"]) for name in ("conv", "head") if name in params]


def numpy_step(w, u, sparsity, retain):
    moved = np.asarray(w, np.float64) + np.asarray(u, np.float64)
    order = sorted(range(moved.size), key=lambda i: (-abs(moved.flat[i]), i))
    for i in order[int(np.rint(moved.size * (1 - sparsity))) :]:
        moved.flat[i] *= retain
    return moved


def test_equals_the_loops_over_several_steps():
    params, _ = run(0.6, 0.7, steps=3)
    expected = PARAMS["head"]["kernel"]
    for _ in range(3):
        expected = numpy_step(expected, UPDATES["head"]["kernel"], 0.6, 0.7)
    # A few operations a step on numbers of order 1 in float32.
    np.testing.assert_allclose(params["head"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(params["head"]["bias"], PARAMS["head"]["bias"] + 3 * UPDATES["head"]["bias"], rtol=1e-6)


def test_retain_one_changes_nothing():
    _, changes = run(0.9, 1.0)
    jax.tree.map(np.testing.assert_array_equal, changes, UPDATES)


def test_retain_zero_is_the_projection_on_the_largest():
    params, _ = run(0.75, 0.0)
    moved = np.asarray(PARAMS["head"]["kernel"] + UPDATES["head"]["kernel"])
    largest = np.abs(moved) >= np.sort(np.abs(moved), None)[-3]
    np.testing.assert_array_equal(params["head"]["kernel"], np.where(largest, moved, 0))
    assert np.all(params["head"]["bias"])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zeros_are_exact_with_updates_in_half_precision(dtype):
    params, updates = PARAMS["head"]["kernel"].astype(dtype), UPDATES["head"]["kernel"].astype(jnp.bfloat16)
    params, _ = run(0.75, 0.0, params, updates)
    assert params.dtype == dtype
    assert np.count_nonzero(params) == 3


def test_a_weight_that_is_never_chosen_shrinks_as_a_power():
    params, _ = run(0.5, 0.9, updates=ZEROS, steps=6)
    w = np.asarray(PARAMS["head"]["kernel"], np.float64)
    small = np.abs(w) < np.median(np.abs(w))
    # Six steps of a few roundings each.
    np.testing.assert_allclose(params["head"]["kernel"], np.where(small, w * 0.9**6, w), rtol=2e-6)


def test_ties_keep_the_lower_index():
    params, _ = run(0.75, 0.0, jax.tree.map(jnp.ones_like, PARAMS), ZEROS)
    assert params["head"]["kernel"].ravel().tolist() == [1, 1, 1] + 9 * [0]


def test_sparsity_by_schedule_and_every_so_many_updates():
    tx = optim.soft_shrinkage(lambda step: jnp.where(step < 4, 0.25, 0.5), retain=0.0, every=2)
    state, update, counts = tx.init(PARAMS), compiled(tx.update), []
    for _ in range(6):
        changes, state = update(UPDATES, state, PARAMS)
        counts += nonzeros(optax.apply_updates(PARAMS, changes))
    assert counts == [9, 12, 9, 12, 6, 12]
    assert state.count == 6


def test_sparsity_by_path_the_first_match_counts():
    tx = optim.soft_shrinkage({r"head/.*": 0.5, r".*/kernel": lambda step: 0.75}, retain=0.0)
    assert nonzeros(one_step(tx, TWO)) == [5, 6]


@pytest.mark.parametrize("amount", [({r"head/.*": 0.5}, None), (0.5, r"head/.*")], ids=["sparsity", "where"])
def test_leaves_that_are_not_named_pass(amount):
    params = one_step(optim.soft_shrinkage(amount[0], where=amount[1], retain=0.0), TWO)
    assert nonzeros(params) == [20, 6]
    assert np.all(params["head"]["bias"])


def test_patterns():
    kernel = one_step(optim.soft_shrinkage(0.5, retain=0.0, pattern="1:2"))["head"]["kernel"]
    np.testing.assert_array_equal((np.asarray(kernel) != 0).reshape(3, 2, 2).sum(1), 1)
    kernel = one_step(optim.soft_shrinkage(0.5, retain=0.0, pattern="channel:-1"))["head"]["kernel"]
    assert sorted(np.count_nonzero(kernel, axis=0)) == [0, 6]


def test_last_in_a_chain_and_behind_a_mask():
    mask = {"conv": {"kernel": True, "bias": False}, "head": {"kernel": False, "bias": False}, "none": None}
    tx = optax.chain(optax.sgd(1.0), optax.masked(optim.soft_shrinkage(0.5, retain=0.0), mask))
    assert nonzeros(one_step(tx, TWO)) == [10, 12]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: optim.soft_shrinkage(1.5), r"sparsity=1.5 must lie in \[0, 1\]"),
        (lambda: optim.soft_shrinkage({".*": -0.1}), r"sparsity\['\.\*'\]=-0.1 must lie in \[0, 1\]"),
        (lambda: optim.soft_shrinkage(0.5, retain=1.1), r"retain=1.1 must lie in \[0, 1\]"),
        (lambda: optim.soft_shrinkage(0.5, every=0), r"every=0 must lie in \[1, inf\)"),
        (lambda: optim.soft_shrinkage(0.5, pattern="blok:4x4"), "pattern='blok:4x4'.*did you mean 'block:4x4'"),
        (lambda: optim.soft_shrinkage(0.5, where="haed/.*").init(PARAMS), "where='haed.*head/kernel"),
        (lambda: optim.soft_shrinkage({"haed/.*": 0.5}).init(PARAMS), "sparsity='haed.*head/kernel"),
        (lambda: optim.soft_shrinkage(0.5).update(UPDATES, optim.SoftShrinkageState(0)), "needs params"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
