"""Elementary scores against NumPy loops in float64, and cases worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard.sparsity import masks, scores

# Each with the entry's own w, and one or two numbers beside it.
DEFINITIONS = {
    "saliency": (scores.saliency, lambda w, g: abs(w * g)),
    "fisher": (scores.fisher, lambda w, v: w * w * v),
    "taylor": (scores.taylor, lambda w, g: abs(w * g + 0.5 * w * w * g * g)),
    "movement": (scores.movement, lambda w, g: -w * g),
    "magnitude_increase": (scores.magnitude_increase, lambda w, start: abs(w) - abs(start)),
    "taylor, second": (
        lambda w, g: scores.taylor(w, g, second=g),
        lambda w, g: abs(w * g + 0.5 * w * w * g),
    ),
}


topk_mask = jax.jit(masks.topk_mask)


def tree_of(seed, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {"a": {"kernel": rng.normal(size=(5, 3)).astype(dtype), "none": None}, "b": rng.normal(size=4).astype(dtype)}


def by_hand(fn, *trees):
    def leaf(*arrays):
        rows = zip(*(np.asarray(x, np.float64).ravel() for x in arrays), strict=True)
        return np.array([fn(*row) for row in rows]).reshape(arrays[0].shape)

    return jax.tree.map(leaf, *trees)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_is_the_loop(name):
    score, definition = DEFINITIONS[name]
    w, other = tree_of(0), tree_of(1)
    got, expected = score(w, other), by_hand(definition, w, other)
    # Four roundings of terms below 10, two of which may cancel.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=4e-6), got, expected)
    assert got["a"]["none"] is None


@pytest.mark.parametrize("name", DEFINITIONS)
def test_half_precision_is_rounded_once(name):
    """The score of bfloat16 leaves is that of the same numbers in float32, rounded."""
    score, _ = DEFINITIONS[name]
    half = [jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree_of(seed)) for seed in (0, 1)]
    wide = [jax.tree.map(lambda x: x.astype(jnp.float32), x) for x in half]
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), score(*half), score(*wide))
    assert score(half[0], wide[1])["b"].dtype == jnp.float32


def test_magnitude():
    assert scores.magnitude({"w": jnp.array([-2.0, 0.5]), "none": None}) == {"w": pytest.approx([2, 0.5]), "none": None}


def test_without_gradient_the_first_entries_stay():
    w = tree_of(0)
    flat = scores.taylor(w, jax.tree.map(np.zeros_like, w))
    assert not any(np.any(x) for x in jax.tree.leaves(flat))
    assert topk_mask(flat["b"], 0.5).tolist() == [True, True, False, False]


def test_movement_adds_up_to_the_way_travelled():
    """With steps -rate g, the sum of -w g is the change of w^2 / 2 per unit of rate, to first order."""
    rate, w, score, start = 1e-3, np.array([1.0, -1.0]), 0, np.array([0.5, 0.5])
    for _ in range(50):
        g = np.array([-1.0, -1.0])  # Towards plus: the first entry leaves zero, the second comes to it.
        score, w = score + np.asarray(scores.movement(w, g)), w - rate * g
    np.testing.assert_allclose(rate * score, w**2 / 2 - start, rtol=0.05)
    assert score[0] > 0 > score[1]


def test_magnitude_increase_is_negative_where_a_weight_has_shrunk():
    assert scores.magnitude_increase(jnp.array([-2.0, 0.5]), jnp.array([1.0, -1.5])).tolist() == [1.0, -1.0]


def test_random_is_a_draw_for_each_leaf():
    params = {"a": jnp.zeros((40, 50)), "b": jnp.zeros((40, 50)), "none": None}
    draws = jax.jit(scores.random)(params, jax.random.key(0))
    again = scores.random(params, jax.random.key(0))
    np.testing.assert_array_equal(draws["a"], again["a"])
    assert not np.array_equal(draws["a"], draws["b"])
    assert not np.array_equal(draws["a"], scores.random(params, jax.random.key(1))["a"])
    for draw in (draws["a"], draws["b"]):
        assert np.all((draw >= 0) & (draw < 1))
        # The mean of 2000 draws has standard deviation 1 / sqrt(12 * 2000) = 0.0065.
        assert abs(float(draw.mean()) - 0.5) < 4 * 0.0065


def test_random_of_half_precision_hardly_ties():
    """Of n draws of 2^23 values, n^2 / 2^24 pairs are equal; in bfloat16 nearly all would be."""
    draw = scores.random(jnp.zeros(1000, jnp.bfloat16), jax.random.key(0))
    assert draw.dtype == jnp.float32
    assert len(np.unique(draw)) >= 998


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_prefer_puts_the_entries_of_the_masks_first(dtype):
    """1000 + 1 is 1000 in bfloat16; a leaf with small scores still comes before the largest of another leaf."""
    given = {"a": jnp.array([1000.0, jnp.nan, 3.0], dtype), "b": jnp.array([-2.0, 1.0], dtype), "none": None}
    preferred = {"a": jnp.array([False, True, False]), "b": jnp.array([True, False]), "none": None}
    got = scores.prefer(given, preferred)
    assert {path: x.dtype for path, x in got.items() if x is not None} == {"a": dtype, "b": dtype}
    assert (got["a"][0], got["a"][2], got["b"][1]) == (1000, 3, 1)
    assert got["a"][1] == got["b"][0] > 1000
    assert scores.prefer(given, {"a": None, "b": None, "none": None})["a"] is given["a"]


def test_prefer_fills_a_pattern_up_with_the_best_of_the_rest():
    score = jnp.array([5.0, 4.0, 3.0, 1.0, 1.0, 2.0, 0.5, 0.25], jnp.float32)
    pattern = jnp.array([True, False, False, False, False, True, False, False])  # 1:4
    mask = topk_mask(scores.prefer(score, pattern), 0.5)
    assert mask.tolist() == [True, True, True, False, False, True, False, False]


LIKE = {"a": {"w": jnp.ones((2, 3))}}
REFUSED = {
    r"params and grads .* 'a/w' of params is not in grads": lambda: scores.saliency(LIKE, {"a": {}}),
    r"params and grads .* 'b' of grads is not in params": lambda: scores.movement(LIKE, {**LIKE, "b": jnp.ones(1)}),
    r"'a/w' has shape \(2, 3\) in params, but \(3,\) in second_moment": lambda: scores.fisher(
        LIKE, {"a": {"w": jnp.ones(3)}}
    ),
    r"'a/w' of params is not in second": lambda: scores.taylor(LIKE, LIKE, second={"a": {"w": None}}),
    r"\(2, 3\) in params, but \(2, 4\) in init": lambda: scores.magnitude_increase(
        LIKE, {"a": {"w": jnp.ones((2, 4))}}
    ),
    r"scores of shape \(2, 3\) have a mask of shape \(3,\)": lambda: scores.prefer(
        LIKE, {"a": {"w": jnp.ones(3, bool)}}
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()
