"""Random search over nodes: what it draws, and that it takes the best of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard.sparsity import channels, lottery

HIDDEN = channels.ChannelGroup("hidden", 10, (channels.Member("up", -1), channels.Member("down", -2)))
HEADS = channels.ChannelGroup("heads", 4, (channels.Member("out", 0, 2),))
GROUPS = [HIDDEN, HEADS]
KEY = jax.random.key(0)
TRIALS = 200


def params():
    rng = np.random.default_rng(0)
    shapes = {"up": (3, 10), "down": (10, 2), "out": (8,)}
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()} | {"none": None}


def loss(params):
    return jnp.sum(jnp.tanh(params["up"]) @ params["down"]) + jnp.sum(params["out"])


LOSSES = (loss, lambda p: jnp.log(loss(p)), lambda p: 0 * loss(p), lambda p: jnp.sum(p["up"]))
LOSS, LOG, ZERO, SUM = range(4)


def by_hand(kept):
    p = {name: np.asarray(x, np.float64) for name, x in params().items() if x is not None}
    hidden, heads = np.asarray(kept[HIDDEN]), np.asarray(kept[HEADS])
    return (np.tanh(p["up"][:, hidden]) @ p["down"][hidden]).sum() + p["out"].reshape(4, 2)[heads].sum()


@functools.partial(jax.jit, static_argnames=("trials", "density", "batch_size"))
def run(params, which, trials=TRIALS, density=0.5, batch_size=TRIALS):
    def loss_fn(p):
        return jax.lax.switch(which, LOSSES, p)

    return lottery.random_search(
        loss_fn, params, GROUPS, density=density, trials=trials, rng=KEY, batch_size=batch_size
    )


@pytest.fixture(scope="module")
def found():
    return run(params(), LOSS)


def test_the_best_trial_is_returned(found):
    kept, losses = found
    assert losses.shape == (TRIALS,)
    # Sums of a few dozen products of numbers near 1, in float32.
    np.testing.assert_allclose(by_hand(kept), np.min(losses), atol=1e-5)
    assert len(np.unique(losses)) > TRIALS / 2


@pytest.mark.parametrize(
    ("density", "counts"), [(0.5, (5, 2)), (0.25, (2, 1)), (0.01, (1, 1)), (0.86, (9, 3)), (1.0, (10, 4))]
)
def test_counts_are_exact(density, counts):
    """10 * 0.25 = 2.5 goes to the even 2."""
    kept, _ = jax.eval_shape(lambda p: run(p, LOSS, 1, density, 1), params())
    assert (kept[HIDDEN].shape[0], kept[HEADS].shape[0]) == counts


def test_indices_ascend_and_differ(found):
    for group, kept in found[0].items():
        assert np.all(np.diff(kept) > 0)
        assert 0 <= kept[0] <= kept[-1] < group.size


def test_trials_are_nested(found):
    """The first trials are the same however many follow, so that the best loss cannot rise."""
    kept, losses = run(params(), LOSS, trials=5, batch_size=5)
    np.testing.assert_allclose(losses, found[1][:5], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(by_hand(kept), np.min(found[1][:5]), atol=1e-5)


def test_every_node_is_drawn_equally_often():
    """Over 200 trials at density 0.5 a node of ten is kept 100 +- 7 times; five of these are allowed."""
    powers = params() | {"up": jnp.zeros((3, 10)).at[1].set(2.0 ** jnp.arange(10))}
    _, losses = run(powers, SUM)
    kept = (np.asarray(losses, int)[:, None] >> np.arange(10)) & 1
    assert np.all(kept.sum(1) == 5)
    assert np.all(np.abs(kept.sum(0) - 100) < 35)


def test_of_equal_losses_the_first_is_taken(found):
    kept, losses = run(params(), ZERO)
    assert not np.any(losses)
    np.testing.assert_allclose(by_hand(kept), found[1][0], atol=1e-5)


def test_what_is_not_a_number_is_worst(found):
    kept, losses = run(params(), LOG)
    np.testing.assert_array_equal(np.isnan(losses), found[1] < 0)
    assert 0 < np.isnan(losses).sum() < TRIALS
    np.testing.assert_allclose(by_hand(kept), np.min(found[1][found[1] >= 0]), atol=1e-5)


def test_density_one_is_the_parent():
    kept, losses = run(params(), LOSS, trials=2, density=1.0, batch_size=2)
    assert kept[HIDDEN].tolist() == list(range(10))
    np.testing.assert_allclose(losses, by_hand(kept), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.0}, r"density=0.0 must lie in \(0, 1\]"),
        ({"density": 1.1}, "density=1.1"),
        ({"trials": 0}, r"trials=0 must lie in \[1, inf\)"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        run(params(), LOSS, **options)
