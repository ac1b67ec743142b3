"""Regression: errors that are damped or amplified, and bins of the target that are classified beside it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from steelyard import choices, precision
from steelyard.losses import checks


def pseudo_huber(
    errors: Float[Array, "*batch"], delta: Float[Array, "..."] | float, *, axis: int | tuple[int, ...] | None = None
) -> Float[Array, "..."]:
    """A smooth Huber loss: half the square of small errors, `delta |e|` for large ones, of slope below `delta`.

        delta^2 (sqrt(1 + e^2 / delta^2) - 1),   computed as   e^2 / (1 + sqrt(1 + e^2 / delta^2))

    which does not cancel. Some trainers use twice this value; this one tends to e^2 / 2 as delta grows, as
    `optax.huber_loss` does. In diffusion, `pseudo_huber_delta` or `pseudo_huber_delta_snr` make delta from the noise
    level. Costs one pass.

    Args:
      errors: e, prediction minus target.
      delta: where it turns from square to linear, in the unit of the errors, positive; infinity is half the square. It
        may be an array that broadcasts to the shape of the result, such as one number for each example.
      axis: with one or several axes, e is the Euclidean length over them: the loss of a vector. None: of each entry.

    Returns:
      Float32 at least, without the axes.

    Raises:
      ValueError: a delta that is not positive, or does not broadcast to the result.

    Source: Improving Diffusion Models's Data-Corruption Resistance using Scheduled Pseudo-Huber Loss (2024, Khrapov et
    al.).
    """
    choices.require_within("delta", delta, "(0, inf]")
    squares = precision.wide(errors) ** 2
    if axis is not None:
        squares = jnp.sum(squares, axis)
    checks.require_broadcast("delta", delta, "the losses", squares.shape)
    inverse = 1 / jnp.asarray(delta, squares.dtype)
    # Scaled twice, as the square of a small delta may underflow.
    return squares / (1 + jnp.sqrt(1 + squares * inverse * inverse))


def pseudo_huber_delta(
    timestep: Float[Array, "*batch"] | int, total: int, *, delta: float = 0.1
) -> Float[Array, "*batch"]:
    """Exponential schedule of delta over the steps of a diffusion: `delta^(timestep / total)`.

    From 1 without noise, for precise details, to delta without signal, where outliers then pull less. For data of unit
    scale: multiply it by that of others.

    Args:
      timestep: of the forward process, in [0, total]: 0 is clean.
      total: number of the steps, positive.
      delta: at the last step, positive.

    Returns:
      Float32 at least.

    Raises:
      ValueError: a number out of its range.

    Source: as for `pseudo_huber`.
    """
    choices.require_within("total", total, "(0, inf)")
    choices.require_within("delta", delta, "(0, inf)")
    if not isinstance(total, jax.core.Tracer):
        choices.require_within("timestep", timestep, f"[0, {total}]")
    timestep = precision.wide(timestep)
    return jnp.exp(jnp.log(jnp.asarray(delta, timestep.dtype)) * timestep / total)


def pseudo_huber_delta_snr(alpha_bar: Float[Array, "*batch"], *, delta: float = 0.1) -> Float[Array, "*batch"]:
    """Schedule of delta by the ratio of noise to signal.

        sigma = sqrt((1 - alpha_bar) / alpha_bar),    (1 - delta) / (1 + sigma)^2 + delta

    Like `pseudo_huber_delta` it goes from 1 without noise to delta without signal, whatever the schedule of the noise.

    Args:
      alpha_bar: share of the signal in the variance, in [0, 1]; the signal is multiplied by its root.
      delta: without signal, positive.

    Returns:
      Float32 at least.

    Raises:
      ValueError: a number out of its range.

    Source: as for `pseudo_huber`.
    """
    choices.require_within("alpha_bar", alpha_bar, "[0, 1]")
    choices.require_within("delta", delta, "(0, inf)")
    alpha_bar = precision.wide(alpha_bar)
    signal, noise = jnp.sqrt(alpha_bar), jnp.sqrt(1 - alpha_bar)
    # 1 / (1 + sigma), without a division by zero where there is no signal.
    share = signal / (signal + noise)
    return (1 - delta) * share**2 + delta


def amplify(errors: Float[Array, "*batch"], *, limit: float = 1 - 1e-6) -> Float[Array, "*batch"]:
    """Steepens a bounded error: `-log(1 - min(e, limit))`, about `e + e^2 / 2` for small ones, of slope `1 / (1 - e)`.

    For autoencoders that detect anomalies: trained on the mean over the entries they fit normal examples closely; the
    score of an anomaly remains the plain error. An error of `limit` or more has the loss `-log(1 - limit)`, 13.8, and
    no gradient: scale the data to [0, 1], and start from outputs in (0, 1). Costs one pass over the errors.

    Args:
      errors: in [0, 1), squares or absolute values of differences of such numbers. Below 0 the result means nothing.
      limit: in (0, 1), and not so near to 1 that it is rounded to it.

    Returns:
      Float32 at least.

    Raises:
      ValueError: `limit` is out of its range.

    Source: Neural Network Training Strategy to Enhance Anomaly Detection Performance: A Perspective on Reconstruction
    Loss Amplification (2023, Park et al.); that the amplifier is this logarithm is a reading of it.
    """
    errors = precision.wide(errors)
    rounded = limit if isinstance(limit, jax.core.Tracer) else np.asarray(limit, errors.dtype)
    choices.require_within("limit", rounded, "(0, 1)")
    limit = jnp.asarray(limit, errors.dtype)
    # A minimum would halve the gradient where both are equal.
    return -jnp.log1p(-jnp.where(errors < limit, errors, limit))


def regression_with_classification(
    prediction: Float[Array, "*batch"],
    logits: Float[Array, "*batch bins"],
    target: Float[Array, "*batch"],
    *,
    edges: Float[Array, "bins-1"],
    weight: float = 0.1,
) -> Float[Array, "*batch"]:
    """Squared error, and beside it the cross-entropy of the bin that the target is in.

        (prediction - target)^2 + weight cross_entropy(logits, bin_targets(target, edges))

    Both are outputs of one trunk; the prediction alone is used afterwards. Meant for targets that are spread unevenly,
    with the bins of `quantile_edges`. Costs a head with an output for each bin.

    Args:
      prediction: in the unit of the target.
      logits: one for each bin.
      target: what is predicted.
      edges: between the bins, ascending, one less than there are bins.
      weight: of the cross-entropy, in squared units of the target per nat, at least 0.

    Returns:
      One number for each example, float32 at least.

    Raises:
      ValueError: a negative weight, edges that do not ascend, or shapes that do not match.

    Source: A step towards understanding why classification helps regression (2023, Pintea et al.).
    """
    choices.require_within("weight", weight, "[0, inf)")
    prediction, target = checks.alike("prediction", prediction, "target", target)
    bins = bin_targets(target, edges)
    logits, expected = precision.wide(logits), (*target.shape, len(edges) + 1)
    if logits.shape != expected:
        shapes = f"target has shape {target.shape}, edges {jnp.shape(edges)} and logits {logits.shape}"
        raise ValueError(f"{shapes}: logits must be of shape {expected}, with one more than there are edges")
    nats = optax.softmax_cross_entropy_with_integer_labels(logits, bins)
    return optax.squared_error(prediction, target) + weight * nats


def bin_targets(targets: Float[Array, "*batch"], edges: Float[Array, "bins-1"]) -> Int[Array, "*batch"]:
    """The bin of each target: how many edges are not above it.

    A target on an edge is in the bin to its right; beyond the first and the last edge lie the two outer bins. Costs a
    comparison of each target with each edge.

    Args:
      targets: any numbers.
      edges: between the bins, ascending, no two equal; such as `uniform_edges` or `quantile_edges`.

    Returns:
      Integers in [0, bins).

    Raises:
      ValueError: edges that are no vector, none, or do not ascend.

    Source: as for `regression_with_classification`.
    """
    targets, edges = precision.wide(targets), precision.wide(edges)
    if edges.ndim != 1 or not edges.size:
        raise ValueError(f"edges has shape {edges.shape}: it must be a vector of one number or more")
    known = not isinstance(edges, jax.core.Tracer)
    if known and not (np.all(np.isfinite(edges)) and np.all(np.diff(edges) > 0)):
        raise ValueError(f"edges={edges} must be finite and ascend, no two of them equal")
    return jnp.searchsorted(edges, targets, side="right", method="compare_all")


def uniform_edges(low: float, high: float, bins: int) -> Float[Array, "bins-1"]:
    """The inner edges of bins of equal width: `low + (high - low) k / bins` for k from 1 to bins - 1.

    Args:
      low, high: the range that is divided, `low < high`; targets beyond it fall in the outer bins.
      bins: at least 2.

    Raises:
      ValueError: fewer than 2 bins, or a range that is empty or not finite.
    """
    bins = choices.require_count("bins", bins, "[2, inf)")
    if not any(isinstance(end, jax.core.Tracer) for end in (low, high)):
        choices.require_within("low", low, f"(-inf, {high})")
        choices.require_within("high", high, f"({low}, inf)")
    return jnp.linspace(precision.wide(low), precision.wide(high), bins + 1)[1:-1]


def quantile_edges(targets: Float[Array, "..."], bins: int) -> Float[Array, "edges"]:
    """The inner edges of bins with equally many of the given targets, or one more: the histogram is equalised.

    Each edge is a target above the smallest one, so that no bin is empty. Equal targets are not divided: where edges
    coincide there are fewer bins than asked for, `len(edges) + 1`. Runs on the host.

    Args:
      targets: those trained on, of any shape; not traced.
      bins: at least 2.

    Returns:
      Ascending, at most `bins - 1`, float32 at least.

    Raises:
      ValueError: fewer than 2 bins, or targets that are not finite or all equal.

    Source: as for `regression_with_classification`.
    """
    bins = choices.require_count("bins", bins, "[2, inf)")
    # Rounded as in `bin_targets`.
    values = np.sort(np.asarray(precision.wide(targets)), axis=None)
    choices.require_within("targets", values, "(-inf, inf)")
    larger = values[values > values[:1]]
    if not larger.size:
        raise ValueError(f"targets has {values.size} numbers, no two of them different: they cannot be binned")
    positions = -(-np.arange(1, bins) * (values.size - 1) // bins)  # of the quantiles k / bins, rounded up
    return jnp.asarray(np.unique(np.maximum(values[positions], larger[0])))
