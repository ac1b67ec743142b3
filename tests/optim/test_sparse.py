"""Updates under masks: moments outside are zero for any rule, and fading gradients are the chain rule."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import optim

MASK = jnp.asarray([[True, False, True], [False, True, True]])
PARAMS = {"kernel": jnp.arange(1.0, 7.0).reshape(2, 3), "bias": jnp.ones(3), "none": None}
GRADS = {"kernel": jnp.full((2, 3), 0.5), "bias": jnp.ones(3), "none": None}
MASKS = {"kernel": MASK, "bias": None, "none": None}


@pytest.mark.parametrize(
    "inner",
    [
        optax.adam(0.1),
        optim.adamp(0.1, weight_decay=0.1),
        optax.sgd(0.1, momentum=0.9),
        optax.adafactor(0.1),
        optax.chain(optax.clip_by_global_norm(1.0), optax.rmsprop(0.1)),
    ],
    ids=["adam", "adamp", "sgd", "adafactor", "rmsprop"],
)
def test_nothing_happens_outside_the_mask(inner):
    tx = optim.sparse(inner)
    dense = optim.sparse(inner).init(PARAMS)
    # A state with moments everywhere, as after dense steps.
    state = optax.tree.map_params(inner, lambda x: jnp.ones_like(x), dense)
    updates, new_state = jax.jit(tx.update)(GRADS, state, PARAMS, masks=MASKS)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    np.testing.assert_array_equal(updates["kernel"][~MASK], 0)
    assert np.all(np.asarray(updates["kernel"][MASK]) != 0)
    assert updates["none"] is None
    for leaf in jax.tree.leaves(new_state):
        if leaf.shape == MASK.shape:
            np.testing.assert_array_equal(leaf[~MASK], 0)


def test_kept_entries_follow_the_inner_rule_and_grown_ones_start_anew():
    """Adam is elementwise: inside the mask it runs as alone; an entry grown later has moments (1 - b) g and so on."""
    inner = optax.scale_by_adam()
    tx = optim.sparse(inner)
    state, plain = tx.init(PARAMS), inner.init(PARAMS)
    for _ in range(2):
        updates, state = tx.update(GRADS, state, PARAMS, masks=MASKS)
        expected, plain = inner.update(GRADS, plain, PARAMS)
        np.testing.assert_array_equal(updates["kernel"][MASK], expected["kernel"][MASK])
        np.testing.assert_array_equal(updates["bias"], expected["bias"])
    _, state = tx.update(GRADS, state, PARAMS, masks={**MASKS, "kernel": ~MASK})
    np.testing.assert_allclose(state.mu["kernel"], jnp.where(MASK, 0, 0.1 * 0.5), rtol=1e-6)


def test_not_finite_gradients_of_pruned_weights_do_not_matter():
    tx = optim.sparse(optax.sgd(1.0))
    grads = {**GRADS, "kernel": jnp.where(MASK, 0.5, jnp.nan)}
    updates, _ = tx.update(grads, tx.init(PARAMS), PARAMS, masks=MASKS)
    np.testing.assert_array_equal(updates["kernel"], jnp.where(MASK, -0.5, 0))


def test_all_dense():
    tx = optim.sparse(optax.sgd(1.0))
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, masks=None)
    np.testing.assert_array_equal(updates["kernel"], -GRADS["kernel"])
    assert tx.update({}, tx.init({}), {}, masks={})[0] == {}


def test_missing_or_misshapen_masks():
    for tx in (optim.sparse(optax.sgd(1.0)), optim.decay_gradient_flow(0.5)):
        with pytest.raises(ValueError, match="extra argument masks"):
            tx.update(GRADS, tx.init(PARAMS), PARAMS)
        with pytest.raises(ValueError, match=r"\(3, 2\) .*\(2, 3\)"):
            tx.update(GRADS, tx.init(PARAMS), PARAMS, masks={**MASKS, "kernel": MASK.T})
    tx = optim.decay_gradient_flow(0.5, masks=lambda params: MASKS)
    with pytest.raises(ValueError, match="function of params"):
        tx.update(GRADS, tx.init(PARAMS))


@pytest.mark.parametrize("where", ["tree", "function", "extra argument"])
def test_decay_gradient_flow(where):
    masks = {
        "tree": MASKS,
        "function": lambda params: {**MASKS, "kernel": params["kernel"] > 2},
        "extra argument": None,
    }
    tx = optim.decay_gradient_flow(optax.linear_schedule(1.0, 0.0, 2), masks=masks[where])
    extra = {"masks": MASKS} if where == "extra argument" else {}
    kept = PARAMS["kernel"] > 2 if where == "function" else MASK
    state = tx.init(PARAMS)
    for flow in (1.0, 0.5, 0.0, 0.0):
        updates, state = jax.jit(tx.update)(GRADS, state, PARAMS, **extra)
        np.testing.assert_array_equal(updates["kernel"], jnp.where(kept, 0.5, flow * 0.5))
        np.testing.assert_array_equal(updates["bias"], GRADS["bias"])
        assert updates["none"] is None
    assert int(state.count) == 4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_straight_through_then_decay_is_the_chain_rule(dtype):
    w, x = PARAMS["kernel"].astype(dtype), jnp.linspace(0.1, 0.7, 2).astype(dtype)
    flow = 0.3
    seen = w * (MASK + jnp.asarray(flow, dtype) * ~MASK)
    straight_through = jax.grad(lambda w: jnp.sum(jnp.sin(x @ w).astype(jnp.float32)))(seen)
    chain = jax.grad(
        lambda w: jnp.sum(jnp.sin(x @ (w * (MASK + jnp.asarray(flow, dtype) * ~MASK))).astype(jnp.float32))
    )(w)
    tx = optim.decay_gradient_flow(flow, masks=MASK)
    updates, _ = tx.update(straight_through, tx.init(w))
    assert updates.dtype == dtype
    np.testing.assert_array_equal(updates, chain)
