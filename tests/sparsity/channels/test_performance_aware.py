"""The pruning of group after group against the same loop in NumPy, whose masks are zeros written by hand."""

import itertools
import math

import jax.numpy as jnp
import numpy as np
import pytest

from steelyard.sparsity import channels

WIDTHS = (5, 10, 6, 10, 3)
X = np.random.default_rng(0).normal(size=(16, WIDTHS[0]))


def network():
    rng = np.random.default_rng(1)
    params = {"none": None}
    for i, (d_in, d_out) in enumerate(itertools.pairwise(WIDTHS)):
        params[f"dense_{i}"] = {"kernel": rng.normal(size=(d_in, d_out)), "bias": rng.normal(size=d_out)}
        params[f"dense_{i}"] = {name: jnp.asarray(x, jnp.float32) for name, x in params[f"dense_{i}"].items()}
    return params


def hidden(i):
    members = ((f"dense_{i}/kernel", -1), (f"dense_{i}/bias", 0), (f"dense_{i + 1}/kernel", -2))
    return channels.ChannelGroup(f"hidden_{i}", WIDTHS[i + 1], tuple(channels.Member(*m) for m in members))


GROUPS = [hidden(i) for i in range(3)]


def arrays(params):
    return [[np.asarray(params[f"dense_{i}"][name], np.float64) for name in ("kernel", "bias")] for i in range(4)]


def outputs(layers):
    x = X
    for kernel, bias in layers[:-1]:
        x = np.maximum(x @ kernel + bias, 0)
    return x @ layers[-1][0] + layers[-1][1]


def losses_of(layers):
    """Three tasks, each with an output of its own: how far it moved, over a floor that differs."""
    target = outputs(arrays(network()))
    return np.mean((outputs(layers) - target) ** 2, axis=0) + np.array([30.0, 90.0, 300.0])


def task_losses(params):
    return losses_of(arrays(params))


def loop(ratios, initial, factor, power, keep_fraction):
    """The rule, ratio by ratio, on arrays in float64; how many channels go, and which."""
    dense = arrays(network())
    scores, saved = [], []
    for i in range(3):
        owned = [dense[i][0].T, dense[i][1][:, None], dense[i + 1][0]]
        scores.append(sum(np.mean(np.abs(x) ** power, axis=1) for x in owned))
        saved.append(sum(x[0].size for x in owned))
    sizes = [len(s) for s in scores]
    first = sorted(range(3), key=lambda i: saved[i] * math.floor(0.3 * sizes[i]), reverse=factor <= 1)

    def masked(removed):
        layers = [[x.copy() for x in layer] for layer in dense]
        for i, count in removed.items():
            lost = np.argsort(scores[i])[:count]
            layers[i][0][:, lost], layers[i][1][lost], layers[i + 1][0][lost] = 0, 0, 0
        return layers

    base, budget, removed, rises = losses_of(dense), initial, {}, {}
    for i in first:
        accepted = None
        for ratio in ratios:
            count = min(math.floor(ratio * sizes[i]), sizes[i] - 1)
            losses = losses_of(masked(removed | {i: count}))
            if max(losses / base) > 1 + budget:
                break
            accepted = (count, losses) if count else None
        if accepted:
            removed[i], losses = accepted
            rises[i] = (losses.sum() - base.sum()) / (saved[i] * removed[i])
            base, budget = np.maximum(base, losses), budget * factor
    best = sorted(rises, key=rises.get)[: math.floor(keep_fraction * 3)]
    return [sorted(np.argsort(s)[removed[i] if i in best else 0 :]) for i, s in enumerate(scores)]


@pytest.mark.parametrize(
    ("options", "power"),
    [
        ({}, 1),
        ({"score": "l2", "initial_drop": 0.5, "total_drop": 2.0}, 2),  # lambda < 1
        ({"initial_drop": 0.2, "total_drop": 9.0}, 1),  # lambda > 1
        ({"initial_drop": 0.4, "sequential": False}, 1),
        ({"initial_drop": 0.5, "total_drop": 2.0, "keep_fraction": 0.7}, 1),
        ({"ratios": (0.125, 0.5), "initial_drop": 4.0, "total_drop": 7.0}, 1),  # the ratios run out
    ],
)
def test_against_the_loop(options, power):
    got = channels.performance_aware(network(), GROUPS, task_losses, **options)
    initial, total = options.get("initial_drop", 0.05), options.get("total_drop", 5.0)
    factor = channels.drop_schedule(initial, 3, total) if options.get("sequential", True) else 1.0
    ratios = options.get("ratios", [i / 20 for i in range(1, 20)])
    expected = loop(ratios, initial, factor, power, options.get("keep_fraction", 1.0))
    assert [got[group].tolist() for group in GROUPS] == expected
    assert any(len(kept) < group.size for group, kept in got.items())


def one_group(*values):
    """A group of which each channel owns one number, or a column of numbers."""
    params = {"w": jnp.asarray(values).T}
    return params, channels.ChannelGroup("g", len(values), (channels.Member("w", -1),))


def mass_lost(params):
    """1 + how much of 1 + 2 + 3 + 4 is gone."""
    return 11 - jnp.sum(jnp.abs(params["w"]))[None]


@pytest.mark.parametrize(("drop", "kept"), [(0.5, [0, 1, 2, 3]), (1.5, [1, 2, 3]), (3.0, [2, 3]), (5.9, [2, 3])])
def test_by_hand(drop, kept):
    """The losses without 1, 2, 3 channels are 2, 4 and 7, where it was 1."""
    params, group = one_group(1.0, 2.0, 3.0, 4.0)
    got = channels.performance_aware(params, [group], mass_lost, initial_drop=drop, total_drop=20.0)
    assert got[group].tolist() == kept


def test_the_worst_task_decides():
    params, group = one_group(1.0, 2.0, 3.0, 4.0)
    options = {"initial_drop": 1.5, "total_drop": 20.0}
    both = channels.performance_aware(
        params, [group], lambda p: jnp.concatenate([100 * jnp.ones(1), mass_lost(p)]), **options
    )
    alone = channels.performance_aware(params, [group], mass_lost, **options)
    assert both[group].tolist() == alone[group].tolist() == [1, 2, 3]


def test_scores_by_hand():
    """Channels (3, 0) and (2, 2): 1.5 is less than 2, but 4.5 is more than 4."""
    params, group = one_group((3.0, 0.0), (2.0, 2.0))
    kept = {
        score: channels.performance_aware(params, [group], lambda p: jnp.ones(1), score=score)[group].tolist()
        for score in ("l1", "l2")
    }
    assert kept == {"l1": [1], "l2": [0]}


def test_a_loss_that_ignores_the_parameters_lets_95_percent_go():
    params = {"w": jnp.arange(20.0), "v": jnp.ones((20, 1)), "u": jnp.ones((1, 3))}
    groups = [channels.ChannelGroup(name, 20, (channels.Member(name, 0),)) for name in ("w", "v")]
    single = channels.ChannelGroup("u", 1, (channels.Member("u", 0),))
    got = channels.performance_aware(params, [*groups, single], lambda p: jnp.zeros(2))
    assert got[groups[0]].tolist() == [19]  # the largest
    assert got[groups[1]].tolist() == [0]  # of equal ones the first
    assert got[single].tolist() == [0]


@pytest.mark.parametrize("risen", [1.0, math.nan, math.inf])
def test_a_loss_without_tolerance_lets_nothing_go(risen):
    """It is 0 at first, of which any rise is an infinite share; and what is not a number is no success."""
    params, group = one_group(1.0, 2.0, 3.0, 4.0)

    def losses(params):
        return jnp.where(jnp.all(params["w"] != 0), 0.0, risen)[None]

    assert channels.performance_aware(params, [group], losses)[group].tolist() == [0, 1, 2, 3]


def test_the_dearest_group_goes_first_and_takes_the_budget():
    """Two equal groups that both could lose half by themselves: each takes one unit of a loss of at most two."""
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    a, b = (channels.ChannelGroup(name, 2, (channels.Member(name, 0),)) for name in "ab")

    def losses(params):
        return jnp.asarray([1.0, 2.0, 8.0])[4 - jnp.sum(params["a"]).astype(int) - jnp.sum(params["b"]).astype(int)][
            None
        ]

    for dear, cheap in ((a, b), (b, a)):
        got = channels.performance_aware(
            params, [a, b], losses, initial_drop=1.0, total_drop=4.0, flops=lambda g, kept, dear=dear: float(g is dear)
        )
        assert (got[dear].tolist(), got[cheap].tolist()) == ([0], [0, 1])


def test_no_groups():
    assert channels.performance_aware({"w": jnp.ones(3)}, [], lambda p: jnp.ones(1)) == {}


@pytest.mark.parametrize(("initial", "layers", "total"), [(0.05, 30, 5.0), (0.06, 40, 6.0), (0.1, 10, 1.5), (2, 2, 99)])
def test_drop_schedule_solves_its_equation(initial, layers, total):
    factor = channels.drop_schedule(initial, layers, total)
    # As many roundings as there are factors, and what the solver leaves.
    assert math.prod(1 + initial * factor**i for i in range(layers)) == pytest.approx(total, rel=1e-12)
    assert (factor > 1) == ((1 + initial) ** layers < total)


def test_drop_schedule_without_change():
    assert channels.drop_schedule(0.1, 7, 1.1**7) == pytest.approx(1, abs=1e-12)
    assert channels.drop_schedule(0.1, 1, 3.0) == 1.0
    # Only where little more than the first layer's rise is left.
    assert 0 < channels.drop_schedule(0.5, 3, 1.5 + 1e-9) < 1e-8


PARAMS, GROUP = one_group(1.0, 2.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: channels.drop_schedule(0.0, 3, 2.0), r"initial_drop=0.0 must lie in \(0, inf\)"),
        (lambda: channels.drop_schedule(0.1, 0, 2.0), "layers=0"),
        (lambda: channels.drop_schedule(0.1, 3, 1.0), r"total_drop=1.0 must lie in \(1, inf\)"),
        (lambda: channels.drop_schedule(0.5, 3, 1.5), r"total_drop=1.5 must lie in \(1.5, inf\)"),
        (lambda: prune(score="l3"), r"score='l3' .* 'l[12]'"),
        (lambda: prune(keep_fraction=1.5), "keep_fraction=1.5"),
        (lambda: prune(ratios=(0.0, 0.5)), r"ratios=0.0 must lie in \(0, 1\]"),
        (lambda: prune(ratios=(0.5, 0.5)), "must ascend"),
        (lambda: prune(lambda p: jnp.ones(())), r"shape \(\)"),
        (lambda: prune(lambda p: -jnp.ones(2)), r"task_losses\(params\)=-1.0"),
        (lambda: channels.performance_aware({"v": PARAMS["w"]}, [GROUP], mass_lost), "'w', which the tree lacks"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def prune(losses=mass_lost, **options):
    return channels.performance_aware(PARAMS, [GROUP], losses, **options)
