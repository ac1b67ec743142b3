"""Up to as many bad workers as a rule is made for, each robust rule keeps what its docstring guarantees.

Ten workers; honest gradients agree up to a hundredth of their length, so that even the loosest guarantee tells a robust
rule from the mean, which breaks all of them.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import pytest

from steelyard import aggregate
from steelyard.aggregate import attacks

COUNT = 10
EPS = 2.0**-23

FAULTS = {
    "nan": functools.partial(attacks.non_finite, value=math.nan),
    "inf": functools.partial(attacks.non_finite, value=math.inf),
    "-inf": functools.partial(attacks.non_finite, value=-math.inf),
    "sign_flip": attacks.sign_flip,
    "sign_flip_5": functools.partial(attacks.sign_flip, scale=5.0),
    "1e8": functools.partial(attacks.sign_flip, scale=1e8),
    "-1e8": functools.partial(attacks.sign_flip, scale=-1e8),
    "1e30": functools.partial(attacks.sign_flip, scale=1e30),
    "alie": attacks.alie,
    "alie_1000": functools.partial(attacks.alie, z=1000.0),
    "inner_product": attacks.inner_product,
    "inner_product_10": functools.partial(attacks.inner_product, epsilon=10.0),
}
# With the z of its authors this attack stays among the honest rows: no bound on the error can tell the mean apart.
HARMLESS_IN_ONE_STEP = {"alie"}


class Rule(NamedTuple):
    """A robust rule and its guarantee.

    Attributes:
      make: `(num_byzantine, honest worker) -> aggregator`.
      most: the largest number of bad workers among ten that it withstands.
      bound: `(num_byzantine, diameter of the honest rows) -> ` its distance from the honest mean; `None` says that each
        coordinate lies between honest values.
      start: `(state, honest mean) -> state`.
    """

    make: Callable
    most: int
    bound: Callable | None
    start: Callable = lambda state, mean: state


def from_honest_mean(state, mean):
    return state._replace(center=mean)


def krum_bound(f, spread):
    return (1 + math.sqrt((COUNT - f - 2) / (COUNT - 2 * f - 1))) * spread


RULES = {
    "median": Rule(lambda f, me: aggregate.median(), 4, None),
    "trimmed_mean": Rule(lambda f, me: aggregate.trimmed_mean(f), 4, None),
    "krum": Rule(lambda f, me: aggregate.krum(f), 3, krum_bound),
    "multi_krum": Rule(lambda f, me: aggregate.krum(f, num_selected=COUNT - f), 3, krum_bound),
    "geometric_median": Rule(
        lambda f, me: aggregate.geometric_median(),
        4,
        lambda f, spread: ((5 * COUNT - 2 * f) * spread + COUNT * 1e-6 / 2) / (COUNT - 2 * f),
    ),
    "nearest_neighbor": Rule(
        lambda f, me: aggregate.nearest_neighbor(f, pivot=me), 4, lambda f, spread: 2 * f / (COUNT - f) * spread
    ),
    # Honest rows are within the radius of where it starts, and not clipped.
    "centered_clip": Rule(
        lambda f, me: aggregate.centered_clip(radius=RADIUS), 4, lambda f, spread: f * RADIUS / COUNT, from_honest_mean
    ),
}


def diameter(rows):
    return max(np.linalg.norm(a - b) for a in rows for b in rows)


def flat(stacked):
    """Rows as vectors, in float64."""
    return np.concatenate([np.asarray(x, np.float64).reshape(x.shape[0], -1) for x in jax.tree.leaves(stacked)], axis=1)


def flat_one(tree):
    return flat(jax.tree.map(lambda x: x[None], tree))[0]


def gradients():
    """Rows of length 1 or so, in three leaves."""
    rng = np.random.default_rng(0)
    shapes = {"w": (4, 3), "b": (5,), "s": ()}
    common = {name: rng.standard_normal(shape) / 4 for name, shape in shapes.items()}
    stacked = {
        name: (x + 1e-3 * rng.standard_normal((COUNT, *x.shape))).astype(np.float32) for name, x in common.items()
    }
    return stacked | {"none": None}


# The diameter of all rows, and so of any honest ones at most.
RADIUS = diameter(flat(gradients()))


@functools.cache
def compiled(name, num_byzantine):
    def run(stacked, mean, me):
        rule = RULES[name].make(num_byzantine, me)
        return rule.update(stacked, RULES[name].start(rule.init(mean), mean))[0]

    return jax.jit(run)


@jax.jit
def plain_mean(stacked, mean, me):
    return aggregate.mean().update(stacked, ())[0]


def keeps(name, fn, stacked, honest, num_byzantine):
    """Whether what `fn` makes of the stack is within the guarantee of the rule `name`."""
    rows = flat(stacked)[honest]
    mean = jax.tree.map(lambda x: x[honest].mean(axis=0), stacked)
    out = flat_one(fn(stacked, mean, np.argmax(honest)))
    length = np.linalg.norm(rows, axis=1).max()
    if RULES[name].bound is None:
        slack = COUNT * EPS * np.abs(rows).max()  # the mean of at most K values is rounded K times
        return bool(np.all((out >= rows.min(axis=0) - slack) & (out <= rows.max(axis=0) + slack)))
    # Squared distances between rows of this length are off by a few eps times its square; the bounds grow with them.
    spread = math.hypot(diameter(rows), math.sqrt(8 * EPS) * length)
    allowed = RULES[name].bound(num_byzantine, spread) + COUNT * EPS * length
    return bool(np.linalg.norm(out - rows.mean(axis=0)) <= allowed)


@functools.cache
def all_attacked(num_byzantine):
    """The stack after each fault; one program for all of them."""
    fn = jax.jit(lambda x: {name: fault(x, num_byzantine) for name, fault in FAULTS.items()})
    return jax.tree.map(np.asarray, fn(gradients()))


def attacked(fault, num_byzantine, bad_first=False):
    stacked = all_attacked(num_byzantine)[fault]
    honest = np.arange(COUNT) < COUNT - num_byzantine
    if not bad_first:
        return stacked, honest
    # Ties go to the lower index, and that of a bad row may be the lowest.
    return jax.tree.map(lambda x: np.roll(x, num_byzantine, axis=0), stacked), np.roll(honest, num_byzantine)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", RULES)
def test_guarantee_and_that_the_mean_breaks_it(name, fault):
    for num_byzantine in (1, RULES[name].most):
        for bad_first in (False, True):
            stacked, honest = attacked(fault, num_byzantine, bad_first)
            assert keeps(name, compiled(name, num_byzantine), stacked, honest, num_byzantine)
            if fault not in HARMLESS_IN_ONE_STEP:
                assert not keeps(name, plain_mean, stacked, honest, num_byzantine)


@pytest.mark.parametrize("name", RULES)
def test_guarantee_where_nobody_is_bad(name):
    honest = np.ones(COUNT, bool)
    for fn in (compiled(name, 1), plain_mean):
        assert keeps(name, fn, gradients(), honest, 1)


@pytest.mark.parametrize("name", RULES)
def test_bad_workers_with_different_faults(name):
    """One overflows and the others are huge in opposite directions, far beyond the digits of any sum of the two."""
    num_byzantine = RULES[name].most
    stacked, honest = attacked("nan", num_byzantine)
    stacked = jax.tree.map(np.copy, stacked)
    for x in jax.tree.leaves(stacked):
        x[-1], x[-2] = 3e17, -2e9
    assert keeps(name, compiled(name, num_byzantine), stacked, honest, num_byzantine)
    assert not keeps(name, plain_mean, stacked, honest, num_byzantine)


@pytest.mark.parametrize("name", ["median", "geometric_median"])
def test_six_of_ten_lead_away_the_rules_that_are_not_told_how_many(name):
    stacked, honest = attacks.sign_flip(gradients(), 6, scale=1e8), np.arange(COUNT) < 4
    assert not keeps(name, compiled(name, RULES[name].most), stacked, honest, RULES[name].most)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: aggregate.trimmed_mean(5), "num_trimmed=5 needs more than 10 gradients, got K=10"),
        (lambda: aggregate.krum(4), "num_byzantine=4 needs more than 10 gradients, got K=10"),
        (lambda: aggregate.krum(3, num_selected=8), "num_selected=8 must be at most K - num_byzantine = 7"),
        (lambda: aggregate.nearest_neighbor(5), "num_byzantine=5 needs more than 10 gradients, got K=10"),
    ],
)
def test_too_many_bad_workers_are_refused_while_tracing(make, message):
    rule = make()
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda x: rule.update(x, rule.init(None))[0], gradients())


@pytest.mark.parametrize("fault", ["nan", "inf", "-inf", "1e8", "1e30"])
def test_flag_bounds_length_and_not_distance(fault):
    """Projections of K unit vectors, divided by the rank, are K / rank long at most: no row counts more than another.

    Where the update points is not guaranteed: a row and its negative span the same line.
    """
    rule = aggregate.flag(rank=2)
    update = jax.jit(rule.update)
    for num_byzantine in (1, 4):
        stacked, _ = attacked(fault, num_byzantine)
        lengths = [
            np.linalg.norm(flat_one(out)) for out in (update(stacked, rule.init(None))[0], plain_mean(stacked, None, 0))
        ]
        assert lengths[0] <= COUNT / 2 * (1 + 1e-3)
        assert not lengths[1] <= COUNT / 2
