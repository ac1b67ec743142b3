"""A penalty of the positives that the highest negative outranks.

It depends on the whole batch. Under `jax.jit` with sharded inputs it is that of the global batch; inside a `shard_map`,
pass `axis_name`, or it is that of each device's rows alone.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from steelyard.losses import checks, pairs
from steelyard.losses.declare import batch_dependent


@batch_dependent
def ranking_hinge(
    scores: Float[Array, "batch *labels"],
    labels: Float[Array, "batch *labels"],
    *,
    where: Bool[Array, "batch"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, "*labels"]:
    """How far the positives fall short of the highest negative, squared.

        sum_{i positive} max(0, max_{j negative} p_j - p_i)^2 / (#positives + 1),   p = sigmoid(scores)

    It is 0 exactly where every positive reaches the highest negative. The gradient flows through both. Added to a
    cross-entropy it lowers the number of positives that are missed, at the price of false alarms.

    Costs a few passes over the batch.

    Args:
      scores: logits, a column for each label if there are several.
      labels: 1 for a positive, 0 for a negative.
      where: the rows that count.
      axis_name: inside a `shard_map`, the mesh axis over which the rows are split.

    Returns:
      One number for each label, 0 if it has no positive or no negative.

    Raises:
      ValueError: shapes that do not match.

    Source: Class-dependent Compression of Deep Neural Networks (2019, Entezari and Saukh).
    """
    scores, labels = checks.alike("scores", scores, "labels", labels)
    if scores.ndim == 0:
        raise ValueError("scores has shape (): it must be [batch] or [batch, labels]")
    valid = pairs.valid_rows(where, len(scores)).reshape(-1, *[1] * (scores.ndim - 1))
    positive, negative = valid & (labels > 0.5), valid & (labels <= 0.5)
    probabilities = jax.nn.sigmoid(jnp.where(valid, scores, 0))
    # A probability of 0 outranks nothing, so that it stands for rows that are no negatives.
    top = jnp.max(pairs.gather_rows(jnp.where(negative, probabilities, 0), axis_name), axis=0, initial=0)
    short = jnp.where(positive, jax.nn.relu(top - probabilities), 0)
    total = pairs.total(jnp.sum(short**2, axis=0), axis_name)
    return total / (pairs.total(jnp.sum(positive, axis=0, dtype=jnp.float32), axis_name) + 1)
