"""Low-bit state: the grids, the dither, a trajectory beside that of the float state, bytes and sharding."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from steelyard import data, formats, optim, tree

SHAPE = (64, 64)


def keep():
    """A rule whose state is its last gradient, so that the stored state shows what became of a given array."""
    return optax.GradientTransformation(lambda p: jax.tree.map(jnp.zeros_like, p), lambda u, s, p=None: (u, u))


def jitted(tx):
    """Both functions compiled: op by op, the start alone would be a hundred small programs."""
    return tx._replace(init=jax.jit(tx.init), update=jax.jit(tx.update))


@functools.cache
def stored_by(bits, **options):
    return jitted(optim.low_bit_state(keep(), bits=bits, **options))


def values(leaf):
    """A stored leaf in float64, from its codes: those of 4 bits are signed square roots."""
    codes = np.asarray(leaf.unpacked().astype(jnp.float32), np.float64)
    scale = np.asarray(leaf.scale, np.float64)
    zero = np.zeros_like(scale) if leaf.zero_point is None else np.asarray(leaf.zero_point, np.float64)
    repeat = [n // m for n, m in zip(leaf.shape, scale.shape, strict=True)]
    dense = (codes - np.kron(zero, np.ones(repeat))) * np.kron(scale, np.ones(repeat))
    return dense * np.abs(dense) if leaf.format == "int4" else dense


def round_trips(x, bits, steps, **options):
    """What is stored of x in each of so many updates, [steps, ...]."""
    tx = stored_by(bits, **options)
    state, rows = tx.init(x), []
    for _ in range(steps):
        _, state = tx.update(x, state, x)
        rows.append(values(state.inner_state))
    return np.stack(rows)


def neighbours(x, bits):
    """The grid's values around each entry, in float64; with 4 bits a column shares a scale."""
    x = np.asarray(x, np.float64)
    if bits == 8:
        step = 2.0 ** (np.floor(np.log2(np.abs(x))) - 2)
        return np.floor(x / step) * step, np.ceil(x / step) * step
    top = 15 if (x >= 0).all() else 7
    scale = 2.0 ** np.ceil(np.log2(np.sqrt(np.abs(x).max(0)) / top))
    root = np.floor(np.sqrt(np.abs(x)) / scale)
    ends = (np.stack([root, root + 1]) * scale) ** 2
    signed = np.sign(x) * ends
    return signed.min(0), signed.max(0)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("is_squared", [False, True])
def test_values_are_dithered_between_their_neighbours(bits, is_squared):
    """Each is a neighbour, and their mean over 64 updates is the value, up to six standard errors of such a coin."""
    x = jax.random.normal(jax.random.key(0), SHAPE)
    x = x**2 + 1e-3 if is_squared else x
    stored = round_trips(x, bits, 64)
    low, high = neighbours(x, bits)
    # Nothing is stored as zero in a block of one sign, so that its values below the first step are on it.
    is_forced = (bits == 4) & is_squared & (low == 0)
    low = np.where(is_forced, high, low)
    assert np.all((np.isclose(stored, low, rtol=1e-6)) | (np.isclose(stored, high, rtol=1e-6)))
    share = np.where(is_forced | (low == high), 0, (stored - np.asarray(x)) / np.where(low == high, 1, high - low))
    assert np.abs(share.mean(0)).max() <= 6 * 0.5 / 8
    assert np.abs(share.mean()) <= 6 * 0.5 / np.sqrt(share.size)


@pytest.mark.parametrize("bits", [8, 4])
def test_nothing_positive_becomes_zero_and_zero_stays(bits):
    x = jnp.full(SHAPE, 1e-12).at[0].set(1.0).at[1].set(0.0)
    stored = round_trips(x, bits, 5)
    assert np.all(stored[:, 2:] > 0)
    assert np.all(stored[:, 1] == 0)
    np.testing.assert_allclose(stored[:, 0], 1.0)


@pytest.mark.parametrize(("bits", "bias", "spread"), [(8, 0.02, 1.4), (4, 0.15, 2.2)])
def test_a_slow_average_keeps_moving(bits, bias, spread):
    """Each update moves it by 0.1% of the way, far less than half a step: to nearest it would stay where it began.

    On the grid, a fraction of 0.1% |g^2 - v| / step of the updates moves it by a step. So it wanders around v as a
    diffusion of variance about v step / 2: with 8 bits (step v / 4) sqrt(v) by a tenth or two, with 4 bits by a third
    in the middle of the grid and more below. Limits for the mean of sqrt(v) and for 98% of its entries.
    """
    tx = optim.low_bit_state(optax.scale_by_adam(b2=0.999), bits=bits)
    g = jax.random.normal(jax.random.key(1), SHAPE) ** 2 + 0.5

    @jax.jit
    def run(g):
        return jax.lax.fori_loop(0, 3000, lambda _, state: tx.update(g, state, g)[1], tx.init(g))

    ratio = np.sqrt(values(run(g).inner_state.nu) / (np.asarray(g, np.float64) ** 2 * (1 - 0.999**3000)))
    assert abs(ratio.mean() - 1) < bias
    assert np.mean((ratio < spread) & (ratio > 1 / spread)) > 0.98


@pytest.mark.parametrize("factor", [1e-4, 1e4])
def test_scales_follow_the_gradient(factor):
    """Growth is noticed at once; a fall when scales are next measured, and is bridged by 22 octaves until then."""
    tx = stored_by(8)
    x = jax.random.normal(jax.random.key(2), SHAPE)
    state = tx.init(x)
    for scale in [1.0] * 3 + [factor] * 40:
        _, state = tx.update(scale * x, state, x)
    np.testing.assert_allclose(values(state.inner_state), factor * np.asarray(x), rtol=0.25)
    assert 2.0**8 <= float(jnp.abs(factor * x).max() / state.inner_state.scale[0, 0]) < 2.0**9 * 1.25


def digits_problem():
    source = data.load("digits")
    x, y = source.columns[source.info.input], source.columns[source.info.label]
    x, y = jnp.asarray(x.reshape(len(x), -1)), jnp.asarray(y)
    keys = jax.random.split(jax.random.key(3), 2)
    params = {"in": jax.random.normal(keys[0], (64, 128)) / 6, "out": jax.random.normal(keys[1], (128, 10)) / 8}

    def loss(params, step):
        rows = jax.lax.dynamic_slice_in_dim(jnp.arange(1280), (step * 128) % 1280, 128)
        logits = jax.nn.relu(x[rows] @ params["in"]) @ params["out"]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y[rows]))

    return params, loss


@functools.cache
def trained(bits):
    """Parameters before and after 200 steps of Adam, and the mean loss of the last epoch of 10 steps."""
    params, loss = digits_problem()
    adam = optax.adam(3e-3)
    tx = adam if bits is None else optim.low_bit_state(adam, bits=bits, min_size=1000)

    def step(carry, i):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params, i)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), value

    (after, _), losses = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), jnp.arange(200)))(params)
    return params, after, float(losses[-10:].mean())


@pytest.mark.parametrize(("bits", "distance", "factor"), [(8, 0.25, 1.1), (4, 0.75, 2.0)])
def test_adam_stays_near_the_float_state(bits, distance, factor):
    """Distance of the parameters from those of the float state, by how far these moved; and the final loss.

    The direction m / sqrt(v) is off by about a tenth of itself in each step with 8 bits (a quarter of an octave is a
    step, dithered), and by about a half with 4 bits; the errors of different steps and entries are independent.
    """
    start, exact, exact_loss = trained(None)
    _, after, loss = trained(bits)
    apart, moved = (optax.tree.norm(optax.tree.sub(x, exact)) for x in (after, start))
    print(f"{bits} bits: distance {apart / moved:.3f}, loss {loss:.4f} (float {exact_loss:.4f})")
    assert apart / moved < distance
    assert loss < factor * exact_loss


def transformer_like():
    return {"a": jnp.ones((256, 512)), "b": jnp.ones((512, 128)), "bias": jnp.ones(512), "none": None}


@pytest.mark.parametrize(("bits", "share"), [(8, 0.26), (4, 0.13)])
def test_bytes_of_the_state(bits, share):
    """8 bits: 1 of 4 bytes. 4 bits: half a byte, and 2 bytes of scale and 1 of zero point a column of 256 or 512."""
    params = transformer_like()
    low, full = optim.low_bit_state(optax.adamw(1e-3), bits=bits), optax.adamw(1e-3)
    assert tree.nbytes(jax.eval_shape(low.init, params)) < share * tree.nbytes(jax.eval_shape(full.init, params))

    def arguments(tx):
        compiled = jax.jit(tx.update).lower(params, jax.eval_shape(tx.init, params), params).compile()
        return compiled.memory_analysis().argument_size_in_bytes - 2 * tree.nbytes(params)

    assert arguments(low) < share * arguments(full)


@pytest.mark.parametrize("bits", [8, 4])
def test_structure_is_kept_and_compiled_once(bits):
    params = {"a": jnp.ones((256, 512)), "half": jnp.ones((64, 128), jnp.bfloat16), "bias": jnp.ones(512)}
    params |= {"scalar": jnp.ones(()), "none": None}
    tx = jitted(optim.low_bit_state(optax.trace(0.9), bits=bits))
    state = tx.init(params)
    moments = state.inner_state.trace
    assert moments["none"] is None
    assert [formats.is_weight(moments[k]) for k in ("a", "half", "bias", "scalar")] == [True, True, False, False]
    assert moments["a"].shape == (256, 512)
    assert moments["half"].dtype == jnp.bfloat16
    updates, after = tx.update(params, state, params)
    tx.update(params, after, params)
    assert tx.update._cache_size() == 1
    assert updates["half"].dtype == jnp.bfloat16
    assert updates["none"] is None


def test_leaves_that_mirror_no_parameter_stay():
    """A table that the rule keeps for itself is as large as a moment, but not one."""

    def init(params):
        return {
            "moment": jax.tree.map(jnp.zeros_like, params),
            "table": jnp.ones(SHAPE),
            "count": jnp.zeros(SHAPE, int),
        }

    tx = optim.low_bit_state(optax.GradientTransformation(init, lambda u, s, p=None: (u, s)))
    state = jax.jit(tx.init)(jnp.ones(SHAPE)).inner_state
    assert [formats.is_weight(state[name]) for name in ("moment", "table", "count")] == [True, False, False]


def test_empty_and_small_trees_are_the_inner_rule():
    for params in ({}, jnp.ones(()), {"a": None, "b": jnp.ones(3)}):
        tx, plain = optim.low_bit_state(optax.adam(0.1)), optax.adam(0.1)
        updates, _ = jax.jit(lambda p, tx=tx: tx.update(p, tx.init(p), p))(params)
        expected, _ = jax.jit(lambda p, tx=plain: tx.update(p, tx.init(p), p))(params)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)


@pytest.mark.parametrize(("bits", "block"), [(8, None), (8, 32), (4, None), (4, 32)])
def test_awkward_shapes(bits, block):
    """Blocks that do not divide, two rows, an odd axis -2 (not packed), convolutions."""
    shapes = [(4096,), (4099, 2), (3, 3, 16, 32), (2, 4096), (65, 64)]
    xs = [jax.random.normal(jax.random.key(i), shape) for i, shape in enumerate(shapes)]
    tx = stored_by(bits, block=block)
    _, state = tx.update(xs, tx.init(xs), xs)
    for x, leaf in zip(xs, state.inner_state, strict=True):
        assert leaf.shape == x.shape
        assert leaf.scale.size <= x.size / 16
        # The widest step is that from 6/7 of the root to all of it, on a scale that may be twice as long.
        assert np.abs(values(leaf) - np.asarray(x)).max() <= (0.25 if bits == 8 else 0.5) * float(jnp.abs(x).max())


def test_blocks_of_very_different_sizes_keep_their_digits_with_8_bits():
    """Rows of a table that are hardly ever touched: below 22 octaves one scale for the leaf cannot tell them apart."""
    x = jax.random.normal(jax.random.key(6), SHAPE).at[:32].multiply(1e-12)
    whole, blocks = (round_trips(x, 8, 3, block=block)[-1] for block in (None, 32))
    x = np.asarray(x, np.float64)
    assert np.all(np.abs(whole[:32]) > 2 * np.abs(x[:32]))
    np.testing.assert_allclose(blocks, x, rtol=0.25)


@pytest.mark.parametrize(
    ("shape", "block", "scales"),
    [
        ((128, 64), None, (1, 64)),
        ((128, 64), 32, (4, 64)),
        ((120, 64), 32, (4, 64)),  # 30 is the largest divisor of 120 up to 32
        ((127, 64), 32, (1, 64)),  # a prime: all of it
        ((8, 1024), 32, (8, 32)),
        ((4096,), 32, (128,)),
        ((4096,), None, (1,)),
    ],
)
def test_blocks(shape, block, scales):
    tx = optim.low_bit_state(keep(), bits=4, block=block)
    assert jax.eval_shape(tx.init, jnp.ones(shape)).inner_state.scale.shape == scales
    if block is not None:
        tx = optim.low_bit_state(keep(), bits=8, block=block)
        assert jax.eval_shape(tx.init, jnp.ones(shape)).inner_state.scale.shape == scales


def test_what_is_not_finite_stays_so():
    x = jnp.ones(SHAPE)
    tx = stored_by(8)
    _, state = tx.update(x, tx.init(x), x)
    _, state = tx.update(x.at[3, 3].set(jnp.nan).at[4, 4].set(-jnp.inf), state, x)
    stored = values(state.inner_state)
    assert np.all(np.isnan(stored[[3, 4], [3, 4]]))
    assert np.isnan(stored).sum() == 2


def test_extra_arguments_reach_the_inner_rule():
    def update(updates, state, params=None, *, factor):
        return jax.tree.map(lambda u: factor * u, updates), state

    tx = optim.low_bit_state(optax.GradientTransformationExtraArgs(lambda p: p, update))
    p = jnp.ones(SHAPE)
    update = jax.jit(lambda p: tx.update(p, tx.init(p), p, factor=3.0)[0])
    np.testing.assert_array_equal(update(p), 3.0)


def test_map_params_sees_codes_as_parameters():
    params = {"a": jnp.ones(SHAPE), "b": jnp.ones(3)}
    tx = optim.low_bit_state(optax.adam(0.1))
    state = jax.eval_shape(tx.init, params)
    kinds = optax.tree.map_params(tx, lambda _: "parameter", state, transform_non_params=lambda _: "other")
    assert kinds.inner_state[0].mu["a"].codes == kinds.inner_state[0].mu["b"] == "parameter"
    assert (kinds.count, kinds.norms, kinds.inner_state[0].count) == ("other",) * 3


def test_composes_with_masked_rules_and_inner_wrappers():
    params = {"a": jnp.ones(SHAPE), "b": jnp.ones(SHAPE)}
    masks = {"a": jnp.arange(64 * 64).reshape(SHAPE) % 2 == 0, "b": None}
    tx = optim.low_bit_state(optim.sparse(optax.masked(optax.adam(0.1), {"a": True, "b": False})))
    state = jax.jit(tx.init)(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(params, state, params, masks=masks)
    assert np.all((np.asarray(updates["a"]) != 0) == np.asarray(masks["a"]))
    assert np.all((values(state.inner_state.inner_state[0].nu["a"]) != 0) == np.asarray(masks["a"]))


def test_vmap_equals_a_loop():
    xs = jax.random.normal(jax.random.key(5), (2, *SHAPE))
    tx = optim.low_bit_state(optax.adam(0.1))

    def run(x):
        state = tx.init(x)
        for scale in (1.0, 0.5):
            updates, state = tx.update(scale * x, state, x)
        return updates

    together, alone = jax.jit(jax.vmap(run))(xs), jax.jit(run)
    # The moments are the same but for the last bit of the average, which may tip a rounding of one entry in 2^21.
    for row, x in zip(together, xs, strict=True):
        assert np.mean(np.isclose(row, alone(x), rtol=1e-5)) > 0.999


def test_a_checkpoint_restores_the_state(tmp_path):
    params = {"a": jnp.ones(SHAPE), "b": jnp.ones(3)}
    for bits in (8, 4):
        tx = jitted(optim.low_bit_state(optax.adam(0.1), bits=bits))
        _, state = tx.update(params, tx.init(params), params)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / str(bits), state)
            checkpointer.wait_until_finished()
            restored = checkpointer.restore(tmp_path / str(bits), jax.eval_shape(lambda s: s, state))
        jax.tree.map(np.testing.assert_array_equal, restored, state)


@pytest.mark.parametrize(("bits", "block"), [(8, None), (8, 32), (4, None), (4, 32)])
def test_sharded_state_follows_its_parameter(bits, block):
    """Codes are sharded as the parameter, nothing is gathered, and the codes are those of one device."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, PartitionSpec("x", "y"))
    tx = optim.low_bit_state(optax.scale_by_adam(), bits=bits, block=block)
    grads = jax.random.normal(jax.random.key(6), (256, 128))
    placed = jax.device_put(grads, sharding)
    alone, state = tx.init(grads), tx.init(placed)
    assert state.inner_state.nu.codes.sharding.is_equivalent_to(sharding, 2)
    update = jax.jit(tx.update)
    _, alone = update(grads, alone, grads)
    compiled = update.lower(placed, state, placed).compile()
    _, state = compiled(placed, state, placed)
    for kind in ("mu", "nu"):
        mine, theirs = (getattr(s.inner_state, kind) for s in (state, alone))
        assert mine.codes.sharding.is_equivalent_to(sharding, 2)
        np.testing.assert_array_equal(values(mine), values(theirs))
    text = compiled.as_text()
    assert not any(word in text for word in ("all-gather", "all-to-all", "collective-permute"))


def test_under_shard_map():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = optim.low_bit_state(optax.sgd(0.1, momentum=0.9))
    x = jax.random.normal(jax.random.key(7), (8 * 64, 64))

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=PartitionSpec("x"), out_specs=PartitionSpec("x"))
    def run(x):
        return tx.update(x, tx.init(x), x)[0]

    np.testing.assert_allclose(jax.jit(run)(x), -0.1 * x, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(bits=5), "bits=5 is not one of 8, 4"),
        (dict(bits="8"), "bits='8' is not one of 8, 4"),
        (dict(block=0), r"block=0 must lie in \[1, inf\)"),
        (dict(min_size=0), r"min_size=0 must lie in \[1, inf\)"),
    ],
)
def test_bad_arguments(options, words):
    with pytest.raises(ValueError, match=words):
        optim.low_bit_state(optax.adam(0.1), **options)


def test_thresholds_are_uniform_and_independent():
    """Correlations of 64 x 64 x 64 thresholds with those one update, row and column on, and their moments."""
    # Half a step above a value of the grid: the threshold decides alone, and is seen through its upper bit.
    ups = round_trips(jnp.full(SHAPE, 1.125), 8, 64) > 1.2
    limit = 5 / np.sqrt(ups.size)
    assert abs(2 * ups.mean() - 1) < limit
    signs = np.where(ups, 1.0, -1.0)
    for axis in range(3):
        assert abs((signs * np.roll(signs, 1, axis)).mean()) < limit
    tx, x = stored_by(8), {"b": jnp.full(SHAPE, 1.125)}
    _, state = tx.update(x, tx.init(x), x)
    assert abs((signs[0] * np.where(values(state.inner_state["b"]) > 1.2, 1, -1)).mean()) < 5 / 64
