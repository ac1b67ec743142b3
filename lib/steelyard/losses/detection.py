"""Dense detection, where nearly every anchor is background, without sampling anchors.

A detector scores C classes on thousands of anchors per image by sigmoids, and a few anchors in a thousand have an
object. Two things keep the many from swamping the first steps: a last bias at which all sigmoids give the frequency of
objects, and a loss that does not grow with the background, `losses.sigmoid_focal_loss(logits, labels, alpha=0.25,
gamma=2.0)`, or plain `losses.sigmoid_binary_cross_entropy` under `guided_loss_scale`. Either is summed over all anchors
and divided by the number of the anchors with an object, at least 1. That number is of the whole batch: where a device
holds a part of it, sums and numbers are added over the devices before they are divided.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from steelyard import choices, precision
from steelyard.losses import declare

Count = int | float | Float[Array, ""]


def prior_bias(prior: float | Float[Array, "..."] = 0.01) -> Float[Array, "..."]:
    """The bias of a last layer whose sigmoid is the prior probability of an object.

        bias = -log((1 - prior) / prior)

    Args:
      prior: in (0, 1); a number, or one for each class.

    Returns:
      The bias, of the shape of the prior, float32 at least; with small kernels the first scores are all near the prior.

    Raises:
      ValueError: `prior` is not in (0, 1), unless traced.

    Source: Focal Loss for Dense Object Detection (2017, Lin et al.), section 3.3.
    """
    choices.require_within("prior", prior, "(0, 1)")
    return jax.scipy.special.logit(precision.wide(prior))


def foreground_prior(num_foreground: Count, num_all: Count, num_classes: int) -> Count:
    """The frequency at which an anchor is an object of one given class, `num_foreground / num_all / num_classes`.

    Counted over one pass through the training data with the matcher that training uses. Over a large data set the
    counts do not fit into 32 bits: Python integers do. With several hosts, add their counts first.

    Args:
      num_foreground: anchors with an object.
      num_all: all anchors.
      num_classes: of objects, without the background.

    Returns:
      The prior that `prior_bias` and `adaptive_threshold` take.

    Raises:
      ValueError: no anchor with an object or more than there are anchors (unless traced), or no class.

    Source: Is Heuristic Sampling Necessary in Training Deep Object Detectors? (2019, Chen et al.).
    """
    choices.require_within("num_all", num_all, "(0, inf)")
    is_traced = isinstance(num_all, jax.core.Tracer)
    choices.require_within("num_foreground", num_foreground, "(0, inf)" if is_traced else f"(0, {num_all}]")
    return num_foreground / num_all / choices.require_count("num_classes", num_classes, "[1, inf)")


def adaptive_threshold(prior: Count, num_classes: int) -> Count:
    """The score above which a detection is kept, `prior * num_classes`: the frequency of anchors with any object.

    A model trained without sampling gives low scores, as objects are rare: 0.05 would remove most.

    Args:
      prior: frequency of an object of one given class, as `foreground_prior` gives it.
      num_classes: of objects, without the background.

    Returns:
      A score in (0, 1].

    Raises:
      ValueError: no class; a prior not in (0, 1 / num_classes], unless traced.

    Source: as for `foreground_prior`.
    """
    num_classes = choices.require_count("num_classes", num_classes, "[1, inf)")
    choices.require_within("prior", prior, f"(0, {1 / num_classes}]")
    return prior * num_classes


@declare.batch_dependent
def guided_loss_scale(
    classification: Float[Array, ""], regression: Float[Array, ""], *, eps: float = 1e-12
) -> Float[Array, ""]:
    """The classification loss, rescaled to the size of the regression loss.

        classification * stop_gradient(regression / max(classification, eps))

    The value is the regression loss; the gradient is the classification loss's, times the ratio. The regression loss,
    which objects alone have, does not grow with the background, and so neither does the step of the classifier. A batch
    without objects has no regression loss and leaves the classifier where it is; and where boxes are learned much
    better than classes, their small loss starves the classifier: give the regression loss the weight that makes the two
    comparable. Costs nothing.

    Batch-dependent: the ratio is of whole batches, and those of microbatches are others. Where a device holds a part of
    the batch, average both losses over the devices first (`jax.lax.pmean`): else each device has its own ratio, and the
    sum of their gradients is that of no common loss.

    Args:
      classification: already summed or averaged over the batch, not negative.
      regression: likewise.
      eps: the least classification loss that is divided by, positive.

    Returns:
      A scalar, float32 at least; 0 if the classification loss is 0.

    Raises:
      ValueError: a loss that is no scalar, or `eps` is not positive.

    Source: as for `foreground_prior`.
    """
    choices.require_within("eps", eps, "(0, inf)")
    for name, loss in (("classification", classification), ("regression", regression)):
        if jnp.ndim(loss):
            raise ValueError(f"{name} has shape {jnp.shape(loss)}: it must be a scalar, already reduced over the batch")
    classification, regression = precision.wide(classification), precision.wide(regression)
    return classification * jax.lax.stop_gradient(regression / jnp.maximum(classification, eps))
