"""Losses and routing of experts against loops in float64, and cases by hand."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import losses

EXPERTS, BATCH, CLASSES = 3, 5, 4
LABELS = np.array([0, 3, 1, 3, 2], np.int32)
TOLERANCE = 1e-5  # sums of a dozen float32 numbers below 10


def stacked(seed=0):
    return (2 * np.random.default_rng(seed).standard_normal((EXPERTS, BATCH, CLASSES))).astype(np.float32)


def log_softmax(row):
    top = max(row)
    total = top + math.log(sum(math.exp(z - top) for z in row))
    return [z - total for z in row]


def ride(logits, margin=(0,) * CLASSES, class_weight=(1,) * CLASSES, temperature=(1,) * CLASSES, diversity=0.2):
    """By loops in float64."""
    logits, result = np.asarray(logits, np.float64), np.zeros(BATCH)
    mean_temperature = sum(temperature) / CLASSES
    for i, y in enumerate(LABELS):
        mean = log_softmax([sum(logits[:, i, c]) / len(logits) / temperature[c] for c in range(CLASSES)])
        for z in logits[:, i]:
            own = -log_softmax([z[c] - margin[c] * (c == y) for c in range(CLASSES)])[y]
            log_q = log_softmax([z[c] / temperature[c] for c in range(CLASSES)])
            kl = sum(math.exp(p) * (p - q) for p, q in zip(mean, log_q, strict=True))
            result[i] += class_weight[y] * own - diversity * mean_temperature**2 * kl
    return result


@functools.cache
def compiled(fn):
    return jax.jit(fn)


def ride_of(logits, labels, margin=0.0, class_weight=1.0, temperature=1.0, diversity=0.2):
    """With everything traced, and one number for each class."""
    margin, class_weight, temperature = (
        jnp.broadcast_to(jnp.asarray(x, jnp.float32), CLASSES) for x in (margin, class_weight, temperature)
    )
    options = {"margin": margin, "class_weight": class_weight, "temperature": temperature, "diversity": diversity}
    return compiled(losses.ride_loss)(logits, labels, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"margin": (0.5, 1.0, 2.0, 0.0), "class_weight": (1.0, 2.0, 0.5, 3.0)},
        {"temperature": (1.0, 0.5, 2.0, 4.0), "diversity": 0.7},
    ],
)
def test_the_loss_follows_the_definition(options):
    np.testing.assert_allclose(
        ride_of(stacked(), LABELS, **options), ride(stacked(), **options), rtol=TOLERANCE, atol=TOLERANCE
    )


def test_numbers_are_the_same_for_every_class():
    options = {"margin": 0.5, "class_weight": 2.0, "temperature": 3.0}
    got = compiled(losses.ride_loss)(stacked(), LABELS, **options)
    np.testing.assert_allclose(got, ride_of(stacked(), LABELS, **options), rtol=TOLERANCE, atol=TOLERANCE)


def test_without_diversity_it_is_the_sum_of_cross_entropies():
    each = compiled(optax.softmax_cross_entropy_with_integer_labels)(stacked(), np.tile(LABELS, (EXPERTS, 1)))
    got = compiled(losses.ride_loss)(stacked(), LABELS, diversity=0.0)
    np.testing.assert_allclose(got, each.sum(0), rtol=TOLERANCE)


@pytest.mark.parametrize("experts", [1, 3])
def test_experts_that_agree_have_no_divergence_and_no_gradient_of_it(experts):
    logits = np.tile(stacked()[:1], (experts, 1, 1))

    def divergence(z):
        return sum((losses.ride_loss(z, LABELS, diversity=d) * s).sum() for d, s in ((0.0, 1), (1.0, -1)))

    value, grads = jax.jit(jax.value_and_grad(divergence))(logits)
    np.testing.assert_allclose(value, 0, atol=experts * BATCH * TOLERANCE)
    np.testing.assert_allclose(grads, 0, atol=TOLERANCE)


def test_nothing_differentiates_through_the_mean():
    """Of the divergence alone, with T for each class: mean(T)^2 (softmax(z_e / T) - softmax(m / T)) / T."""
    logits, temperature = stacked(), np.array([1.0, 0.5, 2.0, 4.0])

    def divergence(z):
        with_it, without = (losses.ride_loss(z, LABELS, temperature=temperature, diversity=d) for d in (1.0, 0.0))
        return (without - with_it).sum()

    p, q = (
        np.exp([log_softmax(r) for r in x.reshape(-1, CLASSES)])
        for x in (logits.mean(0) / temperature, logits / temperature)
    )
    expected = temperature.mean() ** 2 * (q.reshape(logits.shape) - p.reshape(BATCH, CLASSES)) / temperature
    np.testing.assert_allclose(jax.jit(jax.grad(divergence))(logits), expected, atol=32 * TOLERANCE)


def test_any_number_of_leading_axes():
    logits = np.stack([stacked(0), stacked(1)], axis=1)
    labels = np.stack([LABELS, LABELS])
    np.testing.assert_allclose(ride_of(logits, labels)[1], ride_of(stacked(1), LABELS), rtol=TOLERANCE)
    assert jax.eval_shape(losses.routing_targets, logits, labels).shape == (EXPERTS - 1, 2, BATCH)
    assert jax.eval_shape(losses.routed_mean, logits, logits[1:, ..., 0]).shape == (2, BATCH, CLASSES)


def test_temperatures_are_lower_for_rare_classes():
    """C n / sum n = (2, 1/2, 1/2), w = (1.1, 0.95, 0.95) with strength 0.1."""
    got = losses.diversity_temperatures(jnp.array([40, 10, 10]), strength=0.1, base=3.0)
    np.testing.assert_allclose(got, [3, 3 * 0.95 / 1.1, 3 * 0.95 / 1.1], rtol=1e-6)
    np.testing.assert_allclose(losses.diversity_temperatures(jnp.array([40, 10]), strength=0.0), 1, rtol=1e-6)
    np.testing.assert_allclose(losses.diversity_temperatures(jnp.array([40, 10]), strength=1.0), [1, 0.25], rtol=1e-6)


def one_hot_logits(*classes):
    """An expert that answers these classes for the examples of a batch."""
    return np.eye(2, dtype=np.float32)[list(classes)]


def test_routing_targets_by_hand():
    """Label 0 always. Right after 1, 2, 3 experts: 111, 001 (sum of 1 and twice 0), 100, 000."""
    experts = np.stack([one_hot_logits(0, 1, 0, 1), one_hot_logits(0, 1, 1, 1) * 2, one_hot_logits(0, 0, 1, 1) * 4])
    got = compiled(losses.routing_targets)(experts, np.zeros(4, np.int32))
    np.testing.assert_array_equal(got, [[False, True, False, False], [False, True, False, False]])
    # 0101: another expert makes it wrong, and one more right again.
    again = np.stack([one_hot_logits(1), one_hot_logits(0) * 2, one_hot_logits(1) * 4, one_hot_logits(0) * 8])
    np.testing.assert_array_equal(losses.routing_targets(again, np.zeros(1, np.int32))[:, 0], [True, False, True])


def test_the_routed_mean_stops_at_the_first_expert_that_is_not_passed():
    logits = stacked()
    routing = np.array([[-1, -1, 1, 1, 0], [-1, 5, -1, 1, 9]], np.float32)
    used = [1, 1, 2, 3, 1]  # sigmoid(0) = 1/2 is not above the threshold
    expected = [logits[:k, i].mean(0) for i, k in enumerate(used)]
    routed = functools.partial(compiled(losses.routed_mean), logits, routing)
    np.testing.assert_allclose(routed(threshold=0.5), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(routed(threshold=0.0), logits.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(routed(threshold=1.0), logits[0])


def test_one_expert_has_no_routing():
    alone = stacked()[:1]
    assert losses.routing_targets(alone, LABELS).shape == (0, BATCH)
    np.testing.assert_array_equal(losses.routed_mean(alone, jnp.zeros((0, BATCH))), alone[0])


Z = jnp.zeros((3, 2, 4))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: losses.diversity_temperatures(jnp.ones(2), strength=1.5), r"strength=1.5 must lie in \[0, 1\]"),
        (lambda: losses.diversity_temperatures(jnp.ones(2), base=0.0), r"base=0.0 must lie in \(0, inf\)"),
        (lambda: losses.diversity_temperatures(jnp.array([1.0, 0.0])), r"counts=0.0 must lie in \(0, inf\)"),
        (lambda: losses.ride_loss(Z, jnp.zeros(3, int)), r"labels has shape \(3,\) and expert_logits\[0\] \(2, 4\)"),
        (lambda: losses.ride_loss(Z, jnp.array([0, 4])), r"labels=4 must lie in \[0, 4\)"),
        (lambda: losses.ride_loss(Z[:0], jnp.zeros(2, int)), r"expert_logits has shape \(0, 2, 4\)"),
        (lambda: losses.ride_loss(Z, jnp.zeros(2, int), temperature=0.0), r"temperature=0.0 must lie in \(0, inf\)"),
        (lambda: losses.ride_loss(Z, jnp.zeros(2, int), diversity=-1.0), r"diversity=-1.0 must lie in \[0, inf\)"),
        (lambda: losses.ride_loss(Z, jnp.zeros(2, int), margin=jnp.ones(3)), r"margin has shape \(3,\).*\(4,\)"),
        (lambda: losses.ride_loss(Z, jnp.zeros(2, int), class_weight=jnp.ones(3)), r"class_weight has shape \(3,\)"),
        (lambda: losses.routing_targets(Z, jnp.zeros(3, int)), r"labels has shape \(3,\)"),
        (
            lambda: losses.routed_mean(Z, jnp.zeros((3, 2))),
            r"routing_logits has shape \(3, 2\) .* \(3, 2, 4\).*\(2, 2\)",
        ),
        (lambda: losses.routed_mean(Z, jnp.zeros((2, 2)), threshold=2.0), r"threshold=2.0 must lie in \[0, 1\]"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
