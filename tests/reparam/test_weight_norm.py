"""Weight normalization: formulas in float64, a case by hand, and its place in chains, meshes and checkpoints."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from steelyard import formats, reparam, train
from steelyard import tree as tree_lib
from steelyard.train import checkpoint, rules, sharding

KERNEL = jax.random.normal(jax.random.key(0), (8, 6))
PARAMS = {
    "dense": {"kernel": KERNEL, "bias": jnp.ones(6)},
    "conv": {"kernel": jax.random.normal(jax.random.key(1), (2, 2, 4, 3)).astype(jnp.bfloat16)},
    "steps": jnp.ones((2, 2), jnp.int32),
    "nothing": None,
}
# Squares, a sum of eight, a root, a quotient and a product, each rounded to 2^-24: well below 1e-6.
RTOL = 1e-6

vectors = hnp.arrays(np.float32, (4, 3), elements=st.integers(-40, 40).map(lambda i: i / 8))
merge = jax.jit(reparam.weight_norm_merge)


def by_loops(v, g):
    """w = g v / |v| in float64, column by column."""
    w = np.zeros(v.shape)
    for j in range(v.shape[1]):
        length = sum(float(x) ** 2 for x in v[:, j]) ** 0.5
        for i in range(v.shape[0]):
            w[i, j] = 0 if length == 0 else float(g[0, j]) * float(v[i, j]) / length
    return w


def moved(stored):
    """Parts that no longer belong together, with some negative lengths."""
    return jax.tree.map(lambda x: x if x.dtype == jnp.int32 else (0.3 - 1.2 * x).astype(x.dtype), stored)


def see(link, stored, state, *, is_training=False):
    return link.apply(stored, state, step=0, rng=None, train=is_training)


def bits_of(x):
    return np.asarray(x).view(f"u{x.dtype.itemsize}")


def assert_finishes_as_shown(link, params=PARAMS):
    """Also where evaluation is compiled together with what uses it. Returns what is finished."""
    stored, state = link.init(params, jax.random.key(0))
    stored = moved(stored)
    finished = link.finish(stored, state)

    @jax.jit
    def use(stored):
        seen = see(link, stored, state)
        return seen, [jnp.sum(x * x, -1) for x in jax.tree.leaves(seen)]

    dense = jax.tree.map(formats.dense, finished, is_leaf=formats.is_weight)
    for shown in (see(link, stored, state), use(stored)[0]):
        for a, b in zip(jax.tree.leaves(dense), jax.tree.leaves(shown), strict=True):
            np.testing.assert_array_equal(bits_of(a), bits_of(b))
    return finished


@settings(max_examples=30, deadline=None)
@given(vectors, hnp.arrays(np.float32, (1, 3), elements=st.integers(-8, 8).map(float)))
def test_merge_is_the_formula(v, g):
    np.testing.assert_allclose(merge(v, g), by_loops(v, g), rtol=RTOL)


@settings(max_examples=30, deadline=None)
@given(vectors, st.floats(1 / 8, 8, width=32))
def test_the_size_of_the_direction_does_not_matter(v, c):
    g = jnp.array([[1.0, -2.0, 3.0]])
    # The products c v are rounded too, before the norm is taken.
    np.testing.assert_allclose(merge(np.float32(c) * v, g), merge(v, g), rtol=2 * RTOL)


@settings(max_examples=30, deadline=None)
@given(vectors)
def test_merge_undoes_split(w):
    v, g = reparam.weight_norm_split(w)
    assert g.shape == (1, 3)
    np.testing.assert_array_equal(v, w)
    np.testing.assert_allclose(merge(v, g), w, rtol=RTOL)
    # float32 lengths: the error is far below half a unit of bfloat16, so that nothing is lost.
    half = jnp.asarray(w, jnp.bfloat16)
    v, g = reparam.weight_norm_split(half)
    assert (v.dtype, g.dtype, merge(v, g).dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(merge(v, g), float), np.asarray(half, float))


def test_worked_case():
    """v = (3, 4), g = 10: w = (6, 8); for dw = (1, 0): dg = 3/5, dv = 2 ((1, 0) - 3/25 (3, 4)) = (1.28, -0.96)."""
    v, g = jnp.array([[3.0], [4.0]]), jnp.array([[10.0]])
    w, pull = jax.vjp(reparam.weight_norm_merge, v, g)
    np.testing.assert_allclose(w, [[6], [8]], rtol=RTOL)
    dv, dg = pull(jnp.array([[1.0], [0.0]]))
    np.testing.assert_allclose(dg, [[3 / 5]], rtol=RTOL)
    np.testing.assert_allclose(dv, [[2 * (1 - 9 / 25)], [-2 * 12 / 25]], rtol=2 * RTOL)


def test_gradients_are_the_formula_and_orthogonal_to_the_direction():
    v, dw = (np.random.default_rng(i).normal(size=(8, 6)) for i in range(2))
    g = np.linspace(-2, 2, 6)[None]
    norm = np.sqrt((v**2).sum(0, keepdims=True))
    along = (dw * v).sum(0, keepdims=True)
    as_float32 = [jnp.asarray(x, jnp.float32) for x in (v, g, dw)]
    dv, dg = jax.vjp(reparam.weight_norm_merge, *as_float32[:2])[1](as_float32[2])
    np.testing.assert_allclose(dg, along / norm, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dv, g / norm * (dw - along / norm**2 * v), rtol=1e-5, atol=1e-6)
    # A sum of eight terms of size |dv| |v| / 8 that cancel; each has a relative error of a few 2^-24.
    assert np.all(np.abs((np.asarray(dv) * v).sum(0)) < 1e-6 * np.linalg.norm(dv, axis=0) * norm)


def test_the_direction_grows_under_gradient_descent():
    """|v - lr dv|^2 = |v|^2 + lr^2 |dv|^2, since dv is orthogonal to v."""
    link = reparam.weight_norm()
    stored, state = link.init({"kernel": KERNEL}, None)
    gradient = jax.grad(lambda s: jnp.sum(jnp.sin(3 * see(link, s, state)["kernel"])))
    for _ in range(3):
        before = stored
        stored = jax.tree.map(lambda p, g: p - 0.5 * g, stored, gradient(stored))
        old, new = (jnp.linalg.norm(s["kernel"].direction, axis=0) for s in (before, stored))
        assert np.all(new > old)


@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_a_channel_of_zeros_is_zero_with_zero_gradients(size):
    """1e-30 squared is no float32 number."""
    v = jnp.array([[size, 1.0], [size, 1.0]])
    w, pull = jax.vjp(reparam.weight_norm_merge, v, jnp.ones((1, 2)))
    np.testing.assert_array_equal(w[:, 0], 0)
    for gradient in pull(jnp.ones((2, 2))):
        np.testing.assert_array_equal(gradient[:, 0], 0)
        assert np.all(np.isfinite(gradient))
    np.testing.assert_array_equal(reparam.weight_norm_split(0 * v)[1], 0)


@pytest.mark.parametrize(
    ("axis", "shape"), [(-1, (1, 1, 3)), (0, (5, 1, 1)), ((0, -1), (5, 1, 3)), ((), (1, 1, 1)), ((0, 1, 2), (5, 4, 3))]
)
def test_axes_that_keep_their_length(axis, shape):
    w = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)
    v, g = reparam.weight_norm_split(w, axis=axis)
    summed = tuple(i for i, n in enumerate(shape) if n == 1)
    np.testing.assert_allclose(g, np.sqrt((w.astype(float) ** 2).sum(summed, keepdims=True)), rtol=RTOL)
    np.testing.assert_allclose(reparam.weight_norm_merge(v, 2 * g, axis=axis), 2 * w, rtol=RTOL)


def test_data_init_standardizes_each_channel():
    v = KERNEL
    x = jnp.asarray(np.random.default_rng(2).normal(size=(5, 7, 8)) + 1, jnp.float32)
    t = x @ reparam.weight_norm_merge(v, jnp.ones((1, 6)))
    g, bias = reparam.weight_norm_data_init(v, t)
    assert (g.shape, bias.shape) == ((1, 6), (6,))
    y = np.asarray(x @ reparam.weight_norm_merge(v, g) + bias, float).reshape(-1, 6)
    # 35 entries of size 1, of a mean that cancels: 1e-5 is some dozen roundings.
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(y.std(0), 1, rtol=1e-5)


def test_data_init_of_fused_heads_and_of_a_constant_channel():
    v = jnp.ones((4, 2, 3), jnp.bfloat16)
    t = jnp.asarray(np.random.default_rng(3).normal(size=(10, 2, 3)), jnp.float32).at[:, 1, 2].set(7.0)
    g, bias = reparam.weight_norm_data_init(v, t, axis=(1, 2))
    assert (g.shape, bias.shape, g.dtype) == ((1, 2, 3), (2, 3), jnp.float32)
    assert (g[0, 1, 2], bias[1, 2]) == (1, -7)
    np.testing.assert_allclose(g[0, 0, 0], 1 / np.asarray(t[:, 0, 0], float).std(), rtol=RTOL)


def test_stored_is_a_node_in_the_place_of_each_kernel():
    link = reparam.weight_norm()
    stored, state = jax.jit(link.init)(PARAMS, jax.random.key(0))
    assert state == ()
    assert tree_lib.paths(stored) == [
        "conv/kernel/direction", "conv/kernel/length", "dense/bias", "dense/kernel/direction", "dense/kernel/length",
        "steps",
    ]  # fmt: skip
    seen = see(link, stored, state, is_training=True)
    assert jax.tree.structure(seen) == jax.tree.structure(PARAMS)
    np.testing.assert_allclose(seen["dense"]["kernel"], KERNEL, rtol=RTOL)
    np.testing.assert_array_equal(seen["dense"]["bias"], PARAMS["dense"]["bias"])
    assert_finishes_as_shown(link)


@pytest.mark.parametrize("tree", [{}, {"a": None}, jnp.float32(3), jnp.ones(4), jnp.ones((3, 1)), jnp.ones((1, 3))])
def test_awkward_trees(tree):
    link = reparam.weight_norm()
    stored, state = link.init(tree, None)
    # Lengths 1 and sqrt(3): roots and quotients of small numbers, one rounding each.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=RTOL), see(link, stored, state), tree)
    assert jax.tree.structure(link.finish(stored, state)) == jax.tree.structure(tree)


def test_axis_may_depend_on_the_leaf():
    def axis(path, leaf):
        name = tree_lib.path_str(path)
        return None if "conv" in name else (0 if leaf.ndim == 2 else -1)

    link = reparam.weight_norm(axis=axis)
    stored, _ = link.init(PARAMS, None)
    assert stored["dense"]["kernel"].length.shape == (8, 1)
    assert stored["conv"]["kernel"] is PARAMS["conv"]["kernel"]
    assert_finishes_as_shown(link)


def test_stacked_kernels_equal_one_call_for_each():
    stack = jax.random.normal(jax.random.key(2), (3, 8, 6))
    v, g = reparam.weight_norm_split(stack, axis=(0, -1))
    one_by_one = jax.vmap(reparam.weight_norm_split)(stack)
    np.testing.assert_array_equal(g, one_by_one[1])
    np.testing.assert_allclose(
        reparam.weight_norm_merge(v, g + 1, axis=(0, -1)), jax.vmap(reparam.weight_norm_merge)(v, g + 1), rtol=RTOL
    )


def masks_of(tree):
    return jax.tree.map(lambda x: jnp.arange(x.size).reshape(x.shape) % 3 > 0 if len(x) > 1 else None, tree)


DIRECTIONS = r".*/direction"
CHAINS = {
    "only": lambda: reparam.only(reparam.weight_norm(), r"dense/kernel"),
    "mask, norm": lambda: reparam.chain(reparam.masked(masks_of), reparam.weight_norm()),
    "veto, norm": lambda: reparam.chain(reparam.masked(masks_of, backward="chain"), reparam.weight_norm()),
    "norm, mask": lambda: reparam.chain(reparam.weight_norm(), reparam.masked(masks_of)),
    "nm, norm": lambda: reparam.chain(reparam.nm_sparse(2, 4, where=DIRECTIONS), reparam.weight_norm()),
    "norm, nm": lambda: reparam.chain(reparam.weight_norm(), reparam.nm_sparse(2, 4)),
    "norm, int8": lambda: reparam.chain(reparam.weight_norm(), reparam.fake_quant("int8")),
    "norm, nm, int8": lambda: reparam.chain(reparam.weight_norm(), reparam.nm_sparse(2, 4), reparam.fake_quant()),
    "nm, norm, int8": lambda: reparam.chain(
        reparam.nm_sparse(2, 4, where=DIRECTIONS), reparam.weight_norm(), reparam.fake_quant()
    ),
    "cast, norm": lambda: reparam.chain(reparam.cast(), reparam.weight_norm()),
    "norm, cast": lambda: reparam.chain(reparam.weight_norm(), reparam.cast()),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chains_finish_as_shown(name):
    params = {"dense": PARAMS["dense"]}
    kernel = assert_finishes_as_shown(CHAINS[name](), params)["dense"]["kernel"]
    assert isinstance(kernel, formats.NMSparse) == ("nm" in name)
    assert isinstance(getattr(kernel, "values", kernel), formats.Quantized) == ("int8" in name)


def test_masked_directions_stay_masked_and_their_masks_reach_the_optimizer():
    link = CHAINS["nm, norm"]()
    stored, state = link.init({"kernel": KERNEL}, None)
    masks = link.masks(stored, state, step=10**6)
    assert masks["kernel"].length is None
    seen = see(link, stored, state)["kernel"]
    np.testing.assert_array_equal(seen != 0, masks["kernel"].direction)
    # The length is that of the kernel before it was masked: what stays is scaled up to it.
    np.testing.assert_allclose(np.linalg.norm(seen, axis=0), np.linalg.norm(KERNEL, axis=0), rtol=RTOL)


@pytest.mark.parametrize(
    ("link", "text"),
    [
        (reparam.chain(reparam.weight_norm(), reparam.weight_norm()), "kernel is weight-normalized already"),
        (reparam.weight_norm(axis=2), r"kernel: axis 2 .*\(8, 6\)"),
        (reparam.chain(reparam.nm_sparse(2, 4), reparam.weight_norm()), "kernel/direction"),
        (reparam.chain(reparam.weight_norm(), reparam.masked(masks_of, backward="chain")), "Put link 1 first"),
        (reparam.chain(reparam.weight_norm(), reparam.fake_quant(method="lsq")), "Put link 1 first"),
    ],
)
def test_refuses_at_init(link, text):
    with pytest.raises(ValueError, match=text):
        link.init({"kernel": KERNEL}, None)


@pytest.mark.parametrize(
    ("before", "axis"),
    [
        (reparam.fake_quant(where=DIRECTIONS), -1),
        (reparam.fake_quant(where=DIRECTIONS, method="lsq"), -1),
        (reparam.nm_sparse(2, 4, where=DIRECTIONS), 0),
    ],
)
def test_finish_refuses_directions_that_it_cannot_scale(before, axis):
    link = reparam.chain(before, reparam.weight_norm(axis=axis))
    stored, state = link.init({"kernel": KERNEL}, None)
    with pytest.raises(ValueError, match=r"kernel: its direction.*Put weight_norm before"):
        link.finish(stored, state)


def test_refuses_shapes():
    with pytest.raises(ValueError, match=r"g of shape \(6,\).*\(8, 6\).*\(1, 6\)"):
        reparam.weight_norm_merge(KERNEL, jnp.ones(6))
    with pytest.raises(ValueError, match=r"axis 3.*\(8, 6\)"):
        reparam.weight_norm_split(KERNEL, axis=3)
    with pytest.raises(ValueError, match=r"\(4, 5\).*\(6,\).*\(8, 6\)"):
        reparam.weight_norm_data_init(KERNEL, jnp.ones((4, 5)))


def test_decay_of_the_lengths_alone():
    link = reparam.weight_norm()
    stored, _ = link.init({"dense": PARAMS["dense"]}, None)
    tx = optax.add_decayed_weights(0.5, mask=lambda p: tree_lib.select(p, ".*/length"))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, stored), tx.init(stored), stored)
    np.testing.assert_array_equal(updates["dense"]["kernel"].length, 0.5 * stored["dense"]["kernel"].length)
    assert not np.any(updates["dense"]["kernel"].direction)


def make_state():
    return train.init_state(
        {"dense": PARAMS["dense"]}, optax.adam(0.1), rng=jax.random.key(1), reparam=reparam.weight_norm()
    )


def test_a_rule_for_the_kernel_places_both_parts(tmp_path):
    """On a mesh of 2 x 2 the direction is cut in four and the length, with one row, in two; as are their moments."""
    mesh = sharding.make_mesh({"fsdp": 2, "tensor": 2}, devices=jax.devices()[:4])
    rule_set = rules.RuleSet(((r".*kernel", ("fsdp", "tensor")),))
    shapes = jax.eval_shape(make_state)
    shardings = sharding.state_shardings(shapes, rule_set, mesh, optax.adam(0.1), min_size=0)
    for tree in (shardings.params, shardings.opt_state[0].mu):
        node = tree["dense"]["kernel"]
        assert node.direction.spec == jax.P("fsdp", "tensor")
        assert node.length.spec == jax.P(None, "tensor")
    link, state = reparam.weight_norm(), jax.jit(make_state, out_shardings=shardings)()
    np.testing.assert_allclose(see(link, state.params, ())["dense"]["kernel"], KERNEL, rtol=RTOL)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state)
        restored, _ = checkpoints.restore(sharding.with_shardings(shapes, shardings))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for a, b in zip(jax.tree.leaves(restored.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_trains_in_a_step_that_compiles_once():
    def forward(params, batch, *, rng, train):
        return batch["x"] @ params["dense"]["kernel"] + params["dense"]["bias"]

    link, tx = reparam.weight_norm(), optax.adam(0.1)
    step = train.make_step(forward, lambda out, batch: {"fit": jnp.mean((out - batch["y"]) ** 2, -1)}, tx, reparam=link)
    jitted = jax.jit(step)
    state = make_state()
    batch = {"x": jnp.eye(8), "y": jnp.zeros((8, 6))}
    first = None
    for _ in range(5):
        state, metrics = jitted(state, batch)
        first = metrics["loss"] if first is None else first
    assert metrics["loss"] < first
    assert jitted._cache_size() == 1


def test_in_float64():
    with jax.enable_x64(True):
        w = np.random.default_rng(0).normal(size=(8, 6))
        v, g = reparam.weight_norm_split(w)
        assert g.dtype == jnp.float64
        # A dozen roundings of 2^-53.
        np.testing.assert_allclose(reparam.weight_norm_merge(v, g), w, rtol=1e-14)
