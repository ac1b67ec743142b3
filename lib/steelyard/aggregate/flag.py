"""The flag aggregator: gradients projected on the subspace that most of them agree on (2024, Almasi et al.).

Flag Aggregator: Scalable Distributed Training under Failures and Augmented Losses using Convex Optimization.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from steelyard import choices
from steelyard.aggregate import stacked as stacked_lib

# Eigenvalues below this times the largest are those of dependent rows, up to rounding.
_NEGLIGIBLE = 1e-6


def flag(
    rank: int | None = None,
    *,
    iterations: int = 5,
    regularization: float = 0.0,
    eps: float = 1e-7,
    normalize: bool = True,
) -> stacked_lib.Aggregator:
    """Projects the workers' gradients on the subspace that best explains their directions, outliers weighing less.

    With unit rows `u_k = g_k / |g_k|`, the subspace (an orthonormal Y of `rank` columns) is to minimise the sum of
    sines `sum_k sqrt(1 - |Y^T u_k|^2)`, which unlike a sum of squares lets a few rows lie far outside. It starts as the
    span of the largest left singular vectors of `[u_1 .. u_K]`, and `iterations` times becomes that of

        [w_1 u_1 .. w_K u_K],   w_k = (|1 - |Y^T u_k|^2| + eps)^(-1/4)

    The update is `(1/rank) sum_k Y Y^T u_k` (normalize) or `(1/K) sum_k Y Y^T g_k`. `regularization` also wants the
    differences of directions inside: for all ordered pairs it appends the columns `w_kl (u_k - u_l)`,
    `w_kl = regularization / (K (K - 1)) (|1 - |Y^T (u_k - u_l)|^2| + eps)^(-1/4)`.

    Rows that are zero or not finite are left out; K above is the number of the others, but in the mean, where zero rows
    count, and in the default rank. Where singular values are equal at the cut, which directions are kept is arbitrary.
    Where the subspace contains a row, `w_k` is at most `eps^(-1/4)`, and known to about a tenth for the default, which
    is as small as the rounding of float32.

    Cost: the Gram matrix (one all-reduce of K x K numbers on a mesh) and `iterations + 2` eigendecompositions of K x K,
    with the regularization too; never a decomposition of the size of the gradients. Not possible in "lean" mode. Its
    update takes the extra arguments `mesh` and `specs`, or `axis_name`, of `steelyard.aggregate.gram`.

    Args:
      rank: of the subspace; `ceil((K + 1) / 2)` if `None`. Above the number of independent rows it is their span.
      iterations: of reweighting; 0 projects on the singular vectors (the "flag mean").
      regularization: weight of the differences, relative to that of the rows.
      eps: smallest squared sine.
      normalize: whether the update is made of unit rows. Its length then has no relation to that of the gradients.

    Returns:
      An aggregator without state.

    Raises:
      ValueError: an argument out of its range or not whole; while tracing, `rank` is above K.

    Source: Flag Aggregator: Scalable Distributed Training under Failures and Augmented Losses using Convex Optimization
      (2024, Almasi et al.). The start is ours, the paper's is random.
    """
    if rank is not None:
        choices.require_count("rank", rank, "[1, inf)")
    choices.require_count("iterations", iterations, "[0, inf)")
    choices.require_within("regularization", regularization, "[0, inf)")
    choices.require_within("eps", eps, "(0, inf)")

    def check(count):
        if rank is not None and rank > count:
            raise ValueError(f"flag: rank={rank} must be at most the number of gradients, K={count}")

    def rule(gram, valid):
        kept = _default_rank(gram.shape[0]) if rank is None else int(rank)
        norms = jnp.sqrt(jnp.diagonal(gram))
        there = valid & (norms > 0)
        units = jnp.where(there, 1 / jnp.where(there, norms, 1), 0)
        root, inverse = _roots(gram * units[:, None] * units)

        def refine(_, projector):
            return _projector(_times(root, _importance(_seen(root, projector), there, regularization, eps), root), kept)

        start = _projector(_times(root, jnp.diag(there.astype(root.dtype)), root), kept)
        projector = jax.lax.fori_loop(0, int(iterations), refine, start)
        aimed = there / kept if normalize else norms / jnp.maximum(jnp.sum(valid), 1)
        return _times(inverse, projector, _times(root, aimed)) * units

    return stacked_lib.from_distances(rule, check, center=False)


def _default_rank(count: int) -> int:
    return (count + 2) // 2


def _roots(cosine: Float[Array, "K K"]) -> tuple[Float[Array, "K K"], Float[Array, "K K"]]:
    """The root R of the cosine matrix, and its pseudo-inverse.

    `U = Q R` for the matrix U of unit rows as columns and some orthonormal Q, so that R stands for U in all that
    follows, and the pseudo-inverse leads back from Q to coefficients of the rows.
    """
    values, vectors = jnp.linalg.eigh(cosine)
    kept = values > _NEGLIGIBLE * values[-1]
    root = jnp.where(kept, jnp.sqrt(jnp.where(kept, values, 1)), 0)
    inverse = jnp.where(kept, 1 / jnp.where(kept, root, 1), 0)
    return _times(vectors * root, vectors.T), _times(vectors * inverse, vectors.T)


def _projector(moments: Float[Array, "K K"], rank: int) -> Float[Array, "K K"]:
    """The projector on the largest `rank` eigenvectors, fewer where the others are negligible."""
    values, vectors = jnp.linalg.eigh(moments)
    kept = (jnp.arange(values.shape[0]) >= values.shape[0] - rank) & (values > _NEGLIGIBLE * values[-1])
    return _times(jnp.where(kept, vectors, 0), vectors.T)


def _seen(root: Float[Array, "K K"], projector: Float[Array, "K K"]) -> Float[Array, "K K"]:
    """Inner products of the projected unit rows."""
    return _times(root, projector, root)


def _importance(
    projected: Float[Array, "K K"], there: Bool[Array, "K"], regularization: float, eps: float
) -> Float[Array, "K K"]:
    """`C C^T`, where the columns of C hold the coefficients of the weighted rows and differences."""
    rows = jnp.where(there, _square_weight(jnp.diagonal(projected), eps), 0)
    if isinstance(regularization, int | float) and regularization == 0:
        return jnp.diag(rows)
    count = jnp.sum(there)
    scale = regularization / jnp.maximum(count * (count - 1), 1)
    pairs = _square_weight(stacked_lib.pairwise_sqdist(projected), eps) * scale**2
    pairs = jnp.where(there[:, None] & there & ~jnp.eye(len(there), dtype=bool), pairs, 0)
    # Each unordered pair comes twice.
    return jnp.diag(rows + 2 * jnp.sum(pairs, axis=1)) - 2 * pairs


def _square_weight(square: Float[Array, "..."], eps: float) -> Float[Array, "..."]:
    return jax.lax.rsqrt(jnp.abs(1 - square) + eps)


def _times(*factors: Float[Array, "..."]) -> Float[Array, "..."]:
    """The product, from the right."""
    product = factors[-1]
    for factor in reversed(factors[:-1]):
        product = jnp.matmul(factor, product, precision=jax.lax.Precision.HIGHEST)
    return product
