"""Schedules against their formulas in float64, traced and not."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from steelyard.sparsity import schedules

quick = hypothesis.settings(max_examples=25, deadline=None)

# A few roundings of float32 on values of at most 1.
FLOAT32 = {"rtol": 1e-5, "atol": 1e-6}


def both_ways(schedule, steps):
    """The values at Python steps, after checking that a traced step gives the same."""
    plain = np.array([schedule(t) for t in steps])
    # Compiled, a product and a sum may be one rounding instead of two: up to 2^-23 for values of at most 1.
    np.testing.assert_allclose(jax.vmap(jax.jit(schedule))(jnp.array(steps)), plain, rtol=0, atol=2.0**-23)
    return plain


@pytest.mark.parametrize(("initial", "power"), [(0.0, 3), (0.2, 1), (0.9, 2)])
def test_polynomial(initial, power):
    steps = [0, 4, 5, 6, 9, 14, 15, 100]
    schedule = schedules.polynomial(0.8, start=5, end=15, initial=initial, power=power)
    expected = [0.8 + (initial - 0.8) * (1 - min(max((t - 5) / 10, 0), 1)) ** power for t in steps]
    np.testing.assert_allclose(both_ways(schedule, steps), expected, **FLOAT32)


def test_polynomial_of_no_length_is_a_jump():
    assert both_ways(schedules.polynomial(0.5, start=3, end=3, initial=0.25), [0, 2, 3, 4]).tolist() == [
        0.25,
        0.25,
        0.5,
        0.5,
    ]


@pytest.mark.parametrize(("start", "end"), [(5, 4), (-1, 4)])
def test_polynomial_refuses(start, end):
    with pytest.raises(ValueError, match=f"start={start}, end={end}"):
        schedules.polynomial(0.5, start=start, end=end)


@hypothesis.settings(max_examples=8, deadline=None)
@hypothesis.given(st.sampled_from([0.0, 1e-3, 0.03, 0.7]), st.integers(0, 2))
def test_decays(rate, start):
    steps = [0, start, start + 1, start + 7, start + 1000]
    spent = [rate * max(t - start, 0) for t in steps]
    linear = both_ways(schedules.linear_decay(rate, start), steps)
    np.testing.assert_allclose(linear, [min(max(1 - x, 0), 1) for x in spent], **FLOAT32)
    # The rounding of an exponent x is a relative error of about x 2^-24 in exp(-x), which is tiny where x is large.
    exponential = both_ways(schedules.exponential_decay(rate, start), steps)
    np.testing.assert_allclose(exponential, [math.exp(-x) for x in spent], **FLOAT32)


@pytest.mark.parametrize("decay", [schedules.linear_decay, schedules.exponential_decay])
def test_decay_edges(decay):
    assert both_ways(decay(0.0, 2), [0, 2, 10**6]).tolist() == [1, 1, 1]
    assert both_ways(decay(math.inf, 2), [0, 1, 2, 3]).tolist() == [1, 1, 0, 0]
    traced = jax.jit(lambda rate: decay(rate, 2)(7))
    for rate in (0.1, math.inf):
        np.testing.assert_allclose(traced(rate), decay(rate, 2)(7), rtol=1e-6)
    for rate in (-1.0, math.nan):
        with pytest.raises(ValueError, match="rate="):
            decay(rate)


def test_every():
    due = schedules.every(3, 4, 12)
    assert np.flatnonzero(both_ways(due, range(20))).tolist() == [6, 9, 12]
    with pytest.raises(ValueError, match="n=0"):
        schedules.every(0, 1, 2)
    with pytest.raises(ValueError, match="start=3, end=2"):
        schedules.every(1, 3, 2)


@pytest.mark.parametrize(("rate", "expected"), [(0.0, [0, 0, 0]), (0.2, [0, 0.2, 0.36]), (1.0, [0, 1, 1])])
def test_iterative(rate, expected):
    np.testing.assert_allclose(both_ways(schedules.iterative(rate), range(3)), expected, **FLOAT32)


@pytest.mark.parametrize(
    ("start", "end", "sparse"),
    [
        # Two sparse steps, three dense ones; the last dense phase is cut by the end.
        (1, 9, {1, 2, 6, 7, 9, 10, 11}),
        (0, 0, set(range(12))),
        (4, 5, set(range(4, 12))),
    ],
)
def test_alternating(start, end, sparse):
    schedule = schedules.alternating(sparse_steps=2, dense_steps=3, start=start, end=end)
    assert set(np.flatnonzero(both_ways(schedule, range(12)))) == sparse


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"sparse_steps": 0}, "sparse_steps=0"),
        ({"dense_steps": 1.5}, "dense_steps=1.5"),
        ({"start": -1}, "start=-1"),
        ({"end": 2}, r"end=2 must lie in \[3, inf\)"),
    ],
)
def test_alternating_refuses(change, text):
    with pytest.raises(ValueError, match=text):
        schedules.alternating(**({"sparse_steps": 2, "dense_steps": 2, "start": 3, "end": 9} | change))


def test_iterative_refuses():
    with pytest.raises(ValueError, match=r"rate=1.1 must lie in \[0, 1\]"):
        schedules.iterative(1.1)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # (1000 - 100 - 200) / 4 = 175 steps a frame.
        ("stepwise", [(100, 7, 8), (275, 4, 8), (450, 2, 8), (625, 1, 8)]),
        ("geometric", [(100, 8, 64), (275, 4, 32), (450, 2, 16), (625, 1, 8)]),
        ("densify", [(100, 1, 64), (275, 1, 32), (450, 1, 16), (625, 1, 8)]),
    ],
)
def test_published_frames(kind, expected):
    frames = schedules.structure_frames(1, 8, kind=kind, total_steps=1000, dense_steps=100, fine_tune_steps=200)
    assert frames == expected


@quick
@hypothesis.given(
    st.integers(1, 40),
    st.integers(0, 40),
    st.sampled_from(schedules.FRAME_KINDS),
    st.integers(1, 6),
    st.integers(1, 99),
)
def test_frames_by_property(n, more, kind, count, room):
    m = n + more
    frames = schedules.structure_frames(
        n, m, kind=kind, total_steps=room + 5, dense_steps=2, fine_tune_steps=3, frames=count
    )
    if kind == "stepwise":
        count = math.ceil(math.log2(m / n)) + 1
    count = 1 if n == m else count
    assert frames[-1][1:] == (n, m)
    assert [frame.start for frame in frames] == [2 + math.floor(i * room / count) for i in range(count)]
    densities = [frame.n / frame.m for frame in frames]
    assert densities == sorted(densities, reverse=kind != "densify")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kind": "stepwize"}, "stepwise"),
        ({"n": 0}, "n=0"),
        ({"n": 9}, "n=9, m=8"),
        ({"frames": 0}, "frames=0"),
        ({"dense_steps": 5, "fine_tune_steps": 5}, "total_steps=10"),
        ({"dense_steps": -1}, "dense_steps=-1"),
    ],
)
def test_frames_refuse(change, text):
    with pytest.raises(ValueError, match=text):
        schedules.structure_frames(**({"n": 1, "m": 8, "kind": "densify", "total_steps": 10} | change))
