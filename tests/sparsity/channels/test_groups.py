"""Groups of channels worked by hand: scores, selections, masks, and what is left when channels go."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard.sparsity import channels

Group, Member = channels.ChannelGroup, channels.Member

# Compiled as a whole, because op by op takes longer.
score = jax.jit(channels.score, static_argnums=1, static_argnames=("combine", "normalize", "under"))

# Three channels: rows of two leaves, pairs of neighbours in one, entries three apart in another.
MEMBERS = (Member("a", -1), Member("b", 0), Member("pairs", 0, 2), Member("flat", -2, 2, "strided"))
GROUP = Group("hidden", 3, MEMBERS)
TREE = {
    "a": np.array([[1.0, 2, 3], [4, 5, 6]]),
    "b": np.array([1.0, 0, 2]),
    "flat": np.array([[1.0], [2], [3], [10], [20], [30]]),
    "none": None,
    "other": np.arange(4.0),
    "pairs": np.array([1.0, 2, 3, 4, 5, 6]),
}
PARTS = {"a": [5, 7, 9], "b": [1, 0, 2], "pairs": [3, 7, 11], "flat": [11, 22, 33]}
VECTORS = np.array(list(PARTS.values()))


def group(name="g", size=3, path="a"):
    return Group(name, size, (Member(path, -1),))


@pytest.mark.parametrize(
    ("combine", "expected"),
    [("mean", VECTORS.mean(0)), ("sum", VECTORS.sum(0)), ("max", VECTORS.max(0)), ("first", VECTORS[0])],
)
def test_score_sums_a_channels_entries_then_combines_members(combine, expected):
    np.testing.assert_allclose(score(TREE, GROUP, combine=combine), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("normalize", "divisor"), [("mean", 7), ("sum", 21), ("max", 9), ("l2", np.sqrt(25 + 49 + 81) + 1e-8)]
)
def test_score_is_normalized(normalize, divisor):
    scores = score(TREE, GROUP, combine="first", normalize=normalize)
    np.testing.assert_allclose(scores, np.array([5, 7, 9]) / divisor, rtol=1e-6)


def test_members_without_scores_do_not_count():
    some = TREE | {"a": None, "pairs": None}
    np.testing.assert_allclose(score(some, GROUP, combine="first"), PARTS["b"])
    np.testing.assert_allclose(score(some, GROUP), VECTORS[[1, 3]].mean(0))


def test_a_vector_of_zeros_stays_so():
    zeros = jax.tree.map(np.zeros_like, TREE)
    np.testing.assert_array_equal(score(zeros, GROUP, normalize="mean"), np.zeros(3))


def test_select_in_each_group():
    scores = {group("g", 5): np.array([3.0, 1, 2, 1, 9]), group("h", 2): np.array([0.0, np.nan])}
    # floor(0.5 * 5) = 2 and 1 go: of the equal ones the higher index, and NaN before 0.
    kept = channels.select(scores, 0.5)
    assert {g.name: list(index) for g, index in kept.items()} == {"g": [0, 2, 4], "h": [0]}


def test_select_over_all_groups():
    scores = {group("g", 3): np.array([1.0, 2, 3]), group("h", 3): np.array([10.0, 20, 30])}
    # The 3 lowest of 6 are all of g, of which one must stay.
    kept = channels.select(scores, 0.5, scope="global")
    assert {g.name: list(index) for g, index in kept.items()} == {"g": [2], "h": [0, 1, 2]}


def test_select_rounds_up_and_keeps_at_least():
    scores = {group("g", 10): np.arange(10.0), group("h", 5): np.arange(5.0)}
    counts = {g.name: len(index) for g, index in channels.select(scores, 0.5, round_to=4).items()}
    assert counts == {"g": 8, "h": 4}  # from 5 and 3
    counts = {g.name: len(index) for g, index in channels.select(scores, 0.9, round_to=8, min_kept=3).items()}
    assert counts == {"g": 8, "h": 5}  # 8 of 5 is all of them
    assert {len(index) for index in channels.select(scores, 1.0).values()} == {1}
    # 0.29 * 100 is 28.999999999999996.
    assert len(channels.select({group("g", 100): np.arange(100.0)}, 0.29)[group("g", 100)]) == 71


def test_masks_are_products_over_the_groups():
    rows = Group("rows", 2, (Member("a", -2),))
    keep = channels.as_masks({GROUP: np.array([0, 2])}) | {rows: jnp.array([False, True])}
    masks = jax.jit(channels.mask_tree)(TREE, keep)
    assert masks["none"] is None
    expected = {
        "a": [[0, 0, 0], [1, 0, 1]],
        "b": [1, 0, 1],
        "flat": [[1], [0], [1], [1], [0], [1]],
        "other": [1, 1, 1, 1],
        "pairs": [1, 1, 0, 0, 1, 1],
    }
    for name, mask in expected.items():
        assert masks[name].dtype == bool
        np.testing.assert_array_equal(masks[name], mask)


def test_shrink_keeps_what_the_masks_keep():
    rows = Group("rows", 2, (Member("a", -2),))
    kept = {GROUP: np.array([0, 2]), rows: np.array([1])}
    small = channels.shrink(TREE, kept)
    np.testing.assert_array_equal(small["a"], [[4, 6]])
    np.testing.assert_array_equal(small["b"], [1, 2])
    np.testing.assert_array_equal(small["flat"], [[1], [3], [10], [30]])
    np.testing.assert_array_equal(small["pairs"], [1, 2, 5, 6])
    assert small["none"] is None
    assert small["other"] is TREE["other"]
    masks = jax.jit(channels.mask_tree)(TREE, channels.as_masks(kept))
    for name in ("a", "b", "flat", "pairs"):
        np.testing.assert_array_equal(small[name].ravel(), TREE[name][np.asarray(masks[name])])


def test_a_part_of_the_tree_is_named_by_under():
    both = Group("c", 3, (Member("params/a", -1), Member("batch_stats/b", 0)))
    kept = {both: np.array([1])}
    tree = {"params": {"a": TREE["a"]}, "batch_stats": {"b": TREE["b"]}}
    whole = channels.shrink(tree, kept)
    for part in tree:
        jax.tree.map(np.testing.assert_array_equal, channels.shrink(tree[part], kept, under=part), whole[part])
    np.testing.assert_array_equal(score(tree["params"], both, under="params"), [5, 7, 9])
    masks = jax.jit(lambda: channels.mask_tree(tree["batch_stats"], channels.as_masks(kept), under="batch_stats"))()
    np.testing.assert_array_equal(masks["b"], [False, True, False])


def test_shrink_of_shapes():
    shapes = jax.eval_shape(lambda tree: channels.shrink(tree, {GROUP: np.array([1])}), TREE)
    assert jax.tree.map(lambda x: x.shape, shapes) == {
        "a": (2, 1), "b": (1,), "flat": (2, 1), "none": None, "other": (4,), "pairs": (2,)
    }  # fmt: skip


def test_moments_shrink_with_their_parameters():
    masked = optax.masked(optax.trace(0.9), {name: name in ("a", "other") for name in TREE})
    tx = optax.chain(optax.clip(1.0), optax.scale_by_adam(), masked)
    shapes = jax.eval_shape(tx.init, TREE)
    state = jax.tree.map(lambda s: np.arange(np.prod(s.shape)).reshape(s.shape), shapes)
    kept = {GROUP: np.array([0, 2])}
    small = channels.shrink_state(tx, state, TREE, kept)
    # The structure too is that of a state for the smaller parameters, gaps of `masked` included.
    assert jax.tree.map(np.shape, small) == jax.tree.map(np.shape, jax.eval_shape(tx.init, channels.shrink(TREE, kept)))
    jax.tree.map(np.testing.assert_array_equal, small[1].nu, channels.shrink(state[1].nu, kept))
    np.testing.assert_array_equal(small[2].inner_state.trace["a"], [[0, 2], [3, 5]])


def test_factored_moments_cannot_shrink():
    params = {"a": np.ones((4, 6))}
    tx = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    state = jax.tree.map(lambda s: np.zeros(s.shape), jax.eval_shape(tx.init, params))
    whole = {group("g", 6): np.arange(3)}
    with pytest.raises(ValueError, match=r"shape \(4,\) for the parameter a of shape \(4, 6\).*tx.init"):
        channels.shrink_state(tx, state, params, whole)


REFUSED = {
    "lacks": (lambda: channels.score(TREE, group(path="aa")), "'aa', which the tree lacks. Nearest paths: a"),
    "under": (lambda: channels.score(TREE, GROUP, under="params"), "no member with scores .under='params'"),
    "length": (lambda: channels.score(TREE, group(size=2)), r"shape \(2, 3\) has length 3 .* size \* width = 2 \* 1"),
    "axis": (lambda: channels.score(TREE, Group("g", 3, (Member("b", 1),))), r"b of shape \(3,\) has no axis 1"),
    "layout": (lambda: channels.score(TREE, Group("g", 3, (Member("b", 0, 1, "stride"),))), "mean 'strided'"),
    "combine": (lambda: channels.score(TREE, GROUP, combine="men"), "combine='men' .* did you mean 'mean'"),
    "normalize": (lambda: channels.score(TREE, GROUP, normalize="l1"), "normalize='l1' is not one of"),
    "amount": (lambda: channels.select({GROUP: np.ones(3)}, 1.5), r"amount=1.5 must lie in \[0, 1\]"),
    "scope": (lambda: channels.select({GROUP: np.ones(3)}, 0.5, scope="globl"), "did you mean 'global'"),
    "min_kept": (lambda: channels.select({GROUP: np.ones(3)}, 0.5, min_kept=0), "min_kept=0 must lie in"),
    "round_to": (lambda: channels.select({GROUP: np.ones(3)}, 0.5, round_to=1.5), "round_to=1.5 must be a whole"),
    "scores": (lambda: channels.select({GROUP: np.ones(4)}, 0.5), r"'hidden' have shape \(4,\), not \(3,\)"),
    "keep": (lambda: channels.mask_tree(TREE, {GROUP: np.ones(2, bool)}), r"'hidden' has shape \(2,\), not \(3,\)"),
    "empty": (lambda: channels.shrink(TREE, {GROUP: np.array([], int)}), "'hidden' must be a vector of at least one"),
    "bools": (lambda: channels.shrink(TREE, {GROUP: np.ones(3, bool)}), "'hidden' must be a vector of at least one"),
    "order": (lambda: channels.shrink(TREE, {GROUP: np.array([2, 0])}), "must be ascending indices below 3"),
    "range": (lambda: channels.as_masks({GROUP: np.array([3])}), "must be ascending indices below 3"),
    "twice": (lambda: channels.shrink(TREE, {GROUP: [0], group(): [0]}), "axis 1 of a has two members"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    call, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        call()
