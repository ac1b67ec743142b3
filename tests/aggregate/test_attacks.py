"""What bad workers send, against NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from steelyard.aggregate import attacks

EPS = 2.0**-23
ATTACKS = {
    "sign_flip": functools.partial(attacks.sign_flip, scale=5.0),
    "alie": functools.partial(attacks.alie, z=1.5),
    "inner_product": functools.partial(attacks.inner_product, epsilon=0.1),
    "non_finite": functools.partial(attacks.non_finite, value=-np.inf),
}


def expected_rows(name, honest, bad):
    mean, std = honest.mean(axis=0), honest.std(axis=0)
    return {
        "sign_flip": -5.0 * bad,
        "alie": np.broadcast_to(mean - 1.5 * std, bad.shape),
        "inner_product": np.broadcast_to(-0.1 * mean, bad.shape),
        "non_finite": np.full(bad.shape, -np.inf),
    }[name]


def stack(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {"w": jnp.asarray(rng.standard_normal((10, 4, 2)), dtype), "none": None, "b": jnp.arange(10, dtype=dtype)}


@pytest.mark.parametrize("count", [0, 1, 3])
@pytest.mark.parametrize("name", ATTACKS)
def test_the_last_rows_are_replaced_and_no_others(name, count):
    x = stack()
    out = jax.jit(ATTACKS[name], static_argnums=1)(x, count)
    assert out["none"] is None
    for key in ("w", "b"):
        honest, bad = np.split(np.asarray(x[key], np.float64), [10 - count])
        np.testing.assert_array_equal(out[key][: 10 - count], honest)
        np.testing.assert_allclose(out[key][10 - count :], expected_rows(name, honest, bad), rtol=16 * EPS, atol=1e-6)


@pytest.mark.parametrize("name", ATTACKS)
def test_half_precision_is_kept_and_statistics_are_float32(name):
    x = stack(jnp.bfloat16)
    out = ATTACKS[name](x, 3)
    assert out["w"].dtype == jnp.bfloat16
    honest, bad = np.split(np.asarray(x["w"], np.float64), [7])
    np.testing.assert_allclose(np.asarray(out["w"], np.float64)[7:], expected_rows(name, honest, bad), rtol=2.0**-8)


@pytest.mark.parametrize(("count", "bad"), [(10, 3), (10, 4), (11, 2), (25, 11), (3, 1)])
def test_a_little_is_the_quantile_of_the_honest_rows_that_are_needed(count, bad):
    """Honest rows with mean 0 and std 1: what is sent is -z. With the bad ones, s honest ones beyond are a majority."""
    honest = count - bad
    x = np.random.default_rng(1).standard_normal(count).astype(np.float32)
    x[:honest] = (x[:honest] - x[:honest].mean()) / x[:honest].std()
    supporters = count // 2 + 1 - bad
    assert bad + supporters > count / 2
    z = scipy.stats.norm.ppf((honest - supporters) / honest)
    np.testing.assert_allclose(attacks.alie(jnp.asarray(x), bad)[honest:], -z, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: attacks.sign_flip(jnp.ones(4), 4), r"num_byzantine=4 must lie in \[0, 4\)"),
        (lambda: attacks.inner_product(jnp.ones(4), -1), r"num_byzantine=-1 must lie in \[0, 4\)"),
        (lambda: attacks.alie(jnp.ones(4), 2), r"num_byzantine=2 must lie in \[0, 2.0\)"),
        (lambda: attacks.alie(jnp.ones(4), 4, z=1.0), r"num_byzantine=4 must lie in \[0, 4\)"),
        (lambda: attacks.non_finite(jnp.ones(4), 1.5), "num_byzantine=1.5 must be a whole number"),
        (lambda: attacks.non_finite(jnp.ones(4), 1, value=1e30), "value=1e.30 must be nan, inf or -inf"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_strengths_may_be_traced():
    out = jax.vmap(lambda s: attacks.sign_flip(jnp.ones(3), 1, scale=s))(jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(out, [[1, 1, -1], [1, 1, -2]])
