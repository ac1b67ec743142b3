"""Per-class gradient normalisation against float64, cases by hand, and what it promises for two classes."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from steelyard import aggregate

# A squared norm of 12 entries, a root, a quotient, and a sum of 3 products of at most 1.
ROUNDING = 2.0**-24
UPDATE = 24 * ROUNDING


def reference(rows, projections=None):
    total = np.zeros(np.shape(rows)[1:])
    for k, row in enumerate(np.asarray(rows, np.float64)):
        norm = np.sqrt(np.sum(row**2))
        if norm > 0:
            total += row / norm / (1 if projections is None else max(projections[k], 0.05))
    return total


def gradients(count=3, size=12, seed=0):
    rng = np.random.default_rng([seed, count])
    return (rng.standard_normal((count, size)) * 10.0 ** rng.uniform(-3, 3, (count, 1))).astype(np.float32)


def run(rows, **extra):
    rule = aggregate.class_normalized()
    return np.asarray(rule.update(jnp.asarray(rows, jnp.float32), rule.init(None), **extra)[0], np.float64)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_is_the_sum_of_unit_gradients(count):
    rows = gradients(count)
    np.testing.assert_allclose(run(rows), reference(rows), atol=count * UPDATE)


def test_by_hand():
    """(3, 4) / 5 + (0, -2) / 2."""
    np.testing.assert_allclose(run([[3, 4], [0, -2]]), [3 / 5, 4 / 5 - 1], atol=4 * ROUNDING)


@hypothesis.given(seed=st.integers(0, 1000), count=st.sampled_from([2, 5]), factor=st.floats(1e-3, 1e3))
@hypothesis.settings(max_examples=20, deadline=None)
def test_is_at_most_as_long_as_there_are_classes_and_does_not_see_their_scale(seed, count, factor):
    rows = gradients(count, seed=seed)
    update = run(rows)
    assert np.linalg.norm(update) <= count * (1 + UPDATE)
    rows[0] *= np.float32(factor)
    np.testing.assert_allclose(run(rows), update, atol=count * UPDATE)


def test_opposite_classes_cancel():
    row = gradients(1)
    np.testing.assert_allclose(run(np.concatenate([row, -8 * row])), 0, atol=2 * ROUNDING)


def test_an_absent_class_has_no_part():
    rows = gradients(3)
    rows[1] = 0
    np.testing.assert_array_equal(run(rows), run(rows[[0, 2]]))
    np.testing.assert_array_equal(run(np.zeros((3, 4))), 0)


def test_norms_are_of_the_whole_tree():
    rows = gradients(3)
    tree = {"w": jnp.asarray(rows[:, :8]).reshape(3, 4, 2), "none": None, "b": jnp.asarray(rows[:, 8:])}
    rule = aggregate.class_normalized()
    update, _ = jax.jit(rule.update)(tree, rule.init(None))
    assert update["none"] is None
    np.testing.assert_allclose(np.append(np.ravel(update["w"]), update["b"]), reference(rows), atol=3 * UPDATE)


def test_half_precision_gradients_have_float32_norms():
    rows = jnp.full((2, 4096), 0.01, jnp.bfloat16)
    rule = aggregate.class_normalized()
    update, _ = rule.update(rows, rule.init(None))
    assert update.dtype == jnp.bfloat16
    # A sum of 4096 squares in bfloat16 would stop at 256 times the first one.
    np.testing.assert_allclose(update.astype(jnp.float32), 2 / np.sqrt(4096), rtol=2.0**-8)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_gradients_without_a_float32_norm_stay_visible(bad):
    rows = gradients(3)
    rows[1, 2] = bad
    assert not np.isfinite(run(rows)).any()


def test_projections_lengthen_noisy_directions_up_to_a_limit():
    rows, projections = gradients(3), np.array([0.5, 0.01, 1.0])
    update = run(rows, projections=jnp.asarray(projections))
    np.testing.assert_allclose(update, reference(rows, projections), atol=20 * 3 * UPDATE)
    np.testing.assert_allclose(update, run(rows, projections=jnp.array([0.5, -1.0, 1.0])), atol=20 * 3 * UPDATE)
    np.testing.assert_array_equal(run(rows, projections=jnp.ones(3)), run(rows))


def test_a_wrong_number_of_projections_names_both_shapes():
    with pytest.raises(ValueError, match=r"shape \(3,\), got \(2,\)"):
        run(gradients(3), projections=jnp.ones(2))


def test_coordinates_may_be_split_over_devices():
    """Inside shard_map every device has all rows of its own coordinates; the norms are still of the whole."""
    rows, rule = gradients(3, size=16), aggregate.class_normalized()
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(None, "fsdp"), out_specs=P("fsdp"))
    def update(part):
        return rule.update(part, rule.init(None), axis_name="fsdp")[0]

    np.testing.assert_allclose(update(jnp.asarray(rows)), reference(rows), atol=3 * UPDATE)


# Per-class losses.


def test_losses_are_summed_by_class():
    per_example, labels = np.arange(1.0, 7.0), np.array([2, 0, 2, 2, 0, 3])
    expected = [sum(x for x, y in zip(per_example, labels, strict=True) if y == k) for k in range(5)]
    found = jax.jit(lambda x, y: aggregate.per_class_losses(x, y, 5))(per_example, labels)
    np.testing.assert_array_equal(found, expected)


def test_labels_outside_of_the_classes_are_left_out():
    found = aggregate.per_class_losses(jnp.array([1.0, np.nan, 4, 8]), jnp.array([0, -1, 1, 2]), 2)
    np.testing.assert_array_equal(found, [1, 4])


def test_losses_of_half_precision_are_summed_in_float32():
    found = aggregate.per_class_losses(jnp.ones(1000, jnp.bfloat16), jnp.zeros(1000, jnp.int32), 1)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, [1000])  # bfloat16 would stop at 256


@pytest.mark.parametrize(
    ("shapes", "num_classes", "match"),
    [
        (((4,), (4,)), 0, r"num_classes=0 must lie in \[1, inf\)"),
        (((4,), (3,)), 2, r"shapes are \(4,\) and \(3,\)"),
        (((4, 2), (4, 2)), 2, r"shapes are \(4, 2\) and \(4, 2\)"),
        (((), ()), 2, r"shapes are \(\) and \(\)"),
    ],
)
def test_bad_losses(shapes, num_classes, match):
    with pytest.raises(ValueError, match=match):
        aggregate.per_class_losses(jnp.ones(shapes[0]), jnp.ones(shapes[1], jnp.int32), num_classes)


# In use.


def two_classes(seed=0, counts=(60, 3)):
    """Features with a column of ones, and labels 0 and 1, very unequal in number."""
    rng = np.random.default_rng(seed)
    labels = np.repeat([0, 1], counts)
    x = rng.standard_normal((sum(counts), 4)) + 0.7 * labels[:, None]
    return np.concatenate([x, np.ones((sum(counts), 1))], 1).astype(np.float32), labels


def losses_fn(params, x, labels):
    margins = (2 * labels - 1) * (x @ params)
    return aggregate.per_class_losses(jnp.logaddexp(0, -margins), labels, 2)


RULE = aggregate.class_normalized()
STEPS = {mode: jax.jit(aggregate.value_and_grad(losses_fn, RULE, mode=mode)) for mode in ("stacked", "lean")}


@pytest.mark.parametrize("mode", STEPS)
def test_duplicated_examples_change_nothing(mode):
    x, labels = two_classes()
    params = jnp.linspace(-1, 1, 5)
    again = np.flatnonzero(labels == 1)
    more = np.concatenate([x, x[again], x[again]]), np.concatenate([labels, labels[again], labels[again]])
    (_, once, _), (_, thrice, _) = (STEPS[mode](params, RULE.init(None), *data) for data in ((x, labels), more))
    np.testing.assert_allclose(thrice, once, atol=64 * 2 * ROUNDING)  # sums over some 60 examples


@pytest.mark.parametrize("seed", range(3))
def test_no_class_gets_worse_as_long_as_gradients_are_not_opposite(seed):
    """<u_k, sum u> = 1 + cos > 0: small steps with the full batch lower both losses; plain descent raises the rare one.

    With steps of 1e-3 the loss of class k falls by 1e-3 (1 + cos) |g_k| up to second order, 1e-6 n_k |x|^2 / 2.
    """
    x, labels = two_classes(seed)

    def step(params, _):
        losses, update, _ = STEPS["stacked"](params, RULE.init(None), x, labels)
        rows = jax.jacrev(losses_fn)(params, x, labels)
        cosine = rows[0] @ rows[1] / jnp.linalg.norm(rows[0]) / jnp.linalg.norm(rows[1])
        return params - 1e-3 * update, (losses, cosine)

    _, (history, cosines) = jax.jit(lambda p: jax.lax.scan(step, p, length=300))(jnp.zeros(5))
    apart = np.asarray(cosines)[:-1] > -0.99
    assert apart.sum() > 100
    assert np.all(np.diff(history, axis=0)[apart] <= 0)
    plain = jax.grad(lambda p: losses_fn(p, x, labels).sum())(jnp.zeros(5))
    assert losses_fn(-1e-3 * plain, x, labels)[1] > history[0, 1]


def test_a_decaying_rate_finds_where_the_unit_gradients_cancel():
    """Two quadratics about a and b: any point between them is stationary, and the chain ends on that segment."""
    a, b = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])

    def losses(p):
        return jnp.stack([jnp.sum((p - a) ** 2), 50 * jnp.sum((p - b) ** 2)])

    tx = optax.chain(aggregate.class_normalized(), optax.sgd(optax.linear_schedule(0.05, 0.0, 300)))

    def step(carry, _):
        p, state = carry
        updates, state = tx.update(jax.jacrev(losses)(p), state, p, losses=losses(p))
        return (optax.apply_updates(p, updates), state), None

    start = jnp.array([-1.0, -0.5])
    (p, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), length=300))(start)
    np.testing.assert_allclose(p.sum(), 1, atol=0.01)
    assert np.all((p > 0) & (p < 1))
