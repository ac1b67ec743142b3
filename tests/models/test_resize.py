"""A pruned model comes out as a smaller one that computes what the masked one does, and goes on training."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import models
from steelyard.sparsity import channels, masks
from tests.models.helpers import apply, compiled, init, normal

TOKENS = np.random.default_rng(2).integers(0, 11, (2, 5))
CASES = {
    # Half of the activations are not 0 at 0: what a channel gives is masked where it is read.
    "mlp": (models.MLP((7, 5, 3), nn.sigmoid), normal(4, 6)),
    "resnet": (models.ResNet(3, num_blocks=1, width=4), normal(2, 8, 8, 1)),
    "vit": (models.ViT(3, width=8, depth=1, heads=2, mlp_width=6, stem=(3, 4)), normal(2, 4, 4, 1)),
    "transformer": (models.Transformer(11, width=8, depth=2, heads=2, mlp_width=6), TOKENS),
}
SMALLER = {
    "mlp": models.MLP((1, 2, 3), nn.sigmoid),
    "resnet": models.ResNet(3, num_blocks=1, width=(1, 4, 6), inner_width=(2, 3, 5)),
    "vit": models.ViT(3, width=8, depth=1, heads=1, head_dim=4, mlp_width=4, stem=(1, 2)),
    "transformer": models.Transformer(11, width=8, depth=2, heads=1, head_dim=4, mlp_width=(2, 4)),
}


@functools.cache
def found(name):
    model, inputs = CASES[name]
    # Of NumPy arrays, because cutting others compiles a program for each shape.
    variables = jax.tree.map(np.asarray, init(model, inputs))
    return variables, channels.infer(model.apply, variables, inputs)


def kept_of(groups):
    """Of group i some i + 1 channels, and one less than all at most."""
    rng = np.random.default_rng(3)
    counts = [min(i + 1, group.size - 1) for i, group in enumerate(groups)]
    return {g: np.sort(rng.permutation(g.size)[:count]) for g, count in zip(groups, counts, strict=True)}


def masked(tree, keep, under=""):
    return masks.apply(tree, channels.mask_tree(tree, keep, under=under))


@pytest.mark.parametrize("name", CASES)
def test_the_smaller_model_computes_what_the_masked_one_does(name):
    model, inputs = CASES[name]
    variables, groups = found(name)
    kept = kept_of([group for group in groups if not group.normalized])
    small = channels.shrink(variables, kept)
    smaller = models.resize(model, small)
    assert smaller == SMALLER[name]
    expected = compiled(lambda tree, keep: model.apply(masked(tree, keep), inputs))(variables, channels.as_masks(kept))
    outputs = apply(smaller, small, inputs)
    # The same sums of at most some hundred terms of order 1, with zeros or without them.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), outputs, expected)


@pytest.mark.parametrize("name", CASES)
def test_every_width_that_is_found_can_shrink(name):
    model, inputs = CASES[name]
    variables, groups = found(name)
    small = jax.eval_shape(functools.partial(channels.shrink, kept=kept_of(groups)), variables)
    smaller = models.resize(model, small["params"])
    fresh = jax.eval_shape(smaller.init, jax.random.key(0), inputs)
    assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, small)
    outputs = jax.eval_shape(smaller.apply, small, inputs)
    assert outputs == jax.eval_shape(model.apply, variables, inputs)
    assert models.resize(smaller, fresh) == smaller
    # What is left can be cut again.
    assert channels.infer(smaller.apply, small, inputs)


@pytest.mark.parametrize("name", CASES)
def test_an_unchanged_model_stays_itself(name):
    assert models.resize(CASES[name][0], found(name)[0]) == CASES[name][0]


def test_blocks_that_are_removed_are_counted():
    model, tokens = CASES["transformer"]
    params = {name: layer for name, layer in found("transformer")[0]["params"].items() if name != "block_1"}
    smaller = models.resize(model, params)
    assert smaller.depth == 1
    assert jax.eval_shape(smaller.apply, {"params": params}, tokens).shape == (2, 5, 11)


def test_a_step_of_the_smaller_model_is_that_of_the_masked_one():
    model, inputs = CASES["mlp"]
    variables, groups = found("mlp")
    params, kept = variables["params"], kept_of(groups)
    tx = optax.adam(0.1)
    shrink = functools.partial(channels.shrink, kept=kept, under="params")
    state = jax.tree.map(lambda s: np.full(s.shape, 0.5, s.dtype), jax.eval_shape(tx.init, params))
    small_state = channels.shrink_state(tx, state, params, kept, under="params")

    def step(model, params, state, keep=None):
        params = params if keep is None else masked(params, keep, "params")
        grads = jax.grad(lambda p: jnp.mean(model.apply({"params": p}, inputs) ** 2))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    whole = compiled(functools.partial(step, model))(params, state, channels.as_masks(kept))
    whole = jax.tree.map(np.asarray, whole)
    small = compiled(functools.partial(step, models.resize(model, shrink(params))))(shrink(params), small_state)
    expected = shrink(whole[0]), channels.shrink_state(tx, whole[1], params, kept, under="params")
    # Moments of order 0.5 change by gradients that agree to some ulp of float32; a step is of size 0.1.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), small, expected)


def test_widths_by_layer_are_those_of_the_parameters():
    resnet = models.ResNet(3, num_blocks=2, width=(4, 6, 10), inner_width=(1, 2, 3, 4, 5, 6))
    params = jax.eval_shape(resnet.init, jax.random.key(0), normal(1, 8, 8, 1))["params"]
    assert params["stage_2_block_0"]["conv_1"]["kernel"].shape == (3, 3, 5, 10)
    assert params["stage_2_block_0"]["shortcut"]["kernel"].shape == (1, 1, 6, 10)
    assert models.resize(resnet, params) == resnet
    vit = models.ViT(3, width=10, depth=2, heads=(3, 1), head_dim=4, mlp_width=(5, 7))
    params = jax.eval_shape(vit.init, jax.random.key(0), normal(1, 4, 4, 1))["params"]
    assert params["block_0"]["attention"]["query"]["kernel"].shape == (10, 12)
    assert params["block_1"]["attention"]["out"]["kernel"].shape == (4, 10)
    assert params["block_1"]["mlp"]["up"]["kernel"].shape == (10, 7)
    assert models.resize(vit, params) == vit


def test_heads_are_given_a_width_of_their_own():
    """Two heads of 4 in a width of 8 are heads=2; with head_dim they need not fill the width."""
    x = normal(2, 3, 8)
    variables = init(models.SelfAttention(2), x)
    programs = [jax.make_jaxpr(models.SelfAttention(2, head_dim=d).apply)(variables, x) for d in (None, 4)]
    assert str(programs[0]) == str(programs[1])
    wide = jax.eval_shape(models.SelfAttention(3, head_dim=5).init, jax.random.key(0), x)["params"]
    assert wide["key"]["kernel"].shape == (8, 15)
    assert wide["out"]["kernel"].shape == (15, 8)


def layer(*widths):
    return {f"dense_{i}": {"kernel": np.zeros(shape)} for i, shape in enumerate(widths)}


def with_layer(name, path, shape):
    params = jax.tree.map(lambda x: x, found(name)[0]["params"])
    parent = functools.reduce(lambda tree, key: tree[key], path.split("/")[:-1], params)
    return parent.update({path.split("/")[-1]: np.zeros(shape)}) or params


VIT, RESNET = CASES["vit"][0], CASES["resnet"][0]
REFUSED = {
    "class": (lambda: models.resize(nn.Dense(3), {}), "resize knows MLP, ResNet, ViT, Transformer, not Dense"),
    "missing": (
        lambda: models.resize(models.MLP((3, 2)), layer((4, 3))),
        "lack dense_1/kernel. Nearest paths: dense",
    ),
    "heads": (
        lambda: models.resize(VIT, with_layer("vit", "block_0/attention/key/kernel", (8, 4))),
        r"query/kernel of shape \(8, 8\) and block_0/attention/key/kernel of shape \(8, 4\) must have one last axis",
    ),
    "stage": (
        lambda: models.resize(RESNET, with_layer("resnet", "stem/kernel", (3, 3, 1, 3))),
        r"stem/kernel of shape \(3, 3, 1, 3\) and stage_0_block_0/conv_1/kernel of shape \(3, 3, 4, 4\)",
    ),
    "part": (lambda: models.resize(VIT.clone(head_dim=3), found("vit")[0]), "not cut into whole heads of 3 features"),
    "count": (lambda: models.ViT(3, depth=2, mlp_width=(3,)), r"mlp_width must be one number, or 2, .*got \(3,\)"),
    "zero": (lambda: models.Transformer(3, depth=2, mlp_width=(3, 0)), r"mlp_width must be at least 1, got \(3, 0\)"),
    "dim": (lambda: models.ViT(3, depth=2, heads=(2, 1)), r"heads=\(2, 1\) are numbers for each block, .* head_dim"),
    "odd": (lambda: models.Transformer(3, head_dim=3), "head_dim must be even, got 3"),
    "stages": (lambda: models.ResNet(3, width=(3, 4)), r"width must be one number, or 3"),
    "inner": (lambda: models.ResNet(3, num_blocks=1, inner_width=(3, 4)), "inner_width must be one number, or 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    call, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        call()
