"""Casting: what the model sees, what trains, and what is deployed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import formats, reparam

PARAMS = {
    "dense": {"kernel": jax.random.normal(jax.random.key(0), (8, 4)), "bias": jnp.full(4, 1 / 3)},
    "norm": {"scale": jnp.full(4, 1 / 3)},
    "steps": jnp.arange(3),
    "nothing": None,
}


def dtypes(tree):
    return jax.tree.map(lambda x: x.dtype.name, tree)


def test_model_sees_bfloat16_and_the_master_copy_stays():
    link = reparam.cast(keep="norm/.*")
    stored, state = link.init(PARAMS, jax.random.key(0))
    assert stored is PARAMS
    seen = jax.jit(lambda s: link.apply(s, state, step=0, rng=None, train=True))(stored)
    assert dtypes(seen) == {
        "dense": {"kernel": "bfloat16", "bias": "bfloat16"},
        "norm": {"scale": "float32"},
        "steps": "int32",
        "nothing": None,
    }
    np.testing.assert_array_equal(seen["dense"]["bias"], PARAMS["dense"]["bias"].astype(jnp.bfloat16))


def test_gradients_come_back_in_the_dtype_of_the_master_copy():
    link = reparam.cast(jnp.float16)
    w = PARAMS["dense"]
    gradient = jax.grad(
        lambda w: jnp.sum(link.apply(w, (), step=0, rng=None, train=True)["kernel"] ** 2).astype(float)
    )(w)
    assert dtypes(gradient) == {"kernel": "float32", "bias": "float32"}
    # The gradient 2 w is computed from the float16 copy; doubling is exact.
    np.testing.assert_array_equal(gradient["kernel"], 2 * w["kernel"].astype(jnp.float16).astype(jnp.float32))


def test_small_updates_accumulate_in_the_master_copy():
    """1 + 2^-12 is 1 in float16, and so is 1 in the copy; after 2^4 such steps the master copy is at 1 + 2^-8."""
    link = reparam.cast(jnp.float16)
    w = jnp.float32(1)
    for _ in range(16):
        assert link.apply(w, (), step=0, rng=None, train=True) >= 1
        w = w + 2.0**-12
    assert link.apply(w, (), step=0, rng=None, train=True) == 1 + 2.0**-8
    assert jnp.float16(1) + jnp.float16(2.0**-12) == 1


def test_without_a_master_copy_small_updates_are_lost():
    """In float16 a step below 2^-11 of the weight rounds to nothing; in the float32 master copy 2^12 of them add up."""
    update = jnp.float32(2.0**-12)
    alone = jnp.float16(1)
    master = jnp.float32(1)
    link = reparam.cast(jnp.float16)
    for _ in range(2**6):
        alone = (alone + update).astype(jnp.float16)
        master = master + update
    assert alone == 1
    assert link.apply(master, (), step=0, rng=None, train=True) == 1 + 2.0**-6


def test_awkward_trees():
    link = reparam.cast()
    for tree in ({}, {"a": None}, jnp.float32(1 / 3), jnp.zeros((0, 2)), 1.5):
        stored, state = link.init(tree, None)
        seen = link.apply(stored, state, step=0, rng=None, train=True)
        assert jax.tree.structure(seen) == jax.tree.structure(tree)
        assert all(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(seen))


@pytest.mark.parametrize(("finish", "expected"), [("cast", "bfloat16"), ("keep", "float32")])
def test_finish_is_what_evaluation_shows(finish, expected):
    link = reparam.cast(finish=finish, keep="norm/scale")
    stored, state = link.init(PARAMS, None)
    finished = link.finish(stored, state)
    shown = link.apply(stored, state, step=3, rng=None, train=False)
    assert dtypes(finished)["dense"] == {"kernel": expected, "bias": expected}
    assert dtypes(finished) == dtypes(shown)
    jax.tree.map(np.testing.assert_array_equal, finished, shown)


@pytest.mark.parametrize(
    "before",
    [
        [reparam.nm_sparse(2, 4)],
        [reparam.fake_quant()],
        [reparam.nm_sparse(2, 4), reparam.fake_quant("int8", method="lsq")],
    ],
)
def test_finish_casts_weight_nodes(before):
    link = reparam.chain(*before, reparam.cast())
    stored, state = link.init(PARAMS, None)
    node = link.finish(stored, state)["dense"]["kernel"]
    shown = link.apply(stored, state, step=0, rng=None, train=False)["dense"]["kernel"]
    assert formats.is_weight(node)
    assert node.dtype == node.dense().dtype == shown.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(node.dense()).view("u2"), np.asarray(shown).view("u2"))


def test_refuses():
    for dtype in (jnp.int8, bool):
        with pytest.raises(ValueError, match="floating dtype"):
            reparam.cast(dtype)
    with pytest.raises(ValueError, match=r"dtype='bfloat61'.*did you mean 'bfloat16'"):
        reparam.cast("bfloat61")
    with pytest.raises(ValueError, match=r"finish='casts'.*did you mean 'cast'"):
        reparam.cast(finish="casts")
    with pytest.raises(ValueError, match=r"keep='nrom/\.\*'.*norm/scale"):
        reparam.cast(keep=r"nrom/.*").init(PARAMS, None)


def test_refuses_nodes_that_it_does_not_know():
    class Other(formats.Weight):
        pass

    with pytest.raises(ValueError, match="kernel is stored as Other"):
        reparam.cast().finish({"kernel": Other()}, ())
