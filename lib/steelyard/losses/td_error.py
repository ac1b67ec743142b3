"""Temporal-difference errors that are noisy and heavy-tailed: their likelihood, and weights by their variance.

The critic predicts, beside a value, the shape b of its error's distribution, and several critics give the spread of the
errors of one transition. With critics on the first axis, transitions on the second, and `b = softplus(head)` clipped to
[0.1, 10] by the caller:

    error   = td_error(reward, discount, value, stop_gradient(next_value))
    trust   = b / sum(b, axis=0)        a larger shape is a lighter tail
    spread  = best_biased_variance(error, excess_kurtosis=mean(generalized_gaussian_excess_kurtosis(b), axis=0))
    weights = inverse_variance_weights(spread, min_effective=transitions / 2)
    loss    = mean(trust * generalized_gaussian_nll(error, b)) + mean(sum(weights * error^2, axis=1))

The paper fixes the scale at 1. That the two terms weigh the same, and that the trust is not held constant, are readings
of it.

Source: Generalized Gaussian Temporal Difference Error for Uncertainty-aware Reinforcement Learning (2024, Kim et al.).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from steelyard import choices, precision
from steelyard.losses import checks, declare, pairs

# They halve an interval of logarithms: the offset is found to 2e-7 of itself, in float64 too.
_BISECTIONS = 32


def td_error(
    reward: Float[Array, "..."],
    discount: Float[Array, "..."] | float,
    value: Float[Array, "*batch"],
    next_value: Float[Array, "*batch"],
) -> Float[Array, "*batch"]:
    """`reward + discount next_value - value`, one number for each transition.

    Nothing here stops a gradient: put `jax.lax.stop_gradient` on `next_value` for a semi-gradient.

    Args:
      reward: broadcasts to the shape of `value`, which may have a leading axis of critics.
      discount: likewise; 0 where the episode ends.
      value: of the states that were left.
      next_value: of the states that were reached, of the same shape.

    Returns:
      In units of the reward, float32 at least.

    Raises:
      ValueError: shapes that do not match; `[n]` against `[n, 1]` is one.
    """
    value, next_value = checks.alike("value", value, "next_value", next_value)
    reward, discount = _fitted("value", value.shape, value.dtype, reward=reward, discount=discount)
    return reward + discount * next_value - value


def generalized_gaussian_nll(
    error: Float[Array, "*batch"], shape: Float[Array, "..."] | float, *, scale: Float[Array, "..."] | float = 1.0
) -> Float[Array, "*batch"]:
    """Negative log-likelihood of errors with the density `exp(-(|e| / scale)^b) b / (2 scale Gamma(1/b))`.

        (|e| / scale)^b - log b + log(2 scale) + log Gamma(1/b)

    Shape b = 2 is the normal distribution of standard deviation `scale / sqrt(2)`, 1 is Laplace's, a large b tends to
    the uniform one. At an error of 0 the error's gradient is 0, also for b <= 1, where the density has a peak.

    Args:
      error: e, about 0.
      shape: b, positive; broadcasts to the errors.
      scale: in units of the error, positive; broadcasts to the errors.

    Returns:
      Nats for each error, float32 at least.

    Raises:
      ValueError: shape or scale not positive (unless traced), or of a shape that does not broadcast.
    """
    choices.require_within("shape", shape, "(0, inf)")
    choices.require_within("scale", scale, "(0, inf)")
    error, shape, scale = _fitted("error", jnp.shape(error), error=error, shape=shape, scale=scale)
    ratio = jnp.abs(error) / scale
    zero = ratio == 0
    power = jnp.where(zero, 0, jnp.power(jnp.where(zero, 1, ratio), shape))
    return power - jnp.log(shape) + jnp.log(2 * scale) + jax.scipy.special.gammaln(1 / shape)


def generalized_gaussian_variance(
    shape: Float[Array, "*batch"], *, scale: Float[Array, "..."] | float = 1.0
) -> Float[Array, "*batch"]:
    """Variance of that distribution, `scale^2 Gamma(3/b) / Gamma(1/b)`; in float32 for b above 0.08.

    Args:
      shape: b, positive.
      scale: positive; broadcasts to the shapes.

    Raises:
      ValueError: as for `generalized_gaussian_nll`.
    """
    choices.require_within("shape", shape, "(0, inf)")
    choices.require_within("scale", scale, "(0, inf)")
    shape, scale = _fitted("shape", jnp.shape(shape), shape=shape, scale=scale)
    third, first = (jax.scipy.special.gammaln(k / shape) for k in (3, 1))
    return scale**2 * jnp.exp(third - first)


def generalized_gaussian_excess_kurtosis(shape: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
    """Excess kurtosis of that distribution, `Gamma(5/b) Gamma(1/b) / Gamma(3/b)^2 - 3`: 0 for b = 2, 3 for b = 1.

    Args:
      shape: b, positive.

    Raises:
      ValueError: a shape that is not positive (unless traced).
    """
    choices.require_within("shape", shape, "(0, inf)")
    shape = precision.wide(shape)
    fifth, third, first = (jax.scipy.special.gammaln(k / shape) for k in (5, 3, 1))
    return jnp.exp(fifth + first - 2 * third) - 3


def best_biased_variance(
    values: Float[Array, "..."], *, excess_kurtosis: Float[Array, "..."] | float = 0.0, axis: int = 0
) -> Float[Array, "..."]:
    """The multiple of the sample variance that has the least mean squared error.

        s^2 / ((n + 1) / (n - 1) + kappa / n),    s^2 = sum (x - mean)^2 / (n - 1)

    With kappa = 0 that is the sum of squares divided by n + 1.

    Args:
      values: n of them along `axis`, such as the errors of n critics.
      excess_kurtosis: kappa of the distribution that they come from, at least -2; a constant for the gradient.
        Broadcasts to the result.
      axis: which.

    Returns:
      In squared units of the values, without `axis`.

    Raises:
      ValueError: fewer than two values, kappa below -2 (unless traced), or of a shape that does not broadcast.
    """
    choices.require_within("excess_kurtosis", excess_kurtosis, "[-2, inf)")
    values = precision.wide(values)
    n = values.shape[axis]
    if n < 2:
        raise ValueError(f"values has shape {values.shape}: a variance needs at least 2 of them, along axis {axis}")
    variance = jnp.var(values, axis, ddof=1)
    (kappa,) = _fitted("the result", variance.shape, variance.dtype, excess_kurtosis=excess_kurtosis)
    return variance / ((n + 1) / (n - 1) + jax.lax.stop_gradient(kappa) / n)


@declare.batch_dependent
def inverse_variance_weights(
    variance: Float[Array, "batch"],
    *,
    offset: Float[Array, ""] | float | None = None,
    min_effective: float | None = None,
    axis_name: str | None = None,
) -> Float[Array, "batch"]:
    """Weights that sum to 1 over the batch and fall with the variance.

        w_i = (1 / (variance_i + offset)) / sum_j (1 / (variance_j + offset))

    With `min_effective`, offset is the least for which the effective batch size `1 / sum w^2` is that large, found by
    32 bisections on its logarithm. With neither, it is 0, and examples of variance 0 share all of the weight. The
    weights are constants for the gradient.

    The weights depend on the whole batch. Inside a `shard_map` without `axis_name` they are those of each shard. A
    bisection costs one pass over the shard and, with `axis_name`, one all-reduce of two numbers.

    Args:
      variance: of each example, at least 0, finite.
      offset: in units of the variance, at least 0.
      min_effective: in [1, batch], the examples of all shards counted.
      axis_name: inside a `shard_map`, the mesh axis over which the examples are split.

    Returns:
      One weight for each example, float32 at least.

    Raises:
      ValueError: both an offset and an effective size, a number out of its range, a variance that is not a vector or
        (unless traced) negative.

    Source: Sample Efficient Deep Reinforcement Learning via Uncertainty Estimation (2022, Mai et al.).
    """
    choices.require_within("variance", variance, "[0, inf)")
    variance = jax.lax.stop_gradient(precision.wide(variance))
    if variance.ndim != 1:
        raise ValueError(f"variance has shape {variance.shape}: it must be (batch,), one for each example")
    if min_effective is None:
        offset = 0.0 if offset is None else offset
        choices.require_within("offset", offset, "[0, inf)")
    elif offset is None:
        count = len(variance) * (1 if axis_name is None else jax.lax.axis_size(axis_name))
        choices.require_within("min_effective", min_effective, f"[1, {count}]")
        offset = _least_offset(variance, min_effective, axis_name)
    else:
        raise ValueError(f"offset={offset} and min_effective={min_effective}: only one of them may be given")
    weights = _relative_weights(variance, jax.lax.stop_gradient(offset), axis_name)
    return weights / pairs.total(jnp.sum(weights), axis_name)


def _relative_weights(variance: Float[Array, "batch"], offset, axis_name: str | None) -> Float[Array, "batch"]:
    """Divided by the largest of them, so that a variance of 0 is no division by zero."""
    sums = variance + jnp.asarray(offset, variance.dtype)
    least = jnp.min(sums)
    least = least if axis_name is None else jax.lax.pmin(least, axis_name)
    return jnp.where(sums > least, least / jnp.where(sums > 0, sums, 1), 1)


def _least_offset(variance: Float[Array, "batch"], min_effective: float, axis_name: str | None) -> Float[Array, ""]:
    """The least offset for which the effective size is large enough: it grows with the offset."""
    largest = jnp.max(variance)
    largest = largest if axis_name is None else jax.lax.pmax(largest, axis_name)
    unit = jnp.where(largest > 0, largest, 1)
    variance = variance / unit

    def is_enough(offset):
        weights = _relative_weights(variance, offset, axis_name)
        total, squares = pairs.total(jnp.stack([jnp.sum(weights), jnp.sum(weights**2)]), axis_name)
        return total**2 >= min_effective * squares

    def halve(_, ends):
        low, high = ends
        middle = (low + high) / 2
        enough = is_enough(jnp.exp(middle))
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    # Beyond 2^30 variances all weights are equal. The zero makes the ends vary over devices as the variance does.
    zero = 0 * unit
    ends = zero + np.log(jnp.finfo(variance.dtype).tiny), zero + 30 * np.log(2)
    _, high = jax.lax.fori_loop(0, _BISECTIONS, halve, ends)
    return unit * jnp.where(is_enough(0.0), 0, jnp.exp(high))


def _fitted(onto: str, shape: tuple[int, ...], dtype=jnp.float32, /, **values: Array | float) -> list[Array]:
    """The values in one dtype, `dtype` at least.

    Raises:
      ValueError: one of them does not broadcast to the shape, which is that of `onto`.
    """
    for name, value in values.items():
        checks.require_broadcast(name, value, onto, shape)
    dtype = jnp.promote_types(jnp.result_type(*values.values()), dtype)
    return [jnp.asarray(value, dtype) for value in values.values()]
