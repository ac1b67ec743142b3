"""Every model computes the same with packed weights as with the dense weights that these stand for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import formats, models
from steelyard import tree as tree_lib
from tests.models.helpers import apply, compiled, init, normal

IMAGES = normal(2, 8, 8, 1)
TOKENS = jnp.array([[1, 4, 2, 0, 3, 5]])

MODELS = {
    "mlp": (models.MLP((16, 12), flatten=True), IMAGES),
    "resnet": (models.ResNet(10, num_blocks=1, width=4), IMAGES),
    "vit": (models.ViT(10, width=8, depth=1, heads=2, mlp_width=16, stem=(4,), reconstruct=True), IMAGES),
    "transformer": (models.Transformer(8, width=8, depth=1, heads=2, mlp_width=16), TOKENS),
    "transformer_tied": (models.Transformer(8, width=8, depth=1, heads=2, mlp_width=16, tied=True), TOKENS),
}
PACK = {
    "quantized": lambda w: formats.Quantized.from_dense(w, "int8"),
    "nm": lambda w: formats.NMSparse.from_dense(w, n=2, m=4),
}


def pack_where(params, pack, where):
    chosen = tree_lib.select(params, where)
    return compiled(lambda params: jax.tree.map(lambda w, yes: pack(w) if yes else w, params, chosen))(params)


# Tying concerns the embedding alone, which is not stored as N:M.
@pytest.mark.parametrize(
    ("name", "storage"), [(n, s) for n in MODELS for s in PACK if (n, s) != ("transformer_tied", "nm")]
)
def test_packed_equals_dense(name, storage):
    model, inputs = MODELS[name]
    variables = init(model, inputs)
    # N:M groups run along axis -2; the first convolution has a single input channel, a tail of one entry.
    where = r".*/kernel" if storage == "nm" else r".*/(kernel|embedding)"
    packed = {**variables, "params": pack_where(variables["params"], PACK[storage], where)}
    dense = jax.tree.map(formats.dense, packed, is_leaf=formats.is_weight)
    assert any(formats.is_weight(w) for w in jax.tree.leaves(packed, is_leaf=formats.is_weight))
    # The scale leaves the sum in one and enters each term in the other: float32 rounding of sums of up to 144 terms.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        apply(model, packed, inputs),
        apply(model, dense, inputs),
    )


def test_input_gradient_through_packed_weights():
    model, inputs = MODELS["mlp"]
    variables = init(model, inputs)
    packed = {"params": pack_where(variables["params"], PACK["quantized"], r".*/kernel")}
    dense = jax.tree.map(formats.dense, packed, is_leaf=formats.is_weight)
    grads = [
        compiled(jax.grad(lambda x, v: jnp.sum(jnp.square(model.apply(v, x)))))(inputs, v) for v in (packed, dense)
    ]
    np.testing.assert_allclose(grads[0], grads[1], rtol=1e-4, atol=1e-4)
