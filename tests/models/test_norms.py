"""Root mean square and ghost batch normalization against their formulas and Flax."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from steelyard import models
from tests.models.helpers import KEY, normal

# A mean of up to 64 squares in float32, a root and a product: a few times 2^-24, well below 2e-6.
TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}


def numpy_rms_norm(x, fraction=1.0, epsilon=1e-8):
    x = np.asarray(x, np.float64)
    count = int(np.ceil(fraction * x.shape[-1] - 1e-9))
    return x / np.sqrt(np.mean(x[..., :count] ** 2, axis=-1, keepdims=True) + epsilon)


def test_worked_case():
    # (3, 4): the mean square is (9 + 16) / 2, so y = x / sqrt(12.5).
    expected = np.array([3.0, 4.0]) / np.sqrt(12.5)
    np.testing.assert_allclose(models.rms_norm(jnp.array([3.0, 4.0])), expected, **TOLERANCE)


@settings(max_examples=20, deadline=None)
@given(d=st.sampled_from((1, 7, 32)), fraction=st.sampled_from((0.01, 0.3, 1.0)), seed=st.integers(0, 99))
def test_equals_the_formula_in_float64(d, fraction, seed):
    # The worst amplification is a first feature near 0 with fraction * d <= 1: y is then large, and so is its error.
    x = normal(3, d, seed=seed)
    np.testing.assert_allclose(models.rms_norm(x, fraction=fraction), numpy_rms_norm(x, fraction), rtol=1e-5)


def test_a_product_just_above_an_integer_counts_no_extra_feature():
    assert 0.1 * 3 * 10 > 3  # In floating point.
    x = normal(10)
    np.testing.assert_allclose(models.rms_norm(x, fraction=0.1 * 3), numpy_rms_norm(x, 0.3), **TOLERANCE)
    np.testing.assert_allclose(
        models.rms_norm(x, fraction=0.1 * 3), x / np.sqrt(np.mean(np.square(x[:3])) + 1e-8), **TOLERANCE
    )


def test_at_least_one_feature_is_counted():
    x = normal(4, 5)
    y = models.rms_norm(x, fraction=1e-12)
    np.testing.assert_allclose(y, x / np.abs(x[:, :1]), rtol=1e-5)


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5, float("nan")])
def test_fraction_outside_its_range(fraction):
    with pytest.raises(ValueError, match=r"fraction=.* must lie in \(0, 1\]"):
        models.rms_norm(jnp.ones(3), fraction=fraction)
    with pytest.raises(ValueError, match=r"fraction=.* must lie in \(0, 1\]"):
        models.RMSNorm(fraction=fraction)


@pytest.mark.parametrize("name", ["scale", "bias"])
def test_affine_of_the_wrong_length(name):
    with pytest.raises(ValueError, match=rf"{name} has shape \(2,\), but x has shape \(4, 3\)"):
        models.rms_norm(jnp.ones((4, 3)), **{name: jnp.ones(2)})


@pytest.mark.parametrize("fraction", [1.0, 0.25])
@pytest.mark.parametrize("factor", [1e-2, 3.0, 1e4])
def test_invariant_to_a_positive_factor(fraction, factor):
    # epsilon = 1e-8 beside a mean square of about 1e-4 changes the result by 5e-5 of itself.
    x = normal(6, 32)
    y = models.rms_norm(x, fraction=fraction)
    np.testing.assert_allclose(models.rms_norm(factor * x, fraction=fraction), y, rtol=2e-4)


def test_equals_flax():
    x, scale = normal(5, 16), normal(16, seed=2)
    ours, theirs = models.RMSNorm(), nn.RMSNorm(epsilon=1e-8)
    variables = {"params": {"scale": scale}}
    assert jax.tree.map(jnp.shape, ours.init(jax.random.key(0), x)) == {"params": {"scale": (16,)}}
    np.testing.assert_allclose(ours.apply(variables, x), theirs.apply(variables, x), **TOLERANCE)


def test_equals_layer_norm_on_centred_inputs():
    x = normal(5, 16)
    x = x - x.mean(-1, keepdims=True)
    layer = nn.LayerNorm(epsilon=1e-8, use_scale=False, use_bias=False, use_fast_variance=False)
    np.testing.assert_allclose(models.rms_norm(x), layer.apply({}, x), rtol=1e-5, atol=1e-5)


def test_gradient_is_orthogonal_to_the_input():
    x, weights = normal(7, 12), normal(7, 12, seed=2)
    grads = jax.grad(lambda x: jnp.sum(weights * models.rms_norm(x)))(x)
    cosine = jnp.sum(grads * x, -1) / jnp.linalg.norm(grads, axis=-1) / jnp.linalg.norm(x, axis=-1)
    # y(c x) = y(x) up to epsilon = 1e-8, so the derivative along x vanishes up to rounding.
    np.testing.assert_allclose(cosine, 0, atol=1e-6)


@pytest.mark.parametrize("fraction", [1.0, 0.1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_zero_vector_gives_the_bias_and_a_finite_gradient(fraction, dtype):
    x, bias = jnp.zeros((2, 5), dtype), jnp.arange(5.0)
    np.testing.assert_array_equal(models.rms_norm(x, None, bias, fraction=fraction), np.tile(bias, (2, 1)))
    grads = jax.grad(lambda x: models.rms_norm(x, fraction=fraction).astype(jnp.float32).sum())(x)
    assert bool(jnp.all(jnp.isfinite(grads)))


def test_one_feature_gives_the_sign():
    # epsilon = 1e-8 beside 0.04, the smallest square.
    np.testing.assert_allclose(models.rms_norm(jnp.array([[-2.0], [0.2], [0.0]])), [[-1], [1], [0]], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_inputs_are_reduced_in_float32(dtype):
    # In float16, 300^2 overflows; in bfloat16, a sum of 512 ones stops growing at 256.
    for x in (jnp.full((512,), 300.0, dtype), jnp.ones((512,), dtype)):
        y = models.rms_norm(x)
        assert y.dtype == dtype
        np.testing.assert_array_equal(y.astype(jnp.float32), np.ones(512))


def test_only_live_features_count():
    x, where = normal(3, 8), jnp.arange(8) < 5
    y = models.rms_norm(x, where=where)
    np.testing.assert_allclose(y[:, :5], models.rms_norm(x[:, :5]), **TOLERANCE)
    np.testing.assert_array_equal(y[:, 5:], 0)
    np.testing.assert_array_equal(models.rms_norm(x, where=jnp.zeros(8, bool)), 0)


def test_module_parameters_and_result_dtype():
    x = normal(2, 6).astype(jnp.bfloat16)
    module = models.RMSNorm(use_bias=True, dtype=jnp.float32)
    variables = module.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables["params"]) == {"bias": (6,), "scale": (6,)}
    y = module.apply(variables, x)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, numpy_rms_norm(x), **TOLERANCE)
    assert models.RMSNorm().apply({"params": {"scale": jnp.ones(6)}}, x).dtype == jnp.bfloat16


def test_module_without_parameters():
    module = models.RMSNorm(use_scale=False)
    assert not module.init(jax.random.key(0), jnp.ones((2, 3)))


def test_jit_and_vmap():
    x = normal(4, 6)
    y = models.rms_norm(x, fraction=0.5)
    np.testing.assert_allclose(jax.jit(lambda x: models.rms_norm(x, fraction=0.5))(x), y, **TOLERANCE)
    np.testing.assert_allclose(jax.vmap(lambda x: models.rms_norm(x, fraction=0.5))(x), y, **TOLERANCE)


def test_float64_stays_float64():
    with jax.enable_x64(True):
        x = np.random.default_rng(0).normal(size=(3, 8))
        y = models.rms_norm(jnp.asarray(x), fraction=0.5)
        assert y.dtype == jnp.float64
        np.testing.assert_allclose(y, numpy_rms_norm(x, 0.5), rtol=1e-14)


def test_learned_scale_and_bias():
    x, scale, bias = normal(3, 5), normal(5, seed=2), normal(5, seed=3)
    expected = numpy_rms_norm(x) * np.asarray(scale, np.float64) + np.asarray(bias, np.float64)
    np.testing.assert_allclose(models.rms_norm(x, scale, bias), expected, **TOLERANCE)


def ghost(x, *, train=True, ghost_size=4, stats=None, **options):
    """Output and new statistics of a module with scale and bias that are not 1 and 0."""
    module = models.GhostBatchNorm(ghost_size=ghost_size, **options)
    variables = {"params": AFFINE, "batch_stats": STATS if stats is None else stats}
    y, new = jax.jit(lambda v, x: module.apply(v, x, not train, mutable=["batch_stats"]))(variables, x)
    return y, new["batch_stats"]


AFFINE = {"scale": normal(3, seed=4), "bias": normal(3, seed=5)}
STATS = {"mean": normal(3, seed=6), "var": jnp.exp(normal(3, seed=7))}


def numpy_ghost(x, ghost_size, momentum=0.9, epsilon=1e-5):
    """Batch normalization of one chunk after the other, in float64."""
    x, scale, bias, mean, var = (
        np.asarray(a, np.float64) for a in (x, AFFINE["scale"], AFFINE["bias"], STATS["mean"], STATS["var"])
    )
    outputs = []
    for start in range(0, len(x), ghost_size):
        chunk = x[start : start + ghost_size]
        flat = chunk.reshape(-1, chunk.shape[-1])
        outputs.append((chunk - flat.mean(0)) / np.sqrt(flat.var(0) + epsilon) * scale + bias)
        mean = momentum * mean + (1 - momentum) * flat.mean(0)
        var = momentum * var + (1 - momentum) * flat.var(0)
    return np.concatenate(outputs), {"mean": mean, "var": var}


# A mean of a few dozen products, a division by a deviation near 1, and momentum: a few times 2^-24.
GHOST_TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def assert_close(ours, theirs):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **GHOST_TOLERANCE), ours, theirs)


@pytest.mark.parametrize("shape", [(12, 3), (8, 2, 3), (4, 2, 5, 3)])
@pytest.mark.parametrize("momentum", [0.9, 0.0, 1.0])
def test_ghost_equals_batch_normalization_chunk_by_chunk(shape, momentum):
    x = 2 * normal(*shape) + 1
    assert_close(ghost(x, momentum=momentum), numpy_ghost(x, 4, momentum))


@pytest.mark.parametrize("ghost_size", [8, 100])
def test_one_group_equals_flax(ghost_size):
    """As large as the batch, or larger."""
    x = normal(8, 2, 3)
    flax = nn.BatchNorm(use_running_average=False, momentum=0.8, use_fast_variance=False)
    expected, new = flax.apply({"params": AFFINE, "batch_stats": STATS}, x, mutable=["batch_stats"])
    assert_close(ghost(x, ghost_size=ghost_size, momentum=0.8), (expected, new["batch_stats"]))


def test_many_groups_equal_flax_chunk_by_chunk():
    x, stats, outputs = normal(12, 3), STATS, []
    flax = nn.BatchNorm(use_running_average=False, momentum=0.9, use_fast_variance=False)
    for chunk in jnp.split(x, 3):
        y, new = flax.apply({"params": AFFINE, "batch_stats": stats}, chunk, mutable=["batch_stats"])
        outputs, stats = [*outputs, y], new["batch_stats"]
    assert_close(ghost(x), (jnp.concatenate(outputs), stats))


def test_evaluation_uses_and_keeps_the_running_statistics():
    # The number of examples need not be a multiple of anything.
    x = normal(7, 3)
    y, stats = ghost(x, train=False)
    expected = (x - STATS["mean"]) / np.sqrt(STATS["var"] + 1e-5) * AFFINE["scale"] + AFFINE["bias"]
    assert_close(y, expected)
    jax.tree.map(np.testing.assert_array_equal, stats, STATS)


def test_permuting_inside_a_group_permutes_the_output():
    x, order = normal(12, 3), np.array([2, 0, 3, 1, 4, 5, 6, 7, 11, 10, 9, 8])
    (y, stats), (permuted, same) = ghost(x), ghost(x[order])
    assert_close(permuted, y[order])
    assert_close(same, stats)


def test_each_group_has_the_bias_as_mean_and_the_scale_as_deviation():
    y = np.asarray(ghost(100 * normal(12, 2, 3) + 7)[0]).reshape(3, 8, 3)
    np.testing.assert_allclose(y.mean(1), np.tile(AFFINE["bias"], (3, 1)), **GHOST_TOLERANCE)
    np.testing.assert_allclose(y.std(1), np.tile(np.abs(AFFINE["scale"]), (3, 1)), rtol=1e-4)


def test_initialisation_leaves_the_statistics():
    for x in (normal(8, 3), normal(1, 3)):
        variables = models.GhostBatchNorm(ghost_size=4).init(KEY, x)
        np.testing.assert_array_equal(variables["batch_stats"]["mean"], np.zeros(3))
        np.testing.assert_array_equal(variables["batch_stats"]["var"], np.ones(3))
        assert jax.tree.map(jnp.shape, variables["params"]) == {"scale": (3,), "bias": (3,)}
    bare = models.GhostBatchNorm(ghost_size=4, use_scale=False, use_bias=False)
    assert set(bare.init(KEY, normal(8, 3))) == {"batch_stats"}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_ghost_statistics_of_half_precision_are_float32(dtype):
    """Sums over 2^14 examples, which in bfloat16 would stop growing and in float16 overflow.

    The last feature is 3 and 3 + 2^-6: its mean, 3 + 2^-7, is no bfloat16 number, and its variance is 2^-14.
    """
    x = jnp.tile(jnp.asarray([[2.0, 4.0, 3.0], [4.0, 2.0, 3 + 2.0**-6]], dtype), (2**13, 1))
    y, stats = ghost(x, ghost_size=2**14, momentum=0.0)
    assert (y.dtype, stats["mean"].dtype, stats["var"].dtype) == (dtype, jnp.float32, jnp.float32)
    np.testing.assert_allclose(stats["mean"], [3.0, 3.0, 3 + 2.0**-7], rtol=1e-6)
    np.testing.assert_allclose(stats["var"], [1.0, 1.0, 2.0**-14], rtol=1e-3)
    # Rounded once, to at least 8 bits.
    np.testing.assert_allclose(y[:2].astype(jnp.float32), numpy_ghost(x[:2], 2)[0], rtol=2**-8)
    assert ghost(x[:4], dtype=jnp.float32)[0].dtype == jnp.float32


def test_ghost_gradient_passes_through_the_statistics():
    """The output does not change if a group is moved or stretched, so the gradient has no such part."""
    x, weights = normal(8, 3), normal(8, 3, seed=2)
    grads = jax.grad(lambda x: jnp.sum(weights * ghost(x)[0]))(x).reshape(2, 4, 3)
    np.testing.assert_allclose(grads.sum(1), 0, atol=1e-5)
    # Stretching changes the output by epsilon beside the variance: 1e-5 of the gradient's size.
    np.testing.assert_allclose(jnp.sum(grads * x.reshape(2, 4, 3), 1), 0, atol=1e-3)
    assert bool(jnp.all(jnp.isfinite(jax.grad(lambda x: jnp.sum(ghost(x)[0] ** 2))(jnp.zeros((4, 3))))))


def test_groups_on_their_own_devices_need_no_communication():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    x, module = normal(64, 3), models.GhostBatchNorm(ghost_size=4)
    variables = {"params": AFFINE, "batch_stats": STATS}

    def run(x):
        return module.apply(variables, x, mutable=["batch_stats"])

    compiled = jax.jit(lambda x: run(x)[0], in_shardings=rows, out_shardings=rows).lower(x).compile()
    collectives = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    assert not [name for name in collectives if name in compiled.as_text()]
    assert_close(jax.jit(run)(jax.device_put(x, rows)), run(x))


@pytest.mark.parametrize(
    ("options", "shape", "words"),
    [
        (dict(ghost_size=0), (4, 3), r"ghost_size=0 must lie in \[1, inf\)"),
        (dict(momentum=1.5), (4, 3), r"momentum=1.5 must lie in \[0, 1\]"),
        (dict(epsilon=-1.0), (4, 3), "epsilon=-1.0"),
        (dict(ghost_size=4), (10, 3), "ghost_size=4 does not divide the batch of 10"),
        (dict(ghost_size=1), (4, 3), "ghost_size=1 leaves one value"),
        (dict(ghost_size=4), (1, 3), r"one value .* \(1, 3\)"),
        (dict(ghost_size=1), (4, 1, 3), r"one value .* \(4, 1, 3\)"),
        (dict(ghost_size=4), (3,), r"x has shape \(3,\)"),
    ],
)
def test_ghost_bad_arguments(options, shape, words):
    with pytest.raises(ValueError, match=words):
        ghost(jnp.ones(shape), **options)


def test_one_example_with_positions_is_a_group():
    x = normal(4, 5, 3)
    assert_close(ghost(x, ghost_size=1), numpy_ghost(x, 1))
