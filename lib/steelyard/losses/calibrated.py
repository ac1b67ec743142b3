"""A random binary loss in each step, known only by its derivatives at the margins of the batch.

Words: a *margin* is the score of an example times its label, -1 or +1. A loss of the margin is convex if its derivative
never falls as the margin grows, and calibrated (its minimum classifies best) if it is convex and its derivative at 0 is
negative. Any set of derivatives with these two properties is a loss, so that random numbers, sorted, will do.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from steelyard import choices
from steelyard.losses import checks, declare

PerExample = Float[Array, "batch"]


def calibrated_derivatives(
    margins: PerExample, draws: PerExample, *, box_cox: float = 0.0, cap: float = 1.0, floor: float = 1e-6
) -> PerExample:
    """Derivatives of a random convex, calibrated loss at the margins of a batch.

        g = max(-exp(z), -cap), or with (1 + box_cox z)^(1 / box_cox), at least 0, in place of exp(z)
        the k-th smallest g goes to the k-th smallest margin m
        g / max(m, 1) - floor

    They lie in [-cap - floor, 0) and never fall as the margin grows. Equal margins get theirs in their order. A margin
    of NaN gets a derivative of NaN.

    Costs three sorts of the batch.

    Args:
      margins: label times score, labels being -1 and +1.
      draws: z, standard normal numbers, independent of the margins; their order does not matter.
      box_cox: the parameter of the inverse Box-Cox transformation of z; 0 is the exponential function.
      cap: of the size of a derivative, positive.
      floor: its least size, positive.

    Returns:
      One derivative for each example, float32 at least.

    Raises:
      ValueError: a number out of its range, or not two vectors of the same length.

    Source: EnsLoss: Stochastic Calibrated Loss Ensembles for Preventing Overfitting in Classification (2024, Dai).
    """
    choices.require_within("box_cox", box_cox, "(-inf, inf)")
    choices.require_within("cap", cap, "(0, inf)")
    choices.require_within("floor", floor, "(0, inf)")
    margins, draws = checks.alike("margins", margins, "draws", draws)
    if margins.ndim != 1:
        raise ValueError(f"margins has shape {margins.shape}: it must be (batch,), one number for each example")
    slopes = jnp.sort(jnp.maximum(-_inverse_box_cox(draws, box_cox), -cap))
    ranks = jnp.argsort(jnp.argsort(margins))
    return slopes[ranks] / jnp.maximum(margins, 1) - floor


@declare.batch_dependent
def ensemble_calibrated_loss(
    margins: PerExample, key: Key[Array, ""], *, box_cox: float = 0.0, cap: float = 1.0, floor: float = 1e-6
) -> PerExample:
    """`stop_gradient(g) m`, with g from `calibrated_derivatives`: its gradient is that of a random calibrated loss.

    Its value is no loss; log the hinge or the errors instead. The key must be another one in each step; `box_cox` is
    drawn by `box_cox_parameter` every ten epochs or so, and may be traced. For more than two classes, use one score
    against the rest for each.

    The ranks are those in the batch. Inside a `shard_map` each shard draws a loss of its own, convex and calibrated
    too; give every shard another key (fold in its `axis_index`).

    Args:
      margins: m, label times score, labels being -1 and +1.
      key: of the draws.
      box_cox, cap, floor: as in `calibrated_derivatives`.

    Raises:
      ValueError: a number out of its range, or margins that are not a vector.

    Source: as `calibrated_derivatives`.
    """
    draws = jax.random.normal(key, jnp.shape(margins), jnp.promote_types(jnp.result_type(margins), jnp.float32))
    held = jax.lax.stop_gradient(margins)
    return calibrated_derivatives(held, draws, box_cox=box_cox, cap=cap, floor=floor) * margins


def box_cox_parameter(key: Key[Array, ""]) -> Float[Array, ""]:
    """A parameter for `ensemble_calibrated_loss`, uniform in [-1, 1)."""
    return jax.random.uniform(key, minval=-1.0, maxval=1.0)


def _inverse_box_cox(draws: PerExample, box_cox: float) -> PerExample:
    """`max(1 + box_cox z, 0)^(1 / box_cox)`, exp(z) at 0, by logarithms: exact for parameters near 0 too."""
    is_exp = jnp.asarray(box_cox) == 0
    box_cox = jnp.where(is_exp, 1, box_cox).astype(draws.dtype)
    power = jnp.log1p(jnp.maximum(box_cox * draws, -1)) / box_cox
    return jnp.exp(jnp.where(is_exp, draws, power))
