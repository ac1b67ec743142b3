"""The decoder: SwiGLU against NumPy, causality, packed documents, tied output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard import models
from tests.models.helpers import KEY, apply, assert_finite, compiled, init, normal, numpy_attention, to_float64

TOKENS = jnp.array([[1, 4, 2, 0, 3, 5], [5, 5, 1, 2, 0, 4]])


def small(**options) -> models.Transformer:
    return models.Transformer(7, **{"width": 8, "depth": 2, "heads": 2, "mlp_width": 12} | options)


def test_swiglu_equals_numpy():
    x = normal(2, 3, 5)
    module = models.SwiGLU(7)
    variables = init(module, x)
    gate, up, down = (np.asarray(variables["params"][n]["kernel"], np.float64) for n in ("gate", "up", "down"))
    wide = np.asarray(x, np.float64)
    hidden = (wide @ gate) / (1 + np.exp(-(wide @ gate))) * (wide @ up)
    # Dot products of at most 7 terms of order 1 in float32.
    np.testing.assert_allclose(apply(module, variables, x), hidden @ down, rtol=1e-5, atol=1e-5)


def numpy_transformer(params, tokens):
    """A model of one block, for one row of tokens, in float64."""

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + 1e-8) * scale

    x = params["embed"]["embedding"][tokens]
    block = params["block_0"]
    y = norm(x, block["attention_norm"]["scale"])
    x = x + numpy_attention(block["attention"], y, 2, causal=True, rotate=True)
    y = norm(x, block["mlp_norm"]["scale"])
    gate = y @ block["mlp"]["gate"]["kernel"]
    x = x + (gate / (1 + np.exp(-gate)) * (y @ block["mlp"]["up"]["kernel"])) @ block["mlp"]["down"]["kernel"]
    return norm(x, params["norm"]["scale"]) @ params["logits"]["kernel"]


def test_equals_numpy():
    model = small(depth=1)
    variables = init(model, TOKENS)
    params = to_float64(variables["params"])
    expected = np.stack([numpy_transformer(params, np.asarray(row)) for row in TOKENS])
    np.testing.assert_allclose(model.apply(variables, TOKENS), expected, rtol=1e-5, atol=1e-5)


def test_parameter_paths():
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(small(depth=1).init, KEY, TOKENS)["params"])
    square = {"kernel": (8, 8)}
    assert shapes == {
        "embed": {"embedding": (7, 8)},
        "block_0": {
            "attention_norm": {"scale": (8,)},
            "attention": {name: square for name in ("query", "key", "value", "out")},
            "mlp_norm": {"scale": (8,)},
            "mlp": {"gate": {"kernel": (8, 12)}, "up": {"kernel": (8, 12)}, "down": {"kernel": (12, 8)}},
        },
        "norm": {"scale": (8,)},
        "logits": {"kernel": (8, 7)},
    }


def test_a_token_changes_no_logits_before_it():
    model = small()
    variables = init(model, TOKENS)
    run = compiled(model.apply)
    before = np.asarray(run(variables, TOKENS))
    for position in (0, 3, 5):
        after = np.asarray(run(variables, TOKENS.at[:, position].set(6)))
        np.testing.assert_array_equal(after[:, :position], before[:, :position])
        assert np.all(np.any(after != before, axis=-1)[:, position:])


def test_packed_documents_do_not_see_each_other():
    model = small()
    variables = init(model, TOKENS)
    segments, positions = jnp.array([[1, 1, 2, 2, 2, 0]]), jnp.array([[0, 1, 0, 1, 2, 0]])
    packed = apply(model, variables, TOKENS[:1], positions=positions, segments=segments)
    spans = ((0, 2), (2, 5), (5, 6))
    # Each document at the start of its own row; what follows it there cannot reach back.
    alone = apply(model, variables, jnp.stack([jnp.roll(TOKENS[0], -start) for start, _ in spans]))
    for row, (start, end) in enumerate(spans):
        np.testing.assert_allclose(packed[0, start:end], alone[row, : end - start], rtol=1e-5, atol=1e-5)


def test_a_common_shift_of_the_positions_changes_nothing():
    model = small()
    variables = init(model, TOKENS)
    run = compiled(lambda positions: model.apply(variables, TOKENS, positions=positions))
    # Angles of up to 46 radians are exact to 3e-6.
    np.testing.assert_allclose(run(jnp.arange(6)[None] + 40), run(jnp.arange(6)[None]), atol=1e-4)


def test_tied_output_has_no_kernel_of_its_own():
    model = small(tied=True)
    variables = init(model, TOKENS)
    assert "logits" not in variables["params"]
    untied = {"params": variables["params"] | {"logits": {"kernel": variables["params"]["embed"]["embedding"].T}}}
    np.testing.assert_allclose(apply(model, variables, TOKENS), apply(small(), untied, TOKENS), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_bfloat16_computation_keeps_float32_parameters_and_logits(tied):
    model = small(tied=tied, dtype=jnp.bfloat16)
    variables = jax.eval_shape(model.init, KEY, TOKENS)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    assert jax.eval_shape(model.apply, variables, TOKENS).dtype == jnp.float32


def test_bfloat16_computation_is_close():
    variables = init(small(), TOKENS)
    low, full = (apply(small(dtype=dtype), variables, TOKENS) for dtype in (jnp.bfloat16, None))
    assert np.any(low != full)
    # 8 bits of mantissa through two blocks of numbers of order 1.
    np.testing.assert_allclose(low, full, atol=0.15)


def test_jit_equals_no_jit_and_gradients_are_finite():
    model = small()
    variables = init(model, TOKENS)
    eager = model.apply(variables, TOKENS)
    np.testing.assert_allclose(apply(model, variables, TOKENS), eager, rtol=1e-5, atol=1e-5)

    def loss(variables):
        return jnp.sum(jax.nn.log_softmax(model.apply(variables, TOKENS))[..., 1])

    grads = compiled(jax.grad(loss))(variables)
    assert_finite(grads)
    assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(grads))


def test_dropout_only_in_training():
    model = small(dropout=0.5)
    variables = init(model, TOKENS)
    evaluation = [str(jax.make_jaxpr(m.apply)(variables, TOKENS)) for m in (model, small())]
    assert evaluation[0] == evaluation[1]
    run = compiled(lambda key: model.apply(variables, TOKENS, train=True, rngs={"dropout": key}))
    np.testing.assert_array_equal(run(jax.random.key(0)), run(jax.random.key(0)))
    assert not np.allclose(run(jax.random.key(0)), run(jax.random.key(1)))


def test_refuses_bad_arguments():
    with pytest.raises(ValueError, match=r"width must be a multiple of 2 \* heads = 6, got width=8"):
        small(heads=3)
    with pytest.raises(ValueError, match="vocab_size must be at least 1, got 0"):
        models.Transformer(0)
