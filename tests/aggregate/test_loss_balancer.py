"""The loss balancer against a NumPy float64 transcription of its definition, and inside the model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import aggregate

# Sums of fewer than 100 float32 products.
TOLERANCE = 100 * 2.0**-24


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
        out, state = jax.jit(rule.update)(stacked, state)
        assert out["none"] is None
        np.testing.assert_allclose(flatten(out), expected, atol=TOLERANCE)
    np.testing.assert_allclose(state.fix, decays.sum(), rtol=1e-6)


def test_the_first_step_gives_each_loss_its_fraction():
    """With one example and orthogonal gradients the parts can be read off: their norms are weights / sum(weights)."""
    stacked = jnp.diag(jnp.array([1e-3, 1.0, 1e4]))[:, None, :]
    rule = aggregate.loss_balancer([1.0, 2.0, 5.0])
    out, _ = rule.update(stacked, rule.init(None))
    np.testing.assert_allclose(out[0], [1 / 8, 2 / 8, 5 / 8], rtol=1e-6)


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
    ("options", "word"),
    [
        ({"weights": [1.0, 0.0]}, "weights"),
        ({"weights": [1.0, -1.0]}, "weights"),
        ({"weights": []}, "weights"),
        ({"weights": 1.0}, "weights"),
        ({"weights": [1.0], "ema_decay": 1.5}, "ema_decay"),
        ({"weights": [1.0], "total_norm": 0.0}, "total_norm"),
        ({"weights": [1.0], "eps": 0.0}, "eps"),
    ],
)
def test_bad_arguments(options, word):
    with pytest.raises(ValueError, match=word):
        aggregate.loss_balancer(**options)


def test_bad_shapes():
    rule = aggregate.loss_balancer([1.0, 1.0])
    with pytest.raises(ValueError, match="2 weights, but there are 3"):
        rule.update(rows(), rule.init(None))
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 5\)"):
        rule.update((jnp.ones((2, 4)), jnp.ones((2, 5))), rule.init(None))
    with pytest.raises(ValueError, match="batch"):
        rule.update(jnp.ones(2), rule.init(None))


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
