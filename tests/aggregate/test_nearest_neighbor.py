"""Averages of nearest neighbours, against loops in NumPy float64."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import aggregate

EPS = 2.0**-23


def vectors(count=7, size=12, seed=0):
    return np.random.default_rng([seed, count]).standard_normal((count, size)).astype(np.float32)


def reference(x, num_byzantine, pivot):
    x = np.asarray(x, np.float64)
    distances = [np.linalg.norm(row - x[pivot]) for row in x]
    order = sorted(range(len(x)), key=lambda k: (distances[k], k))
    return np.mean([x[k] for k in order[: len(x) - num_byzantine]], axis=0)


@functools.partial(jax.jit, static_argnums=1)
def mix(stacked, num_byzantine):
    return aggregate.nearest_neighbor_mixing(stacked, num_byzantine)


def run(x, num_byzantine, **options):
    rule = aggregate.nearest_neighbor(num_byzantine, **options)
    return np.asarray(jax.jit(rule.update)(jnp.asarray(x, jnp.float32), rule.init(None))[0], np.float64)


@pytest.mark.parametrize("num_byzantine", [0, 1, 3])
def test_definition(num_byzantine):
    x = vectors()
    expected = [reference(x, num_byzantine, pivot) for pivot in range(len(x))]
    np.testing.assert_allclose(mix(x, num_byzantine), expected, atol=8 * EPS)  # seven products of numbers near 1
    np.testing.assert_allclose(run(x, num_byzantine), expected[0], atol=8 * EPS)
    np.testing.assert_allclose(run(x, num_byzantine, pivot=4), expected[4], atol=8 * EPS)


def test_worked_example():
    """On a line, peer 0 drops the one at 10; the peer at 10 has 1.5 and 1 nearest."""
    x = np.float32([[0.0], [1.0], [1.5], [10.0]])
    np.testing.assert_allclose(mix(x, 1)[:, 0], [2.5 / 3, 2.5 / 3, 2.5 / 3, 12.5 / 3], rtol=2 * EPS)


def test_ties_go_to_the_lower_index():
    x = np.float32([[0.0], [1.0], [-1.0]])
    np.testing.assert_array_equal(run(x, 1), [0.5])
    np.testing.assert_array_equal(run(x[[0, 2, 1]], 1), [-0.5])


def test_with_nobody_left_out_everyone_has_the_mean():
    x = vectors()
    mean = np.broadcast_to(x.astype(np.float64).mean(axis=0), x.shape)
    np.testing.assert_allclose(mix(x, 0), mean, atol=8 * EPS)


def test_agreement_is_a_fixed_point():
    row = vectors(1)[0]
    x = np.stack([row] * 5 + [-row, 100 * row])
    np.testing.assert_allclose(mix(x, 2)[:5], x[:5], rtol=8 * EPS)


@hypothesis.given(seed=st.integers(0, 10_000), far=st.sampled_from([1e8, -1e15, 1e30, np.nan, np.inf]))
@hypothesis.settings(max_examples=10, deadline=None)
def test_a_row_far_away_never_enters_the_average_of_another(seed, far):
    x = vectors(seed=seed)
    x[6] = far
    expected = np.broadcast_to(x[:6].astype(np.float64).mean(axis=0), (6, 12))
    np.testing.assert_allclose(mix(x, 1)[:6], expected, atol=8 * EPS)


def test_a_peer_that_is_not_finite_gets_the_mean_of_the_finite_ones():
    x = vectors()
    x[2, 3], x[5, 0] = np.nan, np.inf
    finite = x[[0, 1, 3, 4, 6]].astype(np.float64)
    np.testing.assert_allclose(mix(x, 1)[2::3], [finite.mean(axis=0)] * 2, atol=8 * EPS)
    np.testing.assert_allclose(run(x, 3, pivot=2), finite.mean(axis=0), atol=8 * EPS)


def test_every_peer_averages():
    """Rows of the mixing matrix sum to 1: a leaf of ones stays; and its entries are 0 or 1 / (K - f)."""
    x = {"w": jnp.asarray(vectors()), "ones": jnp.ones((7,)), "unit": 1e-3 * jnp.eye(7), "none": None}
    out = mix(x, 2)
    np.testing.assert_allclose(out["ones"], 1, rtol=4 * EPS)
    matrix = 1e3 * np.asarray(out["unit"])
    np.testing.assert_allclose(np.sort(matrix, axis=1), np.tile([0, 0, *[1 / 5] * 5], (7, 1)), rtol=8 * EPS)
    assert np.all(np.diagonal(matrix) > 0)
    assert out["none"] is None


def test_one_peer_keeps_its_own():
    x = vectors(1)
    np.testing.assert_array_equal(mix(x, 0), x)


def test_half_precision_is_accumulated_in_float32_and_kept():
    x = jnp.ones((257, 2), jnp.bfloat16).at[0].set(256)
    out = mix(x, 0)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, jnp.full((257, 2), 512 / 257, jnp.bfloat16))


@pytest.mark.parametrize("form", ["specs", "axis_name"])
def test_coordinates_on_a_mesh(form):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    x, spec = jnp.asarray(vectors(size=16)), jax.sharding.PartitionSpec(None, "model")
    if form == "specs":
        out = jax.jit(lambda x: aggregate.nearest_neighbor_mixing(x, 2, mesh=mesh, specs=spec))(x)
    else:
        local = functools.partial(aggregate.nearest_neighbor_mixing, num_byzantine=2, axis_name="model")
        out = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))(x)
    np.testing.assert_allclose(out, mix(x, 2), atol=8 * EPS)


def test_distances_are_computed_once_for_all_peers():
    text = jax.jit(lambda x: aggregate.nearest_neighbor_mixing(x, 2)).lower(jnp.asarray(vectors())).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line and "-> tensor<7x7xf32>" in line]
    assert len(products) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: aggregate.nearest_neighbor(-1), r"num_byzantine=-1 must lie in \[0, inf\)"),
        (lambda: aggregate.nearest_neighbor(1.5), "num_byzantine=1.5 must be a whole number"),
        (lambda: aggregate.nearest_neighbor(1, pivot=-1), r"pivot=-1 must lie in \[0, inf\)"),
        (lambda: run(vectors(), 1, pivot=7), r"pivot=7 must lie in \[0, 7\)"),
        (lambda: run(vectors(4), 2), "num_byzantine=2 needs more than 4 gradients, got K=4"),
        (lambda: mix(vectors(4), 2), "num_byzantine=2 needs more than 4 gradients, got K=4"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_round_of_monna_brings_honest_peers_together_at_the_optimum():
    """Peers descend |theta - 1|^2 / 2 with momentum and mix their parameters; two send the negated mean of the rest."""
    tx = optax.chain(optax.ema(0.9, debias=False), optax.sgd(0.1))
    start = jnp.asarray(vectors(11, 4))

    def step(carry, _):
        theta, state = carry
        updates, state = tx.update(theta - 1, state)
        sent = aggregate.attacks.inner_product(theta + updates, 2, epsilon=1.0)
        return (aggregate.nearest_neighbor_mixing(sent, 2), state), None

    (theta, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, length=200))((start, tx.init(start)))
    np.testing.assert_allclose(theta[:9], 1, atol=1e-3)
