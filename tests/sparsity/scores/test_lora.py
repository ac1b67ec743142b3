"""The score from adapters against the products that it stands for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard.sparsity import scores

RNG = np.random.default_rng(0)
W = RNG.normal(size=(5, 4))
A, GA = RNG.normal(size=(2, 5, 2))
B, GB = RNG.normal(size=(2, 2, 4))

lora = jax.jit(scores.lora, static_argnames=("power",))


@pytest.mark.parametrize(("scale", "power"), [(1.0, 1), (0.5, 2)])
def test_is_the_change_of_one_step_times_the_weight(scale, power):
    change = (A - GA) @ (B - GB) - A @ B
    expected = np.abs(change * (W + scale * A @ B)) ** power
    args = [jnp.asarray(x, jnp.float32) for x in (W, A, B, GA, GB)]
    np.testing.assert_allclose(lora(*args, scale=scale, power=power), expected, rtol=1e-4, atol=1e-4)


def test_at_the_start_only_the_second_factor_has_a_gradient():
    """With b = 0 the loss does not see a: grad_a = 0, and the score is |a grad_b W|."""
    got = lora(W, A, 0 * B, 0 * GA, GB)
    np.testing.assert_allclose(got, np.abs(A @ GB * W), rtol=1e-5, atol=1e-5)


def test_a_weight_that_is_seen_as_zero_has_no_score():
    np.testing.assert_array_equal(lora(0 * W, A, 0 * B, GA, GB), 0)


def test_a_stack_is_its_layers():
    stacked = lora(*(np.stack([x, 2 * x]) for x in (W, A, B, GA, GB)))
    np.testing.assert_allclose(stacked[1], lora(*(2 * x for x in (W, A, B, GA, GB))), rtol=1e-5)


REFUSED = {
    r"b has shape \(3, 4\), but with a of shape \(5, 2\) a weight of shape \(5, 4\) needs \(2, 4\)": dict(
        b=np.ones((3, 4))
    ),
    r"a has shape \(4, 2\)": dict(a=np.ones((4, 2))),
    r"grad_a has shape \(5, 3\)": dict(grad_a=np.ones((5, 3))),
    r"grad_b has shape \(4, 2\)": dict(grad_b=np.ones((4, 2))),
    r"power=0 must lie in \(0, inf\)": dict(power=0),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_refused(message):
    given = dict(weight=W, a=A, b=B, grad_a=GA, grad_b=GB) | REFUSED[message]
    with pytest.raises(ValueError, match=message):
        scores.lora(**given)
