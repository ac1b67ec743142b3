"""What losses refuse outside of jit, and let through inside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard.losses import checks


def test_what_fits_is_widened():
    logits, labels = checks.labelled(jnp.ones((2, 3), jnp.bfloat16), np.array([0, 2]))
    assert (logits.dtype, labels.shape) == (jnp.float32, (2,))
    a, b = checks.alike("a", jnp.ones(2, jnp.float16), "b", [1, 2])
    assert a.dtype == b.dtype == jnp.float32
    assert checks.number_or("scale", 2, (3,)).shape == ()
    np.testing.assert_array_equal(checks.class_sizes([3, 1]), [3, 1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: checks.labelled(jnp.ones((2, 3)), jnp.ones(3, int)), r"labels has shape \(3,\) and logits \(2, 3\)"),
        (lambda: checks.labelled(jnp.ones((2, 3)), jnp.array([0, 3])), r"labels=3 must lie in \[0, 3\)"),
        (lambda: checks.labelled(jnp.ones((2, 3)), jnp.array([-1, 0])), r"labels=-1 must lie in \[0, 3\)"),
        (lambda: checks.labelled(jnp.ones((2, 3)), jnp.ones(2)), "labels are float32"),
        (lambda: checks.alike("a", jnp.ones(2), "b", jnp.ones(3)), r"a has shape \(2,\) and b \(3,\)"),
        (lambda: checks.number_or("margin", jnp.ones(2), (3,)), r"margin has shape \(2,\).*\(3,\)"),
        (lambda: checks.class_sizes(jnp.array([2, 0])), r"counts=0\.0 must lie in \(0, inf\)"),
        (lambda: checks.class_sizes(jnp.ones(2), 3), r"counts has shape \(2,\): it must be \(3,\)"),
    ],
)
def test_what_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_traced_cannot_be_looked_at():
    jax.jit(lambda labels, counts: (checks.labelled(jnp.ones((1, 2)), labels), checks.class_sizes(counts)))(
        jnp.array([7]), jnp.zeros(2)
    )


def test_broadcasting_must_not_enlarge():
    checks.require_broadcast("scale", jnp.ones((1, 3)), "the result", (2, 3))
    for shape in ((3, 1), (2, 1, 3), (2,)):
        with pytest.raises(ValueError, match=r"scale has shape .* it must broadcast to that of the result, \(2, 3\)"):
            checks.require_broadcast("scale", jnp.ones(shape), "the result", (2, 3))
