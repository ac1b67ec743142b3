"""Curves against forward passes in NumPy, and the budgeted choice against trying all of them."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard.sparsity.allocation import distortion_curves, rate_distortion

AMOUNTS = np.array([0.0, 0.3, 0.7, 1.0])
PARAMS = {
    "a": {"kernel": jax.random.normal(jax.random.key(0), (5, 4)), "bias": jnp.ones(4)},
    "b": {"kernel": jax.random.normal(jax.random.key(1), (4, 3))},
    "nothing": None,
}
X = jax.random.normal(jax.random.key(2), (6, 5))


def forward(params, x):
    return jax.nn.relu(x @ params["a"]["kernel"] + params["a"]["bias"]) @ params["b"]["kernel"]


def pruned(w, amount):
    """Without its floor(amount n) smallest entries."""
    w = np.asarray(w, np.float64)
    smallest = np.argsort(np.abs(w).ravel(), kind="stable")[: int(amount * w.size + 1e-9)]
    flat = w.ravel().copy()
    flat[smallest] = 0
    return flat.reshape(w.shape)


def moved(name, amount):
    """Squared differences of the outputs when one kernel is pruned."""
    kernels = {layer: np.asarray(PARAMS[layer]["kernel"], np.float64) for layer in "ab"}
    outputs = [
        np.maximum(np.asarray(X, np.float64) @ ks["a"] + 1, 0) @ ks["b"]
        for ks in (kernels, kernels | {name: pruned(kernels[name], amount)})
    ]
    return (outputs[0] - outputs[1]) ** 2


@pytest.mark.parametrize("reduce", ["mean", "max"])
def test_curves(reduce):
    curves = jax.jit(functools.partial(distortion_curves, forward, amounts=AMOUNTS, reduce=reduce))(PARAMS, X)
    expected = [
        [moved(name, a).mean() if reduce == "mean" else moved(name, a).mean(axis=1).max() for a in AMOUNTS]
        for name in "ab"
    ]
    # float32: outputs of order 1, and squares of their differences.
    np.testing.assert_allclose(curves, expected, rtol=1e-4)
    np.testing.assert_array_equal(curves[:, 0], 0)


def test_curves_of_some_leaves():
    curves = distortion_curves(lambda p, x: x @ p["kernel"] + p["bias"], PARAMS["a"], X, [1.0], where="kernel")
    np.testing.assert_allclose(curves, [[np.mean((np.asarray(X) @ np.asarray(PARAMS["a"]["kernel"])) ** 2)]], rtol=1e-5)


def kept(amounts, sizes):
    return np.array([[n - int(a * n + 1e-9) for a in amounts] for n in sizes])


def least(distortions, amounts, sizes, sparsity):
    """The least sum of distortions of all choices within the budget."""
    keeps, layers = kept(amounts, sizes), np.arange(len(sizes))
    budget = int((1 - sparsity) * sum(sizes) + 1e-9)
    sums = [
        distortions[layers, list(choice)].sum()
        for choice in itertools.product(range(len(amounts)), repeat=len(sizes))
        if keeps[layers, list(choice)].sum() <= budget
    ]
    return min(sums)


def chosen(distortions, amounts, sizes, sparsity, **options):
    """The sum of the distortions of the answer, which keeps to the budget, exactly."""
    choice, layers = rate_distortion(distortions, amounts, sizes, sparsity, **options), np.arange(len(sizes))
    assert kept(amounts, sizes)[layers, choice].sum() <= int((1 - sparsity) * sum(sizes) + 1e-9)
    return distortions[layers, choice].sum()


def problem(seed, layers=4):
    """Curves that are not monotone, among them."""
    rng = np.random.default_rng(seed)
    distortions = np.abs(np.cumsum(rng.normal(0.3, 1.0, (layers, 4)), axis=1))
    return distortions, AMOUNTS, rng.integers(1, 50, layers)


@pytest.mark.parametrize("seed", range(6))
def test_no_choice_is_better(seed):
    distortions, amounts, sizes = problem(seed)
    sums = [chosen(distortions, amounts, sizes, s) for s in np.linspace(0, 1, 11)]
    np.testing.assert_allclose(sums, [least(distortions, amounts, sizes, s) for s in np.linspace(0, 1, 11)], rtol=1e-12)
    assert (np.diff(sums) >= 0).all()  # the smaller the budget, the larger the distortion


@pytest.mark.parametrize("seed", range(3))
def test_coarse_budgets_stay_within_and_come_close(seed):
    distortions, amounts, sizes = problem(seed)
    for sparsity in (0.2, 0.5, 0.8):
        coarse = chosen(distortions, amounts, 1000 * sizes, sparsity, resolution=200)
        # Rounding up costs each layer less than a unit, and a budget less by five units suffices.
        assert coarse <= least(distortions, amounts, 1000 * sizes, sparsity + 5 / 200) + 1e-9


def test_nothing_is_pruned_without_a_budget():
    distortions = np.array([[0.0, 1, 2, 3]] * 3)
    assert rate_distortion(distortions, AMOUNTS, [7, 11, 10_000], 0.0).tolist() == [0, 0, 0]


def test_linear_curves_prune_the_cheapest_layers():
    """Costs a weight of 3, 1 and 2: half of 300 weights are all of the second layer and half of the third."""
    amounts = np.linspace(0, 1, 11)
    distortions = 100 * np.outer([3.0, 1.0, 2.0], amounts)
    assert rate_distortion(distortions, amounts, [100] * 3, 0.5).tolist() == [0, 10, 5]


def test_ties_and_floors():
    """Equal distortions: the densest; what was pruned before stays so."""
    flat = np.zeros((1, 4))
    assert rate_distortion(flat, AMOUNTS, [10], 0.0).tolist() == [0]
    assert rate_distortion(flat, AMOUNTS, [10], 0.5).tolist() == [2]
    assert rate_distortion(np.zeros((2, 4)), AMOUNTS, [10, 10], 0.1, floor=[0.3, 0.0]).tolist() == [1, 0]
    infinite = np.array([[0.0, np.inf, np.inf, 5.0]])
    assert rate_distortion(infinite, AMOUNTS, [10], 0.5).tolist() == [3]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"sparsity": 0.9}, r"sparsity=0.9 cannot be had"),
        ({"sparsity": 1.1}, r"sparsity=1.1"),
        ({"distortions": np.zeros((3, 3))}, r"\(3, 3\); 2 sizes and 3 amounts need \(2, 3\)"),
        ({"distortions": np.full((2, 3), np.nan)}, r"distortions=nan"),
        ({"amounts": [0.0, 0.5, 1.5]}, r"amounts=1.5 must lie in \[0, 1\]"),
        ({"resolution": 0}, r"resolution=0"),
        ({"floor": [0.0]}, r"floor has shape \(1,\), but there are 2 layers"),
    ],
)
def test_refuses(changes, text):
    arguments = {"distortions": np.zeros((2, 3)), "amounts": [0.0, 0.5, 0.8], "sizes": [10, 20], "sparsity": 0.5}
    with pytest.raises(ValueError, match=text):
        rate_distortion(**(arguments | changes))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"reduce": "maximum"}, "did you mean 'max'"),
        ({"amounts": [-0.1]}, "amounts=-0.1"),
        ({"where": "b/kernl"}, "b/kernel"),
        ({"where": lambda path, leaf: False}, "none of the 3 leaves"),
    ],
)
def test_curves_refuse(options, text):
    with pytest.raises(ValueError, match=text):
        distortion_curves(forward, PARAMS, X, **({"amounts": AMOUNTS} | options))
