"""What retrains after pruning, and low-rank updates that keep the holes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import sparsity
from tests.models.helpers import normal

retrain = sparsity.retrain

W = jnp.where(normal(6, 4) > 0, normal(6, 4, seed=2), 0)
A, B = normal(6, 2, seed=3), normal(2, 4, seed=4)
X = normal(3, 6, seed=5)
PARAMS = {
    "embed": {"embedding": W},
    "block_0": {
        "attention_norm": {"scale": jnp.ones(4)},
        "mlp": {"up": {"kernel": W, "bias": jnp.ones(4)}, "packed": None},
    },
    "rms": {"scale": jnp.ones(4)},
    "logits": {"kernel": W},
}
LABELS = {
    "embed": {"embedding": "freeze"},
    "block_0": {
        "attention_norm": {"scale": "train"},
        "mlp": {"up": {"kernel": "freeze", "bias": "train"}, "packed": None},
    },
    "rms": {"scale": "train"},
    "logits": {"kernel": "train"},
}


def numpy_masked(weight, a, b, scale, mask):
    merged = np.zeros(np.shape(weight))
    for i, j in np.ndindex(*merged.shape):
        if mask[i, j]:
            merged[i, j] = float(weight[i, j]) + scale * sum(float(a[i, r]) * float(b[r, j]) for r in range(a.shape[1]))
    return merged


def test_labels_by_name():
    assert retrain.trainable(PARAMS) == LABELS
    only_bias = retrain.trainable(PARAMS, ("bias",))
    assert [path for path, label in jax.tree.leaves_with_path(only_bias) if label == "train"] == [
        path for path, _ in jax.tree.leaves_with_path(PARAMS) if "bias" in jax.tree_util.keystr(path)
    ]
    assert retrain.trainable(PARAMS, ("embed/.*",))["embed"] == {"embedding": "train"}
    assert retrain.trainable({}) == {}


def test_a_model_without_norms_has_none():
    params = {"dense_0": {"kernel": W, "bias": jnp.ones(4)}}
    assert retrain.trainable(params) == {"dense_0": {"kernel": "freeze", "bias": "train"}}


def test_moments_exist_for_what_trains_alone():
    labels = retrain.trainable(PARAMS)
    tx = optax.partition({"train": optax.adam(0.1), "freeze": optax.set_to_zero()}, labels)
    state = tx.init(PARAMS)
    trained = sum(
        leaf.size for leaf, label in zip(*map(jax.tree.leaves, (PARAMS, labels)), strict=True) if label == "train"
    )
    assert sum(leaf.size for leaf in jax.tree.leaves(optax.tree.get(state, "mu"))) == trained
    updates, _ = jax.jit(tx.update)(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS)
    moved = jax.tree.map(lambda u: "train" if np.any(u) else "freeze", updates)
    assert moved == labels


@pytest.mark.parametrize("given", ["found", "given"])
def test_masked_equals_the_loops_and_fills_no_hole(given):
    mask = W != 0 if given == "found" else (W != 0) | (normal(6, 4, seed=6) > 1)
    merged = retrain.masked_lora_weight(W, A, B, scale=0.5, mask=None if given == "found" else mask)
    # A product of two terms of order 1, added to a third.
    np.testing.assert_allclose(merged, numpy_masked(W, A, B, 0.5, mask), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(merged == 0, ~mask)


def test_at_the_start_both_give_the_weight():
    np.testing.assert_array_equal(retrain.masked_lora_weight(W, A, jnp.zeros_like(B), scale=2.0), W)
    # a b = 1 up to the rounding of 1 / sqrt(3) three times over.
    ones = jnp.full((6, 3), 3**-0.5), jnp.full((3, 4), 3**-0.5)
    scaled = retrain.scaled_lora_weight(W, *ones)
    np.testing.assert_allclose(scaled, W, rtol=1e-6)
    np.testing.assert_array_equal(scaled == 0, W == 0)


def test_scaled_with_rank_one_rescales_inputs_and_outputs():
    a, b = normal(6, 1), normal(1, 4)
    through = (X * a[:, 0]) @ W * b[0]
    np.testing.assert_allclose(X @ retrain.scaled_lora_weight(W, a, b), through, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_the_merged_weight_under_the_mask():
    """With G = dL/dW of the merged weight: dL/da = scale (G * mask) b', dL/db = scale a' (G * mask)."""
    pull = normal(6, 4, seed=7)
    grads = jax.grad(lambda a, b: jnp.vdot(pull, retrain.masked_lora_weight(W, a, b, scale=0.5)), (0, 1))(A, B)
    masked = np.asarray(pull, np.float64) * (W != 0)
    np.testing.assert_allclose(grads[0], 0.5 * masked @ np.asarray(B).T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(grads[1], 0.5 * np.asarray(A).T @ masked, rtol=1e-5, atol=1e-6)


def test_stacks_of_weights():
    stack = [jnp.stack([x, 2 * x]) for x in (W, A, B)]
    merged = retrain.masked_lora_weight(*stack)
    np.testing.assert_allclose(merged[1], numpy_masked(2 * W, 2 * A, 2 * B, 1.0, W != 0), rtol=1e-6, atol=1e-5)
    assert retrain.scaled_lora_weight(*stack).shape == (2, 6, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: retrain.trainable(PARAMS, "bias"), r"select='bias' must be a sequence"),
        (
            lambda: retrain.trainable(PARAMS, ("nrom",)),
            "select='nrom' is not one of .*did you mean 'norm'",
        ),
        (lambda: retrain.trainable(PARAMS, ("logit/.*",)), "select='logit/.\\*' matches none.*logits/kernel"),
        (lambda: retrain.trainable({"w": W}), "selects none of the 1 parameters"),
        (lambda: retrain.masked_lora_weight(W, A, B.T), r"\(6, 2\) times b of shape \(4, 2\).*\(6, 4\) of weight"),
        (lambda: retrain.scaled_lora_weight(W.T, A, B), r"\(6, 2\) times b of shape \(2, 4\).*\(4, 6\) of weight"),
        (lambda: retrain.masked_lora_weight(W, A, B, mask=W.T != 0), r"mask has shape \(4, 6\).*\(6, 4\)"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
