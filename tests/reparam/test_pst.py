"""Parameter-efficient sparse training against its equations in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import reparam
from steelyard.sparsity import schedules
from tests.reparam.conftest import best

IN, OUT, RANK, MASK_RANK = 6, 4, 3, 2
STRENGTHS = {"beta": 0.5, "alpha1": 0.75, "alpha2": 1.5}
SHAPES = {
    "w": (IN, OUT),
    "u": (IN, RANK),
    "v": (RANK, OUT),
    "a": (IN, MASK_RANK),
    "b": (MASK_RANK, OUT),
    "row": (IN,),
    "col": (OUT,),
}
PARAMS = {"dense": {"kernel": jax.random.normal(jax.random.key(0), (IN, OUT)), "bias": jnp.ones(OUT)}, "none": None}


def draws(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


@jax.jit
def value_and_vjp(arrays, sparsity, g):
    value, pullback = jax.vjp(lambda x: reparam.pst_weight(**x, sparsity=sparsity, **STRENGTHS), arrays)
    return value, pullback(g)[0]


def definition(w, u, v, a, b, row, col, sparsity):
    """Updated weight and mask, in float64, entry by entry."""
    updated = w.astype(np.float64) + STRENGTHS["beta"] * u.astype(np.float64) @ v
    scores = np.zeros((IN, OUT))
    for i in range(IN):
        for j in range(OUT):
            importance = sum(float(a[i, r]) * float(b[r, j]) for r in range(MASK_RANK))
            scores[i, j] = abs(updated[i, j]) + STRENGTHS["alpha1"] * importance
            scores[i, j] += STRENGTHS["alpha2"] * (float(row[i]) + float(col[j]))
    return updated, best(scores, round(IN * OUT * (1 - sparsity)))


@pytest.mark.parametrize("sparsity", [0.0, 0.75])
def test_value_and_gradients(sparsity):
    for seed in range(3):
        x, g = draws(seed), draws(seed + 10)["w"]
        value, gradient = value_and_vjp(x, sparsity, g)
        updated, mask = definition(**x, sparsity=sparsity)
        into_scores = g * updated
        into_weight = g * mask + into_scores * np.sign(updated)
        expected = {
            "w": np.zeros((IN, OUT)),
            "u": STRENGTHS["beta"] * into_weight @ x["v"].T,
            "v": STRENGTHS["beta"] * x["u"].T @ into_weight,
            "a": STRENGTHS["alpha1"] * into_scores @ x["b"].T,
            "b": STRENGTHS["alpha1"] * x["a"].T @ into_scores,
            "row": STRENGTHS["alpha2"] * into_scores.sum(1),
            "col": STRENGTHS["alpha2"] * into_scores.sum(0),
        }
        # float32: sums of a dozen products of numbers of order 1 to 10.
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
        close(value, updated * mask)
        jax.tree.map(close, gradient, expected)


def test_training_begins_with_magnitude_pruning():
    link = reparam.pst(0.75, rank=RANK, mask_rank=MASK_RANK)
    stored, state = link.init(PARAMS, jax.random.key(1))
    seen = link.apply(stored, state, step=0, rng=None, train=True)
    w = np.asarray(PARAMS["dense"]["kernel"])
    np.testing.assert_array_equal(seen["dense"]["kernel"], np.where(best(np.abs(w), 6), w, 0))
    np.testing.assert_array_equal(seen["dense"]["bias"], PARAMS["dense"]["bias"])
    assert seen["none"] is stored["none"] is stored["dense"]["bias"] is None
    trained = sum(x.size for x in jax.tree.leaves(stored))
    assert trained == (RANK + MASK_RANK) * (IN + OUT) + IN + OUT
    u, v, a, b, row, col = stored["dense"]["kernel"]
    assert not any(np.any(x) for x in (v, b, row, col))
    assert np.std(np.append(u, a)) > 0.5


def test_draws_are_those_of_the_path():
    """Another leaf in the tree changes nothing."""
    link = reparam.pst(0.5, rank=RANK, mask_rank=MASK_RANK)
    more = {"another": PARAMS["dense"], **PARAMS}
    alone, among = (link.init(p, jax.random.key(1))[0] for p in (PARAMS, more))
    np.testing.assert_array_equal(alone["dense"]["kernel"].u, among["dense"]["kernel"].u)
    assert (among["dense"]["kernel"].u != among["another"]["kernel"].u).all()


def test_schedule_and_finish():
    """After the step t the state has the sparsity of t + 1, which training, evaluation and storage share."""
    link = reparam.pst(schedules.polynomial(0.75, start=0, end=4, power=1), rank=RANK, mask_rank=MASK_RANK)
    stored, state = jax.jit(link.init)(PARAMS, jax.random.key(1))
    stored = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.1), stored)
    show = jax.jit(lambda *args: link.apply(*args, step=0, rng=None, train=False)["dense"]["kernel"])
    update = jax.jit(functools.partial(link.update, rng=None))
    for step in range(5):
        zeros = round(IN * OUT * 0.75 * min(step, 4) / 4)
        assert np.count_nonzero(show(stored, state)) == IN * OUT - zeros
        if step == 3:
            finished = link.finish(stored, state)["dense"]["kernel"]
            np.testing.assert_array_equal(np.asarray(finished).view("u4"), np.asarray(show(stored, state)).view("u4"))
        state = update(state, stored, None, step=step)


def test_only_leaves_the_rest_to_the_optimizer():
    link = reparam.only(reparam.pst(0.5), r".*/kernel")
    stored, state = link.init(PARAMS, jax.random.key(1))
    np.testing.assert_array_equal(stored.rest["dense"]["bias"], PARAMS["dense"]["bias"])
    gradient = jax.grad(lambda s: link.apply(s, state, step=0, rng=None, train=True)["dense"]["bias"].sum())(stored)
    assert gradient.rest["dense"]["bias"].tolist() == [1] * OUT


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, r"rank=0 must lie in \[1, inf\)"),
        ({"mask_rank": 0}, r"mask_rank=0 must lie in \[1, inf\)"),
        ({"sparsity": 1.5}, r"sparsity=1.5 must lie in \[0, 1\]"),
    ],
)
def test_refuses_at_construction(options, text):
    with pytest.raises(ValueError, match=text):
        reparam.pst(**({"sparsity": 0.5} | options))


def test_refuses_shapes():
    x = draws(0)
    with pytest.raises(ValueError, match=r"row of shape \(4,\).*\(6, 4\): it must be \(6,\)"):
        reparam.pst_weight(**(x | {"row": x["col"]}), sparsity=0.5)
    with pytest.raises(ValueError, match=r"w of shape \(6,\)"):
        reparam.pst_weight(**(x | {"w": x["row"]}), sparsity=0.5)
    with pytest.raises(ValueError, match=r"kernl.*kernel"):
        reparam.pst(0.5, where="dense/kernl").init(PARAMS, jax.random.key(0))
    with pytest.raises(ValueError, match=r"dense/bias has shape \(4,\)"):
        reparam.pst(0.5, where=lambda path, leaf: True).init(PARAMS, jax.random.key(0))
