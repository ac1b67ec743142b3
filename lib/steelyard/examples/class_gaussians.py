"""A Gaussian for the features of every class, to draw more examples of those that have few.

Noisy labels put outliers into a class, which are dropped before anything is estimated; few examples give a poor
covariance, which is mixed with those of the nearest large classes. Train the classifier on

    features and sample_features(key, gaussians, extra)

with `extra` the label c repeated `max(count) - count[c]` times, for all c.

When Noisy Labels Meet Long Tail Dilemmas: A Representation Calibration Method (2022, Zhang et al.).
"""

import importlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from steelyard import choices, precision
from steelyard.losses import checks

_LEAST_VARIANCE = 1e-6
_ROWS = 32  # whose roots of covariances are in memory together


class Gaussians(NamedTuple):
    """One normal distribution for each class.

    Attributes:
      mean: of the features.
      covariance: symmetric; singular where a class has few examples.
      count: how many examples each class had, those included that were dropped.
    """

    mean: Float[Array, "classes features"]
    covariance: Float[Array, "classes features features"]
    count: Int[Array, "classes"]


def class_gaussians(
    features: Float[np.ndarray, "n features"],
    labels: Int[np.ndarray, "n"],
    num_classes: int,
    *,
    neighbors: int = 10,
    keep: float = 0.9,
    is_head: Bool[np.ndarray, "classes"],
    borrow: int = 3,
    mixture: float = 0.5,
    jitter: float = 0.2,
) -> Gaussians:
    """Estimates a Gaussian for each class, without its outliers, and lets small classes borrow from large ones.

    Of each class the share `keep` with the smallest local outlier factor among `neighbors` is kept, unless the class
    has no more than `neighbors` examples; m, S are the mean and the covariance (over n - 1) of what is kept, S = 0
    for one example. A class k that is no head takes from the `borrow` heads nearest in d_c = |m_k - m_c|^2, with
    weights w_c = n_c / d_c, scaled to sum to 1:

        mean       = mixture sum_c w_c m_c + (1 - mixture) m_k
        covariance = mixture sum_c w_c S_c + (1 - mixture) S_k + jitter^2 I

    Runs on the host in float64, between the training of the features and that of the classifier; keep < 1 needs
    scikit-learn. Costs classes D^2 of memory.

    Args:
      features: of an encoder that has not seen the labels.
      labels: in [0, num_classes), some of them wrong.
      num_classes: how many classes there are, each with an example at least.
      neighbors: at least 1.
      keep: in (0, 1]; 1 drops nothing.
      is_head: which classes are large.
      borrow: how many heads a small class takes from, at least 1 and not more than there are.
      mixture: the heads' share, in [0, 1].
      jitter: standard deviation that a small class gets in addition, in units of the features, not negative.

    Returns:
      Float32, or float64 for such features.

    Raises:
      ValueError: a number out of its range, shapes that do not match, a class without examples, too few heads.

    Source: When Noisy Labels Meet Long Tail Dilemmas: A Representation Calibration Method (2022, Zhang et al.). The
    weights, the outlier rule and the constants are a reading of it.
    """
    neighbors = choices.require_count("neighbors", neighbors, "[1, inf)")
    borrow = choices.require_count("borrow", borrow, "[1, inf)")
    for name, value, interval in (
        ("keep", keep, "(0, 1]"),
        ("mixture", mixture, "[0, 1]"),
        ("jitter", jitter, "[0, inf)"),
    ):
        choices.require_within(name, value, interval)
    dtype = precision.wide(features).dtype
    features, labels, is_head = np.asarray(features, np.float64), np.asarray(labels), np.asarray(is_head, bool)
    counts = _counts(features, labels, num_classes, is_head, borrow)
    moments = [_moments(_inliers(features[labels == c], neighbors, keep)) for c in range(num_classes)]
    means, covariances = (np.stack(parts) for parts in zip(*moments, strict=True))

    borrowed_means, borrowed_covariances = means.copy(), covariances.copy()
    for k in np.flatnonzero(~is_head):
        heads, weights = _lenders(means, counts, is_head, k, borrow)
        borrowed_means[k] = mixture * weights @ means[heads] + (1 - mixture) * means[k]
        lent = np.tensordot(weights, covariances[heads], axes=1)
        borrowed_covariances[k] = mixture * lent + (1 - mixture) * covariances[k] + jitter**2 * np.eye(means.shape[1])
    return Gaussians(
        jnp.asarray(borrowed_means, dtype), jnp.asarray(borrowed_covariances, dtype), jnp.asarray(counts, jnp.int32)
    )


def sample_features(key: Key[Array, ""], gaussians: Gaussians, labels: Int[Array, "n"]) -> Float[Array, "n features"]:
    """One feature vector for each label, from the Gaussian of its class.

        mean_y + V sqrt(max(e, 1e-6)) z        V e V^T: the covariance, z standard normal

    The eigenvalues are clipped so that singular covariances can be drawn from. Costs an eigendecomposition for each
    class at every call, and D^2 operations for each label, with the roots of 32 of them in memory.

    Args:
      key: for z.
      gaussians: from `class_gaussians`.
      labels: y, integers in [0, classes).

    Returns:
      Of the dtype of the means.

    Raises:
      ValueError: labels that are not a vector of integers.

    Source: When Noisy Labels Meet Long Tail Dilemmas: A Representation Calibration Method (2022, Zhang et al.).
    """
    labels = jnp.asarray(labels)
    if labels.ndim != 1 or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be a vector of integers, got {labels.dtype} of shape {labels.shape}")
    variances, axes = jnp.linalg.eigh(gaussians.covariance)
    roots = axes * jnp.sqrt(jnp.maximum(variances, _LEAST_VARIANCE))[:, None, :]
    noise = jax.random.normal(key, (len(labels), gaussians.mean.shape[1]), gaussians.mean.dtype)

    def draw(row):
        label, z = row
        return gaussians.mean[label] + jnp.matmul(roots[label], z, precision="highest")

    return jax.lax.map(draw, (labels, noise), batch_size=_ROWS)


def _counts(features, labels, num_classes: int, is_head, borrow: int) -> Int[np.ndarray, "classes"]:
    checks.rows(features, name="features", labels=labels)
    if is_head.shape != (num_classes,):
        raise ValueError(f"is_head has shape {is_head.shape}: it must be ({num_classes},), one for each class")
    if not is_head.all() and is_head.sum() < borrow:
        raise ValueError(f"borrow={borrow}, but is_head names {is_head.sum()} classes to borrow from")
    choices.require_within("labels", labels, f"[0, {num_classes})")
    counts = np.bincount(labels, minlength=num_classes)
    if not counts.all():
        raise ValueError(f"class {np.argmin(counts)} has no examples: every class of {num_classes} must have one")
    return counts


def _inliers(rows: Float[np.ndarray, "n features"], neighbors: int, keep: float) -> Float[np.ndarray, "kept features"]:
    """The share of the rows that lie where their neighbours lie densest; one at least."""
    if keep == 1 or len(rows) <= neighbors:
        return rows
    fitted = _sklearn().LocalOutlierFactor(n_neighbors=neighbors).fit(rows)
    order = np.argsort(-fitted.negative_outlier_factor_, kind="stable")
    return rows[np.sort(order[: max(1, round(keep * len(rows)))])]


def _moments(rows: Float[np.ndarray, "n features"]) -> tuple[np.ndarray, np.ndarray]:
    mean = rows.mean(axis=0)
    return mean, (rows - mean).T @ (rows - mean) / max(len(rows) - 1, 1)


def _lenders(means, counts, is_head, k: int, borrow: int) -> tuple[Int[np.ndarray, "b"], Float[np.ndarray, "b"]]:
    """The nearest heads of a class, and their weights."""
    heads = np.flatnonzero(is_head)
    distances = np.sum((means[heads] - means[k]) ** 2, axis=1)
    nearest = np.argsort(distances, kind="stable")[:borrow]
    # A head in the same place takes all of the weight.
    weights = counts[heads[nearest]] / np.maximum(distances[nearest], np.finfo(np.float64).tiny)
    return heads[nearest], weights / weights.sum()


def _sklearn():
    try:
        return importlib.import_module("sklearn.neighbors")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "keep < 1 drops outliers by scikit-learn: pip install 'steelyard[train]', or keep everything with keep=1"
        ) from error
