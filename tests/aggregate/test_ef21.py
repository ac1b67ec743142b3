"""EF21 against loops in NumPy float64; its form on a mesh against its form on a stack, and the bytes that it moves."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from launch import hlo
from steelyard import aggregate
from tests.aggregate.helpers import compress, flat, flat_one

P = jax.sharding.PartitionSpec
EPS = 2.0**-23
WORKERS = 8
SHAPES = {"kernel": (4, 5), "bias": (9,), "gain": (), "none": None}
SIZE = 30
UNEVEN = np.arange(1.0, 9.0) / 36
# A few sums of float32 numbers near 1.
CLOSE = {"rtol": 32 * EPS, "atol": 32 * EPS}


def identity(tree, step, worker):
    del step, worker
    return tree


def gradients(step=0, seed=0):
    rng = np.random.default_rng([11, seed, step])
    return {
        name: None if shape is None else jnp.asarray(rng.standard_normal((WORKERS, *shape)), jnp.float32)
        for name, shape in SHAPES.items()
    }


def reference(steps, k, weights):
    estimates = np.zeros((WORKERS, SIZE))
    for rows in steps:
        for worker, row in enumerate(flat(rows)):
            target = row / (WORKERS * weights[worker])
            estimates[worker] += compress(target - estimates[worker], k)
        yield weights @ estimates


# On a stack.


@pytest.mark.parametrize("weights", [None, UNEVEN], ids=["EF21", "EF21-W"])
@pytest.mark.parametrize("k", [1, 7])
def test_five_steps(k, weights):
    rule = aggregate.ef21(WORKERS, aggregate.top_k(k), weights=weights)
    steps = [gradients(step) for step in range(5)]
    state, update = rule.init(jax.tree.map(lambda x: x[0], steps[0])), jax.jit(rule.update)
    shares = np.full(WORKERS, 1 / WORKERS) if weights is None else weights
    for rows, expected in zip(steps, reference(steps, k, shares), strict=True):
        out, state = update(rows, state)
        assert out["none"] is None
        np.testing.assert_allclose(flat_one(out), expected, **CLOSE)
    assert int(state.step) == 5


@pytest.mark.parametrize("weights", [None, UNEVEN], ids=["EF21", "EF21-W"])
@pytest.mark.parametrize("compressor", [identity, aggregate.top_k(SIZE)], ids=["identity", "all"])
def test_without_compression_it_is_the_mean(compressor, weights):
    rule = aggregate.ef21(WORKERS, compressor, weights=weights)
    state = rule.init(jax.tree.map(lambda x: x[0], gradients()))
    for step in range(3):
        out, state = rule.update(gradients(step), state)
        np.testing.assert_allclose(flat_one(out), flat(gradients(step)).mean(0), **CLOSE)


def test_uniform_weights_are_none():
    rows = gradients()
    params = jax.tree.map(lambda x: x[0], rows)
    rules = [aggregate.ef21(WORKERS, aggregate.top_k(3), weights=w) for w in (None, np.full(WORKERS, 0.125))]
    one, other = (rule.update(rows, rule.init(params))[0] for rule in rules)
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.mark.parametrize("k", [1, 4, 7])
def test_a_constant_gradient_is_reached_exactly(k):
    """Each step sends k entries that were not sent before: `ceil(P / k)` steps, and not one fewer."""
    rows = gradients()
    rule = aggregate.ef21(WORKERS, aggregate.top_k(k))
    state = rule.init(jax.tree.map(lambda x: x[0], rows))
    update, steps = jax.jit(rule.update), -(-SIZE // k)
    for step in range(1, steps + 1):
        _, state = update(rows, state)
        is_there = np.array_equal(flat(state.estimates), flat(rows))
        assert is_there == (step == steps)


def test_one_worker_keeps_half_precision_gradients_in_float32():
    rule = aggregate.ef21(1, aggregate.top_k(2))
    rows = {"x": jnp.array([[1.0, -2.0, 0.5]], jnp.bfloat16)}
    state = rule.init({"x": jnp.zeros(3, jnp.bfloat16)})
    out, state = rule.update(rows, state)
    assert (out["x"].dtype, state.estimates["x"].dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(out["x"].astype(jnp.float32), [1, -2, 0])
    out, _ = rule.update(rows, state)
    np.testing.assert_array_equal(out["x"], rows["x"][0])


def test_the_first_gradient_may_be_sent_as_it_is():
    """A state of one compressor is a state of any other."""
    rows = gradients()
    params = jax.tree.map(lambda x: x[0], rows)
    whole, sparse = (aggregate.ef21(WORKERS, c) for c in (identity, aggregate.top_k(1)))
    _, state = whole.update(rows, whole.init(params))
    out, _ = sparse.update(rows, state)
    np.testing.assert_allclose(flat_one(out), flat(rows).mean(0), **CLOSE)


def test_descent_with_one_entry_a_step_reaches_the_minimum():
    """|p - a_k|^2 / 2 has smoothness 1 for each worker; with the theory's rate p converges to the mean of a_k."""
    targets = jnp.asarray(np.random.default_rng(0).standard_normal((WORKERS, 6)), jnp.float32)
    rate = aggregate.ef21_step_size(np.ones(WORKERS), alpha=1 / 6)
    tx = optax.chain(aggregate.ef21(WORKERS, aggregate.top_k(1)), optax.sgd(rate))

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params - targets, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (jnp.ones(6), tx.init(jnp.ones(6))), length=500)
    np.testing.assert_allclose(params, targets.mean(0), atol=1e-5)


# Step sizes.


def test_worked_step_sizes():
    """alpha = 0.19: theta = 0.1, beta = 8.1, root 9; the means of (1, 2, 3) are 2 and sqrt(14 / 3)."""
    step = functools.partial(aggregate.ef21_step_size, [1.0, 2.0, 3.0], alpha=0.19)
    np.testing.assert_allclose(step(), 1 / (2 + 9 * 2), rtol=8 * EPS)
    np.testing.assert_allclose(step(weighted=False), 1 / (2 + 9 * np.sqrt(14 / 3)), rtol=8 * EPS)
    np.testing.assert_allclose(step(overall=1.5), 1 / (1.5 + 9 * 2), rtol=8 * EPS)


@pytest.mark.parametrize("weighted", [True, False])
def test_without_compression_the_step_size_is_that_of_descent(weighted):
    np.testing.assert_allclose(aggregate.ef21_step_size([1.0, 3.0], alpha=1.0, weighted=weighted), 0.5)


def test_tiny_contractions_keep_their_digits():
    """theta = alpha / 2 (1 + alpha / 4 + ..) is below the rounding of 1 - sqrt(1 - alpha)."""
    alpha = 1e-8
    np.testing.assert_allclose(aggregate.ef21_step_size([1.0], alpha=alpha), alpha / 2, rtol=1e-5)


# On a mesh.


@functools.cache
def mesh():
    return jax.make_mesh((WORKERS,), ("worker",), axis_types=(jax.sharding.AxisType.Auto,))


def exchange(compressor, weights=None, sparse=None):
    """`(rows, state) -> (update, state)`, each device with its own row and estimate; checked to be replicated."""
    spec = aggregate.EF21ExchangeState(P(), P("worker"), P())

    def worker(rows, state):
        own = state._replace(estimate=jax.tree.map(lambda x: x[0], state.estimate))
        weight = None if weights is None else jnp.asarray(weights, jnp.float32)[jax.lax.axis_index("worker")]
        grads = jax.tree.map(lambda x: x[0], rows)
        update, own = aggregate.ef21_exchange(grads, own, compressor, "worker", weight=weight, sparse=sparse)
        return update, own._replace(estimate=jax.tree.map(lambda x: x[None], own.estimate))

    return jax.jit(jax.shard_map(worker, mesh=mesh(), in_specs=(P("worker"), spec), out_specs=(P(), spec)))


def exchange_start(rows):
    state = aggregate.ef21_exchange_init(jax.tree.map(lambda x: x[0], rows))
    return state._replace(estimate=jax.tree.map(jnp.zeros_like, rows))


@pytest.mark.parametrize("weights", [None, UNEVEN], ids=["EF21", "EF21-W"])
@pytest.mark.parametrize("sparse", [True, False], ids=["sparse", "dense"])
@pytest.mark.parametrize("kind", ["top_k", "random_k"])
def test_the_exchange_is_the_rule_on_the_stack(kind, sparse, weights):
    compressor = aggregate.top_k(4) if kind == "top_k" else aggregate.random_k(4, jax.random.key(2))
    rule = aggregate.ef21(WORKERS, compressor, weights=weights)
    fn, update = exchange(compressor, weights, sparse), jax.jit(rule.update)
    state, on_stack = exchange_start(gradients()), rule.init(jax.tree.map(lambda x: x[0], gradients()))
    for step in range(4):
        out, state = fn(gradients(step), state)
        expected, on_stack = update(gradients(step), on_stack)
        assert out["none"] is None
        np.testing.assert_allclose(flat_one(out), flat_one(expected), **CLOSE)
        # Two programs: the same choice of entries, and values to a rounding.
        np.testing.assert_allclose(flat(state.estimate), flat(on_stack.estimates), **CLOSE)


def test_half_precision_gradients_are_exchanged_in_float32():
    rows = {"x": jnp.asarray(np.random.default_rng(0).standard_normal((WORKERS, 40)), jnp.bfloat16)}
    state = exchange_start(rows)
    state = state._replace(estimate=jax.tree.map(lambda x: x.astype(jnp.float32), state.estimate))
    out, state = exchange(aggregate.top_k(3))(rows, state)
    assert (out["x"].dtype, state.mean["x"].dtype) == (jnp.bfloat16, jnp.float32)
    expected = np.mean([compress(row, 3) for row in np.asarray(rows["x"], np.float64)], axis=0)
    np.testing.assert_allclose(state.mean["x"], expected, **CLOSE)


def traffic(size, compressor, sparse=None):
    rows = jnp.ones((WORKERS, size))
    return hlo.collective_bytes(
        exchange(compressor, sparse=sparse).lower(rows, exchange_start(rows)).compile().as_text()
    )


def test_bytes_on_the_wire():
    """k values and k indices of each worker, of 4 bytes, instead of P numbers."""
    size, k = 1000, 10
    assert traffic(size, aggregate.top_k(k), sparse=True) == {"all-gather": WORKERS * k * (4 + 4)}
    assert traffic(size, aggregate.top_k(k), sparse=False) == {"all-reduce": 4 * size}


@pytest.mark.parametrize(
    ("k", "kind"), [(1, "all-gather"), (124, "all-gather"), (125, "all-reduce"), (1000, "all-reduce")]
)
def test_by_itself_it_takes_the_form_that_moves_less(k, kind):
    """On a ring, 7 k (4 + 4) bytes against 2 (7 / 8) 4 P: they are equal at 8 k = P."""
    assert list(traffic(1000, aggregate.top_k(k))) == [kind]


def test_a_compressor_that_does_not_say_what_it_keeps_is_summed():
    assert list(traffic(1000, identity)) == ["all-reduce"]
    with pytest.raises(ValueError, match="sparse=True needs a Sparsifier"):
        traffic(1000, identity, sparse=True)


# Errors.

top_1 = aggregate.top_k(1)
BAD = {
    "workers": (lambda: aggregate.ef21(0, top_1), r"num_workers=0 must lie in \[1, inf\)"),
    "compressor": (lambda: aggregate.ef21(2, 5), "compressor=5 must be a function"),
    "weights_shape": (lambda: aggregate.ef21(2, top_1, weights=[1.0]), r"weights must have shape \(2,\).* got \(1,\)"),
    "weights_zero": (lambda: aggregate.ef21(2, top_1, weights=[0.0, 1.0]), "weights must be positive"),
    "weights_nan": (lambda: aggregate.ef21(2, top_1, weights=[np.nan, 1.0]), "weights must be positive"),
    "weights_sum": (lambda: aggregate.ef21(2, top_1, weights=[0.5, 0.5001]), "weights must sum to 1 within 1e-5"),
    "smoothness_shape": (lambda: aggregate.ef21_step_size(1.0, alpha=0.5), r"smoothness must be a vector.* shape \(\)"),
    "smoothness_zero": (lambda: aggregate.ef21_step_size([0.0], alpha=0.5), "smoothness must be positive"),
    "alpha_zero": (lambda: aggregate.ef21_step_size([1.0], alpha=0.0), r"alpha=0.0 must lie in \(0, 1\]"),
    "alpha_large": (lambda: aggregate.ef21_step_size([1.0], alpha=1.1), "alpha=1.1"),
    "overall": (lambda: aggregate.ef21_step_size([1.0], alpha=0.5, overall=0.0), r"overall=0.0 must lie in \(0, inf\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    make, text = BAD[name]
    with pytest.raises(ValueError, match=text):
        make()


def test_weights_may_be_off_by_rounding():
    aggregate.ef21(3, top_1, weights=np.full(3, 1 / 3, np.float32) + np.float32(2e-6))


def test_bad_stacks():
    rule = aggregate.ef21(3, top_1)
    state = rule.init(jnp.zeros(4))
    with pytest.raises(ValueError, match="ef21 was made for 3 gradients, but there are 2"):
        rule.update(jnp.ones((2, 4)), state)
    with pytest.raises(ValueError, match=r"whole rows.*axis_name='worker'.*ef21_exchange"):
        rule.update(jnp.ones((3, 4)), state, axis_name="worker")
