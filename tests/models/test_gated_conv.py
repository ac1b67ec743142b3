"""A gated convolution is its convolution times a gate, and its two gradients go where they should."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import models
from steelyard.sparsity import gating
from tests.models.helpers import apply, compiled, init, normal

X = normal(4, 5, 6, 3)
LAYER = models.GatedConv(8, mass=0.6, strides=(2, 1))
VARIABLES = init(LAYER, X)


def sown(collected):
    return {name: collected["intermediates"][name][0] for name in ("logits", "target", "gate")}


def test_output_is_the_convolution_times_the_gate():
    y, collected = apply(LAYER, VARIABLES, X, mutable=["intermediates"])
    params, seen = VARIABLES["params"], sown(collected)
    h = np.maximum(apply(models.Conv(8, strides=(2, 1)), {"params": params["conv"]}, X), 0)
    logits = np.mean(np.asarray(X, np.float64), (1, 2)) @ params["predictor"]["kernel"] + params["predictor"]["bias"]
    # A mean of 30 and a dot product of 3 numbers of order 1.
    np.testing.assert_allclose(seen["logits"], logits, rtol=1e-5, atol=1e-5)
    gate = logits > 0
    assert gate.any()
    assert not gate.all()
    np.testing.assert_array_equal(seen["gate"], gate)
    # Both sides may be compiled differently: sums of 27 products.
    np.testing.assert_allclose(y, h * gate[:, None, None, :], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(seen["target"], compiled(gating.mass_mask)(np.max(h, (1, 2)), 0.6))


def test_parameters_have_plain_names():
    layer = models.GatedConv(8, ratio=0.5, norm=functools.partial(nn.BatchNorm, use_running_average=True))
    params = init(layer, X)["params"]
    assert jax.tree.map(jnp.shape, params) == {
        "conv": {"kernel": (3, 3, 3, 8)},
        "norm": {"bias": (8,), "scale": (8,)},
        "predictor": {"bias": (8,), "kernel": (3, 8)},
    }


def test_target_by_ratio_and_softmax_of_the_pooled_input():
    layer = models.GatedConv(8, ratio=0.5, strides=(2, 1), softmax=True)
    _, collected = apply(layer, VARIABLES, X, mutable=["intermediates"])
    seen, predictor = sown(collected), VARIABLES["params"]["predictor"]
    assert np.all(np.sum(seen["target"], -1) <= 4)
    pooled = np.exp(np.mean(np.asarray(X, np.float64), (1, 2)))
    logits = pooled / pooled.sum(-1, keepdims=True) @ predictor["kernel"] + predictor["bias"]
    np.testing.assert_allclose(seen["logits"], logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decoupled", [True, False])
def test_the_predictor_reaches_the_layers_before_only_if_coupled(decoupled):
    layer = LAYER.clone(decoupled=decoupled)

    def loss(params, x):
        _, collected = layer.apply({"params": params}, x, mutable=["intermediates"])
        seen = sown(collected)
        return gating.predictor_loss(seen["logits"], seen["target"])

    grads, grad_x = compiled(jax.grad(loss, (0, 1)))(VARIABLES["params"], X)
    assert not np.any(grads["conv"]["kernel"])  # the target is never differentiated
    assert np.any(grads["predictor"]["kernel"])
    assert np.any(grad_x) != decoupled


def test_the_gate_is_differentiated_as_the_sigmoid():
    """d sum(y) / d bias_c = sum over examples of p (1 - p) times the sum of h over pixels, also where the gate is 0."""

    def total(bias):
        params = {**VARIABLES["params"], "predictor": {**VARIABLES["params"]["predictor"], "bias": bias}}
        y, collected = LAYER.apply({"params": params}, X, mutable=["intermediates"])
        return jnp.sum(y), sown(collected)["logits"]

    grad, logits = compiled(jax.grad(total, has_aux=True))(VARIABLES["params"]["predictor"]["bias"])
    h = apply(models.Conv(8, strides=(2, 1)), {"params": VARIABLES["params"]["conv"]}, X)
    p = 1 / (1 + np.exp(-np.asarray(logits, np.float64)))
    expected = np.sum(p * (1 - p) * np.sum(np.maximum(h, 0), (1, 2)), 0)
    # Sums of 4 * 18 products of sums of 27, in float32.
    np.testing.assert_allclose(grad, expected, rtol=1e-4)


def test_half_precision_is_kept_and_the_predictor_stays_wide():
    layer = LAYER.clone(dtype=jnp.bfloat16)
    shapes = jax.eval_shape(functools.partial(layer.apply, mutable=["intermediates"]), VARIABLES, X)
    assert shapes[0].dtype == jnp.bfloat16
    assert sown(shapes[1])["logits"].dtype == jnp.float32


def test_intermediates_cost_nothing_unless_asked_for():
    assert set(VARIABLES) == {"params"}
    text = jax.jit(LAYER.apply).lower(VARIABLES, X).compile().as_text()
    assert "sort" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs mass or ratio, and not both: mass=None, ratio=None"),
        ({"mass": 0.5, "ratio": 0.5}, "mass=0.5, ratio=0.5"),
        ({"mass": 1.5}, r"mass=1.5 must lie in \(-inf, 1\]"),
        ({"ratio": 2.0}, r"ratio=2.0 must lie in \[0, 1\]"),
        ({"mass": 0.5, "min_kept": 0.5}, r"min_kept=0.5 must be a whole number in \[0, inf\)"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        models.GatedConv(8, **options)
    with pytest.raises(ValueError, match="features must be at least 1, got 0"):
        models.GatedConv(0, mass=0.5)
