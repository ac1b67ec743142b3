"""M-ConFIG against its definition in NumPy, written with loops, and what a step in turn runs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import aggregate

P = jax.sharding.PartitionSpec
EPS = 2.0**-23
SIZE = 12
# What is compiled here runs a few times: the time goes into compiling.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
jitted = functools.cache(compiled)
TWO, THREE = (aggregate.momentum_conflict_free(count, eps=0.5) for count in (2, 3))


def conflict_free_direction(rows):
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    direction = np.linalg.pinv(units) @ np.ones(len(rows))
    direction /= np.linalg.norm(direction)
    return (rows @ direction).sum() * direction


def reference(steps, count, direction, b1=0.9, b2=0.999, eps=1e-8):
    """The update of each step, from pairs of indices and rows."""
    size = steps[0][1].shape[1]
    momenta, counts, t = np.zeros((count, size)), np.zeros(count), 0
    mean, square, updates = np.zeros(size), np.zeros(size), []
    for indices, rows in steps:
        for i, g in zip(indices, np.asarray(rows, np.float64), strict=True):
            momenta[i] = b1 * momenta[i] + (1 - b1) * g
            counts[i] += 1
        if counts.min() == 0:
            updates.append(np.zeros(size))
            continue
        t += 1
        d = direction(np.stack([m / (1 - b1**c) for m, c in zip(momenta, counts, strict=True)]))
        new = d * (1 - b1**t)
        pseudo = (new - b1 * mean) / (1 - b1)
        mean, square = new, b2 * square + (1 - b2) * pseudo**2
        updates.append(d / (np.sqrt(square / (1 - b2**t)) + eps))
    return updates


def steps_of(schedule, seed=0, dtype=np.float32):
    """Rows around a common vector, so that no momentum is near zero or opposite to another."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(SIZE)
    return [(indices, (common + rng.standard_normal((len(indices), SIZE))).astype(dtype)) for indices in schedule]


def run(rule, steps, size=SIZE, dtype=jnp.float32):
    update = jitted(rule.update)
    state, updates = rule.init(jnp.zeros(size, dtype)), []
    for indices, rows in steps:
        out, state = update(jnp.asarray(rows), state, indices=jnp.asarray(indices))
        updates.append(np.asarray(out, np.float64))
    return updates, state


SCHEDULES = {
    "one in turn": [[t % 3] for t in range(9)],
    "two at a time": [[0, 1], [2, 0], [1, 2], [0, 2]],
    "all": [[0, 1, 2]] * 4,
    "unevenly": [[0], [0], [2, 1], [1], [0, 1, 2], [2]],
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_definition(name):
    """With a direction that is exact in float64, so that nothing but the momenta and the moments is compared."""
    weights = np.array([0.5, 2.0, 1.0])
    options = dict(b1=0.8, b2=0.95, eps=1e-3)
    with jax.enable_x64(True):
        steps = steps_of(SCHEDULES[name], dtype=np.float64)
        rule = aggregate.momentum_conflict_free(3, aggregator=aggregate.static(weights), **options)
        updates, state = run(rule, steps, dtype=jnp.float64)
    expected = reference(steps, 3, lambda rows: weights @ rows, **options)
    # Float64, but that quotients such as 1 / (1 - b1) lose a digit; entries are below 10.
    np.testing.assert_allclose(updates, expected, atol=1e-13)
    np.testing.assert_array_equal(state.counts, np.bincount(np.concatenate(SCHEDULES[name]), minlength=3))
    assert state.step == sum(np.any(u) for u in expected)


@pytest.mark.parametrize("name", SCHEDULES)
def test_conflict_free_by_default(name):
    """A direction good to 16 eps times the condition of the cosines, over (1 - b1) and over the eps of the root."""
    steps, eps = steps_of(SCHEDULES[name]), 0.5
    updates, _ = run(THREE, steps)
    conditions, norms = [1.0], [1.0]

    def direction(rows):
        conditions.append(np.linalg.cond(rows / np.linalg.norm(rows, axis=1, keepdims=True)) ** 2)
        out = conflict_free_direction(rows)
        norms.append(np.linalg.norm(out))
        return out

    expected = reference(steps, 3, direction, eps=eps)
    tolerance = 16 * EPS * max(conditions) * max(norms) * 2 / (1 - 0.9) / eps
    assert tolerance < 0.1
    np.testing.assert_allclose(updates, expected, atol=tolerance)


@pytest.mark.parametrize(("b1", "b2"), [(0.9, 0.999), (0.5, 0.9), (0.0, 0.0)])
def test_one_task_is_adam(b1, b2):
    """Then the pseudo-gradient is the gradient, up to a cancellation of (1 + b1) / (1 - b1) of its roundings."""
    rng = np.random.default_rng(1)
    rows = (rng.uniform(0.5, 1.5, (5, 1, SIZE)) * rng.choice([-1, 1], (5, 1, SIZE))).astype(np.float32)
    adam = optax.scale_by_adam(b1, b2, eps=1e-8)
    state, expected = adam.init(jnp.zeros(SIZE)), []
    for row in rows:
        out, state = adam.update(jnp.asarray(row[0]), state)
        expected.append(out)
    updates, _ = run(aggregate.momentum_conflict_free(1, b1=b1, b2=b2), [([0], row) for row in rows])
    np.testing.assert_allclose(updates, expected, rtol=16 * EPS * (1 + b1) / (1 - b1), atol=16 * EPS * 2 / (1 - b1))


def test_until_every_task_has_been_seen_the_update_is_zero_and_the_moments_wait():
    steps = steps_of([[0], [1], [0], [2]])
    rule = aggregate.momentum_conflict_free(3)  # its eps is small
    updates, state = run(rule, steps[:3])
    np.testing.assert_array_equal(updates, 0)
    np.testing.assert_array_equal(state.counts, [2, 1, 0])
    assert state.step == 0
    assert not np.any(state.mean)
    assert not np.any(state.square)
    # The first pseudo-gradient is the direction itself, so that Adam's shape makes it a sign.
    updates, state = run(rule, steps)
    np.testing.assert_allclose(np.abs(updates[-1]), 1, rtol=1e-5)
    assert state.step == 1


def test_a_task_without_a_fresh_gradient_keeps_its_momentum():
    steps = steps_of([[0, 1, 2], [1]])
    _, before = run(THREE, steps[:1])
    _, after = run(THREE, steps)
    for k, same in enumerate([True, False, True]):
        assert np.array_equal(before.momenta[k], after.momenta[k]) == same


def test_names_of_tasks_do_not_matter():
    """Rows may come in any order, and renaming all tasks changes no update."""
    rename = np.array([2, 0, 1])
    steps = steps_of([[0, 1], [2], [1, 2, 0]])
    expected, _ = run(THREE, steps)
    renamed, _ = run(THREE, [(rename[indices], rows) for indices, rows in steps])
    turned, _ = run(THREE, [(indices[::-1], rows[::-1]) for indices, rows in steps])
    # The eigenvectors of a permuted matrix are other roundings of the same.
    np.testing.assert_allclose(renamed, expected, atol=1e-4)
    np.testing.assert_allclose(turned, expected, atol=1e-4)


def test_without_indices_there_is_one_gradient_for_each_task():
    indices, rows = steps_of([[0, 1, 2]])[0]
    state = THREE.init(jnp.zeros(SIZE))
    left = jitted(THREE.update)(jnp.asarray(rows), state)
    right = jitted(THREE.update)(jnp.asarray(rows), state, indices=jnp.asarray(indices))
    for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_aggregator_keeps_its_state_and_gets_the_losses_of_all_tasks_in_order():
    seen = aggregate.from_losses(lambda losses, state: (losses, state + losses), lambda: jnp.zeros(3))
    rule = aggregate.momentum_conflict_free(3, aggregator=seen)
    rows = jnp.eye(3)
    given = {"indices": jnp.array([2, 0, 1]), "losses": jnp.array([3.0, 1, 2])}
    _, state = compiled(rule.update)(rows, rule.init(jnp.zeros(3)), **given)
    np.testing.assert_array_equal(state.inner, [1, 2, 3])
    with pytest.raises(ValueError, match="needs the losses"):
        rule.update(rows[:1], state, indices=jnp.array([0]), losses=jnp.array([1.0]))


def test_zero_and_opposite_gradients_give_zero():
    zeros, _ = run(TWO, [([0, 1], np.zeros((2, SIZE), np.float32))] * 3)
    np.testing.assert_array_equal(zeros, 0)
    (_, (row,)), *_ = steps_of([[0]])
    opposite, state = run(TWO, [([0, 1], np.stack([row, -3 * row]))] * 3)
    np.testing.assert_array_equal(opposite, 0)
    assert state.step == 3


def test_trees_dtypes_and_states_that_keep_their_types():
    params = {"w": jnp.zeros((4, 2), jnp.bfloat16), "none": None, "masked": optax.MaskedNode(), "s": jnp.float32(0)}
    fresh = {**params, "w": jnp.ones((1, 4, 2), jnp.bfloat16), "s": jnp.ones(1)}
    rule = aggregate.momentum_conflict_free(2)
    state, update = rule.init(params), jitted(rule.update)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.momenta, state.mean, state.square))} == {jnp.dtype("float32")}
    for step in range(3):
        out, state = update(fresh, state, indices=jnp.array([step % 2]))
    assert update._cache_size() == 1
    assert out["none"] is None
    assert isinstance(out["masked"], optax.MaskedNode)
    assert (out["w"].dtype, out["w"].shape, out["s"].shape) == (jnp.bfloat16, (4, 2), ())
    # Constant gradients: the direction is their sum, the pseudo-gradient too, and their quotient 1.
    np.testing.assert_allclose(out["w"].astype(jnp.float32), 1, rtol=2.0**-8)
    np.testing.assert_allclose(out["s"], 1, rtol=1e-4)


def test_half_precision_gradients_are_accumulated_in_float32():
    """A mean of 1 and 2^-7 steps: the momentum 1 + 2^-7 b1 (1 - b1) has no bfloat16 near it."""
    rule = aggregate.momentum_conflict_free(1, b1=0.5)
    state = rule.init(jnp.zeros((1,), jnp.bfloat16))
    for value in (1.0, 1.0 + 2.0**-7):
        _, state = jitted(rule.update)(jnp.full((1, 1), value, jnp.bfloat16), state)
    assert state.momenta[0, 0] == 0.5 * 0.5 + 0.5 * (1 + 2.0**-7)


def test_vmap_over_problems():
    problems = [steps_of([[0, 1], [1]], seed=seed) for seed in range(3)]
    state = jax.vmap(lambda _: TWO.init(jnp.zeros(SIZE)))(jnp.arange(3))
    for t in range(2):
        indices = jnp.asarray(problems[0][t][0])
        rows = np.stack([steps[t][1] for steps in problems])
        out, state = compiled(jax.vmap(lambda g, s, i=indices: TWO.update(g, s, indices=i)))(rows, state)
    expected = [run(TWO, steps)[0][-1] for steps in problems]
    np.testing.assert_allclose(out, expected, atol=1e-4)


def test_coordinates_split_over_devices():
    """Inside shard_map every device has all rows of its own coordinates, and `axis_name` goes on to the aggregator."""
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    steps = steps_of([[0], [1], [0]])

    @compiled
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(None, "x"), out_specs=P("x"))
    def sharded(rows):
        state = TWO.init(rows[0])
        for t, (indices, _) in enumerate(steps):
            out, state = TWO.update(rows[t][None], state, indices=jnp.asarray(indices), axis_name="x")
        return out

    rows = np.concatenate([rows for _, rows in steps])
    np.testing.assert_allclose(sharded(rows), run(TWO, steps)[0][-1], atol=1e-4)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_tasks": 0}, r"num_tasks=0 must lie in \[1, inf\)"),
        ({"num_tasks": 2.5}, "num_tasks=2.5 must be a whole number"),
        ({"num_tasks": 2, "b1": 1.0}, r"b1=1.0 must lie in \[0, 1\)"),
        ({"num_tasks": 2, "b2": -0.1}, r"b2=-0.1 must lie in \[0, 1\)"),
        ({"num_tasks": 2, "eps": 0.0}, r"eps=0.0 must lie in \(0, inf\)"),
        ({"num_tasks": 2, "b1": np.nan}, "b1=nan"),
    ],
)
def test_bad_arguments(options, text):
    with pytest.raises(ValueError, match=text):
        aggregate.momentum_conflict_free(**options)


@pytest.mark.parametrize(
    ("rows", "extra", "text"),
    [
        (1, {}, "made for 2 tasks: 1 gradients need"),
        (3, {}, "made for 2 tasks: 3 gradients need"),
        (1, {"indices": [0, 1]}, r"shape \(2,\), but there are 1 gradients"),
        (1, {"indices": 0}, r"shape \(\), but there are 1 gradients"),
        (3, {"indices": [0, 1, 1]}, r"shape \(3,\), but there are 3 gradients"),
        (2, {"num_losses": 3}, "made for 2 tasks, but 3 losses"),
    ],
)
def test_bad_shapes(rows, extra, text):
    rule = aggregate.momentum_conflict_free(2)
    with pytest.raises(ValueError, match=text):
        rule.update(jnp.ones((rows, 3)), rule.init(jnp.zeros(3)), **extra)


# --- value_and_grad_cyclic ---


def quadratics(centers, marks=None):
    """`|p - c|^2 / 2` of each center, each seen by its mark."""
    marks = marks or [lambda p: p] * len(centers)
    return [
        lambda p, scale, c=c, m=m: scale * jnp.sum((m(p) - c) ** 2) / 2 for c, m in zip(centers, marks, strict=True)
    ]


CENTERS = np.array([[1.0, 0, 0], [0, 2, 0], [0, 0, 3]])


def test_losses_take_turns():
    fn = compiled(aggregate.value_and_grad_cyclic(quadratics(CENTERS), THREE))
    params = jnp.array([-1.0, 0.5, -2.0])
    state, values, updates = THREE.init(params), [], []
    for step in range(4):
        value, update, state = fn(params, state, step, 2.0)
        values.append(value)
        updates.append(update)
    assert fn._cache_size() == 1
    gaps = np.asarray(params) - CENTERS[[0, 1, 2, 0]]
    np.testing.assert_allclose(values, (gaps**2).sum(1), rtol=1e-6)
    expected = reference([([t % 3], 2 * gaps[t][None]) for t in range(4)], 3, conflict_free_direction, eps=0.5)
    np.testing.assert_allclose(updates, expected, atol=1e-4)


def test_only_the_backward_pass_of_the_loss_in_turn_is_run():
    passes = []

    def marked(k):
        """The identity, noting when a cotangent passes."""

        @jax.custom_vjp
        def identity(x):
            return x

        def backward(_, cotangent):
            jax.debug.callback(lambda _: passes.append(k), cotangent[0])
            return (cotangent,)

        identity.defvjp(lambda x: (x, None), backward)
        return identity

    rule = aggregate.momentum_conflict_free(3, aggregator=aggregate.mean())
    fn = compiled(aggregate.value_and_grad_cyclic(quadratics(CENTERS, [marked(k) for k in range(3)]), rule))
    params = jnp.zeros(3)
    state = rule.init(params)
    for step in (0, 1, 2, 3, 7):
        _, _, state = fn(params, state, step, 1.0)
        jax.block_until_ready(state)
        jax.effects_barrier()
    assert passes == [0, 1, 2, 0, 1]


def switches(fn, *args):
    """How many branches each switch of a function has."""
    eqns = jax.make_jaxpr(fn)(*args).eqns
    return [len(eqn.params["branches"]) for eqn in eqns if eqn.primitive.name == "cond"]


def test_it_stays_a_switch_under_vmap_if_the_step_is_shared():
    rule = THREE
    fn = aggregate.value_and_grad_cyclic(quadratics(CENTERS), rule)
    params = jnp.zeros((4, 3))
    state = jax.vmap(rule.init)(params)
    shared = jax.vmap(fn, (0, 0, None, None))
    assert switches(fn, params[0], rule.init(params[0]), 0, 1.0) == [3]
    assert switches(shared, params, state, 0, 1.0) == [3]
    assert switches(jax.vmap(fn, (0, 0, 0, None)), params, state, jnp.arange(4), 1.0) == []


def test_it_trains_in_a_chain():
    """It reaches the segment between the two centers, where neither loss can fall without the other's rising."""
    tx = optax.chain(aggregate.momentum_conflict_free(2), optax.scale_by_learning_rate(0.02))
    fn = aggregate.value_and_grad_cyclic(quadratics(np.eye(2)), tx)
    params = jnp.array([-1.0, -0.5])

    def body(carry, step):
        params, state = carry
        _, update, state = fn(params, state, step, 1.0)
        return (optax.apply_updates(params, update), state), None

    (params, _), _ = compiled(lambda start: jax.lax.scan(body, start, jnp.arange(600)))((params, tx.init(params)))
    np.testing.assert_allclose(params.sum(), 1, atol=0.04)  # Adam's steps are 0.02 long in each coordinate
    assert np.all((params > 0) & (params < 1))


@pytest.mark.parametrize("losses", [[], lambda p: p.sum(), [1.0]])
def test_bad_losses(losses):
    with pytest.raises(ValueError, match="losses must be a sequence of at least one function"):
        aggregate.value_and_grad_cyclic(losses, aggregate.momentum_conflict_free(1))


def test_as_many_losses_as_tasks():
    rule = aggregate.momentum_conflict_free(2)
    fn = aggregate.value_and_grad_cyclic(quadratics(CENTERS), rule)
    with pytest.raises(ValueError, match="made for 2 tasks, but 3 losses take turns"):
        fn(jnp.zeros(3), rule.init(jnp.zeros(3)), 0, 1.0)
