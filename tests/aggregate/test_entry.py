"""The drivers: one rule gives one update however it is run, at the cost that the mode promises."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import aggregate

# The three modes contract the same products in another order; conditions of the small systems here are below 30.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def make_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        "dense": {"kernel": jnp.asarray(rng.standard_normal((4, 5)) / 2, dtype), "bias": jnp.zeros((5,), dtype)},
        "heads": jnp.asarray(rng.standard_normal((5, 3)), dtype),
        "gain": jnp.asarray(1.5, dtype),
        "frozen": None,
    }


def make_batch(size=6):
    rng = np.random.default_rng(1)
    return jnp.asarray(rng.standard_normal((size, 4)), jnp.float32), jnp.asarray(rng.standard_normal((size, 3)))


def trunk(params, x, y):
    del y
    dtype = params["gain"].dtype
    return jnp.tanh(x.astype(dtype) @ params["dense"]["kernel"] + params["dense"]["bias"]) * params["gain"]


def heads(params, z, x, y):
    del x
    outputs = z @ params["heads"] * params["gain"]
    return jnp.mean((outputs.astype(jnp.float32) - y) ** 2, axis=0) * jnp.array([1.0, 5.0, 0.2])


def losses_fn(params, x, y):
    return heads(params, trunk(params, x, y), x, y)


def losses_and_aux(params, x, y):
    z = trunk(params, x, y)
    return heads(params, z, x, y), {"z": z, "first": x[0]}


def weighting(power):
    """A rule on losses with a state: weights follow a running sum of losses."""

    def rule(losses, state):
        state = state + losses
        return state**power, state

    return aggregate.from_losses(rule, lambda: jnp.zeros(3))


def assert_trees_close(left, right, **tolerance):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), **tolerance), left, right)


JACOBIAN = jax.jit(jax.jacrev(losses_fn))


@jax.jit
def reference_gradient(weights, params, *batch):
    return jax.grad(lambda p: weights @ losses_fn(p, *batch))(params)


# --- weighted_gradient ---


def test_weighted_gradient_is_the_gradient_of_the_weighted_sum():
    params, batch, weights = make_params(), make_batch(), jnp.array([1.0, -2.0, 0.5])
    expected = reference_gradient(weights, params, *batch)
    losses, grads = jax.jit(aggregate.weighted_gradient(losses_fn))(params, weights, *batch)
    assert_trees_close(grads, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(losses, losses_fn(params, *batch), rtol=1e-6)
    with_aux = jax.jit(aggregate.weighted_gradient(losses_and_aux, has_aux=True))
    (_, aux), grads = with_aux(params, weights, *batch)
    assert_trees_close(grads, expected, rtol=1e-5, atol=1e-6)
    assert aux["z"].shape == (6, 5)


def test_weights_may_be_a_function_of_the_losses_and_are_not_differentiated():
    params, batch = make_params(), make_batch()
    gradient = aggregate.weighted_gradient(losses_fn)
    _, grads = jax.jit(lambda params, *batch: gradient(params, lambda losses: losses**2, *batch))(params, *batch)
    weights = losses_fn(params, *batch) ** 2
    expected = reference_gradient(weights, params, *batch)
    assert_trees_close(grads, expected, rtol=1e-5, atol=1e-6)


def test_weights_of_the_wrong_length_and_losses_of_the_wrong_rank():
    params, batch = make_params(), make_batch()
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        aggregate.weighted_gradient(losses_fn)(params, jnp.ones(2), *batch)
    for mode in ("weights", "stacked", "lean"):
        fn = aggregate.value_and_grad(lambda p: p @ p, aggregate.mean(), mode=mode)
        with pytest.raises(ValueError, match=r"shape \[K\].*\(\)"):
            fn(jnp.ones(3), optax.EmptyState())
    with pytest.raises(ValueError, match=r"shape \[K\]"):
        aggregate.value_and_grad(lambda p: {"a": p @ p}, aggregate.mean())(jnp.ones(3), optax.EmptyState())


# --- value_and_grad ---


@pytest.mark.parametrize("rule", [aggregate.mean(), aggregate.conflict_free()])
def test_the_modes_agree(rule):
    params, batch = make_params(), make_batch()
    state = rule.init(params)
    expected, _ = rule.update(JACOBIAN(params, *batch), state, params, losses=losses_fn(params, *batch))
    modes = ["stacked", "lean"] + (["weights"] if rule.weights else [])
    for mode in modes:
        losses, update, new_state = jax.jit(aggregate.value_and_grad(losses_fn, rule, mode=mode))(params, state, *batch)
        np.testing.assert_allclose(losses, losses_fn(params, *batch), rtol=1e-6)
        assert_trees_close(update, expected, **CLOSE)
        assert jax.tree.structure(new_state) == jax.tree.structure(state)


def test_rules_on_losses_agree_in_their_modes_and_keep_their_state():
    params, batch, rule = make_params(), make_batch(), weighting(0.5)
    state = jnp.array([1.0, 2.0, 3.0])
    weights = (state + losses_fn(params, *batch)) ** 0.5
    expected = reference_gradient(weights, params, *batch)
    for mode in ("auto", "weights", "stacked"):
        _, update, new_state = jax.jit(aggregate.value_and_grad(losses_fn, rule, mode=mode))(params, state, *batch)
        assert_trees_close(update, expected, **CLOSE)
        np.testing.assert_allclose(new_state, state + losses_fn(params, *batch), rtol=1e-6)


@pytest.mark.parametrize("mode", ["weights", "stacked", "lean"])
def test_aux_comes_back_once(mode):
    params, batch, rule = make_params(), make_batch(), aggregate.mean()
    fn = aggregate.value_and_grad(losses_and_aux, rule, mode=mode, has_aux=True)
    (losses, aux), update, _ = jax.jit(fn)(params, rule.init(params), *batch)
    assert losses.shape == (3,)
    assert_trees_close(aux, losses_and_aux(params, *batch)[1], rtol=1e-6, atol=1e-6)
    assert_trees_close(update, reference_gradient(jnp.full(3, 1 / 3), params, *batch), **CLOSE)


@pytest.mark.parametrize("mode", ["weights", "stacked", "lean"])
def test_the_report(mode):
    params, batch, rule = make_params(), make_batch(), aggregate.mean()
    fn = aggregate.value_and_grad(losses_fn, rule, mode=mode, report=True)
    _, update, _, report = jax.jit(fn)(params, rule.init(params), *batch)
    np.testing.assert_allclose(report.weights, 1 / 3)
    assert_trees_close(aggregate.combine(report.weights, JACOBIAN(params, *batch)), update, **CLOSE)
    if mode == "weights":
        assert report.gram is None
    else:
        np.testing.assert_allclose(report.gram, aggregate.gram(JACOBIAN(params, *batch)), rtol=1e-4)


def test_the_report_is_empty_for_a_rule_without_weights():
    rule = aggregate.Aggregator(optax.init_empty_state, lambda g, s, p=None, **extra: (jax.tree.map(max_first, g), s))
    params, batch = make_params(), make_batch()
    fn = jax.jit(aggregate.value_and_grad(losses_fn, rule, report=True))
    _, update, _, report = fn(params, optax.EmptyState(), *batch)
    assert report == (None, None)
    assert_trees_close(update, jax.tree.map(max_first, JACOBIAN(params, *batch)), **CLOSE)


def max_first(x):
    return x.max(axis=0)


@pytest.mark.parametrize("mode", ["weights", "stacked", "lean"])
def test_bfloat16_parameters_keep_their_dtype(mode):
    params, batch = make_params(jnp.bfloat16), make_batch()
    rule = aggregate.mean()
    _, update, _ = jax.jit(aggregate.value_and_grad(losses_fn, rule, mode=mode))(params, rule.init(params), *batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(update)} == {jnp.dtype(jnp.bfloat16)}
    expected = reference_gradient(jnp.full(3, 1 / 3), make_params(), *batch)
    # 8 bits in every intermediate of a few layers.
    for got, want in zip(jax.tree.leaves(update), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0.05 * max(np.abs(want).max(), 1))


def test_a_bare_array_and_a_single_loss():
    matrix = jnp.array([[1.0, 2.0]])
    for mode in ("stacked", "lean"):
        fn = aggregate.value_and_grad(lambda p: matrix @ p, aggregate.conflict_free(), mode=mode)
        for run in (fn, jax.jit(fn)):
            losses, update, _ = run(jnp.array([3.0, -1.0]), optax.EmptyState())
            np.testing.assert_allclose(losses, [1])
            np.testing.assert_allclose(update, [1, 2], rtol=1e-6)


def test_the_forward_pass_runs_once_but_in_lean_mode():
    """There it runs for each of K + 1 passes back and K forward, which is what keeps the memory flat."""
    calls = []

    def counted(params, x, y):
        jax.debug.callback(lambda: calls.append(1))
        return losses_fn(params, x, y)

    params, batch, rule = make_params(), make_batch(), aggregate.mean()
    for mode, runs in (("weights", 1), ("stacked", 1), ("lean", 3 + 1 + 3)):
        calls.clear()
        result = jax.jit(aggregate.value_and_grad(counted, rule, mode=mode))(params, rule.init(params), *batch)
        jax.block_until_ready(result)
        jax.effects_barrier()
        assert len(calls) == runs, mode


def test_lean_needs_the_memory_of_a_single_loss():
    """Three layers whose residuals and gradients both count: 16 tasks against the plain gradient of one."""
    count, size, batch = 16, 96, 64
    rng = np.random.default_rng(0)
    directions = jnp.asarray(rng.standard_normal((count, size)), jnp.float32)

    def tasks(kernels, x):
        for kernel in kernels:
            x = jnp.tanh(x @ kernel)
        return jnp.mean(x @ directions.T, axis=0)

    kernels = [jnp.eye(size) + 0.1 * i for i in range(3)]
    x = jnp.asarray(rng.standard_normal((batch, size)), jnp.float32)
    rule = aggregate.conflict_free()

    def compiled(fn):
        return jax.jit(fn).lower(kernels, rule.init(None), x).compile()

    programs = {mode: compiled(aggregate.value_and_grad(tasks, rule, mode=mode)) for mode in ("stacked", "lean")}
    programs["single"] = compiled(lambda p, state, x: jax.value_and_grad(lambda p: tasks(p, x)[0])(p))
    used = {name: program.memory_analysis().temp_size_in_bytes for name, program in programs.items()}
    assert used["stacked"] >= count * 4 * sum(k.size for k in kernels)
    # The aggregate's copy of one gradient is a temporary here, where the plain gradient is an output.
    assert used["lean"] <= 1.3 * used["single"] + 4 * sum(k.size for k in kernels)
    updates = {mode: programs[mode](kernels, rule.init(None), x)[1] for mode in ("stacked", "lean")}
    scale = max(np.abs(leaf).max() for leaf in updates["stacked"])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * scale), updates["lean"], updates["stacked"])


def ascended(value_and_grad_fn, rho=0.05):
    """Sharpness-aware minimization: value at the parameters, gradient one normalised step uphill."""

    def fn(params, *args):
        value, grads = value_and_grad_fn(params, *args)
        scale = rho / optax.tree.norm(grads)
        return value, value_and_grad_fn(jax.tree.map(lambda p, g: p + scale * g, params, grads), *args)[1]

    return fn


def accumulated(value_and_grad_fn, parts):
    """Mean of value and gradient over microbatches."""

    def fn(params, weights, *batch):
        split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
        results = jax.lax.map(lambda micro: value_and_grad_fn(params, weights, *micro), split)
        return jax.tree.map(lambda x: x.mean(axis=0), results)

    return fn


def test_a_wrapped_gradient_gives_one_aux_and_its_own_rows():
    params, batch, rule = make_params(), make_batch(), aggregate.conflict_free()
    gradient = ascended(aggregate.weighted_gradient(losses_and_aux, has_aux=True))
    row = jax.jit(gradient)
    rows = [row(params, unit, *batch)[1] for unit in jnp.eye(3)]
    expected, _ = rule.update(jax.tree.map(lambda *leaves: np.stack(leaves), *rows), rule.init(params))
    fn = aggregate.value_and_grad(losses_and_aux, rule, mode="stacked", has_aux=True, gradient=gradient)
    value, update, _ = jax.jit(fn)(params, rule.init(params), *batch)
    assert_trees_close(update, expected, **CLOSE)
    assert_trees_close(value, losses_and_aux(params, *batch), rtol=1e-5, atol=1e-6)


def test_a_value_that_depends_on_the_unit_vector_still_comes_back_once():
    """A gradient whose value is computed once for each task, as a wrapper may do."""
    inner = aggregate.weighted_gradient(losses_and_aux, has_aux=True)

    def gradient(params, weights, *batch):
        value, grads = inner(params, weights, *batch)
        return jax.tree.map(lambda x: x + 0 * weights.sum(), value), grads

    params, batch, rule = make_params(), make_batch(), aggregate.conflict_free()
    fn = aggregate.value_and_grad(losses_and_aux, rule, has_aux=True, gradient=gradient)
    value, _, _ = jax.jit(fn)(params, rule.init(params), *batch)
    assert_trees_close(value, losses_and_aux(params, *batch), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["weights", "stacked"])
def test_a_gradient_accumulated_over_microbatches(mode):
    """The losses are means over the batch, so that two halves average to the whole."""
    params, batch, rule = make_params(), make_batch(6), aggregate.mean()
    gradient = accumulated(aggregate.weighted_gradient(losses_fn), parts=2)
    fn = aggregate.value_and_grad(losses_fn, rule, mode=mode, gradient=gradient)
    losses, update, _ = jax.jit(fn)(params, rule.init(params), *batch)
    np.testing.assert_allclose(losses, losses_fn(params, *batch), rtol=1e-5)
    assert_trees_close(update, reference_gradient(jnp.full(3, 1 / 3), params, *batch), **CLOSE)


def test_modes_that_a_rule_does_not_have():
    with pytest.raises(ValueError, match=r"'lean' is not possible.*'weights', 'stacked'$"):
        aggregate.value_and_grad(losses_fn, weighting(1), mode="lean")
    with pytest.raises(ValueError, match=r"'weights' is not possible.*'stacked', 'lean'$"):
        aggregate.value_and_grad(losses_fn, aggregate.conflict_free(), mode="weights")
    chained = optax.chain(aggregate.mean(), optax.adam(1e-3))
    with pytest.raises(ValueError, match=r"its modes are 'stacked'$"):
        aggregate.value_and_grad(losses_fn, chained, mode="weights")
    with pytest.raises(ValueError, match="did you mean 'stacked'"):
        aggregate.value_and_grad(losses_fn, aggregate.mean(), mode="stack")
    with pytest.raises(ValueError, match="gradient must be None"):
        aggregate.value_and_grad(
            losses_fn, aggregate.mean(), mode="lean", gradient=aggregate.weighted_gradient(losses_fn)
        )


def test_a_chain_runs_stacked():
    params, batch = make_params(), make_batch()
    tx = optax.chain(aggregate.mean(), optax.scale(-2.0))
    _, update, _ = jax.jit(aggregate.value_and_grad(losses_fn, tx))(params, tx.init(params), *batch)
    expected = reference_gradient(jnp.full(3, -2 / 3), params, *batch)
    assert_trees_close(update, expected, **CLOSE)


@pytest.mark.parametrize("mode", ["stacked", "lean"])
def test_on_a_mesh_the_update_is_that_of_one_device(mode):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    rng = np.random.default_rng(4)
    kernel, x = rng.standard_normal((6, 3)).astype(np.float32), rng.standard_normal((8, 6)).astype(np.float32)
    place = [jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(axis)) for axis in ("model", "data")]
    rule = aggregate.conflict_free()
    fn = jax.jit(aggregate.value_and_grad(lambda p, x: jnp.mean((x @ p) ** 3, axis=0), rule, mode=mode))
    _, update, _ = fn(jax.device_put(kernel, place[0]), rule.init(None), jax.device_put(x, place[1]))
    # Loss k sees column k alone, and its gradient is the mean over the batch of 3 (x p_k)^2 x.
    rows = np.einsum("bk,bi,kj->kij", 3 * (x @ kernel) ** 2 / len(x), x, np.eye(3)).astype(np.float32)
    np.testing.assert_allclose(update, rule.update(rows, rule.init(None))[0], **CLOSE)


# --- value_and_grad_at ---


def test_balancing_at_z_with_plain_weights_is_the_plain_gradient():
    params, batch, weights = make_params(), make_batch(), jnp.array([0.5, 2.0, 1.0])
    rule = aggregate.static(weights)
    fn = aggregate.value_and_grad_at(trunk, heads, rule, head_weights="weights")
    (losses, z), grads, _ = jax.jit(fn)(params, rule.init(None), *batch)
    assert_trees_close(grads, reference_gradient(weights, params, *batch), **CLOSE)
    np.testing.assert_allclose(losses, losses_fn(params, *batch), rtol=1e-5)
    np.testing.assert_allclose(z, trunk(params, *batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head_weights", ["ones", "weights"])
def test_balancing_at_z_is_a_cotangent_for_the_trunk_plus_the_heads_own_gradients(head_weights):
    """Composed from Jacobians; `gain` is used by trunk and heads and gets both parts."""
    params, batch, rule = make_params(), make_batch(), aggregate.conflict_free()
    z = jax.jit(trunk)(params, *batch)
    z_rows = jax.jit(jax.jacrev(lambda z: heads(params, z, *batch)))(z)
    weights, _ = rule.gram_weights(aggregate.gram(z_rows), None, ())
    cotangent = jnp.tensordot(weights, z_rows, axes=1)
    h = jnp.ones(3) if head_weights == "ones" else weights
    # Two terms, each with the other's z held fixed.
    expected = jax.jit(jax.grad(lambda p: jnp.sum(cotangent * trunk(p, *batch)) + h @ heads(p, z, *batch)))(params)
    fn = aggregate.value_and_grad_at(trunk, heads, rule, head_weights=head_weights, report=True)
    _, grads, _, report = jax.jit(fn)(params, rule.init(z), *batch)
    assert_trees_close(grads, expected, **CLOSE)
    np.testing.assert_allclose(report.weights, weights, rtol=1e-4)
    np.testing.assert_allclose(report.gram, aggregate.gram(z_rows), rtol=1e-5)


def test_z_may_be_a_tree_and_the_trunk_may_return_aux():
    params, batch, rule = make_params(), make_batch(), aggregate.mean()

    def tree_trunk(params, x, y):
        z = trunk(params, x, y)
        return {"left": z[:, :2], "none": None, "right": z[:, 2:]}, x.sum()

    def tree_heads(params, z, x, y):
        return heads(params, jnp.concatenate([z["left"], z["right"]], axis=1), x, y)

    fn = aggregate.value_and_grad_at(tree_trunk, tree_heads, rule, head_weights="weights", has_aux=True)
    (_, z, aux), grads, _ = jax.jit(fn)(params, rule.init(None), *batch)
    assert z["none"] is None
    np.testing.assert_allclose(aux, batch[0].sum(), rtol=1e-6)
    assert_trees_close(grads, reference_gradient(jnp.full(3, 1 / 3), params, *batch), **CLOSE)


def test_the_shortest_convex_combination_at_z_lowers_both_losses():
    """Two gradients of z at an obtuse angle: (2, 0) and (-1, 1) are nearest to zero at 2/5 and 3/5, (1/5, 3/5)."""

    def shortest(gram, losses, state):
        first = (gram[1, 1] - gram[0, 1]) / (gram[0, 0] - 2 * gram[0, 1] + gram[1, 1])
        first = jnp.clip(first, 0, 1)
        return jnp.stack([first, 1 - first]), state

    rows = jnp.array([[2.0, 0.0], [-1.0, 1.0]])
    kernel, x = jnp.array([[1.0, 2.0, 0.5], [0.0, 1.0, -1.0]]), jnp.array([1.0, -1.0, 3.0])
    rule = aggregate.from_gram(shortest)
    fn = aggregate.value_and_grad_at(lambda p, x: p @ x, lambda p, z, x: rows @ z, rule, report=True)
    (losses, _), grads, _, report = jax.jit(fn)(kernel, rule.init(None), x)
    np.testing.assert_allclose(report.weights, [2 / 5, 3 / 5], rtol=1e-6)
    np.testing.assert_allclose(grads, np.outer([1 / 5, 3 / 5], x), rtol=1e-5)
    (after, _), *_ = jax.jit(fn)(kernel - 0.01 * grads, rule.init(None), x)
    assert (after < losses).all()


def test_the_trunk_is_back_propagated_once_and_the_heads_once_per_loss():
    counts = {"trunk": 0, "heads": 0}

    def watched(name):
        """The identity, counting how often a cotangent passes."""

        @jax.custom_vjp
        def identity(x):
            return x

        def backward(_, cotangent):
            jax.debug.callback(lambda _: counts.update({name: counts[name] + 1}), cotangent.ravel()[0])
            return (cotangent,)

        identity.defvjp(lambda x: (x, None), backward)
        return identity

    at_trunk, at_heads = watched("trunk"), watched("heads")

    def watched_heads(params, z, x, y):
        return heads(params, at_heads(z), x, y)

    rule, params, batch = aggregate.conflict_free(), make_params(), make_batch()
    fn = aggregate.value_and_grad_at(lambda p, x, y: at_trunk(trunk(p, x, y)), watched_heads, rule)
    jax.block_until_ready(jax.jit(fn)(params, rule.init(None), *batch))
    jax.effects_barrier()
    # The heads see each of the 3 unit cotangents, and the one that trains the heads themselves.
    assert counts == {"trunk": 1, "heads": 4}


def test_bad_head_weights():
    with pytest.raises(ValueError, match="did you mean 'ones'"):
        aggregate.value_and_grad_at(trunk, heads, aggregate.mean(), head_weights="one")
    with pytest.raises(ValueError, match="gram_weights"):
        aggregate.value_and_grad_at(trunk, heads, aggregate.loss_balancer([1.0]), head_weights="weights")
    fn = aggregate.value_and_grad_at(lambda p: p, lambda p, z: z @ z, aggregate.mean())
    with pytest.raises(ValueError, match=r"shape \[K\]"):
        fn(jnp.ones(3), optax.EmptyState())
