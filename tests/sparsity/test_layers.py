"""Layers scored by hand and removed from residual networks: what remains must compute what it did."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import tree
from steelyard.sparsity import layers

BLOCKS = [rf"block_{i}/.*" for i in range(4)]
WIDTH = 6


@pytest.fixture(scope="module")
def params():
    """Four residual blocks between a stem and a head, as NumPy arrays; every tree has a `None` leaf."""
    rng = np.random.default_rng(0)

    def block():
        return {
            "up": {"kernel": rng.normal(size=(WIDTH, 3)), "bias": rng.normal(size=3)},
            "down": {"kernel": rng.normal(size=(3, WIDTH)), "bias": None},
        }

    net = {f"block_{i}": block() for i in range(4)}
    net |= {"stem": {"kernel": rng.normal(size=(5, WIDTH))}, "head": {"kernel": rng.normal(size=(WIDTH, 2))}}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), net)


@pytest.fixture(scope="module")
def stacked(params):
    blocks = jax.tree.map(lambda *xs: jnp.stack(xs), *(params[f"block_{i}"] for i in range(4)))
    return {"blocks": blocks, "stem": params["stem"], "head": params["head"]}


def forward(params, x):
    """Skips a block without parameters, as a model must whose blocks can be removed."""
    x = x @ params["stem"]["kernel"]
    for name in sorted(name for name in params if name.startswith("block_")):
        if jax.tree.leaves(params[name]):
            x = x + branch(params[name], x)
    return x @ params["head"]["kernel"]


def branch(block, x):
    return jax.nn.relu(x @ block["up"]["kernel"] + block["up"]["bias"]) @ block["down"]["kernel"]


def forward_stacked(params, x):
    x = x @ params["stem"]["kernel"]
    x, _ = jax.lax.scan(lambda x, block: (x + branch(block, x), None), x, params["blocks"])
    return x @ params["head"]["kernel"]


def entries(block):
    return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(block)])


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_scores_are_means_over_all_entries_of_a_block(params, stacked, reduce):
    expected = [getattr(np, reduce)(entries(params[f"block_{i}"])) for i in range(4)]
    got = layers.score_blocks(params, BLOCKS, reduce=reduce)
    # Sums of at most 39 float32 numbers.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=39 * 2**-23)
    np.testing.assert_allclose(layers.score_blocks(stacked, "blocks/.*", reduce=reduce), got, rtol=1e-5, atol=1e-6)


def test_scores_of_half_precision_are_summed_in_float32():
    """In bfloat16 a sum of ones stops at 256."""
    ones = {"block": jnp.ones((50, 40), jnp.bfloat16)}
    assert layers.score_blocks(ones, ["block"], reduce="sum").tolist() == [2000]
    stack = {"block": jnp.ones((2, 50, 40), jnp.bfloat16)}
    assert layers.score_blocks(stack, "block", reduce="sum").tolist() == [2000, 2000]


def test_blocks_may_be_chosen_by_functions(params):
    chosen = [lambda path, leaf, i=i: path.startswith(f"block_{i}/") for i in range(4)]
    np.testing.assert_array_equal(layers.score_blocks(params, chosen), layers.score_blocks(params, BLOCKS))


@pytest.mark.parametrize(
    ("scores", "count", "expected"),
    [
        ([3.0, 1.0, 2.0, 1.0], 0, ()),
        ([3.0, 1.0, 2.0, 1.0], 1, (3,)),
        ([3.0, 1.0, 2.0, 1.0], 2, (1, 3)),
        ([0.0, 0.0, 0.0, 0.0], 2, (2, 3)),
        ([1.0, float("nan"), -2.0, -3.0], 2, (1, 3)),
    ],
)
def test_the_lowest_go_and_of_equal_ones_the_deeper(scores, count, expected):
    assert layers.lowest_blocks(jnp.array(scores), count) == expected


def test_a_block_whose_branch_is_zero_can_go(params):
    x = jax.random.normal(jax.random.key(0), (7, 5))
    silent = params | {"block_2": params["block_2"] | {"down": {"kernel": jnp.zeros((3, WIDTH)), "bias": None}}}
    np.testing.assert_array_equal(forward(layers.remove_blocks(silent, BLOCKS, (2,)), x), forward(silent, x))


def test_removal_takes_away_the_block_and_no_more(params):
    removed = layers.remove_blocks(params, BLOCKS, (3, 1, 1))
    gone = entries(params["block_1"]).size + entries(params["block_3"]).size
    assert tree.size(removed) == tree.size(params) - gone
    assert removed.keys() == params.keys()
    assert not jax.tree.leaves((removed["block_1"], removed["block_3"]))
    for name in ("block_0", "stem", "head"):
        assert all(x is y for x, y in zip(*map(jax.tree.leaves, (removed[name], params[name])), strict=True))


def test_nothing_removed_is_the_identity(params, stacked):
    assert jax.tree.leaves(layers.remove_blocks(params, BLOCKS, ())) == jax.tree.leaves(params)
    assert all(jax.tree.leaves(jax.tree.map(np.array_equal, layers.remove_blocks(stacked, "blocks/.*", ()), stacked)))


def test_stacked_blocks_are_removed_like_others(params, stacked):
    x = jax.random.normal(jax.random.key(1), (7, 5))
    short = layers.remove_blocks(stacked, "blocks/.*", (0, 2))
    assert short["blocks"]["up"]["kernel"].shape == (2, WIDTH, 3)
    expected = forward(layers.remove_blocks(params, BLOCKS, (0, 2)), x)
    # The same products, differently compiled.
    np.testing.assert_allclose(forward_stacked(short, x), expected, rtol=1e-4, atol=1e-5)


TREE = {"a": {"w": jnp.ones((2, 3))}, "b": {"w": jnp.ones((4, 3))}, "c": jnp.ones(())}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: layers.score_blocks(TREE, ["a/.*"], reduce="main"), r"reduce='main' .* 'mean'"),
        (lambda: layers.score_blocks(TREE, ["a/.*", "d/w"]), r"blocks\[1\]='d/w' .* a/w"),
        (lambda: layers.score_blocks(TREE, ["a/.*", ".*/w"]), "a/w is in blocks 0 and 1"),
        (lambda: layers.score_blocks(TREE, []), "blocks is empty"),
        (lambda: layers.score_blocks(TREE, "d/w"), "blocks='d/w'"),
        (lambda: layers.score_blocks(TREE, ".*/w"), r"\(2, 3\) and \(4, 3\)"),
        (lambda: layers.score_blocks(TREE, "c"), r"\(\)"),
        (lambda: layers.lowest_blocks(jnp.ones(3), 3), r"count=3 must lie in \[0, 3\)"),
        (lambda: layers.lowest_blocks(jnp.ones(3), -1), "count=-1"),
        (lambda: layers.remove_blocks(TREE, ["a/.*", "b/.*"], (0, 1)), r"drop=\[0, 1\] leaves none of the 2"),
        (lambda: layers.remove_blocks(TREE, ["a/.*", "b/.*"], (2,)), r"drop=2 must lie in \[0, 2\)"),
        (lambda: layers.remove_blocks(TREE, "a/w", (0, 1)), "leaves none of the 2"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
