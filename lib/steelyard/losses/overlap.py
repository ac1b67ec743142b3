"""Overlap of soft predictions with targets, over a whole set: Dice, Tversky, and what is lost by averaging them.

Such a loss is a ratio of sums, not a mean over examples: the mean of the losses of parts of a batch is another loss.
Under `jax.jit` with sharded inputs it is that of the global batch. Inside a `shard_map`, pass `axis_name`, by which the
sums are completed before they are divided, or it is that of each device's part alone.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from steelyard import choices
from steelyard.losses import checks, pairs
from steelyard.losses.declare import batch_dependent

Axis = int | Sequence[int]


@batch_dependent
def soft_dice_loss(
    probabilities: Float[Array, "..."],
    targets: Float[Array, "..."],
    *,
    axis: Axis,
    smooth: float = 1.0,
    power: int = 1,
    where: Bool[Array, "n"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, "..."]:
    """One minus the soft F1 of predictions, or Sorensen-Dice coefficient.

        1 - (2 sum p t + smooth) / (sum p^power + sum t^power + smooth)

    What the sums run over is `axis`: the frames of a recording [frames, classes], or its frames and classes; the batch.
    The more, the nearer to the F1 of the whole set; see `simpson_gap`. `optax.losses.dice_loss` is the same for the
    logits of exclusive classes, one example at a time unless told otherwise, with half the `smooth`.

    Costs one pass over both arrays.

    Args:
      probabilities: p, in [0, 1].
      targets: t, in [0, 1], of the same shape.
      axis: of the sums, one or several.
      smooth: at least 0; with 1 an absent class that is not predicted either has loss 0. With 0 so it has, but a
        prediction however faint has 1.
      power: 1, or 2 for squares in the denominator.
      where: which entries of the first of the summed axes count, one truth value for each.
      axis_name: inside a `shard_map`, the mesh axis over which one of the summed axes is split.

    Returns:
      In [0, 1], one number for each index of the axes that are not summed.

    Raises:
      ValueError: a number out of its range, an axis that there is not, or shapes that do not match.

    Source: Improving Polyphonic Sound Event Detection on Multichannel Recordings with the Sorensen-Dice Coefficient
    Loss and Transfer Learning (2021, Watcharasupat et al.).
    """
    choices.require_within("smooth", smooth, "[0, inf)")
    overlap, predicted, actual = soft_counts(
        probabilities, targets, axis=axis, power=power, where=where, axis_name=axis_name
    )
    return 1 - _ratio(2 * overlap + smooth, predicted + actual + smooth)


@batch_dependent
def soft_tversky_loss(
    probabilities: Float[Array, "..."],
    targets: Float[Array, "..."],
    *,
    axis: Axis,
    alpha: float = 0.5,
    beta: float = 0.5,
    smooth: float = 1.0,
    where: Bool[Array, "n"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, "..."]:
    """A Dice loss that weighs false alarms and misses.

        1 - (TP + smooth) / (TP + alpha FP + beta FN + smooth)
        TP = sum p t,   FP = sum p (1 - t),   FN = sum (1 - p) t

    With alpha = beta = 1/2 it is `soft_dice_loss` of twice the `smooth`, with 1 the Jaccard loss.

    Costs one pass over both arrays.

    Args:
      probabilities: p, in [0, 1].
      targets: t, in [0, 1], of the same shape.
      axis: of the sums, one or several.
      alpha: what a false alarm costs, at least 0.
      beta: what a miss costs, at least 0.
      smooth, where, axis_name: as in `soft_dice_loss`.

    Returns:
      In [0, 1], one number for each index of the axes that are not summed.

    Raises:
      ValueError: a number out of its range, an axis that there is not, or shapes that do not match.

    Source: Tversky loss function for image segmentation using 3D fully convolutional deep networks (2017, Salehi et
    al.).
    """
    for name, value in {"alpha": alpha, "beta": beta, "smooth": smooth}.items():
        choices.require_within(name, value, "[0, inf)")
    overlap, predicted, actual = soft_counts(probabilities, targets, axis=axis, where=where, axis_name=axis_name)
    wrong = alpha * (predicted - overlap) + beta * (actual - overlap)
    return 1 - _ratio(overlap + smooth, overlap + wrong + smooth)


def soft_counts(
    probabilities: Float[Array, "..."],
    targets: Float[Array, "..."],
    *,
    axis: Axis,
    power: int = 1,
    where: Bool[Array, "n"] | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """What F1 and its kin are made of: how much of the predictions is right, how much is predicted, how much there is.

    Args and errors are those of `soft_dice_loss`.

    Returns:
      `sum p t`, `sum p^power` and `sum t^power`, float32 at least, one number for each index of the axes that are not
      summed. For decisions of 0 and 1: true positives, predicted and actual positives.
    """
    if power not in (1, 2):
        raise ValueError(f"power={power} must be 1 or 2")
    p, t = checks.alike("probabilities", probabilities, "targets", targets)
    axes = _axes(axis, p.shape)
    if where is not None:
        first = axes[0]
        valid = pairs.valid_rows(where, p.shape[first])
        valid = valid.reshape([-1 if i == first else 1 for i in range(p.ndim)])
        p, t = jnp.where(valid, p, 0), jnp.where(valid, t, 0)
    return tuple(pairs.total(jnp.sum(x, axes), axis_name) for x in (p * t, p**power, t**power))


def simpson_gap(
    metric: Callable[..., Float[Array, "..."]], arrays: Sequence[Array], *, batch_size: int
) -> Float[Array, "..."]:
    """How far a metric of a whole set is from the mean of the same metric over its batches.

        metric(all) - mean_b metric(batch b)

    Zero for means over examples, such as accuracy; not for F1, Dice, AUC: what is best in every batch need not be best
    in the whole (Simpson's paradox), and a loss averaged over batches or devices then trains for something else. The
    remedy for Dice is `soft_dice_loss(axis=0, axis_name=...)` on batches as large as can be.

    Args:
      metric: `(*arrays) -> value`, which JAX can vmap; finite in every batch, those without positives too.
      arrays: what it takes, with a leading axis of n examples each.
      batch_size: of consecutive batches, in [1, n]; a remainder counts in the whole only.

    Returns:
      Of the shape of the metric, and in its unit.

    Raises:
      ValueError: `batch_size` out of its range, arrays of different length or none.

    Source: Simpson's Bias in NLP Training (2021, Yuan et al.).
    """
    arrays = [jnp.asarray(x) for x in arrays]
    lengths = {x.shape[:1] for x in arrays}
    if len(lengths) != 1 or lengths == {()}:
        raise ValueError(f"arrays must have one leading axis in common; their shapes are {[x.shape for x in arrays]}")
    ((n,),) = lengths
    batch_size = choices.require_count("batch_size", batch_size, f"[1, {n}]")
    count = n // batch_size
    batches = [x[: count * batch_size].reshape(count, batch_size, *x.shape[1:]) for x in arrays]
    return metric(*arrays) - jnp.mean(jax.vmap(metric)(*batches), axis=0)


def _axes(axis: Axis, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes in order, counted from the front."""
    given = tuple(axis) if isinstance(axis, Sequence) else (axis,)
    axes = {i % len(shape) for i in given if -len(shape) <= i < len(shape)}
    if not given or len(axes) != len(given):
        raise ValueError(f"axis={axis} must be one or several different axes of the shape {shape}")
    return tuple(sorted(axes))


def _ratio(part: Float[Array, "..."], whole: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 where there is nothing, with zero gradient."""
    some = whole > 0
    return jnp.where(some, part / jnp.where(some, whole, 1), 1)
