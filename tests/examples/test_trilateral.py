"""Features, class means and ratios against loops in NumPy, and the loss at its two ends."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import examples, losses

BATCH, CLASSES = 5, 3


def corners(seed=0, dtype=np.float32):
    """Student, teacher, truth and class mean."""
    rng = np.random.default_rng(seed)
    student, teacher, mean = rng.dirichlet(np.ones(CLASSES), (3, BATCH)).astype(dtype)
    return student, teacher, np.eye(CLASSES, dtype=dtype)[rng.integers(CLASSES, size=BATCH)], mean


def test_features_follow_the_definition():
    s, t, g, m = corners()
    got = examples.trilateral_features(s, t, g, m)
    assert got.shape == (BATCH, 5 * CLASSES)
    for i in range(BATCH):
        sides = [*(s[i] - g[i]), *(t[i] - g[i]), *(s[i] - t[i]), *(m[i] - g[i]), *(s[i] - m[i])]
        np.testing.assert_array_equal(got[i], sides)


def test_features_are_zero_where_all_agree():
    truth = corners()[2]
    np.testing.assert_array_equal(examples.trilateral_features(truth, truth, truth, truth), 0)


def test_features_are_constants():
    s, t, g, m = map(jnp.asarray, corners())
    grads = jax.grad(lambda *args: jnp.sum(examples.trilateral_features(*args) ** 2), argnums=(0, 1, 3))(s, t, g, m)
    assert not any(np.any(x) for x in grads)


def test_features_of_half_precision_are_float32():
    half = [jnp.asarray(x, jnp.bfloat16) for x in corners()]
    got = examples.trilateral_features(*half)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, examples.trilateral_features(*[x.astype(jnp.float32) for x in half]))


@pytest.mark.parametrize("num_classes", [1, 4])
def test_class_means_follow_the_definition(num_classes):
    rng = np.random.default_rng(1)
    probs, labels = rng.dirichlet(np.ones(CLASSES), 9).astype(np.float32), np.arange(9) % 3
    got = jax.jit(examples.class_means, static_argnums=2)(probs, labels, num_classes)
    assert got.shape == (num_classes, CLASSES)
    for c in range(num_classes):
        members = [row for row, label in zip(probs.astype(np.float64), labels, strict=True) if label == c]
        expected = np.mean(members, axis=0) if members else np.full(CLASSES, 1 / CLASSES)
        np.testing.assert_allclose(got[c], expected, rtol=9 * 2.0**-23)


def test_a_class_without_examples_has_a_uniform_mean():
    got = examples.class_means(jnp.array([[0.9, 0.1]]), jnp.array([1]), 3)
    np.testing.assert_array_equal(got, np.array([[0.5, 0.5], [0.9, 0.1], [0.5, 0.5]], np.float32))


def test_class_means_of_half_precision_are_summed_in_float32():
    """In bfloat16 a sum of 1000 times 0.25 would stop at 64."""
    got = examples.class_means(jnp.full((1000, 4), 0.25, jnp.bfloat16), jnp.zeros(1000, jnp.int32), 1)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, 0.25)


def test_ratios_follow_the_definition():
    features = np.asarray(examples.trilateral_features(*corners()))
    network = examples.FusionRatio(hidden=7)
    params = network.init(jax.random.key(0), features)
    params["hidden"]["bias"] = jnp.linspace(-1, 1, 7)
    params["ratio"]["bias"] = jnp.array([0.3])
    got = jax.jit(network.apply)(params, features)
    w1, b1, w2, b2 = (np.asarray(params[a][b], np.float64) for a in ("hidden", "ratio") for b in ("kernel", "bias"))
    for i, row in enumerate(features.astype(np.float64)):
        hidden = [max(0.0, sum(row * w1[:, j]) + b1[j]) for j in range(7)]
        expected = 1 / (1 + np.exp(-(sum(hidden * w2[:, 0]) + b2[0])))
        np.testing.assert_allclose(got[i], expected, rtol=1e-5)
    assert got.shape == (BATCH,)


def test_parameters_have_the_width_and_start_near_a_half():
    features = np.random.default_rng(1).standard_normal((64, 5 * CLASSES), np.float32) / 4
    network = examples.FusionRatio()
    params = jax.jit(network.init)(jax.random.key(0), features)
    shapes = jax.tree.map(jnp.shape, params, is_leaf=lambda x: isinstance(x, jax.Array))
    assert shapes == {"hidden": {"kernel": (15, 64), "bias": (64,)}, "ratio": {"kernel": (64, 1), "bias": (1,)}}
    # Of variance 1 / in, each of 15 and 64: three standard deviations of the sample's own.
    for name, width in (("hidden", 15), ("ratio", 64)):
        kernel = np.asarray(params[name]["kernel"])
        assert abs(kernel.var() * width - 1) < 3 * np.sqrt(2 / kernel.size)
    ratios = network.apply(params, features)
    assert np.all((ratios > 0) & (ratios < 1))
    assert abs(np.mean(ratios) - 0.5) < 0.25
    assert network == examples.FusionRatio(hidden=64)


def student_loss(student, teacher, labels, alpha, temperature=4.0):
    distilled = temperature**2 * losses.forward_kl(student, teacher, temperature=temperature)
    plain = losses.softmax_cross_entropy_with_integer_labels(student, labels)
    return jnp.mean(alpha * distilled + (1 - alpha) * plain)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_constant_ratio_is_cross_entropy_at_one_end_and_distillation_at_the_other(alpha):
    """One bilevel step with a saturated ratio is a step on that loss alone."""
    rng = np.random.default_rng(2)
    x, teacher = (rng.standard_normal((BATCH, width), np.float32) for width in (2, CLASSES))
    labels = jnp.array([0, 1, 2, 0, 1])
    saturated = jnp.where(alpha == 1, 200.0, -200.0)  # the sigmoid is 0 or 1 in float32

    def inner(w, ratio_logit, batch):
        del batch
        return student_loss(x @ w, teacher, labels, jax.nn.sigmoid(ratio_logit))

    tx = optax.sgd(1.0)
    step = examples.bilevel_step(inner, lambda w, batch: jnp.sum(w**2), inner_rate=0.1, outer_tx=tx)
    w = jnp.full((2, CLASSES), 0.1)
    state, _ = jax.jit(step)(examples.BilevelStepState(w, saturated, tx.init(saturated)), None, None)

    def alone(w):
        if alpha == 0:
            return losses.softmax_cross_entropy_with_integer_labels(x @ w, labels).mean()
        return 16 * losses.forward_kl(x @ w, teacher, temperature=4.0).mean()

    np.testing.assert_allclose(state.params, w - 0.1 * jax.jit(jax.grad(alone))(w), rtol=1e-5)


def test_ratios_learn_to_leave_a_teacher_that_is_wrong():
    """A teacher whose answer is the next class for every second example: alpha falls there more than elsewhere."""
    labels = jnp.arange(12) % CLASSES
    wrong = np.arange(12) % 2 == 1
    truth = jax.nn.one_hot(labels, CLASSES)
    teacher = 3 * jax.nn.one_hot(jnp.where(wrong, labels + 1, labels) % CLASSES, CLASSES)
    means = examples.class_means(jax.nn.softmax(teacher), labels, CLASSES)[labels]
    network, tx = examples.FusionRatio(hidden=8), optax.adam(0.05)

    def ratios(omega, w):
        return network.apply(
            omega, examples.trilateral_features(jax.nn.softmax(w), jax.nn.softmax(teacher), truth, means)
        )

    step = examples.bilevel_step(
        lambda w, omega, batch: student_loss(w, teacher, labels, ratios(omega, w)),
        lambda w, batch: losses.softmax_cross_entropy_with_integer_labels(w, labels).mean(),
        inner_rate=1.0,
        outer_tx=tx,
    )
    w = jnp.zeros((12, CLASSES))
    omega = network.init(jax.random.key(0), jnp.zeros((12, 5 * CLASSES)))
    state = examples.BilevelStepState(w, omega, tx.init(omega))
    state, _ = jax.jit(lambda s: jax.lax.scan(lambda c, _: step(c, None, None), s, length=40))(state)
    alpha = np.asarray(jax.jit(ratios)(state.weigher, state.params))
    assert alpha[wrong].max() < alpha[~wrong].min()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: examples.FusionRatio(hidden=0), r"hidden=0 must lie in \[1, inf\)"),
        (lambda: examples.class_means(jnp.ones((2, 3)), jnp.zeros(2, int), 0), r"num_classes=0 must lie in \[1, inf\)"),
        (lambda: examples.class_means(jnp.ones((2, 3)), jnp.zeros(3, int), 3), r"\(2, 3\) and \(3,\)"),
        (lambda: examples.class_means(jnp.ones(3), jnp.zeros(3, int), 3), r"\(3,\) and \(3,\)"),
        (
            lambda: examples.trilateral_features(*[jnp.ones((2, 3))] * 3, jnp.ones((3, 3))),
            r"\(2, 3\), \(2, 3\), \(2, 3\), \(3, 3\)",
        ),
        (lambda: examples.trilateral_features(*[jnp.ones(3)] * 4), r"\[batch, classes\]"),
    ],
)
def test_bad_arguments(call, match):
    with pytest.raises(ValueError, match=match):
        call()
