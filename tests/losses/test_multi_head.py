"""Heads with temperatures of their own: by loops in float64, and against the contrast of one head."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import losses

H, N, D = 2, 4, 3


def heads(seed=0, h=H):
    rng = np.random.default_rng(seed)
    return tuple(losses.normalize(jnp.asarray(rng.standard_normal((h, N, D)), jnp.float32)) for _ in range(2))


def temperatures(seed=1, h=H):
    return jnp.asarray(np.random.default_rng(seed).uniform(0.1, 1, (h, N, N)), jnp.float32)


def transcribed(a, b, t, regularizer, where):
    a, b, t = (np.asarray(x, np.float64) for x in (a, b, t))
    rows = [i for i in range(a.shape[1]) if where[i]]
    result = np.zeros(a.shape[1])
    for i in rows:
        for h in range(len(a)):
            scores = {j: a[h, i] @ b[h, j] / t[h, i, j] for j in rows}
            costs = [a.shape[2] / 2 * math.log(t[h, i, j]) + 1 / t[h, i, j] for j in rows]
            result[i] += math.log(sum(map(math.exp, scores.values()))) - scores[i]
            result[i] += regularizer * sum(costs) / len(costs)
    return result


multi_head_contrastive = jax.jit(losses.multi_head_contrastive)


@pytest.mark.parametrize("where", [[True] * N, [True, False, True, True], [False, True, False, False]])
def test_losses_follow_the_definition(where):
    got = multi_head_contrastive(*heads(), temperatures(), regularizer=0.3, where=np.array(where))
    expected = transcribed(*heads(), temperatures(), 0.3, where)
    # Scores of up to 10, and costs up to 0.3 * 10, lose their last bits.
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=10 * 2.0**-21)


def test_temperatures_follow_the_definition_and_keep_their_bounds():
    a, b = (3 * x for x in heads())
    got = losses.adaptive_temperatures(a, b, lower=0.1, upper=0.6)
    products = np.einsum("hid,hjd->hij", np.asarray(a, np.float64), np.asarray(b, np.float64))
    np.testing.assert_allclose(got, 0.1 + 0.5 / (1 + np.exp(-products)), rtol=1e-6)
    extreme = losses.adaptive_temperatures(1e3 * a, b, lower=0.1, upper=0.6)
    np.testing.assert_allclose([extreme.min(), extreme.max()], [0.1, 0.6], rtol=1e-6)


def test_without_features_temperatures_lie_in_the_middle():
    _, b = heads()
    np.testing.assert_allclose(losses.adaptive_temperatures(jnp.zeros_like(b), b), (0.05 + 1) / 2, rtol=1e-6)


def test_one_head_of_constant_temperature_is_info_nce_and_a_constant():
    (a, b), t = heads(h=1), 0.2
    got = multi_head_contrastive(a, b, jnp.full((1, N, N), t), regularizer=0.1)
    constant = 0.1 * (D / 2 * math.log(t) + 1 / t)
    np.testing.assert_allclose(got, jax.jit(losses.info_nce)(a[0], b[0], temperature=t) + constant, rtol=1e-5)


def test_the_cost_of_temperatures_is_least_at_two_by_the_dimension():
    """Orthogonal views have no contrast that depends on t: what remains of the gradient is that of the cost."""
    a, b = jnp.ones((H, N, 1)) * jnp.eye(4)[0], jnp.ones((H, N, 1)) * jnp.eye(4)[1]
    slope = jax.jit(jax.grad(lambda t: losses.multi_head_contrastive(a, b, jnp.full((H, N, N), t)).sum()))
    best = 2 / 4
    # The two terms that cancel are each d / 2t = 4, for 8 rows and heads, of weight 0.1.
    np.testing.assert_allclose(slope(best), 0, atol=0.1 * 8 * 4 * 2.0**-20)
    assert slope(0.9 * best) < 0 < slope(1.1 * best)


def test_gradients_flow_into_the_features_of_the_temperatures():
    a, b = heads()
    features = heads(seed=2)

    def total(features):
        return losses.multi_head_contrastive(a, b, losses.adaptive_temperatures(*features)).sum()

    gradients = jax.jit(jax.grad(total))(features)
    for gradient in gradients:
        assert np.all(np.abs(gradient).max(-1) > 1e-3)


def test_half_precision_is_widened_first():
    half = [x.astype(jnp.bfloat16) for x in (*heads(), temperatures())]
    got = multi_head_contrastive(*half, regularizer=0.3, where=np.ones(N, bool))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, transcribed(*half, 0.3, [True] * N), rtol=1e-5, atol=10 * 2.0**-21)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda a, b, t: losses.adaptive_temperatures(a, b, lower=0), r"lower=0 must lie in \(0, inf\)"),
        (lambda a, b, t: losses.adaptive_temperatures(a, b, upper=0.05), r"upper=0.05 must lie in \(0.05, inf\)"),
        (lambda a, b, t: losses.adaptive_temperatures(a, b[:1]), r"a has shape \(2, 4, 3\) and b \(1, 4, 3\)"),
        (lambda a, b, t: losses.adaptive_temperatures(a[0], b[0]), r"\(4, 3\).*\[heads, batch, d\]"),
        (
            lambda a, b, t: losses.multi_head_contrastive(a, b, t, regularizer=-1),
            r"regularizer=-1 must lie in \[0, inf\)",
        ),
        (lambda a, b, t: losses.multi_head_contrastive(a, b, t - 1), r"temperatures=-0.*must lie in \(0, inf\)"),
        (lambda a, b, t: losses.multi_head_contrastive(a, b, t[:, :3]), r"\(2, 3, 4\).*\(2, 4, 4\)"),
        (lambda a, b, t: losses.multi_head_contrastive(a, b[:, :3], t), r"\(2, 4, 3\) and heads_b \(2, 3, 3\)"),
        (lambda a, b, t: losses.multi_head_contrastive(a[0], b[0], t), r"\(4, 3\).*\[heads, batch, d\]"),
        (
            lambda a, b, t: losses.multi_head_contrastive(a, b, t, where=jnp.ones(3, bool)),
            r"where has shape \(3,\)",
        ),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call(*heads(), temperatures())
