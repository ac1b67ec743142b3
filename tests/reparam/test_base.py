"""Composition: links act in order, states and storages compose, parts of a tree are left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import formats, reparam
from steelyard.reparam import base

PARAMS = {"dense": {"kernel": jnp.arange(8.0).reshape(4, 2) - 3.0, "bias": jnp.ones(2)}, "skip": None}


def scaled(factor):
    """Keeps the structure; counts its updates; never lets an entry exceed 4."""
    return reparam.Reparam(
        init=lambda params, rng: (params, jnp.zeros((), jnp.int32)),
        apply=lambda stored, state, *, step, rng, train: jax.tree.map(lambda x: factor * x, stored),
        update=lambda state, stored, grads, *, step, rng: state + (0 if grads is None else 1),
        project=lambda stored, state: jax.tree.map(lambda x: jnp.minimum(x, 4.0), stored),
    )


def shifted():
    """Changes the structure: a trainable offset beside every parameter."""

    def init(params, rng):
        return {"base": params, "offset": jax.tree.map(jnp.ones_like, params)}, ()

    def apply(stored, state, *, step, rng, train):
        return jax.tree.map(jnp.add, stored["base"], stored["offset"])

    return reparam.Reparam(init, apply)


def see(link, stored, state, *, train=True, step=0):
    return link.apply(stored, state, step=step, rng=jax.random.key(1), train=train)


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_identity_keeps_everything():
    link = reparam.identity()
    stored, state = link.init(PARAMS, jax.random.key(0))
    same(see(link, stored, state), PARAMS)
    same(link.finish(stored, state), PARAMS)
    assert link.masks(stored, state, step=0) is None
    assert link.update(state, stored, PARAMS, step=0, rng=None) == state


def test_links_act_in_the_order_of_their_arguments():
    link = reparam.chain(scaled(3.0), shifted())
    stored, state = link.init(PARAMS, jax.random.key(0))
    # shifted() shows base + offset; scaled() acts before it, on both.
    same(see(link, stored, state), jax.tree.map(lambda x: 3.0 * x + 3.0, PARAMS))
    other = reparam.chain(shifted(), reparam.identity())
    stored, state = other.init(PARAMS, jax.random.key(0))
    same(see(other, stored, state), jax.tree.map(lambda x: x + 1.0, PARAMS))


def test_an_empty_chain_is_the_identity():
    link = reparam.chain()
    stored, state = link.init(PARAMS, jax.random.key(0))
    same(see(link, stored, state), PARAMS)


def test_chained_projection_and_update():
    link = reparam.chain(scaled(2.0), scaled(0.5))
    stored, state = link.init(PARAMS, jax.random.key(0))
    projected = link.project(jax.tree.map(lambda x: 10.0 * x, stored), state)
    assert max(float(x.max()) for x in jax.tree.leaves(projected)) == 4.0
    assert link.update(state, stored, PARAMS, step=0, rng=None) == (1, 1)


def test_gradients_reach_a_link_only_in_the_structure_that_it_stores():
    counted = scaled(1.0)._replace(project=base._keep_stored)
    link = reparam.chain(shifted(), counted)
    stored, state = link.init(PARAMS, jax.random.key(0))
    assert link.update(state, stored, stored, step=0, rng=None)[1] == 0


def test_a_constraint_behind_a_change_of_structure_is_refused():
    with pytest.raises(ValueError, match="Put link 1 first"):
        reparam.chain(shifted(), scaled(1.0)).init(PARAMS, jax.random.key(0))


def test_masks_of_a_chain_keep_what_all_links_keep():
    def masking(mask):
        return reparam.identity()._replace(masks=lambda stored, state, *, step: mask)

    a = {"dense": {"kernel": jnp.array([True, True, False]), "bias": None}}
    b = {"dense": {"kernel": jnp.array([True, False, True]), "bias": jnp.array([True])}}
    params = {"dense": {"kernel": jnp.ones(3), "bias": jnp.ones(1)}}
    link = reparam.chain(masking(a), masking(b), reparam.identity())
    stored, state = link.init(params, jax.random.key(0))
    masks = link.masks(stored, state, step=0)
    np.testing.assert_array_equal(masks["dense"]["kernel"], [True, False, False])
    np.testing.assert_array_equal(masks["dense"]["bias"], [True])


def test_mask_then_quantizer_finishes_as_one_node_that_is_what_evaluation_saw():
    link = reparam.chain(reparam.nm_sparse(2, 4, where=r".*kernel$"), reparam.fake_quant("int8", where=r".*kernel$"))
    kernel = jax.random.normal(jax.random.key(2), (16, 6))
    stored, state = link.init({"dense": {"kernel": kernel, "bias": jnp.ones(6)}}, jax.random.key(0))
    packed = link.finish(stored, state)
    node = packed["dense"]["kernel"]
    assert isinstance(node, formats.NMSparse)
    assert isinstance(node.values, formats.Quantized)
    same(jax.tree.map(formats.dense, packed, is_leaf=formats.is_weight), see(link, stored, state, train=False))
    # 8 rows of int8 codes, one scale for each of 6 columns, 8 two-bit positions a column.
    assert formats.nbytes(node) == 8 * 6 + 6 * 4 + 2 * 6


@pytest.mark.parametrize("inner", [scaled(3.0), shifted()], ids=["same structure", "new structure"])
def test_only_restricts_a_link_to_some_leaves(inner):
    link = reparam.only(inner, r".*/kernel")
    stored, state = link.init(PARAMS, jax.random.key(0))
    seen = see(link, stored, state)
    expected, _ = inner.init(PARAMS["dense"]["kernel"], jax.random.key(0))
    same(seen["dense"]["kernel"], see(inner, expected, state))
    same(seen["dense"]["bias"], PARAMS["dense"]["bias"])
    assert seen["skip"] is None
    same(link.finish(stored, state), see(link, stored, state, train=False))


def test_only_keeps_the_structure_if_the_inner_link_does():
    link = reparam.only(scaled(3.0), r".*/kernel")
    stored, state = link.init(PARAMS, jax.random.key(0))
    assert jax.tree.structure(stored) == jax.tree.structure(PARAMS)
    projected = link.project(jax.tree.map(lambda x: 10.0 * x, stored), state)
    assert float(projected["dense"]["kernel"].max()) == 4.0
    assert float(projected["dense"]["bias"].max()) == 10.0
    assert link.update(state, stored, PARAMS, step=0, rng=None) == 1


def test_only_leaves_nodes_of_an_earlier_link_alone():
    link = reparam.chain(
        reparam.only(reparam.nm_sparse(2, 4), "a/kernel"), reparam.only(reparam.fake_quant("int8"), "b/kernel")
    )
    params = {name: {"kernel": jax.random.normal(jax.random.key(i), (8, 4))} for i, name in enumerate("ab")}
    packed = link.finish(*link.init(params, jax.random.key(0)))
    assert isinstance(packed["a"]["kernel"], formats.NMSparse)
    assert isinstance(packed["b"]["kernel"], formats.Quantized)


def test_only_with_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match="matches none"):
        reparam.only(scaled(1.0), "kernels").init(PARAMS, jax.random.key(0))


def test_draws_of_links_differ_and_follow_the_key():
    noisy = reparam.Reparam(
        init=lambda params, rng: (params, ()),
        apply=lambda stored, state, *, step, rng, train: stored + jax.random.normal(rng, stored.shape),
    )
    link = reparam.chain(noisy, noisy)
    stored, state = link.init(jnp.zeros(4), jax.random.key(0))
    one = link.apply(stored, state, step=0, rng=jax.random.key(5), train=True)
    again = link.apply(stored, state, step=0, rng=jax.random.key(5), train=True)
    first = noisy.apply(stored, (), step=0, rng=jax.random.fold_in(jax.random.key(5), 0), train=True)
    same(one, again)
    assert not np.allclose(one, 2 * first)
