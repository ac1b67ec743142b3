"""How much a loss depends on each leaf, from forward passes alone.

Source: ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models (2024, Sung et al.).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from steelyard import aggregate, choices, precision

PyTree = Any


def zeroth_order(
    loss_fn: Callable[[PyTree], Float[Array, ""]],
    params: PyTree,
    rng: Key[Array, ""],
    *,
    eps: float = 1e-3,
    num_noise: int = 1,
) -> PyTree:
    """mean |L(W_l + eps z) - L(W_l - eps z)| / (2 eps) for each leaf l alone, over normal directions z.

    For a loss that is linear in W_l its mean is sqrt(2 / pi) times the length of the gradient.

    Args:
      loss_fn: `params -> scalar`, over a batch; average the scores of several batches. It gets one leaf in float32
        at least, so that the step is not lost to rounding.
      params: a tree of float arrays; `None` leaves pass.
      rng: a key; the index of the leaf and that of the direction are folded in.
      eps: length of the step, in units of a standard normal entry.
      num_noise: directions for each leaf.

    Returns:
      A tree like `params` of scalars, in float32 at least. The score of a block is the sum over its leaves.

    Cost: 2 num_noise forward passes for each leaf, one at a time, and no backward pass.

    Raises:
      ValueError: `eps` is not positive, or `num_noise` is below 1.
    """
    choices.require_within("eps", eps, "(0, inf)")
    num_noise = choices.require_count("num_noise", num_noise, "[1, inf)")
    leaf_list, structure = jax.tree.flatten(params)

    def score(i):
        def loss_of(leaf):
            return loss_fn(structure.unflatten([*leaf_list[:i], leaf, *leaf_list[i + 1 :]]))

        def slope(noise):
            key = jax.random.fold_in(jax.random.fold_in(rng, i), noise)
            return aggregate.spsa_projected_gradient(loss_of, precision.wide(leaf_list[i]), key, epsilon=eps)

        return jnp.mean(jnp.abs(jax.lax.map(slope, jnp.arange(num_noise))))

    return structure.unflatten([score(i) for i in range(len(leaf_list))])
