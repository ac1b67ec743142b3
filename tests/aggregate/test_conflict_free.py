"""ConFIG against its definition in NumPy float64, with a pseudo-inverse of the unit gradients themselves."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.experimental import aggregating

from steelyard import aggregate

LENGTHS = ("projection", "min", "max", "harmonic", "arithmetic", "geometric", 0)
EPS = 2.0**-23


def reference(x, weights=None, length="projection"):
    """The definition: `d = U^+ w`, then a length from the gradients that are not zero."""
    x = np.asarray(x, np.float64)
    norms = np.linalg.norm(x, axis=1)
    units = np.where(norms[:, None] > 0, x / np.where(norms > 0, norms, 1)[:, None], 0)
    weights = np.ones(len(x)) if weights is None else np.asarray(weights, np.float64)
    # Singular values below this are zero up to rounding in the examples that have dependent rows.
    direction = np.linalg.pinv(units, rcond=1e-6) @ weights
    if np.linalg.norm(direction) < 1e-6:
        return np.zeros(x.shape[1])
    direction /= np.linalg.norm(direction)
    there = norms[norms > 0]
    means = {
        "min": there.min(),
        "max": there.max(),
        "harmonic": 1 / np.mean(1 / there),
        "arithmetic": there.mean(),
        "geometric": np.exp(np.log(there).mean()),
    }
    if length == "projection":
        return (x @ direction).sum() * direction
    mean = means[length] if isinstance(length, str) else norms[length]
    return mean * (units @ direction).sum() * direction


def cosine_condition(x):
    units = x / np.linalg.norm(x, axis=1, keepdims=True)
    return np.linalg.cond(units) ** 2


def run(x, **options):
    rule = aggregate.conflict_free(**options)
    return np.asarray(rule.update(jnp.asarray(x, jnp.float32), rule.init(None))[0], np.float64)


def assert_near(out, expected, condition=10.0):
    """The pseudo-inverse of a cosine matrix known to float32 is good to eps times its condition number."""
    np.testing.assert_allclose(out, expected, atol=16 * EPS * condition * max(np.linalg.norm(expected), 1e-30))


def gradients(count, size=30, seed=0):
    """Independent rows of very different lengths."""
    rng = np.random.default_rng([seed, count])
    return (rng.standard_normal((count, size)) * 10.0 ** rng.uniform(-2, 2, (count, 1))).astype(np.float32)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_well_conditioned(count, length):
    x = gradients(count)
    assert_near(run(x, length=length), reference(x, length=length), cosine_condition(x))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("spread", [0.3, 0.1])
def test_badly_conditioned(count, length, spread):
    rng = np.random.default_rng([7, count])
    x = (rng.standard_normal(30) + spread * rng.standard_normal((count, 30))).astype(np.float32)
    condition = cosine_condition(x.astype(np.float64))
    assert condition > 10
    assert_near(run(x, length=length), reference(x, length=length), condition)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("count", [2, 3, 5])
def test_a_zero_gradient_is_ignored(count, length):
    x = gradients(count)
    x[count - 1] = 0
    out = run(x, length=length)
    assert_near(out, reference(x, length=length))
    assert_near(out, run(x[: count - 1], length=length))


def test_a_length_taken_from_a_zero_gradient_is_zero():
    x = gradients(3)
    x[1] = 0
    np.testing.assert_array_equal(run(x, length=1), 0)


@pytest.mark.parametrize("length", LENGTHS)
def test_dependent_gradients(length):
    basis = np.random.default_rng(3).integers(-4, 5, (2, 30)).astype(np.float32)
    mixing = np.float32([[1, 0], [0, 1], [1, 1], [2, -1], [1, 2]])
    x = mixing @ basis  # small integers: exactly of rank 2
    assert_near(run(x, length=length), reference(x, length=length), condition=30)


@pytest.mark.parametrize("length", LENGTHS)
def test_chosen_weights_are_the_relative_cosines(length):
    x, weights = gradients(3), np.array([1.0, 2.0, 0.5])
    out = run(x, weights=weights, length=length)
    assert_near(out, reference(x, weights, length), cosine_condition(x))
    cosines = x.astype(np.float64) @ out / np.linalg.norm(x, axis=1)
    np.testing.assert_allclose(cosines / cosines[0], weights / weights[0], rtol=1e-4)


@hypothesis.given(count=st.integers(2, 5), seed=st.integers(0, 10_000))
@hypothesis.settings(max_examples=30, deadline=None)
def test_equal_positive_cosines(count, seed):
    x = gradients(count, seed=seed)
    projections = x.astype(np.float64) @ run(x) / np.linalg.norm(x, axis=1)
    assert projections.min() > 0
    np.testing.assert_allclose(projections, projections.mean(), rtol=1e-4)


@hypothesis.given(seed=st.integers(0, 10_000), row=st.integers(0, 2), factor=st.floats(1e-3, 1e3))
@hypothesis.settings(max_examples=20, deadline=None)
def test_scaling_one_gradient_keeps_the_direction(seed, row, factor):
    x = gradients(3, seed=seed)
    scaled = x.copy()
    scaled[row] *= np.float32(factor)
    before, after = run(x), run(scaled)
    assert_near(after / np.linalg.norm(after), before / np.linalg.norm(before), 2 * cosine_condition(x))


@hypothesis.given(seed=st.integers(0, 10_000))
@hypothesis.settings(max_examples=20, deadline=None)
def test_the_order_of_tasks_does_not_matter(seed):
    x = gradients(4, seed=seed)
    order = np.random.default_rng(seed).permutation(4)
    assert_near(run(x[order]), run(x), 2 * cosine_condition(x))


@pytest.mark.parametrize("seed", range(5))
def test_two_gradients_have_a_closed_form(seed):
    """`d ~ o1 + o2`, where o_i is the unit part of one gradient orthogonal to the other."""
    x = gradients(2, seed=seed)
    a, b = x.astype(np.float64)
    first = a - (a @ b) / (b @ b) * b
    second = b - (a @ b) / (a @ a) * a
    direction = first / np.linalg.norm(first) + second / np.linalg.norm(second)
    direction /= np.linalg.norm(direction)
    assert_near(run(x), (a @ direction + b @ direction) * direction, cosine_condition(x))


def test_worked_example():
    """(1, 0) and (0, 1): dhat = (1, 1) / sqrt 2, both project to 1 / sqrt 2, so the length is sqrt 2."""
    np.testing.assert_allclose(run([[1, 0], [0, 1]]), [1, 1], rtol=4 * EPS)


@pytest.mark.parametrize("length", LENGTHS)
def test_one_gradient_is_returned_as_it_is(length):
    x = gradients(1)
    assert_near(run(x, length=length), x[0], condition=1)


def test_parallel_gradients_add_their_norms():
    u = np.array([1.0, 2.0, 2.0]) / 3
    assert_near(run(np.outer([1, 2, 5], u)), 8 * u)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("factor", [1.0, 0.3, 7.0])
def test_opposite_gradients_give_zero(factor, length):
    g = gradients(1)
    np.testing.assert_array_equal(run(np.concatenate([g, -np.float32(factor) * g]), length=length), 0)


@pytest.mark.parametrize("length", LENGTHS)
def test_pairs_of_opposite_gradients_give_zero(length):
    g = gradients(2)
    np.testing.assert_array_equal(run(np.concatenate([g, -3 * g]), length=length), 0)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("count", [1, 3])
def test_all_zero_gradients_give_zero(count, length):
    np.testing.assert_array_equal(run(np.zeros((count, 30)), length=length), 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_gradients_that_are_not_finite_stay_visible(bad):
    x = gradients(3)
    x[1, 2] = bad
    assert not np.isfinite(run(x)).any()


def test_bad_arguments():
    with pytest.raises(ValueError, match="did you mean 'harmonic'"):
        aggregate.conflict_free(length="harmonics")
    for bad in (-1, True, 0.5, None):
        with pytest.raises(ValueError, match="length"):
            aggregate.conflict_free(length=bad)
    with pytest.raises(ValueError, match="vector"):
        aggregate.conflict_free(weights=1.0)
    for bad in ([1.0, np.nan], [np.inf, 1.0]):
        with pytest.raises(ValueError, match="weights must be finite"):
            aggregate.conflict_free(weights=bad)
    with pytest.raises(ValueError, match="2 weights, but there are 3 gradients"):
        run(gradients(3), weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="length=3 is not the index of one of 3"):
        run(gradients(3), length=3)


def test_trees_dtypes_and_jit():
    x = {"w": jnp.asarray(gradients(3)).reshape(3, 5, 6), "n": None, "s": jnp.array([1.0, -1.0, 2.0])}
    rule = aggregate.conflict_free()
    flat = np.concatenate([np.asarray(x["w"]).reshape(3, -1), np.asarray(x["s"])[:, None]], axis=1)
    expected = reference(flat)
    for update in (rule.update, jax.jit(rule.update)):
        out, _ = update(x, rule.init(None))
        assert out["n"] is None
        assert out["s"].shape == ()
        assert_near(np.append(np.ravel(out["w"]), out["s"]), expected, cosine_condition(flat))
    half, _ = rule.update(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), x), rule.init(None))
    assert half["w"].dtype == jnp.bfloat16
    # Gradients rounded to 8 bits (relative 2^-9) move a direction by that times the condition of U; then one rounding.
    difference = np.append(np.ravel(half["w"].astype(np.float32)), half["s"]) - expected
    assert np.linalg.norm(difference) < 8 * 2.0**-9 * np.sqrt(cosine_condition(flat)) * np.linalg.norm(expected)


def test_float64_gradients_keep_their_dtype():
    with jax.enable_x64(True):
        x = jnp.asarray(gradients(3), jnp.float64)
        rule = aggregate.conflict_free()
        out, _ = jax.jit(rule.update)(x, rule.init(None))
        assert out.dtype == jnp.float64
        assert_near(np.asarray(out), reference(x), cosine_condition(np.asarray(x)))


def test_vmap_over_problems():
    x = np.stack([gradients(3, seed=seed) for seed in range(4)])
    rule = aggregate.conflict_free()
    out = jax.jit(jax.vmap(lambda g: rule.update(g, optax.EmptyState())[0]))(x)
    for row, problem in zip(np.asarray(out), x, strict=True):
        assert_near(row, reference(problem), cosine_condition(problem))


def test_chains_with_an_optimizer():
    """On f_1 = |p - a|^2, f_2 = 4 |p - b|^2 the chain reaches the segment between a and b: it is Pareto optimal."""
    a, b = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])

    def losses(p):
        return jnp.stack([jnp.sum((p - a) ** 2), 4 * jnp.sum((p - b) ** 2)])

    tx = optax.chain(aggregate.conflict_free(), optax.adam(1e-2))
    params = jnp.array([-1.0, -1.0])

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.jacrev(losses)(params), state, params, losses=losses(params))
        return (optax.apply_updates(params, updates), state), losses(params)

    (params, _), history = jax.lax.scan(step, (params, tx.init(params)), length=600)
    assert (history[-1] < history[0]).all()
    np.testing.assert_allclose(params.sum(), 1, atol=0.02)  # Adam's steps are 0.01 long in each coordinate
    assert ((params > 0) & (params < 1)).all()


def test_works_inside_the_aggregation_pipeline_of_optax():
    x = jnp.asarray(gradients(3))
    tx = aggregating.process(optax.scale(2.0), aggregate.conflict_free(), optax.sgd(0.5))
    assert isinstance(tx, aggregating.Aggregator)
    params = jnp.zeros(x.shape[1])
    updates, _ = tx.update(x, tx.init(params), params)
    assert_near(updates, -0.5 * reference(2 * x), cosine_condition(np.asarray(x)))
