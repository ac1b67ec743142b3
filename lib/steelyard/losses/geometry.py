"""How classes lie in feature space: their means, how wide they spread, and how near they come to a simplex.

At the end of long, balanced training the features of a class meet in its mean, and the centred means are a simplex: of
equal length, all pairs at the cosine `-1 / (classes - 1)`. With few examples of some classes it does not happen by
itself. Two terms ask for it,

    cross-entropy + a sum(within_class_spread) - b mean(nearest_mean_angle)

and `simplex_frame` is a classifier that is put there and never trained. The means are parameters `[classes, features]`,
which the spread then trains as well, or those of the batch, `class_means`.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from steelyard import choices, precision
from steelyard.losses import checks, declare, margins, pairs

Features = Float[Array, "batch features"]
Labels = Int[Array, "batch"]
Means = Float[Array, "classes features"]


def class_means(
    features: Features,
    labels: Labels,
    num_classes: int,
    *,
    where: Bool[Array, "batch"] | None = None,
    axis_name: str | None = None,
) -> Means:
    """The mean of the features of each class, differentiable; zero for a class without examples.

    Inside a `shard_map` without `axis_name`, the means are those of each shard. Costs a product with a matrix
    [classes, batch].

    Args:
      features: one row for each example.
      labels: in [0, num_classes); examples with others, if traced, are left out.
      num_classes: how many rows the result has.
      where: the examples that count; None: all.
      axis_name: the mesh axis over which the batch is split; the result is then equal on every device.

    Returns:
      Float32 at least.

    Raises:
      ValueError: shapes that do not match, `num_classes` below 1, labels out of range (unless traced).
    """
    x, members = _members(features, labels, num_classes, where)
    sums = pairs.total(pairs.products(members.T, x.T), axis_name)
    return sums / jnp.maximum(_counts(members, axis_name), 1)[:, None]


@declare.batch_dependent
def within_class_spread(
    features: Features,
    labels: Labels,
    means: Means,
    *,
    where: Bool[Array, "batch"] | None = None,
    axis_name: str | None = None,
) -> Float[Array, "batch"]:
    """Squared distances of the features to the mean of their class, with the same total weight for every class.

        |h_i - mean_y|^2 / (classes n_y)        n_y: examples of the label's class in the batch

    The sum over the batch, not its mean, is the mean over the classes of their mean squared radius; a class without
    examples adds 0. It depends on the batch by n, so that microbatches give another loss; inside a `shard_map`
    without `axis_name`, n is counted in each shard. Costs a product with a matrix [batch, classes].

    Args:
      features, labels: h and y.
      means: trained, or those of the batch.
      where, axis_name: as in `class_means`; an example that does not count has loss 0.

    Returns:
      One number for each example, float32 at least.

    Raises:
      ValueError: shapes that do not match, labels out of range (unless traced).

    Source: Inducing Neural Collapse in Deep Long-tailed Learning (2023, Liu et al.).
    """
    means = precision.wide(means)
    if means.ndim != 2 or jnp.shape(features)[1:] != means.shape[1:]:
        raise ValueError(
            f"means has shape {means.shape} and features {jnp.shape(features)}: both need the same columns"
        )
    x, members = _members(features, labels, means.shape[0], where)
    # A masked row is zero and belongs to no class: its distance is 0.
    squares = jnp.sum((x - pairs.products(members, means.T)) ** 2, axis=-1)
    sizes = jnp.sum(members * _counts(members, axis_name), axis=-1)
    return squares / (means.shape[0] * jnp.maximum(sizes, 1))


def nearest_mean_angle(means: Means, *, eps: float = 1e-5) -> Float[Array, "classes"]:
    """The angle between each class mean and the one that is nearest in angle, both seen from their common centre.

        u_c = normalize(mean_c - mean of the means)        arccos(max over k != c of u_c . u_k)

    To be made large; the simplex has the largest least angle, arccos(-1 / (classes - 1)). Costs a matrix
    [classes, classes].

    Args:
      means: of classes that have examples, or trained.
      eps: cosines are clipped to [-1 + eps, 1 - eps], in (0, 1). There is no gradient beyond: of two means in the same
        direction none moves.

    Returns:
      Radians, float32 at least; pi for a class alone, pi / 2 for a mean in the centre.

    Raises:
      ValueError: `eps` out of its range, or means that are no matrix.

    Source: Inducing Neural Collapse in Deep Long-tailed Learning (2023, Liu et al.).
    """
    choices.require_within("eps", eps, "(0, 1)")
    cosines = _cosines(means)
    classes = len(cosines)
    if classes == 1:
        return jnp.full((1,), math.pi, cosines.dtype)
    nearest = jnp.max(jnp.where(jnp.eye(classes, dtype=bool), -jnp.inf, cosines), axis=-1)
    return jnp.arccos(jnp.clip(nearest, -1 + eps, 1 - eps))


def frame_gap(means: Means) -> Float[Array, ""]:
    """How far class means are from a simplex: the Frobenius distance of their cosines from its own.

        | cos(mean_c - centre, mean_k - centre) - (1 if c = k else -1 / (classes - 1)) |

    Returns:
      0 for a simplex, whatever its size and place; float32 at least.

    Raises:
      ValueError: fewer than two classes, or means that are no matrix.

    Source: Inducing Neural Collapse in Deep Long-tailed Learning (2023, Liu et al.).
    """
    cosines = _cosines(means)
    classes = choices.require_count("classes", len(cosines), "[2, inf)")
    ideal = jnp.where(jnp.eye(classes, dtype=bool), 1, -1 / (classes - 1))
    return optax.safe_norm(cosines - ideal, 0.0)


def simplex_frame(
    key: Key[Array, ""], features: int, classes: int, *, norm: float = 1.0
) -> Float[Array, "features classes"]:
    """A random simplex as a classifier's kernel: columns of equal length, equally far from each other.

        W = norm sqrt(C / (C - 1)) U (I - 1 1^T / C)        U: C random orthonormal columns

    Args:
      key: for U.
      features: length of the columns, at least `classes`.
      classes: C, at least 2.
      norm: length of the columns, not negative.

    Returns:
      Float32; the columns' cosines are -1 / (C - 1).

    Raises:
      ValueError: a number out of its range.

    Source: Exploring Weight Balancing on Long-Tailed Recognition Problem (2023, Hasegawa, Sato).
    """
    classes = choices.require_count("classes", classes, "[2, inf)")
    features = choices.require_count("features", features, f"[{classes}, inf)")
    choices.require_within("norm", norm, "[0, inf)")
    columns = jax.random.orthogonal(key, features, m=classes, dtype=jnp.float32)
    return norm * math.sqrt(classes / (classes - 1)) * (columns - jnp.mean(columns, axis=1, keepdims=True))


def fisher_discriminant_ratio(
    features: Features, labels: Labels, num_classes: int, *, ridge: float = 0.0
) -> Float[Array, ""]:
    """How far classes lie apart, in units of their own spread: `trace(W^-1 B)`.

        W = 1/N sum_i (h_i - mean_y) (h_i - mean_y)^T  +  ridge trace(W) / D I
        B = 1/N sum_c n_c (mean_c - mean) (mean_c - mean)^T

    No linear map of the features changes it (without ridge). Costs N D^2 + D^3.

    Args:
      features, labels, num_classes: as in `class_means`; h is [N, D].
      ridge: not negative. Without it, W is singular where a direction has no spread within classes (always if
        N - classes < D), and the result is NaN, or meaningless by rounding.

    Returns:
      Float32 at least.

    Raises:
      ValueError: as in `class_means`, or a negative `ridge`.

    Source: Exploring Weight Balancing on Long-Tailed Recognition Problem (2023, Hasegawa, Sato).
    """
    choices.require_within("ridge", ridge, "[0, inf)")
    x, members = _members(features, labels, num_classes, None)
    means = class_means(features, labels, num_classes)
    counts = _counts(members, None)
    total = jnp.sum(counts)
    apart = jnp.sqrt(counts / total)[:, None] * (means - jnp.sum(x, axis=0) / total)
    inside = (x - pairs.products(members, means.T)) / jnp.sqrt(total)
    within = pairs.products(inside.T, inside.T)
    within += ridge * jnp.trace(within) / len(within) * jnp.eye(len(within), dtype=within.dtype)
    # With W = L L^T it is the squared length of L^-1 applied to the roots of B.
    return jnp.sum(jax.scipy.linalg.solve_triangular(jnp.linalg.cholesky(within), apart.T, lower=True) ** 2)


def cone_cosine(features: Features, labels: Labels, num_classes: int) -> Float[Array, ""]:
    """Mean cosine between features of different classes; near 1 if all lie in a narrow cone.

    Costs a product with a matrix [classes, N], not one of all pairs.

    Arguments and errors are those of `class_means`.

    Returns:
      Float32 at least; 0 if there is one class only. A row of zeros has cosine 0 to all.

    Source: Exploring Weight Balancing on Long-Tailed Recognition Problem (2023, Hasegawa, Sato).
    """
    means = class_means(margins.normalize(features), labels, num_classes)
    counts = _counts(_members(features, labels, num_classes, None)[1], None)
    # The cosines of all pairs from two classes are, in the mean, the inner product of the classes' means.
    weights = jnp.where(jnp.eye(num_classes, dtype=bool), 0, jnp.outer(counts, counts))
    return jnp.sum(weights * pairs.products(means, means)) / jnp.maximum(jnp.sum(weights), 1)


def _members(
    features: Features, labels: Labels, num_classes: int, where: Bool[Array, "batch"] | None
) -> tuple[Features, Float[Array, "batch classes"]]:
    """The features, and 1 where an example is of a class; rows that do not count, or have no class, are all zero."""
    classes = choices.require_count("num_classes", num_classes, "[1, inf)")
    features, labels = checks.rows(features, name="features", labels=labels), jnp.asarray(labels)
    checks.check_labels(labels, classes)
    is_member = margins.label_mask(labels, classes) & pairs.valid_rows(where, len(labels))[:, None]
    return jnp.where(jnp.any(is_member, axis=-1)[:, None], features, 0), is_member.astype(features.dtype)


def _counts(members: Float[Array, "batch classes"], axis_name: str | None) -> Float[Array, "classes"]:
    return pairs.total(jnp.sum(members, axis=0), axis_name)


def _cosines(means: Means) -> Float[Array, "classes classes"]:
    means = precision.wide(means)
    if means.ndim != 2:
        raise ValueError(f"means has shape {means.shape}: it must be [classes, features]")
    unit = margins.normalize(means - jnp.mean(means, axis=0))
    return pairs.products(unit, unit)
