"""Per-class gradient normalisation: every class pulls with the same force (2023, Francazi et al.).

A Theoretical Analysis of the Learning Dynamics under Class Imbalance.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from steelyard import choices, precision
from steelyard.aggregate import stacked as stacked_lib

# Cosines below this are noise; dividing by them would make a step of nothing but noise.
_LEAST_PROJECTION = 0.05


def class_normalized() -> stacked_lib.Aggregator:
    """The sum of the classes' unit gradients, so that a large class cannot drag the loss of a small one up.

        update = sum_k g_k / |g_k|,    g_k the gradient of class k's loss, 0 / 0 = 0

    With the full batch this is the paper's PCNGD, with mini-batches PCNSGD. `per_class_losses` gives the losses; sums
    and means over a class do the same. A class that the batch lacks has a zero gradient and no part in the update.

    The norm of the update is at most K and does not vanish where the losses are least: the learning rate must decay.
    Costs K backward passes, together or one by one ("lean"); needs the norms of the gradients alone.

    Its update takes an extra argument `projections: Float["K"]`, the running mean of the cosine between a class's
    mini-batch and full-batch gradient. Then each unit gradient is divided by `max(projections_k, 0.05)`: small classes
    have noisy directions, and a noisy direction leads less far along the true one (PCNSGD+R). The drivers of
    `steelyard.aggregate.value_and_grad` do not pass it; call `update` on the stacked gradients. It also takes the extra
    arguments of `steelyard.aggregate.square_norms`.

    Returns:
      An aggregator without state.

    Raises:
      ValueError: while tracing, `projections` does not have one number per class.

    Source: A Theoretical Analysis of the Learning Dynamics under Class Imbalance (2023, Francazi et al.), per-class
    normalised gradient descent.
    """

    def update(stacked, state, params=None, *, projections=None, mesh=None, specs=None, axis_name=None, **extra_args):
        del params, extra_args
        weights = _inverse_norms(stacked_lib.square_norms(stacked, mesh=mesh, specs=specs, axis_name=axis_name))
        if projections is not None:
            weights = weights / jnp.maximum(_checked(projections, weights), _LEAST_PROJECTION)
        return stacked_lib.combine(weights, stacked), state

    def gram_weights(gram, losses, state):
        del losses
        return jax.lax.stop_gradient(_inverse_norms(jnp.diagonal(gram))), state

    return stacked_lib.Aggregator(optax.init_empty_state, update, gram_weights=gram_weights)


def per_class_losses(
    per_example: Float[Array, "batch"], labels: Int[Array, "batch"], num_classes: int
) -> Float[Array, "classes"]:
    """The sum of the losses of each class's examples, `L_k = sum over i with labels_i = k of per_example_i`.

    Sums, not means: their gradients add up to that of the whole batch. 0 for a class without examples.

    Args:
      per_example: one loss per example.
      labels: the class (or group, or domain) of each; an example whose label is none of them is left out.
      num_classes: K.

    Returns:
      K sums, float32 at least.

    Raises:
      ValueError: `num_classes` is below 1, or the two arrays are not vectors of one length.
    """
    choices.require_within("num_classes", num_classes, "[1, inf)")
    if jnp.ndim(per_example) != 1 or jnp.shape(per_example) != jnp.shape(labels):
        raise ValueError(
            "per_example and labels must be vectors with one entry per example: "
            f"their shapes are {jnp.shape(per_example)} and {jnp.shape(labels)}"
        )
    return jax.ops.segment_sum(precision.wide(per_example), jnp.asarray(labels), num_classes)


def _inverse_norms(squares: Float[Array, "K"]) -> Float[Array, "K"]:
    """`1 / |g_k|`, 0 for a zero gradient; NaN for a square beyond float32, which must stay visible."""
    return jnp.where(squares == 0, 0, jnp.sqrt(squares) / jnp.where(squares == 0, 1, squares))


def _checked(projections: Float[Array, "K"], weights: Float[Array, "K"]) -> Float[Array, "K"]:
    if jnp.shape(projections) != weights.shape:
        raise ValueError(
            f"projections must have one number per class: shape {weights.shape}, got {jnp.shape(projections)}"
        )
    return jnp.asarray(projections, jnp.float32)
