"""The forward-only score on losses whose slopes are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard.sparsity import scores

RNG = np.random.default_rng(0)
C = {"a": RNG.normal(size=(3, 4)), "b": 3 * RNG.normal(size=5)}
PARAMS = {"a": jnp.ones((3, 4)), "b": jnp.zeros(5), "idle": jnp.ones(2), "none": None}


def linear(params):
    return sum(jnp.vdot(jnp.asarray(C[name], params[name].dtype), params[name]) for name in C)


def test_of_a_linear_loss_is_the_length_of_the_gradient():
    """|<c, z>| is half-normal: its mean is |c| sqrt(2 / pi), its standard deviation |c| sqrt(1 - 2 / pi)."""
    num = 400
    got = jax.jit(lambda p: scores.zeroth_order(linear, p, jax.random.key(0), eps=0.1, num_noise=num))(PARAMS)
    for name, c in C.items():
        length = np.linalg.norm(c)
        error = 4 * length * np.sqrt((1 - 2 / np.pi) / num)
        np.testing.assert_allclose(got[name], length * np.sqrt(2 / np.pi), atol=error)
    assert got["idle"] == 0
    assert got["none"] is None
    assert {x.shape for x in jax.tree.leaves(got)} == {()}


def test_only_one_leaf_moves_and_its_direction_has_its_own_key():
    """Of a product of two sums each factor has the slope of the other one."""
    params = [jnp.full(3, 2.0), jnp.full(3, 5.0)]
    key = jax.random.key(1)

    def both(params, key):
        losses = (lambda p: jnp.sum(p[0]) * jnp.sum(p[1])), (lambda p: jnp.sum(p[0]) + jnp.sum(p[1]))
        return [scores.zeroth_order(loss, params, key, eps=1.0) for loss in losses]

    both = jax.jit(both)
    slope, single = both(params, key)
    np.testing.assert_allclose(slope, [15 * single[0], 6 * single[1]], rtol=1e-5)
    assert single[0] != single[1]
    assert both(params, jax.random.key(2))[1][0] != single[0]


def test_half_precision_is_moved_in_float32():
    """1 + 1e-3 z is 1 in bfloat16 for nearly all z."""
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    score = jax.jit(lambda p: scores.zeroth_order(linear, p, jax.random.key(0), eps=2.0**-10))
    got, expected = score(half), score(PARAMS)
    np.testing.assert_allclose(got["a"], expected["a"], rtol=1e-2)
    assert got["a"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [({"eps": 0.0}, r"eps=0.0 must lie in \(0, inf\)"), ({"num_noise": 0}, "num_noise=0"), ({"num_noise": 1.5}, "1.5")],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        scores.zeroth_order(linear, PARAMS, jax.random.key(0), **options)
