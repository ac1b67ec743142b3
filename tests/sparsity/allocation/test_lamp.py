"""The layer-adaptive allocation against its definition, in float64 and with loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard.sparsity import allocation

PARAMS = {
    "a": {"kernel": jax.random.normal(jax.random.key(0), (4, 6)), "bias": jnp.ones(6)},
    "b": {"kernel": 100 * jax.random.normal(jax.random.key(1), (6, 10)) ** 3},
    "nothing": {"kernel": None},
}
SIZES = [24, 60]


def defined(leaves, kept):
    """Survivors of each leaf when the `kept` highest scores of all stay."""
    scored = []
    for i, leaf in enumerate(leaves):
        squares = sorted(float(x) ** 2 for x in np.ravel(leaf).astype(np.float64))
        scored += [(squares[u] / sum(squares[u:]), i) for u in range(len(squares))]
    top = sorted(scored, reverse=True)[:kept]
    return [sum(i == layer for _, i in top) for layer in range(len(leaves))]


@pytest.mark.parametrize("kept", [0, 2, 21, 84])
def test_survivors_are_those_of_the_definition(kept):
    sparsities = allocation.lamp(PARAMS, 1 - kept / 84)
    survivors = defined([PARAMS["a"]["kernel"], PARAMS["b"]["kernel"]], kept)
    found = [sparsities[name]["kernel"] for name in "ab"]
    np.testing.assert_allclose(found, 1 - np.array(survivors) / SIZES, rtol=1e-12)
    assert all(type(x) is float for x in found)
    assert sparsities["a"]["bias"] is sparsities["nothing"]["kernel"] is None
    if kept == 2:
        assert survivors == [1, 1]  # the largest of each leaf has the score 1


def test_the_scale_of_a_leaf_does_not_matter():
    scaled = PARAMS | {"b": {"kernel": PARAMS["b"]["kernel"] / 2**10}}
    assert allocation.lamp(scaled, 0.75) == allocation.lamp(PARAMS, 0.75)


def test_a_leaf_of_zeros_goes_first():
    zeros = PARAMS | {"b": {"kernel": jnp.zeros((6, 10))}}
    sparsities = allocation.lamp(zeros, 1 - 24 / 84)
    assert [sparsities[name]["kernel"] for name in "ab"] == [0.0, 1.0]


def test_options():
    """What has a sparsity of its own is not counted; a function may select a vector."""
    sparsities = allocation.lamp(
        PARAMS, 0.5, where=lambda path, leaf: path in ("a/bias", "b/kernel"), override={"b/.*": 0.1}
    )
    assert sparsities["a"] == {"bias": 0.5, "kernel": None}
    assert sparsities["b"] == {"kernel": 0.1}


@pytest.mark.parametrize(
    ("options", "text"),
    [({"sparsity": 2.0}, "sparsity=2.0"), ({"sparsity": 0.5, "where": "a/kernl"}, "a/kernl.*a/kernel")],
)
def test_refuses(options, text):
    with pytest.raises(ValueError, match=text):
        allocation.lamp(PARAMS, **options)
