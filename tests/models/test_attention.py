"""Self-attention and rotary positions against NumPy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steelyard import models
from tests.models.helpers import KEY, apply, compiled, init, normal, numpy_attention, numpy_rotary, to_float64


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (models.SelfAttention(2), {}),
        (models.SelfAttention(2, causal=True, rotary_base=10000.0, use_bias=False), {"causal": True, "rotate": True}),
    ],
)
def test_equals_numpy(module, options):
    x = normal(2, 5, 8)
    variables = init(module, x)
    params = to_float64(variables["params"])
    expected = np.stack([numpy_attention(params, row, 2, **options) for row in to_float64(x)])
    # Sums of 8 terms of order 1 and one softmax in float32.
    np.testing.assert_allclose(apply(module, variables, x), expected, rtol=1e-5, atol=1e-5)


def test_parameter_paths():
    variables = jax.eval_shape(models.SelfAttention(2).init, KEY, normal(1, 3, 8))
    one = {"kernel": (8, 8), "bias": (8,)}
    assert jax.tree.map(jnp.shape, variables["params"]) == {n: one for n in ("query", "key", "value", "out")}


@compiled
def _score(query, key, query_position, key_position):
    return jnp.sum(models.rotary(query, query_position[None]) * models.rotary(key, key_position[None]))


@settings(max_examples=20, deadline=None)
@given(first=st.integers(0, 200), second=st.integers(0, 200), offset=st.integers(0, 300), seed=st.integers(0, 99))
def test_scores_depend_on_the_difference_of_positions(first, second, offset, seed):
    query, key = normal(2, 1, 1, 8, seed=seed)
    # An angle of up to 500 radians is exact to 500 * 2^-24 = 3e-5; the score is a sum of 8 products of order 1.
    np.testing.assert_allclose(
        _score(query, key, first + offset, second + offset), _score(query, key, first, second), atol=1e-3
    )


def test_rotary_equals_numpy_and_keeps_lengths():
    x = normal(2, 6, 3, 8)
    positions = jnp.array([[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 0]])
    y = compiled(models.rotary)(x, positions)
    expected = np.stack(
        [numpy_rotary(np.asarray(a, np.float64), np.asarray(p)) for a, p in zip(x, positions, strict=True)]
    )
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(y[:, 0], x[:, 0])


def test_rotary_keeps_the_dtype():
    x = jax.ShapeDtypeStruct((2, 1, 4), jnp.bfloat16)
    assert jax.eval_shape(models.rotary, x, jnp.arange(2)).dtype == jnp.bfloat16


def test_bad_shapes():
    with pytest.raises(ValueError, match=r"even number of features a head, x has shape \(2, 1, 3\)"):
        models.rotary(normal(2, 1, 3), jnp.arange(2))
    with pytest.raises(ValueError, match=r"positions of shape \(3,\) do not fit x of shape \(2, 1, 4\)"):
        models.rotary(normal(2, 1, 4), jnp.arange(3))
    with pytest.raises(ValueError, match=r"heads=3 does not divide the width of x, shape \(1, 2, 8\)"):
        models.SelfAttention(3).init(KEY, normal(1, 2, 8))


def test_a_mask_hides_keys():
    x = normal(1, 4, 8)
    module = models.SelfAttention(2)
    variables = init(module, x)
    mask = (jnp.arange(4) < 3)[None, None, None, :] & jnp.ones((1, 1, 4, 1), bool)
    hidden = apply(module, variables, x, mask=mask)
    np.testing.assert_allclose(hidden[:, :3], apply(module, variables, x[:, :3]), rtol=1e-5, atol=1e-6)
