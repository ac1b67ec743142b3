"""The logistic gradient divided by the mean error probability.

With large steps the gradient descent of logistic regression becomes the batch perceptron: a well classified example
contributes nothing, but it still counts in the mean, so the steps shrink with the number of examples that are right
already. Divided by the mean error probability, the gradient is an average over the *misclassified* examples alone.

Source: From Logistic Regression to the Perceptron Algorithm: Exploring Gradient Descent with Large Step Sizes (2025,
Tyurin).
"""

import jax
import jax.numpy as jnp
import optax

from steelyard import choices, precision


def normalize_by_error(eps: float = 1e-12) -> optax.GradientTransformationExtraArgs:
    """Divides the gradient by the extra argument `error`, the mean probability of the wrong classes.

        u = g / max(error, eps)

    For f(w) = mean_i log(1 + exp(-y_i a_i.w)) with the error probabilities s_i = 1 / (1 + exp(y_i a_i.w)), and error =
    mean_i s_i, a step of size c is w + c sum_i s_i y_i a_i / sum_i s_i. As c grows, s_i becomes the indicator of a
    misclassified example (1/2 on the boundary). For several classes, error = mean_i (1 - probability of the right
    class). Follow it with `optax.sgd(step)`; the update takes the error by name:

        tx = optax.chain(normalize_by_error(), optax.sgd(step))
        updates, state = tx.update(grads, state, params, error=error)

    `error` is a scalar in [0, 1] and the mean over the very examples of the gradient: the global mean, where these lie
    on several devices. A negative one has no meaning. An error that has underflowed to 0 comes with a zero gradient,
    and the update is 0. The cost is one mean of values that the loss computes anyway. The division is done in float32
    at least and the result has the dtype of the gradient.

    Args:
      eps: least divisor.

    Returns:
      A transformation without state, whose `update` takes the extra argument `error: Float[Array, ""]`.

    Raises:
      ValueError: eps is not positive; at update, `error` is not a scalar.
      TypeError: at update, `error` is missing.

    Source: From Logistic Regression to the Perceptron Algorithm (2025, Tyurin), the normalized method.

    >>> tx = normalize_by_error()
    >>> tx.update(jnp.asarray([0.5, -0.25]), tx.init(None), error=0.25)[0].tolist()
    [2.0, -1.0]
    """
    choices.require_within("eps", eps, "(0, inf)")

    def init(params):
        del params
        return optax.EmptyState()

    def update(updates, state, params=None, *, error, **extra_args):
        del params, extra_args
        if jnp.shape(error) != ():
            raise ValueError(f"error has shape {jnp.shape(error)}; it must be a scalar, the mean over the examples")
        divisor = jnp.maximum(precision.wide(error), eps)
        return jax.tree.map(lambda g: _divide(g, divisor), updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def _divide(grad, divisor):
    wide = precision.wide(grad)
    return (wide / divisor.astype(wide.dtype)).astype(jnp.result_type(grad))
