"""Class counts and weights, focal loss and classifier norms against loops in float64 and cases worked by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from steelyard import losses

COUNTS = np.array([1000.0, 40.0, 7.0, 1.0])
LABELS = jnp.array([[0, 1, 1, 3], [3, 3, 3, 0]])


def logits(seed=0, shape=(6, 4), scale=2.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def labels(seed=0, n=6, classes=4):
    return jnp.asarray(np.random.default_rng(seed).integers(0, classes, n))


@functools.cache
def compiled(fn, *static):
    return jax.jit(fn, static_argnames=static)


def test_counts_are_those_of_numpy():
    got = compiled(losses.class_counts, "num_classes")(LABELS, num_classes=5)
    np.testing.assert_array_equal(got, np.bincount(LABELS.ravel(), minlength=5))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(losses.class_counts(LABELS[:0], 2), [0, 0])


def weights(counts, **options):
    return compiled(losses.class_weights, "kind", "beta", "power", "normalize")(counts, **options)


def test_examples_outside_of_the_mask_do_not_count():
    where = jnp.array([[True, True, False, False], [True, False, True, True]])
    np.testing.assert_array_equal(losses.class_counts(LABELS, 4, where=where), [2, 1, 0, 2])


def test_counts_of_examples_on_many_devices_are_those_of_all():
    y = labels(n=16)
    where = jnp.arange(16) % 3 > 0
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    count = jax.shard_map(
        lambda y, where: losses.class_counts(y, 4, where=where, axis_name="data"),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P(),
    )
    np.testing.assert_array_equal(jax.jit(count)(y, where), losses.class_counts(y, 4, where=where))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("options", "weight"),
    [
        ({"kind": "none"}, lambda n: 1.0),
        ({"kind": "inverse"}, lambda n: 1 / n),
        ({"kind": "inverse", "power": 0.5}, lambda n: 1 / math.sqrt(n)),
        ({}, lambda n: (1 - 0.9999) / (1 - 0.9999**n)),
        ({"beta": 0.9}, lambda n: (1 - 0.9) / (1 - 0.9**n)),
    ],
)
def test_weights_follow_the_definition(options, weight, normalize):
    expected = np.array([weight(n) for n in COUNTS])
    if normalize:
        expected *= len(COUNTS) / expected.sum()
    got = weights(COUNTS, normalize=normalize, **options)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_effective_numbers_go_from_equal_weights_to_inverse_frequencies():
    np.testing.assert_array_equal(weights(COUNTS, beta=0.0), 1)
    # n (1 - beta) = 1e-6 at most: so much is the difference.
    np.testing.assert_allclose(weights(COUNTS, beta=1 - 1e-9), weights(COUNTS, kind="inverse"), rtol=3e-6)
    np.testing.assert_allclose(weights(np.full(4, 50.0)), 1, rtol=1e-6)


@pytest.mark.parametrize("kind", ["none", "inverse", "effective_number"])
def test_a_class_without_examples_has_no_weight_and_the_others_sum_to_their_number(kind):
    fn = jax.jit(lambda n: jax.vjp(lambda n: losses.class_weights(n, kind=kind), n))
    got, pull = fn(jnp.array([30.0, 0.0, 2.0]))
    assert got[1] == 0
    np.testing.assert_allclose(got.sum(), 2, rtol=1e-6)
    assert np.isfinite(pull(jnp.arange(3.0))[0]).all()
    np.testing.assert_array_equal(fn(jnp.zeros(3))[0], 0)


def focal(z, y, gamma, alpha=None):
    return compiled(losses.softmax_focal_loss)(z, y, gamma=gamma, alpha=alpha)


def test_focal_loss_follows_the_definition():
    z, y, alpha = logits(), labels(), np.array([0.2, 1.0, 3.0, 0.5])
    expected = []
    for row, label in zip(np.asarray(z, np.float64), y, strict=True):
        p = np.exp(row[label]) / np.exp(row).sum()
        expected.append(-alpha[label] * (1 - p) ** 1.5 * np.log(p))
    np.testing.assert_allclose(focal(z, y, 1.5, alpha), expected, rtol=1e-5)


def test_without_focus_focal_loss_is_cross_entropy():
    z, y = logits(shape=(2, 3, 4)), labels().reshape(2, 3)
    expected = compiled(optax.softmax_cross_entropy_with_integer_labels)(z, y)
    np.testing.assert_allclose(focal(z, y, 0.0), expected, rtol=1e-5, atol=1e-6)


def test_of_two_classes_focal_loss_is_that_of_optax():
    z = logits()[:, 0]
    y = jnp.array([0, 1, 0, 1, 1, 0])
    pair = jnp.stack([jnp.zeros_like(z), z], axis=-1)
    expected = jax.jit(losses.sigmoid_focal_loss)(z, y.astype(jnp.float32), alpha=0.25, gamma=2.0)
    got = focal(pair, y, 2.0, jnp.array([0.75, 0.25]))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7)


def test_focal_loss_of_certain_predictions_is_exact():
    """Where 1 - p is below the resolution of p, (1 - p)^g (-log p) is exp(-g m) exp(-m) up to exp(-m)."""
    m = jnp.linspace(20.0, 50.0, 6)
    z = jnp.stack([m, jnp.zeros(6)], axis=-1)
    got = focal(z, jnp.zeros(6, int), 0.5, jnp.ones(2))
    np.testing.assert_allclose(got, np.exp(-1.5 * np.asarray(m, np.float64)), rtol=1e-5)


@pytest.mark.parametrize("z", [[[200.0, -200.0], [-200.0, 200.0]], [[1.0], [3.0]]])
def test_focal_loss_has_finite_gradients_of_certain_predictions_and_of_a_single_class(z):
    z, y = jnp.array(z), jnp.zeros(2, int)
    fn = jax.jit(jax.value_and_grad(lambda z, gamma: losses.softmax_focal_loss(z, y, gamma=gamma).sum()))
    for gamma in (0.0, 0.5, 2.0):
        value, grads = fn(z, gamma)
        assert np.isfinite(value)
        assert np.isfinite(grads).all()


def test_a_deferred_weight_changes_at_its_step():
    fn = jax.jit(lambda step: losses.deferred(step, start=80, before=1.0, after=jnp.array([0.5, 2.0])))
    for step, expected in ((0, [1, 1]), (79, [1, 1]), (80, [0.5, 2]), (100, [0.5, 2])):
        np.testing.assert_array_equal(fn(step), expected)


KERNEL = jnp.array([[3.0, 0.0, 1.0], [4.0, 0.0, 0.0]])


def test_tau_normalization_divides_by_powers_of_lengths():
    fn = jax.jit(lambda tau: jax.vjp(lambda kernel: losses.tau_normalize(kernel, tau=tau), KERNEL))
    for tau, lengths in ((1.0, [5, 1, 1]), (0.5, np.sqrt([5, 1, 1])), (0.0, 1)):
        got, pull = fn(tau)
        np.testing.assert_allclose(got, np.asarray(KERNEL) / lengths, rtol=1e-6)
        assert np.isfinite(pull(KERNEL + 1)[0]).all()


def test_max_norm_shortens_what_is_longer():
    fn = jax.jit(lambda kernel, radius: jax.vjp(lambda kernel: losses.max_norm(kernel, radius=radius), kernel))
    got, pull = fn(KERNEL, jnp.full(3, 2.5))
    np.testing.assert_allclose(got, [[1.5, 0, 1], [2, 0, 0]], rtol=1e-6)
    assert np.isfinite(pull(KERNEL + 1)[0]).all()
    np.testing.assert_allclose(fn(got, jnp.full(3, 2.5))[0], got, rtol=1e-6)
    by_class, _ = fn(KERNEL, jnp.array([10.0, 1.0, 0.5]))
    np.testing.assert_allclose(by_class, [[3, 0, 0.5], [4, 0, 0]], rtol=1e-6)


def test_classifiers_keep_their_dtype():
    kernel = KERNEL.astype(jnp.bfloat16)
    for fn in (losses.tau_normalize, functools.partial(losses.max_norm, radius=1.0)):
        assert jax.eval_shape(fn, kernel).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: losses.class_counts(jnp.ones(3), 2), "integers"),
        (lambda: losses.class_counts(jnp.array([0, 2]), 2), r"labels=2 must lie in \[0, 2\)"),
        (lambda: losses.class_counts(jnp.array([0]), 0), r"num_classes=0 must lie in \[1, inf\)"),
        (lambda: losses.class_counts(LABELS, 4, where=jnp.ones(3, bool)), r"\(3,\) and labels \(2, 4\)"),
        (lambda: losses.class_weights(COUNTS, kind="effective_numbers"), "did you mean 'effective_number'"),
        (lambda: losses.class_weights(COUNTS, beta=1.0), r"beta=1.0 must lie in \[0, 1\)"),
        (lambda: losses.class_weights(-COUNTS), r"counts=-1000.0 must lie in \[0, inf\)"),
        (lambda: losses.class_weights(3.0), r"counts has shape \(\)"),
        (lambda: losses.softmax_focal_loss(logits(), labels(), gamma=-1.0), r"gamma=-1.0 must lie in \[0, inf\)"),
        (lambda: losses.softmax_focal_loss(logits(), labels(n=5)), r"\(5,\) and logits \(6, 4\)"),
        (lambda: losses.softmax_focal_loss(logits(), labels(), alpha=jnp.ones(3)), r"alpha has shape \(3,\).*\(4,\)"),
        (lambda: losses.deferred(0, start=-1, before=1.0, after=2.0), r"start=-1 must lie in \[0, inf\)"),
        (lambda: losses.deferred(0, start=1, before=jnp.ones(2), after=jnp.ones(3)), r"\(3,\), \(2,\)|\(2,\), \(3,\)"),
        (lambda: losses.tau_normalize(logits(), tau=-0.5), r"tau=-0.5 must lie in \[0, inf\)"),
        (lambda: losses.tau_normalize(jnp.ones(3)), r"kernel has shape \(3,\)"),
        (lambda: losses.max_norm(logits(), radius=0.0), r"radius=0.0 must lie in \(0, inf\)"),
        (lambda: losses.max_norm(logits(), radius=jnp.ones(3)), r"radius has shape \(3,\).*\(4,\)"),
        (lambda: losses.max_norm(jnp.ones(3), radius=1.0), r"kernel has shape \(3,\)"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
