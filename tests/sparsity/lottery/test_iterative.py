"""Iterative pruning with trainings that are formulas, so that every mask can be found by sorting in NumPy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import sparsity
from steelyard.sparsity import lottery

KEY = jax.random.key(0)


def params():
    rng = np.random.default_rng(0)
    return {
        "body": {"kernel": jnp.asarray(rng.standard_normal((6, 5)), jnp.float32), "bias": jnp.ones(5)},
        "head": {"kernel": jnp.asarray(rng.standard_normal((5, 4)), jnp.float32), "bias": None},
    }


@jax.jit
def drift(start, masks, rng):
    """Kernels move by noise that depends on the key; what is masked stays zero."""
    moved = jax.tree.map(lambda w: w + jax.random.normal(jax.random.fold_in(rng, w.size), w.shape), start)
    return sparsity.masks.apply(moved, masks)


def train(start, masks, rng):
    return drift(start, masks, rng), None, {}


def anything(path, leaf):
    return True


def kernels(tree):
    return [np.asarray(tree["body"]["kernel"]), np.asarray(tree["head"]["kernel"])]


def best(score, mask, kept):
    """The best of the mask, found by sorting all of it."""
    candidates = sorted(np.flatnonzero(mask), key=lambda i: (-score.flat[i], i))
    chosen = np.zeros(score.shape, bool)
    chosen.flat[candidates[:kept]] = True
    return chosen


def assert_nested(tickets):
    for before, after in itertools.pairwise(tickets):
        for a, b in zip(kernels(before.masks), kernels(after.masks), strict=True):
            assert not np.any(b & ~a)


def test_each_layer_loses_its_share_of_the_lowest():
    """Of 30 weights 0.7 a round: 21, 15 (of 14.7), 10 (of 10.5); of 20 in the output layer 0.85: 17, 14, 12."""
    tickets = lottery.iterative_pruning(train, params(), rate=0.3, rounds=3, output="head/kernel", rng=KEY)
    counts = [[mask.sum() for mask in kernels(t.masks)] for t in tickets]
    assert counts == [[30, 20], [21, 17], [15, 14], [10, 12]]
    assert_nested(tickets)
    for before, after in itertools.pairwise(tickets):
        for w, old, new in zip(*map(kernels, (before.trained, before.masks, after.masks)), strict=True):
            np.testing.assert_array_equal(new, best(abs(w), old, new.sum()))
    np.testing.assert_allclose([t.sparsity for t in tickets], [0, 12 / 50, 21 / 50, 28 / 50])
    assert tickets[-1].masks["body"]["bias"] is None
    assert tickets[-1].masks["head"]["bias"] is None


def test_all_leaves_compete_with_scope_global():
    tickets = lottery.iterative_pruning(train, params(), rate=0.4, rounds=2, scope="global", rng=KEY)
    assert [sum(mask.sum() for mask in kernels(t.masks)) for t in tickets] == [50, 30, 18]
    flat = [np.concatenate([x.ravel() for x in kernels(t)]) for t in (tickets[0].trained, tickets[1].masks)]
    np.testing.assert_array_equal(flat[1], best(abs(flat[0]), np.ones(50, bool), 30))
    assert_nested(tickets)


@pytest.mark.parametrize("rate", [0.2, 0.5])
def test_the_density_falls_geometrically(rate):
    """Each of the 5 rounds rounds the count of each leaf by at most a half, of which later rounds keep a share."""
    tickets = lottery.iterative_pruning(train, params(), rate=rate, rng=KEY)
    for r, ticket in enumerate(tickets):
        slack = 2 * 0.5 * sum((1 - rate) ** i for i in range(r)) / 50
        assert abs(ticket.sparsity - (1 - (1 - rate) ** r)) <= slack + 1e-9


def test_survivors_are_rewound_bit_for_bit():
    start = params()
    for ticket in lottery.iterative_pruning(train, start, rounds=2, rng=KEY):
        for w, initial, mask in zip(*map(kernels, (ticket.params, start, ticket.masks)), strict=True):
            np.testing.assert_array_equal(w, np.where(mask, initial, 0))
        np.testing.assert_array_equal(ticket.params["body"]["bias"], start["body"]["bias"])


def test_tickets_are_rewound_to_the_early_weights_of_the_dense_training_only():
    def early(start, masks, rng):
        return drift(start, masks, rng), jax.tree.map(lambda w: 2 * w, start), {}

    start = params()
    tickets = lottery.iterative_pruning(early, start, rounds=2, rng=KEY)
    np.testing.assert_array_equal(tickets[0].params["body"]["kernel"], start["body"]["kernel"])
    for ticket in tickets[1:]:
        for w, initial, mask in zip(*map(kernels, (ticket.params, start, ticket.masks)), strict=True):
            np.testing.assert_array_equal(w, np.where(mask, 2 * initial, 0))


def test_a_score_with_init_gets_the_weights_that_are_rewound_to():
    """These are tripled; training doubles the first two of them and halves the others, which are larger."""

    def halve(start, masks, rng):
        return start * jnp.where(jnp.arange(8) < 2, 6, 1.5), 3 * start, None

    start = jnp.float32([1, -1, 50, 60, -70, 80, 10, 20])
    increase = sparsity.scores.magnitude_increase
    dense, ticket = lottery.iterative_pruning(halve, start, rate=0.5, rounds=1, score=increase, where=anything, rng=KEY)
    assert np.flatnonzero(ticket.masks).tolist() == [0, 1, 6, 7]
    assert np.all(increase(dense.trained, 3 * start)[2:] < 0)


def test_of_checkpoints_the_one_with_the_highest_metric_is_taken():
    """An AUC of NaN is of a part with a single class."""

    def checkpoints(start, masks, rng):
        stacked = jax.tree.map(lambda w: jnp.stack([w, 2 * w, 3 * w, 4 * w]), start)
        metrics = {"auc": jnp.float32([0.6, jnp.nan, 0.9, 0.9]), "false_negatives": jnp.arange(4)}
        return stacked, None, metrics

    for ticket in lottery.iterative_pruning(checkpoints, params(), rounds=1, select="auc", rng=KEY):
        assert ticket.metrics["false_negatives"] == 2
        np.testing.assert_allclose(ticket.trained["body"]["kernel"], 3 * ticket.params["body"]["kernel"])


def test_it_stops_at_a_density():
    tickets = lottery.iterative_pruning(train, params(), rate=0.5, rounds=9, stop_density=0.26, rng=KEY)
    assert [1 - t.sparsity for t in tickets] == pytest.approx([1, 0.5, 13 / 50])
    assert len(lottery.iterative_pruning(train, params(), rounds=0, rng=KEY)) == 1


def test_where_may_include_a_vector_and_a_leaf_keeps_one_weight():
    tickets = lottery.iterative_pruning(
        lambda start, masks, rng: (start, None, None), jnp.ones(8), rate=0.9, rounds=2, where=anything, rng=KEY
    )
    assert [int(t.masks.sum()) for t in tickets] == [8, 1, 1]


def test_a_survivor_with_the_worst_score_is_preferred_to_what_was_removed():
    """The scores of the second round are minus infinity and NaN: ties among survivors, which removed weights lose."""

    def score(trained):
        worst = jnp.where(jnp.arange(8) % 2 == 0, -jnp.inf, jnp.nan)
        return jnp.where(jnp.all(trained != 0), jnp.arange(8.0), worst)

    tickets = lottery.iterative_pruning(
        lambda start, masks, rng: (start, None, None),
        jnp.ones(8),
        rate=0.5,
        rounds=2,
        score=score,
        where=anything,
        rng=KEY,
    )
    assert np.flatnonzero(tickets[1].masks).tolist() == [4, 5, 6, 7]
    assert np.flatnonzero(tickets[2].masks).tolist() == [4, 5]


def test_seeds_can_be_mapped_over():
    @jax.jit
    def draw(start, masks, rng):
        return jax.random.normal(rng, start.shape), None, None

    def masks(key):
        tickets = lottery.iterative_pruning(draw, jnp.ones(8), rate=0.4, rounds=2, where=anything, rng=key)
        return [ticket.masks for ticket in tickets[1:]]

    keys = jax.random.split(KEY, 2)
    mapped = jax.vmap(masks)(keys)
    for i, key in enumerate(keys):
        np.testing.assert_array_equal([many[i] for many in mapped], masks(key))


def test_accept_allows_for_a_share_more():
    np.testing.assert_array_equal(lottery.accept(8, np.arange(8, 12), 0.25), [True, True, True, False])
    assert lottery.accept(0, 0)


prune = functools.partial(lottery.iterative_pruning, train, params(), rng=KEY)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: prune(rate=0.0), r"rate=0.0 must lie in \(0, 1\)"),
        (lambda: prune(rounds=-1), r"rounds=-1 must lie in \[0, inf\)"),
        (lambda: prune(scope="layers"), "scope='layers' .* did you mean 'layer'"),
        (lambda: prune(stop_density=1.5), r"stop_density=1.5 must lie in \[0, 1\]"),
        (lambda: prune(output_rate=0.1), "output_rate=0.1 needs output"),
        (lambda: prune(output="head/kernel", output_rate=1.0), r"output_rate=1.0 must lie in \[0, 1\)"),
        (lambda: prune(output="haed/kernel"), "output='haed/kernel' matches none .* head/kernel"),
        (lambda: prune(output="head/kernel", scope="global"), "output='head/kernel' is for scope='layer'"),
        (lambda: prune(where="haed/.*"), "where='haed/.*' matches none .* head/kernel"),
        (lambda: prune(select="acu"), "select='acu' is not one of"),
        (
            lambda: prune(score=lambda w: jax.tree.map(lambda x: x[:2], w)),
            r"score: body/kernel has shape \(2, 5\), but its mask \(6, 5\)",
        ),
        (
            lambda: lottery.rewind({"a": jnp.ones(3)}, {"a": jnp.ones(2, bool)}),
            r"start: a has shape \(3,\), but its mask \(2,\)",
        ),
        (lambda: lottery.accept(1, 1, -0.1), r"tolerance=-0.1 must lie in \[0, inf\)"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
