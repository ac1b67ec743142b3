"""The loss balancer against a NumPy float64 transcription of its definition, and inside the model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import aggregate

P = jax.sharding.PartitionSpec
# Sums of fewer than 100 float32 products.
TOLERANCE = 100 * 2.0**-24


@functools.cache
def jitted(rule):
    return jax.jit(rule.update)


def rows(seed=0, scale=(1.0, 100.0, 0.01)):
    rng = np.random.default_rng(seed)
    scale = np.asarray(scale, np.float32)
    audio = rng.standard_normal((len(scale), 4, 5, 2)).astype(np.float32) * scale[:, None, None, None]
    code = rng.standard_normal((len(scale), 4, 3)).astype(np.float32) * scale[:, None, None]
    return {"audio": jnp.asarray(audio), "none": None, "code": jnp.asarray(code)}


def norms(stacked, per_example):
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(stacked)]
    flat = np.concatenate([leaf.reshape(*leaf.shape[:2], -1) for leaf in leaves], axis=2)
    if per_example:
        return np.linalg.norm(flat, axis=2).mean(axis=1)
    return np.linalg.norm(flat.reshape(len(flat), -1), axis=1)


def flatten(tree):
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(tree)])


def weighted(scales, stacked):
    return sum(s * flatten(jax.tree.map(lambda leaf, k=k: leaf[k], stacked)) for k, s in enumerate(scales))


@pytest.mark.parametrize("per_example", [True, False])
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999, 1.0])
def test_three_steps_follow_the_definition(decay, per_example):
    weights = np.array([1.0, 3.0, 0.5])
    rule = aggregate.loss_balancer(weights, ema_decay=decay, per_example=per_example, total_norm=2.0)
    state = rule.init(None)
    history = []
    for step in range(3):
        stacked = rows(seed=step)
        history.append(norms(stacked, per_example))
        age = np.arange(step, -1, -1)
        decays = decay ** age.astype(float)  # 0 ** 0 is 1: without memory only the last step counts
        mean = (decays[:, None] * history).sum(0) / decays.sum()
        expected = weighted(weights / weights.sum() * 2.0 / mean, stacked)
        out, state = jitted(rule)(stacked, state)
        assert out["none"] is None
        np.testing.assert_allclose(flatten(out), expected, atol=TOLERANCE)
    np.testing.assert_allclose(state.fix, decays.sum(), rtol=1e-6)


def test_the_first_step_gives_each_loss_its_fraction():
    """With one example and orthogonal gradients the parts can be read off: their norms are weights / sum(weights)."""
    stacked = jnp.diag(jnp.array([1e-3, 1.0, 1e4]))[:, None, :]
    rule = aggregate.loss_balancer([1.0, 2.0, 5.0])
    out, _ = rule.update(stacked, rule.init(None))
    np.testing.assert_allclose(out[0], [1 / 8, 2 / 8, 5 / 8], rtol=1e-6)


def test_the_first_step_gives_each_part_its_norm_whatever_the_batch():
    """Without `per_example` the parts `scale_k zbar_k` have norms weights / sum(weights) total_norm exactly."""
    stacked = rows()
    rule = aggregate.loss_balancer([1.0, 2.0, 5.0], per_example=False, total_norm=4.0)
    for k, fraction in enumerate([1 / 8, 2 / 8, 5 / 8]):
        alone = jax.tree.map(lambda leaf, k=k: leaf.at[jnp.arange(3) != k].set(0), stacked)
        out, _ = jitted(rule)(alone, rule.init(None))
        np.testing.assert_allclose(np.linalg.norm(flatten(out)), 4 * fraction, rtol=TOLERANCE)


def test_one_loss_gives_the_total_norm():
    rule = aggregate.loss_balancer([3.0], per_example=False, total_norm=0.5)
    out, _ = rule.update(rows(scale=[100.0]), rule.init(None))
    np.testing.assert_allclose(np.linalg.norm(flatten(out)), 0.5, rtol=TOLERANCE)


@pytest.mark.parametrize("per_example", [True, False])
def test_opposite_losses_of_any_scale_cancel_at_the_first_step(per_example):
    g = rows(scale=[1.0])["audio"]
    stacked = jnp.concatenate([g, -100 * g])
    rule = aggregate.loss_balancer([1.0, 1.0], per_example=per_example)
    out, _ = rule.update(stacked, rule.init(None))
    np.testing.assert_allclose(out, 0, atol=TOLERANCE)
    plain = aggregate.loss_balancer([1.0, 1.0], per_example=per_example, rescale=False)
    np.testing.assert_allclose(plain.update(stacked, plain.init(None))[0], -99 * g[0], rtol=1e-5)


def test_a_loss_that_was_a_thousand_times_larger_from_the_start_gives_the_same():
    rule = aggregate.loss_balancer([1.0, 2.0, 5.0])
    states = [rule.init(None)] * 2
    for step in range(3):
        scales = (1.0, 1.0, 1.0), (1.0, 1000.0, 1.0)
        outs, states = zip(
            *[jitted(rule)(rows(step, scale), state) for scale, state in zip(scales, states, strict=True)], strict=True
        )
        np.testing.assert_allclose(flatten(outs[0]), flatten(outs[1]), atol=TOLERANCE)


def test_without_memory_the_scale_of_a_loss_does_not_matter():
    rule = aggregate.loss_balancer([1.0, 1.0, 1.0], ema_decay=0.0)
    first, _ = rule.update(rows(scale=(1, 1, 1)), rule.init(None))
    second, _ = rule.update(rows(scale=(1e-3, 1, 1e3)), rule.init(None))
    np.testing.assert_allclose(flatten(first), flatten(second), atol=TOLERANCE)


def test_without_rescaling_the_weights_are_the_scales():
    rule = aggregate.loss_balancer([1.0, 2.0, 3.0], rescale=False)
    stacked = rows()
    out, state = rule.update(stacked, rule.init(None))
    np.testing.assert_allclose(flatten(out), weighted([1, 2, 3], stacked), rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(state.total, norms(stacked, True), rtol=1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.999, 1.0])
def test_a_zero_gradient_at_the_first_step_is_finite(decay):
    stacked = jax.tree.map(lambda leaf: leaf.at[1].set(0), rows())
    rule = aggregate.loss_balancer([1.0, 1.0, 2.0], ema_decay=decay)
    out, _ = rule.update(stacked, rule.init(None))
    n = norms(stacked, True)
    np.testing.assert_allclose(flatten(out), weighted([0.25 / n[0], 0, 0.5 / n[2]], stacked), atol=TOLERANCE)
    zero, _ = rule.update(jax.tree.map(jnp.zeros_like, stacked), rule.init(None))
    np.testing.assert_array_equal(flatten(zero), 0)


def test_half_precision_keeps_its_dtype_and_a_float32_state():
    stacked = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), rows())
    rule = aggregate.loss_balancer([1.0, 1.0, 1.0])
    out, state = rule.update(stacked, rule.init(None))
    assert out["audio"].dtype == jnp.bfloat16
    assert state.total.dtype == jnp.float32
    np.testing.assert_allclose(state.total, norms(stacked, True), rtol=1e-6)


def test_the_state_keeps_its_types_in_float64():
    with jax.enable_x64(True):
        stacked = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), rows())
        rule = aggregate.loss_balancer([1.0, 1.0, 1.0])
        before = rule.init(None)
        out, after = jax.jit(rule.update)(stacked, before)
        assert [x.dtype for x in before] == [x.dtype for x in after]
        assert out["audio"].dtype == jnp.float64


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"weights": [1.0, 0.0]}, "weights"),
        ({"weights": [1.0, -1.0]}, "weights"),
        ({"weights": []}, "weights"),
        ({"weights": 1.0}, "weights"),
        ({"weights": [1.0, np.nan]}, "weights"),
        ({"weights": [1.0], "ema_decay": 1.5}, r"ema_decay=1.5 must lie in \[0, 1\]"),
        ({"weights": [1.0], "total_norm": 0.0}, r"total_norm=0.0 must lie in \(0, inf\)"),
        ({"weights": [1.0], "eps": 0.0}, r"eps=0.0 must lie in \(0, inf\)"),
    ],
)
def test_bad_arguments(options, text):
    with pytest.raises(ValueError, match=text):
        aggregate.loss_balancer(**options)


def test_bad_shapes():
    rule = aggregate.loss_balancer([1.0, 1.0])
    with pytest.raises(ValueError, match="2 weights, but there are 3"):
        rule.update(rows(), rule.init(None))
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 5\)"):
        rule.update((jnp.ones((2, 4)), jnp.ones((2, 5))), rule.init(None))
    with pytest.raises(ValueError, match="batch"):
        rule.update(jnp.ones(2), rule.init(None))


def split(rule, specs, mesh):
    """One update inside shard_map, where the leaves are split as in `specs` (of z, without the axis K)."""
    stacked_specs = jax.tree.map(lambda spec: P(None, *spec), specs, is_leaf=lambda x: isinstance(x, P))

    def local(stacked):
        return rule.update(stacked, rule.init(None), axis_name="x")

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(stacked_specs,), out_specs=(specs, P())))


@pytest.mark.parametrize(
    ("per_example", "specs"),
    [
        (True, {"audio": P("x"), "none": None, "code": P("x")}),
        (False, {"audio": P("x"), "none": None, "code": P("x")}),
        (False, {"audio": P(None, None, "x"), "none": None, "code": P("x")}),
    ],
)
def test_inside_shard_map_norms_are_those_of_all_devices(per_example, specs, mesh):
    stacked = rows()
    rule = aggregate.loss_balancer([1.0, 2.0, 5.0], per_example=per_example)
    expected, state = rule.update(stacked, rule.init(None))
    out, split_state = split(rule, specs, mesh)(stacked)
    np.testing.assert_allclose(flatten(out), flatten(expected), atol=TOLERANCE)
    np.testing.assert_allclose(split_state.total, state.total, rtol=TOLERANCE)


@pytest.mark.parametrize("per_example", [True, False])
def test_with_mesh_and_specs_norms_are_those_of_all_devices(per_example, mesh):
    stacked, specs = rows(), {"audio": P(None, "x"), "none": None, "code": P(None, "x")}
    placed = {
        name: leaf if leaf is None else jax.device_put(leaf, jax.sharding.NamedSharding(mesh, specs[name]))
        for name, leaf in stacked.items()
    }
    rule = aggregate.loss_balancer([1.0, 2.0, 5.0], per_example=per_example)
    expected, _ = rule.update(stacked, rule.init(None))
    out, _ = jax.jit(lambda x: rule.update(x, rule.init(None), mesh=mesh, specs=specs))(placed)
    np.testing.assert_allclose(flatten(out), flatten(expected), atol=TOLERANCE)


def test_flat_parts_of_rows_are_no_examples(mesh):
    with pytest.raises(ValueError, match="per_example with axis_name='x' needs leaves"):
        split(aggregate.loss_balancer([1.0, 2.0, 5.0]), P("x"), mesh)(jnp.ones((3, 8)))


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))


def test_balancing_at_the_output_of_a_model():
    """z = p x, L_1 = 1000 mean(z), L_2 = mean(z^2): the balanced cotangent, by hand, pulled back through z = p x."""
    x = jnp.array([[1.0], [2.0], [-3.0]])
    p = jnp.array(0.5)
    rule = aggregate.loss_balancer([1.0, 3.0])

    def heads(p, z, x):
        del p, x
        return jnp.stack([1000 * z.mean(), jnp.mean(z**2)])

    fn = aggregate.value_and_grad_at(lambda p, x: p * x, heads, rule)
    (losses, z), grads, state = fn(p, rule.init(None), x)
    np.testing.assert_allclose(jax.jit(fn)(p, rule.init(None), x)[1], grads, rtol=1e-6)
    z_rows = np.stack([np.full((3, 1), 1000 / 3), 2 * np.asarray(z) / 3])
    mean_norms = np.abs(z_rows[..., 0]).mean(1)
    cotangent = 0.25 * z_rows[0] / mean_norms[0] + 0.75 * z_rows[1] / mean_norms[1]
    np.testing.assert_allclose(grads, (cotangent * np.asarray(x)).sum(), rtol=1e-5)
    np.testing.assert_allclose(losses, [1000 * z.mean(), (z**2).mean()], rtol=1e-6)
    np.testing.assert_allclose(state.total, mean_norms, rtol=1e-6)


def test_chains_with_an_optimizer():
    tx = optax.chain(aggregate.loss_balancer([1.0, 1.0, 1.0]), optax.sgd(1.0))
    stacked = rows()
    z = jax.tree.map(lambda leaf: leaf[0], stacked)
    updates, _ = tx.update(stacked, tx.init(z), z, losses=jnp.ones(3))
    np.testing.assert_allclose(flatten(updates), -weighted(1 / 3 / norms(stacked, True), stacked), atol=TOLERANCE)
