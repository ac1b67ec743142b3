"""Allocations by shape, against closed forms and cases worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import tree
from steelyard.sparsity import allocation

# In the order of the leaves: 288, 4608 and 640 weights.
SHAPES = {"a_conv": (3, 3, 4, 8), "b_conv": (3, 3, 8, 64), "c_head": (64, 10)}
PARAMS = {
    name: {"kernel": jax.ShapeDtypeStruct(s, jnp.float32), "bias": jnp.zeros(s[-1])} for name, s in SHAPES.items()
}
PARAMS["nothing"] = {"kernel": None}
SIZES = np.array([288, 4608, 640])


def values(sparsities):
    assert all(type(x) is float for x in jax.tree.leaves(sparsities))
    assert sparsities["nothing"]["kernel"] is None
    assert all(sparsities[name]["bias"] is None for name in SHAPES)
    return np.array([sparsities[name]["kernel"] for name in SHAPES])


def test_uniform():
    assert values(allocation.uniform(PARAMS, 0.7)).tolist() == [0.7] * 3


@pytest.mark.parametrize(("kernel", "power"), [(True, 1.0), (True, 0.5), (False, 1.0), (False, 2.0)])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 1.0])
def test_erdos_renyi(kernel, power, sparsity):
    kept = 1 - values(allocation.erdos_renyi(PARAMS, sparsity, kernel=kernel, power=power))
    np.testing.assert_allclose(kept @ SIZES, (1 - sparsity) * SIZES.sum(), rtol=1e-9, atol=1e-9)
    axes = [s if kernel else s[-2:] for s in SHAPES.values()]
    p = np.array([(sum(s) / np.prod(s)) ** power for s in axes])
    # What is not dense is in proportion to p, and what is dense would have had more than all.
    is_open = kept < 1
    if is_open.any():
        c = (kept / p)[is_open]
        np.testing.assert_allclose(c, c[0], rtol=1e-9, atol=1e-12)
        assert (p[~is_open] * c[0] >= 1 - 1e-9).all()


def test_erdos_renyi_by_hand():
    """p = 6/8 and 20/64 of 8 and 64 weights: shares 6 and 20. Of 13 the half each; of 68 the first is full at 8."""
    params = {"a": jnp.zeros((2, 4)), "b": jnp.zeros((4, 16))}
    halved, filled = (allocation.erdos_renyi(params, 1 - kept / 72) for kept in (13, 68))
    np.testing.assert_allclose([halved["a"], halved["b"]], [1 - 3 / 8, 1 - 10 / 64], rtol=1e-12)
    assert filled["a"] == 0.0
    np.testing.assert_allclose(filled["b"], 4 / 64, rtol=1e-9)


def test_one_leaf_or_power_zero_is_uniform():
    np.testing.assert_allclose(allocation.erdos_renyi(jnp.zeros((5, 7)), 0.3), 0.3, rtol=1e-12)
    np.testing.assert_allclose(values(allocation.erdos_renyi(PARAMS, 0.6, power=0.0)), 0.6, rtol=1e-12)


@pytest.mark.parametrize(
    ("sparsity", "pruned"),
    [
        # 0.5 of 5536 are 2768, of the 5248 outside of the first convolution: the head may go down to 128, and keeps
        # more than that.
        (0.5, [0, 2768 * 4608 / 5248, 2768 * 640 / 5248]),
        # Of 4982 the head gives 640 - 128 and the second convolution the rest.
        (0.9, [0, 4982 - 512, 512]),
        (0.0, [0, 0, 0]),
    ],
)
def test_uniform_plus(sparsity, pruned):
    np.testing.assert_allclose(values(allocation.uniform_plus(PARAMS, sparsity)), pruned / SIZES, rtol=1e-12)


def test_uniform_plus_without_a_convolution():
    """A first matrix has no privilege; 150 of 200 weights go, but only 50 from the last."""
    params = [jnp.zeros((10, 10)), jnp.zeros((10, 10))]
    assert allocation.uniform_plus(params, 0.75, last_kept=0.5) == [1.0, 0.5]
    assert allocation.uniform_plus(params, 0.4, last_kept=0.5) == [0.4, 0.4]


@pytest.mark.parametrize("name", ["uniform", "uniform_plus", "erdos_renyi"])
def test_overridden_leaves_are_outside_of_the_budget(name):
    fn = getattr(allocation, name)
    own = values(fn(PARAMS, 0.6, override={"c_head/.*": 0.25, ".*head/kernel": 0.5}))
    rest = fn({k: v for k, v in PARAMS.items() if k != "c_head"}, 0.6)
    np.testing.assert_array_equal(own, [rest["a_conv"]["kernel"], rest["b_conv"]["kernel"], 0.25])
    everything = fn(PARAMS, 0.6, override={".*": 0.125})
    assert values(everything).tolist() == [0.125] * 3


def test_where_selects():
    chosen = allocation.uniform(PARAMS, 0.5, where=".*conv/kernel")
    assert dict(tree.flatten(chosen)) == {"a_conv/kernel": 0.5, "b_conv/kernel": 0.5}
    by_hand = allocation.uniform(PARAMS, 0.5, where=lambda path, leaf: path == "c_head/bias")
    assert dict(tree.flatten(by_hand)) == {"c_head/bias": 0.5}


@pytest.mark.parametrize(
    ("fn", "arguments", "text"),
    [
        ("uniform", {"sparsity": 1.5}, r"sparsity=1.5 must lie in \[0, 1\]"),
        ("erdos_renyi", {"sparsity": -0.5}, r"sparsity=-0.5"),
        ("erdos_renyi", {"sparsity": 0.5, "power": -1.0}, r"power=-1.0"),
        ("uniform_plus", {"sparsity": 0.5, "last_kept": 2.0}, r"last_kept=2.0"),
        ("uniform_plus", {"sparsity": 0.99}, r"sparsity=0.99 .* 5481 of 5536"),
        ("uniform", {"sparsity": 0.5, "where": "c_haed/kernel"}, r"c_haed.*c_head/kernel"),
        ("uniform", {"sparsity": 0.5, "where": ".*bias"}, r"bias.* two axes"),
        ("uniform", {"sparsity": 0.5, "where": lambda path, leaf: False}, r"none of the 6 leaves"),
        ("uniform", {"sparsity": 0.5, "override": {"c_head/bias": 0.1}}, r"override='c_head/bias'.*c_head/kernel"),
        ("uniform", {"sparsity": 0.5, "override": {"c_head/kernel": 2.0}}, r"override.*=2.0 must lie"),
    ],
)
def test_refuses(fn, arguments, text):
    with pytest.raises(ValueError, match=text):
        getattr(allocation, fn)(PARAMS, **arguments)
