"""Tasks weighted by how much of them lies in the subspace that they share best (2020, Wu et al.).

Understanding and Improving Information Transfer in Multi-Task Learning, the SVD-based reweighting scheme. The
alignment of the tasks' inputs, from the same paper, is `steelyard.models.TaskAlignment`.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from steelyard import choices, precision
from steelyard.aggregate import stacked as stacked_lib


def svd_weights(gram: Float[Array, "K K"], rank: int) -> Float[Array, "K"]:
    """The length of each vector's projection on the best subspace of a given dimension.

        theta = [theta_1 ... theta_K] = U S V^T,    alpha_i = |U_r^T theta_i| = sqrt(sum_{s <= r} S_s^2 V_is^2)

    with `U_r` the first r columns. It needs the inner products of the vectors alone: `S^2` and V are the eigenvalues
    and eigenvectors of the Gram matrix. In the paper `theta_i = X_i^T y_i`, from inputs and labels of task i; the
    weights are computed once, and `static(alpha)` trains with them.

    Costs one K x K eigendecomposition. Lengths below sqrt(K eps) of the longest vector, eps of float32, are rounding.
    Where the singular values r and r + 1 are equal, either direction may be taken.

    Args:
      gram: inner products of the K vectors.
      rank: dimension r of the shared subspace, 1 to K.

    Returns:
      alpha, in float32 at least.

    Raises:
      ValueError: `rank` is not in 1..K, or `gram` is not square.
    """
    choices.require_count("rank", rank, "[1, inf)")
    if jnp.ndim(gram) != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"gram must be a square matrix [K, K], got shape {jnp.shape(gram)}")
    if rank > gram.shape[0]:
        raise ValueError(f"rank={rank} must be at most the number of tasks, {gram.shape[0]}")
    values, vectors = jnp.linalg.eigh(precision.wide(gram))
    # Eigenvalues ascend. Rounding may leave those that are zero slightly below.
    return jnp.sqrt(jnp.square(vectors[:, -rank:]) @ jnp.maximum(values[-rank:], 0))


def svd_reweight(rank: int, *, normalize: bool = False) -> stacked_lib.Aggregator:
    """Weighs each gradient by `svd_weights` of the current gradients' Gram matrix: `sum_k alpha_k g_k`.

    At the zero weights of a linear model with squared loss gradient i is a multiple of `X_i^T y_i`, so that these are
    then the weights of the paper. All-zero gradients give a zero update.

    Costs K backward passes ("lean" is possible) and one K x K eigendecomposition a step.

    Args:
      rank: dimension of the shared subspace, 1 to K.
      normalize: whether to scale the weights to the sum K. If `False`, a gradient c times as long weighs c times as
        much, and the update is of second degree in the gradients.

    Returns:
      An aggregator without state.

    Raises:
      ValueError: `rank` is not a whole number from 1 on; while tracing, it exceeds the number of gradients.
    """
    choices.require_count("rank", rank, "[1, inf)")

    def rule(gram, losses, state):
        del losses
        weights = svd_weights(gram, rank)
        if normalize:
            total = jnp.sum(weights)
            weights = weights * gram.shape[0] / jnp.where(total == 0, 1, total)
        return weights, state

    return stacked_lib.from_gram(rule)
