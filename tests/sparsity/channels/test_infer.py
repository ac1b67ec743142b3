"""Groups found in programs, against groups worked out by hand. Programs are traced here, and none is compiled."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from steelyard import models
from steelyard.sparsity import channels

X = jax.ShapeDtypeStruct((2, 6), jnp.float32)
IMAGES = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
TOKENS = jax.ShapeDtypeStruct((2, 5), jnp.int32)


@functools.cache
def variables_of(model, inputs):
    return jax.eval_shape(model.init, jax.random.key(0), inputs)


def inferred(model, inputs):
    """name -> (size, members, normalized) of a model's groups, by the paths below `params`."""
    groups = channels.infer(model.apply, variables_of(model, inputs), inputs)
    assert len({group.name for group in groups}) == len(groups)
    return as_table(groups)


def as_table(groups):
    return {
        group.name.removeprefix("params/"): (group.size, {tuple(m) for m in group.members}, group.normalized)
        for group in groups
    }


def shapes(**leaves):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}


def members(*entries, prefix="params/"):
    """(path, axis) or (path, axis, width, layout) -> members."""
    return {tuple(channels.Member(f"{prefix}{path}", *rest)) for path, *rest in entries}


def norm(path):
    statistics = members((f"{path}/mean", -1), (f"{path}/var", -1), prefix="batch_stats/")
    return statistics | members((f"{path}/scale", -1), (f"{path}/bias", -1))


def test_perceptron():
    expected = {
        f"dense_{i}": (
            size,
            members((f"dense_{i}/kernel", -1), (f"dense_{i}/bias", -1), (f"dense_{i + 1}/kernel", -2)),
            False,
        )
        for i, size in enumerate((7, 5))
    }
    assert inferred(models.MLP((7, 5, 4)), X) == expected


def test_residual_network():
    inner = {
        f"stage_{s}_block_0/conv_0": (
            4 * 2**s,
            members((f"stage_{s}_block_0/conv_0/kernel", -1), (f"stage_{s}_block_0/conv_1/kernel", -2))
            | norm(f"stage_{s}_block_0/norm_0"),
            False,
        )
        for s in range(3)
    }
    stem = members(("stem/kernel", -1), ("stage_0_block_0/conv_0/kernel", -2), ("stage_0_block_0/conv_1/kernel", -1))
    stem |= norm("stem_norm") | norm("stage_0_block_0/norm_1")
    stem |= members(("stage_1_block_0/conv_0/kernel", -2), ("stage_1_block_0/shortcut/kernel", -2))
    stages = {"stem": (4, stem, False)}
    for s in (1, 2):
        block = f"stage_{s}_block_0"
        made = members((f"{block}/conv_1/kernel", -1), (f"{block}/shortcut/kernel", -1))
        after = (f"stage_{s + 1}_block_0/conv_0/kernel", f"stage_{s + 1}_block_0/shortcut/kernel")
        read = members(*((path, -2) for path in (after if s == 1 else ["logits/kernel"])))
        stages[block] = 4 * 2**s, made | read | norm(f"{block}/norm_1") | norm(f"{block}/shortcut_norm"), False
    assert inferred(models.ResNet(10, num_blocks=1, width=4), IMAGES) == inner | stages


def attention(block, width, *, biases):
    """Heads as groups of `width` neighbouring features."""
    made = [(f"{block}/attention/{name}/kernel", -1, width) for name in ("query", "key", "value")]
    made += [(f"{block}/attention/{name}/bias", -1, width) for name in ("query", "key", "value") if biases]
    return members(*made, (f"{block}/attention/out/kernel", -2, width))


def stream(block, *hidden, biases):
    """What one block reads from the residual stream and adds to it."""
    read = [f"attention/{name}" for name in ("query", "key", "value")] + [f"mlp/{name}" for name in hidden]
    added = [f"{block}/{name}" for name in ("attention/out", "mlp/down")]
    result = [(f"{block}/{name}/kernel", -2) for name in read] + [(f"{name}/kernel", -1) for name in added]
    result += [(f"{block}/{name}/scale", -1) for name in ("attention_norm", "mlp_norm")]
    if biases:
        result += [(f"{name}/bias", -1) for name in (*added, f"{block}/attention_norm", f"{block}/mlp_norm")]
    return members(*result)


def test_vision_transformer():
    model = models.ViT(10, patch=2, width=8, depth=2, heads=2, mlp_width=12, stem=(3, 5), reconstruct=True)
    residual = members(
        ("patch/kernel", -1), ("patch/bias", -1), ("position", -1), ("norm/scale", -1), ("norm/bias", -1)
    )
    residual |= members(("logits/kernel", -2), ("reconstruction/kernel", -2))
    expected = {
        "stem_0": (3, members(("stem_0/kernel", -1), ("stem_0/bias", -1), ("stem_1/kernel", -2)), False),
        # A patch of 2 x 2 pixels is flattened with its channels last.
        "stem_1": (
            5,
            members(("stem_1/kernel", -1), ("stem_1/bias", -1), ("patch/kernel", -2, 4, "strided")),
            False,
        ),
        "patch": (8, residual | stream("block_0", "up", biases=True) | stream("block_1", "up", biases=True), True),
    }
    for block in ("block_0", "block_1"):
        hidden = members((f"{block}/mlp/up/kernel", -1), (f"{block}/mlp/up/bias", -1), (f"{block}/mlp/down/kernel", -2))
        expected |= {f"{block}/mlp/up": (12, hidden, False)}
        expected |= {f"{block}/attention": (2, attention(block, 4, biases=True), False)}
    assert inferred(model, IMAGES) == expected


@pytest.mark.parametrize("tied", [False, True])
def test_transformer(tied):
    model = models.Transformer(11, width=8, depth=1, heads=2, mlp_width=12, tied=tied)
    residual = members(("embed/embedding", -1), ("norm/scale", -1)) | stream("block_0", "gate", "up", biases=False)
    gated = members(*((f"block_0/mlp/{name}/kernel", axis) for name, axis in (("gate", -1), ("up", -1), ("down", -2))))
    assert inferred(model, TOKENS) == {
        "embed": (8, residual if tied else residual | members(("logits/kernel", -2)), True),
        "block_0/attention": (2, attention("block_0", 4, biases=False), False),
        "block_0/mlp": (12, gated, False),
    }


def test_blocked_names_operation_and_reason():
    model = models.Transformer(11, width=8, depth=1, heads=1, mlp_width=12)
    reasons = channels.blocked(model.apply, variables_of(model, TOKENS), TOKENS)
    path = "params/block_0/attention"
    assert reasons == {
        ("params/embed/embedding", -2): "gather: entries of the axis are looked up",
        ("params/logits/kernel", -1): "an axis of the outputs",
        # A single head is not cut from others, and yet its features must stay: rotary positions pair them.
        (f"{path}/query/kernel", -1): "slice: a part of the axis is taken",
        (f"{path}/key/kernel", -1): "slice: a part of the axis is taken",
        (f"{path}/value/kernel", -1): "dot_general: a product of two activations",
        (f"{path}/out/kernel", -2): "dot_general: a product of two activations",
    }


def rnn(params, x):
    def step(h, x):
        h = jnp.tanh(x @ params["w"] + h @ params["u"] + params["b"])
        return h, h

    _, states = jax.lax.scan(step, jnp.zeros((2, 5)), x)
    return states @ params["out"]


def deep(params, x):
    """Layers stacked along axis 0, rematerialized, with an activation that has its own derivative."""

    @jax.checkpoint
    def layer(x, weights):
        return x + nn.silu(x @ weights["up"]) @ weights["down"], None

    x = x @ params["embed"]
    return jax.lax.scan(layer, x, params["layers"])[0] @ params["out"]


def control(params, x):
    h = jax.lax.cond(jnp.sum(x) > 0, lambda: x @ params["a"], lambda: x @ params["b"])
    h = jax.lax.while_loop(lambda h: jnp.all(h > 1), lambda h: h * params["c"], h)
    return h @ params["out"]


def test_loops_and_branches_are_entered():
    sequence = jax.ShapeDtypeStruct((3, 2, 6), jnp.float32)
    recurrent = channels.infer(rnn, shapes(w=(6, 5), u=(5, 5), b=(5,), out=(5, 4)), sequence)
    assert as_table(recurrent) == {
        "u": (5, members(("w", -1), ("u", -1), ("u", -2), ("b", -1), ("out", -2), prefix=""), False)
    }
    stacked = shapes(embed=(6, 5), out=(5, 4)) | {"layers": shapes(up=(3, 5, 7), down=(3, 7, 5))}
    assert as_table(channels.infer(deep, stacked, X)) == {
        "embed": (5, members(("embed", -1), ("layers/up", -2), ("layers/down", -1), ("out", -2), prefix=""), False),
        "layers": (7, members(("layers/up", -1), ("layers/down", -2), prefix=""), False),
    }
    assert channels.blocked(deep, stacked, X)["layers/up", -3] == "scan: steps along the axis"
    branched = channels.infer(control, shapes(a=(6, 5), b=(6, 5), c=(5,), out=(5, 4)), X)
    # Whether the loop goes on is asked of all channels.
    expected = members(("a", -1), ("b", -1), ("c", -1), ("out", -2), prefix="")
    assert as_table(branched) == {"a": (5, expected, True)}


class Convolutions(nn.Module):
    """A depthwise convolution between pointwise ones, group normalization, pooling, and a flattening."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (1, 1), name="expand")(x)
        x = nn.Conv(8, (3, 3), feature_group_count=8, name="depthwise")(x)
        x = nn.relu(nn.GroupNorm(4, name="norm")(x))
        x = nn.Conv(5, (1, 1), name="project")(nn.max_pool(x, (2, 2), (2, 2)))
        return nn.Dense(10, name="logits")(x.reshape(len(x), -1))


def test_convolutions():
    # What can go is a group of the normalization: 2 channels. The depthwise kernel has one input channel.
    owned = [(f"{name}", -1, 2) for name in ("expand/kernel", "expand/bias", "depthwise/kernel", "depthwise/bias")]
    owned += [("norm/scale", -1, 2), ("norm/bias", -1, 2), ("project/kernel", -2, 2)]
    flat = members(("project/kernel", -1), ("project/bias", -1), ("logits/kernel", -2, 16, "strided"))
    assert inferred(Convolutions(), IMAGES) == {"expand": (4, members(*owned), False), "project": (5, flat, False)}


def through(fn, inner=6):
    """A hidden layer of 6 features with `fn` after it."""
    return lambda params, x: fn(x @ params["a"], params), shapes(a=(6, 6), b=(inner, 4))


CONSTANT = jnp.ones(6)
STOPPED = {
    "a part": (lambda h, p: h[:, :3] @ p["b"], 3, "slice: a part of the axis is taken"),
    "joined": (lambda h, p: jnp.concatenate([h, h], -1) @ p["b"], 12, "concatenate: arrays are joined along the axis"),
    "padded": (lambda h, p: jnp.pad(h, ((0, 0), (0, 2))) @ p["b"], 8, "pad: the axis is padded"),
    "sorted": (lambda h, p: jnp.sort(h) @ p["b"], 6, "sort: the axis is sorted"),
    "running": (lambda h, p: jnp.cumsum(h, -1) @ p["b"], 6, "cumsum: runs along the axis"),
    "reversed": (lambda h, p: h[:, ::-1] @ p["b"], 6, "rev: the axis is reversed"),
    "looked up": (lambda h, p: h[:, jnp.array([2, 1])] @ p["b"], 2, "gather: entries of the axis are looked up"),
    "a position": (lambda h, p: jax.nn.one_hot(jnp.argmax(h, -1), 6) @ p["b"], 6, "argmax: the result is a position"),
    "counted": (lambda h, p: (h * jnp.arange(6.0)) @ p["b"], 6, "iota: counts along the axis"),
    "a constant": (lambda h, p: (h * CONSTANT) @ p["b"], 6, "an axis of a constant of the function"),
    "unknown": (lambda h, p: jnp.fft.fft(h).real @ p["b"], 6, "fft: there is no rule for this operation"),
    "recut": (lambda h, p: h.reshape(3, 4) @ p["b"], 4, "reshape: the old axes are not cut into the new ones"),
    "a square": (lambda h, p: (h * h.reshape(2, 2, 3).swapaxes(1, 2).reshape(2, 6)) @ p["b"], 6, "mul: its axes are"),
    "fused": (lambda h, p: h.reshape(2, 3, 2)[:, 0] @ p["b"], 2, "slice: a part of the axis is taken"),
    "returned": (lambda h, p: (h, h @ p["b"]), 6, "an axis of the outputs"),
}


@pytest.mark.parametrize("name", STOPPED)
def test_what_stops_a_channel_is_named(name):
    fn, inner, reason = STOPPED[name]
    apply_fn, params = through(fn, inner)
    assert channels.blocked(apply_fn, params, X)["a", -1].startswith(reason)
    with pytest.raises(ValueError, match=f"no channel of this model can be removed: .*{reason}"):
        channels.infer(apply_fn, params, X)


def test_what_does_not_stop_a_channel():
    def fn(h, params):
        h = jnp.where(h > 0, h, 0.1 * h)[:, None].transpose(0, 2, 1).squeeze(-1)
        h = jax.nn.softmax(h, -1)
        return jnp.einsum("bi,io->ob", jnp.broadcast_to(h[None], (3, 2, 6)).mean(0), params["b"])

    apply_fn, params = through(fn)
    assert as_table(channels.infer(apply_fn, params, X)) == {"a": (6, members(("a", -1), ("b", -2), prefix=""), True)}


def test_protected_and_unused_parameters():
    model = models.MLP((7, 5, 4))
    variables = variables_of(model, X) | {"unused": shapes(a=(3, 2))}
    groups = channels.infer(model.apply, variables, X, protect=r"params/dense_2/.*")
    assert [group.name for group in groups] == ["params/dense_0"]
    reasons = channels.blocked(model.apply, variables, X, protect=[r"params/dense_2/.*"])
    assert reasons["params/dense_1/kernel", -1] == "protected by the caller"
    assert reasons["unused/a", -2] == "the function does not use the parameter"
    with pytest.raises(ValueError, match="protect='params/dense' matches none"):
        channels.infer(model.apply, variables, X, protect=["params/dense"])


def test_a_model_without_channels():
    with pytest.raises(ValueError, match=r"removed: an axis of the inputs \(a axis -2\); an axis of the outputs"):
        channels.infer(lambda p, x: x @ p["a"], shapes(a=(6, 4)), X)
    with pytest.raises(ValueError, match="it has no parameter with an axis of 2 or more"):
        channels.infer(lambda p, x: x * p["a"], shapes(a=(), b=(1, 1)), X)


def test_describe():
    members = (channels.Member("up", -1), channels.Member("down", -2, 4, "strided"))
    lines = channels.describe([channels.ChannelGroup("mlp", 7, members, True)]).splitlines()
    assert lines == [
        "name    size  members",
        "mlp        7  up axis -1",
        "              down axis -2, 4 strided entries a channel",
        "              (normalized over the channels)",
    ]
