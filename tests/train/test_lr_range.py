"""The range test on losses that are known, and on a quadratic whose largest learning rate is."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import train


def replay(losses):
    """A step that returns these losses one after another; the state counts them."""
    return lambda state, batch, lr: (state + 1, losses[state])


def by_hand(lrs, losses, smoothing, factor):
    """The rule in loops: smoothed losses, where it stops, and where they fall fastest."""
    smoothed, mean, stop = [], 0.0, None
    for i, loss in enumerate(losses):
        mean = smoothing * mean + (1 - smoothing) * loss
        smoothed.append(mean / (1 - smoothing ** (i + 1)))
        if smoothed[-1] > factor * min(smoothed):
            stop = i
            break
    x, low = [math.log(lr) for lr in lrs], smoothed.index(min(smoothed))

    def slope(i):
        """Of the parabola through i and its neighbours; exponential rates are equally far apart in x."""
        return (smoothed[i + 1] - smoothed[i - 1]) / (x[i + 1] - x[i - 1])

    inner = range(max(1, len(smoothed) // 10), low + 1)
    return smoothed, stop, lrs[min(inner, key=slope)]


@pytest.mark.parametrize("smoothing", [0.0, 0.5, 0.9])
def test_a_valley(smoothing):
    n = 60
    place = np.arange(n) / (n - 1)
    losses = 2 - np.tanh(12 * (place - 0.4)) + 100 * np.maximum(place - 0.7, 0) ** 2
    got = train.lr_range_test(
        replay(losses), 0, range(n), num_steps=n, min_lr=1e-4, max_lr=1.0, smoothing=smoothing, stop_factor=4.0
    )
    lrs = [1e-4 * 1e4 ** (i / (n - 1)) for i in range(n)]
    _, stop, suggestion = by_hand(lrs, losses, smoothing, 4.0)
    assert got.diverged_at == stop
    taken = n if stop is None else stop + 1
    np.testing.assert_allclose(got.lrs, lrs[:taken], rtol=1e-12)
    np.testing.assert_array_equal(got.losses, losses[:taken])
    np.testing.assert_allclose(got.suggestion, suggestion, rtol=1e-12)


def test_linear_rates():
    got = train.lr_range_test(replay([1.0] * 5), 0, range(5), num_steps=5, min_lr=1.0, max_lr=3.0, mode="linear")
    np.testing.assert_allclose(got.lrs, [1, 1.5, 2, 2.5, 3], rtol=1e-15)
    assert got.diverged_at is None


def test_stops_when_batches_run_out_and_reads_no_more_than_it_needs():
    short = train.lr_range_test(replay([3.0, 2.0, 1.0]), 0, range(3), num_steps=50)
    assert len(short.lrs) == len(short.losses) == 3
    assert short.diverged_at is None
    endless = itertools.count()
    assert len(train.lr_range_test(replay([1.0] * 9), 0, endless, num_steps=9).lrs) == 9
    assert next(endless) == 9
    assert train.lr_range_test(replay([]), 0, [], min_lr=0.25).suggestion == 0.25


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_it(bad):
    got = train.lr_range_test(replay([4.0, 2.0, 1.0, bad, 0.0]), 0, range(5), num_steps=5, smoothing=0.0)
    assert got.diverged_at == 3
    assert len(got.losses) == 4
    assert got.suggestion in got.lrs[:3]
    first = train.lr_range_test(replay([bad, 1.0]), 0, range(5), num_steps=5, min_lr=0.125)
    assert (first.diverged_at, first.suggestion) == (0, 0.125)


def test_a_loss_that_only_rises_suggests_the_first_rate():
    got = train.lr_range_test(replay([1.0, 2.0, 3.0, 5.0]), 0, range(4), num_steps=4, smoothing=0.0)
    assert got.diverged_at == 3
    assert got.suggestion == got.lrs[0]


def test_a_quadratic_diverges_where_two_over_the_curvature_lies():
    """Gradient descent multiplies p by 1 - lr h: its loss falls below lr = 2 / h and rises above."""
    h = 4.0
    step = jax.jit(lambda p, batch, lr: (p - lr * h * p, h * p**2 / 2))
    got = train.lr_range_test(
        step, jnp.float32(1.0), range(20), min_lr=0.3, max_lr=1.0, num_steps=20, smoothing=0.0, stop_factor=np.inf
    )
    # The loss at step i is the one before the update at lr_i, so it rises one step after its rate was too large.
    rises = 1 + int(np.flatnonzero(np.diff(got.losses) > 0)[0])
    assert got.lrs[rises - 2] <= 2 / h <= got.lrs[rises]
    assert got.suggestion < 2 / h
    assert step._cache_size() == 1


def test_the_state_is_not_kept_even_by_a_step_that_donates():
    step = jax.jit(lambda p, batch, lr: (jax.tree.map(lambda x: x * (1 - lr), p), jnp.sum(p["w"])), donate_argnums=0)
    state = {"w": jnp.ones(3), "none": None, "epoch": 0}
    train.lr_range_test(step, state, range(5), num_steps=5, max_lr=0.5)
    np.testing.assert_array_equal(state["w"], 1.0)
    assert state["epoch"] == 0


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"mode": "exponental"}, "did you mean 'exponential'"),
        ({"min_lr": 1.0, "max_lr": 1.0}, r"min_lr=1.0 must lie in \(0, 1.0\)"),
        ({"min_lr": 0.0}, r"min_lr=0.0 must lie in \(0, 10.0\)"),
        ({"max_lr": -1.0}, r"max_lr=-1.0 must lie in \(0, inf\)"),
        ({"num_steps": 2}, r"num_steps=2 must lie in \[3, inf\)"),
        ({"smoothing": 1.0}, r"smoothing=1.0 must lie in \[0, 1\)"),
        ({"stop_factor": 1.0}, r"stop_factor=1.0 must lie in \(1, inf\]"),
    ],
)
def test_refuses(change, text):
    with pytest.raises(ValueError, match=text):
        train.lr_range_test(replay([1.0]), 0, range(1), **change)
