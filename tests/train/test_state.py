"""The state before the first step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from steelyard import aggregate, reparam, train

PARAMS = {"kernel": jnp.arange(32.0).reshape(8, 4), "bias": jnp.zeros(4)}


def test_without_options_the_stored_parameters_are_the_parameters():
    tx = optax.adam(1e-3)
    state = train.init_state(PARAMS, tx, rng=jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, state.params, PARAMS)
    jax.tree.map(np.testing.assert_array_equal, state.opt_state, tx.init(PARAMS))
    assert int(state.step) == int(state.skipped) == 0
    assert state.references == {}
    assert state.model_state is None
    assert state.aggregator_state == ()


def test_moments_exist_for_what_is_stored():
    link = reparam.fake_quant("int8", method="lsq", where="kernel")
    state = train.init_state(PARAMS, optax.adam(1e-3), rng=jax.random.key(0), reparam=link)
    assert set(state.params) == {"base", "fake_quant"}
    assert jax.tree.structure(state.opt_state[0].mu) == jax.tree.structure(state.params)


def test_an_aggregator_is_initialised_on_what_it_balances():
    seen = []
    rule = aggregate.mean()
    spy = aggregate.Aggregator(lambda tree: seen.append(tree) or (), rule.update, weights=rule.weights)
    options = {"rng": jax.random.key(0), "aggregator": spy}
    train.init_state(PARAMS, optax.sgd(1.0), **options)
    train.init_state(PARAMS, optax.sgd(1.0), outputs={"logits": jnp.zeros((2, 3))}, **options)
    assert set(seen[0]) == {"kernel", "bias"}
    assert set(seen[1]) == {"logits"}


def test_the_key_of_the_run_differs_from_the_key_that_it_was_made_of():
    state = train.init_state(PARAMS, optax.sgd(1.0), rng=jax.random.key(0))
    assert not np.array_equal(jax.random.key_data(state.rng), jax.random.key_data(jax.random.key(0)))
    again = train.init_state(PARAMS, optax.sgd(1.0), rng=jax.random.key(0))
    np.testing.assert_array_equal(jax.random.key_data(state.rng), jax.random.key_data(again.rng))


def test_shapes_need_no_memory():
    shapes = jax.eval_shape(lambda: train.init_state(PARAMS, optax.adam(1e-3), rng=jax.random.key(0)))
    assert shapes.params["kernel"].shape == (8, 4)
    assert isinstance(shapes.step, jax.ShapeDtypeStruct)
