"""Large classes cut into clusters as large as the small classes, for `losses.subclass_contrastive`.

Every few epochs, on the host:

    counts = subclass_count(class_counts)
    subclasses of class c = balanced_clusters(key, embeddings of class c, counts[c])

Subclass-balancing Contrastive Learning for Long-tailed Recognition (2023, Hou et al.).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from steelyard import choices
from steelyard.losses import checks


def balanced_clusters(
    key: Key[Array, ""], embeddings: Float[Array, "n d"], num_clusters: int, *, iterations: int = 50
) -> Int[np.ndarray, "n"]:
    """K-means by cosine, with clusters whose sizes differ by at most 1.

    It starts at K of the points. Each round takes the pairs of point and centre by descending similarity: a point joins
    a centre unless it has one already or the centre has floor(n / K) points. Points that are left over join in the same
    way, one to a centre. Centres are then means, and rounds go on until no point moves.

    Runs in NumPy, outside of jit; a round costs the n x K similarities a few times.

    Args:
      key: draws the first centres.
      embeddings: only their directions count.
      num_clusters: K, from 1 to n.
      iterations: rounds at most.

    Returns:
      The cluster of each point, in [0, K).

    Raises:
      ValueError: a number out of its range, embeddings that are not [n, d].

    Source: Subclass-balancing Contrastive Learning for Long-tailed Recognition (2023, Hou et al.).
    """
    if jnp.ndim(embeddings) != 2 or not len(embeddings):
        raise ValueError(f"embeddings has shape {jnp.shape(embeddings)}: it must be [n, d], n >= 1")
    points = _unit(np.asarray(embeddings, np.float64))
    num_clusters = choices.require_count("num_clusters", num_clusters, f"[1, {len(points)}]")
    iterations = choices.require_count("iterations", iterations, "[1, inf)")
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    centres = points[rng.choice(len(points), num_clusters, replace=False)]
    clusters = None
    for _ in range(iterations):
        previous, clusters = clusters, _assign(points @ centres.T)
        if np.array_equal(clusters, previous):
            break
        centres = _unit(np.stack([points[clusters == k].mean(0) for k in range(num_clusters)]))
    return clusters


def subclass_count(counts: Float[Array, "classes"], *, minimum_size: int = 10) -> Int[Array, "classes"]:
    """Into how many clusters to cut each class, so that a cluster is about as large as the smallest class.

        max(1, floor(n_c / max(min n, minimum_size)))

    Args:
      counts: n, how many training examples each class has, positive.
      minimum_size: the least size of a cluster that is aimed at, at least 1.

    Raises:
      ValueError: a number out of its range, counts that are not one number for each class.

    Source: Subclass-balancing Contrastive Learning for Long-tailed Recognition (2023, Hou et al.).

    >>> subclass_count(jnp.array([100, 59, 12, 20])).tolist()
    [8, 4, 1, 1]
    """
    choices.require_within("minimum_size", minimum_size, "[1, inf)")
    counts = checks.class_sizes(counts)
    size = jnp.maximum(jnp.min(counts), minimum_size)
    return jnp.maximum(counts // size, 1).astype(jnp.int32)


def cluster_temperatures(
    embeddings: Float[Array, "n d"],
    labels: Int[Array, "n"],
    counts: Float[Array, "classes"],
    subclass_counts: Int[Array, "classes"],
    *,
    temperature: float = 0.1,
    smoothing: float = 10.0,
) -> Float[Array, "classes"]:
    """Temperatures of the contrast between classes, higher for classes that are spread out.

        phi_c = mean_{i in c} |v_i - mean of c| / log(n_c + smoothing), clipped to its 20th to 80th percentile
        t_c   = temperature phi_c / mean(phi),   or temperature for a class that is not cut

    Args:
      embeddings: v, of the training examples.
      labels: in [0, classes).
      counts: n, how many training examples each class has, positive.
      subclass_counts: into how many clusters each class is cut.
      temperature: positive.
      smoothing: at least 1.

    Returns:
      Float32 at least; `temperature` also where phi is 0. Nothing differentiates through it.

    Raises:
      ValueError: shapes that do not match, a number out of its range.

    Source: Subclass-balancing Contrastive Learning for Long-tailed Recognition (2023, Hou et al.). The paper also
    writes exp(phi_c / mean(phi)) in place of the ratio.
    """
    choices.require_within("temperature", temperature, "(0, inf)")
    choices.require_within("smoothing", smoothing, "[1, inf)")
    counts, cuts = checks.class_sizes(counts), jnp.asarray(subclass_counts)
    if cuts.shape != counts.shape:
        raise ValueError(f"subclass_counts has shape {cuts.shape} and counts {counts.shape}: they must be the same")
    spread = _spread(jax.lax.stop_gradient(embeddings), labels, len(counts))
    phi = spread / jnp.log(counts + smoothing)
    phi = jnp.clip(phi, *jnp.percentile(phi, jnp.array([20, 80])))
    ratio = jnp.where(phi > 0, phi / jnp.where(phi > 0, jnp.mean(phi), 1), 1)
    return temperature * jnp.where(cuts > 1, ratio, 1)


def _spread(embeddings: Float[Array, "n d"], labels: Int[Array, "n"], classes: int) -> Float[Array, "classes"]:
    """Mean distance of a class's rows from their mean, 0 for a class without rows."""
    x, labels = checks.rows(embeddings, labels=labels), jnp.asarray(labels)
    checks.check_labels(labels, classes)
    rows = jnp.maximum(jnp.bincount(labels, length=classes), 1)
    means = jax.ops.segment_sum(x, labels, classes) / rows[:, None]
    return jax.ops.segment_sum(jnp.linalg.norm(x - means[labels], axis=1), labels, classes) / rows


def _assign(similarities: Float[np.ndarray, "n K"]) -> Int[np.ndarray, "n"]:
    n, count = similarities.shape
    clusters = _greedy(similarities, n // count)
    left = clusters < 0
    clusters[left] = _greedy(similarities[left], 1)
    return clusters


def _greedy(similarities: Float[np.ndarray, "n K"], capacity: int) -> Int[np.ndarray, "n"]:
    """The centre of each point if pairs are taken by descending similarity, -1 for points that find all full.

    Points ask the nearest centre that has not refused them, and a centre refuses all but the nearest that ask, until
    none is refused. As both sides rank by the same numbers, that is the greedy result, without a loop over pairs.
    """
    wishes = similarities.copy()
    while True:
        choice = np.where(np.isneginf(wishes).all(1), -1, np.argmax(wishes, axis=1))
        asked = np.flatnonzero(choice >= 0)
        asked = asked[np.lexsort((-similarities[asked, choice[asked]], choice[asked]))]
        ordered = choice[asked]
        rank = np.arange(len(asked)) - np.searchsorted(ordered, ordered)
        refused = asked[rank >= capacity]
        if not len(refused):
            return choice
        wishes[refused, choice[refused]] = -np.inf


def _unit(x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), np.finfo(x.dtype).tiny)
