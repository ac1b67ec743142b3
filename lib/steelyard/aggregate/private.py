"""Differentially private learning of many tasks: how a user's privacy budget is split (2023, Krichene et al.).

Multi-Task Differential Privacy Under Distribution Skew. A *user* has data for some of the tasks; privacy is that of the
user, so that the noise depends on what one user can change in all tasks together.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from steelyard import choices, precision


def private_task_weights(
    membership: Shaped[Array, "users tasks"],
    counts: Float[Array, "tasks"],
    *,
    exponent: float = -0.5,
    budget: float = 1.0,
) -> Float[Array, "users tasks"]:
    """Weights of each user's tasks, larger for tasks that few users have.

        omega_j = max(counts_j, 1)^exponent
        w_ij = sqrt(budget) m_ij omega_j / sqrt(sum_l m_il omega_l^2)

    Multiply user i's loss (or gradient, or sufficient statistic) on task j by w_ij. If what is weighted has at most
    norm C for each user and task, adding or removing a user changes the sum by at most `C sqrt(budget)`: Gaussian noise
    of standard deviation `sigma C sqrt(budget)` on every entry has noise multiplier sigma.

    Which exponent: let `n_j` users have task j. The noise in a least-squares solution is about `1 / (n_j omega_j)`, and
    its excess risk, summed over the users, `sum_j 1 / (n_j omega_j^2)`; under `sum_j n_j omega_j^2 <= const` it is
    least at `omega = n^(-1/2)`. For noisy gradient descent on Lipschitz losses the risk is `sum_j 1 / omega_j`, least
    at `n^(-1/3)`. 0 splits each budget equally. It may be tuned. Computed once; costs nothing in training.

    Args:
      membership: whether user i has data for task j: `True`, or any number other than 0.
      counts: users per task, exact only if they are public: else from `noisy_counts`, at a price in privacy. Multiples
        of them give the same weights (none of them below 1).
      exponent: at most 0.
      budget: `sum_j w_ij^2`, of every user with a task.

    Returns:
      The weights, float32; a row of zeros for a user without a task.

    Raises:
      ValueError: a number out of its range, or shapes that do not fit.

    Source: Multi-Task Differential Privacy Under Distribution Skew (2023, Krichene et al.).
    """
    choices.require_within("exponent", exponent, "(-inf, 0]")
    choices.require_within("budget", budget, "(0, inf)")
    has_task, counts = _has_task(membership), precision.wide(counts)
    if counts.shape != has_task.shape[1:]:
        raise ValueError(
            f"counts must have one number per task: membership has shape {has_task.shape}, counts {counts.shape}"
        )
    log_counts = jnp.log(jnp.maximum(counts, 1))
    # w_ij^2 / budget is a softmax over the user's tasks: unlike powers of large counts it cannot underflow to 0 / 0.
    shares = jax.nn.softmax(jnp.broadcast_to(2 * exponent * log_counts, has_task.shape), where=has_task)
    return jnp.sqrt(budget * shares)


def noisy_counts(
    membership: Shaped[Array, "users tasks"],
    key: Key[Array, ""],
    *,
    stddev: float,
    sample: int | None = None,
) -> Float[Array, "tasks"]:
    """How many users have each task, private by Gaussian noise.

        counts_j = max(1, stddev z_j + sum_i m_ij),    z_j standard normal

    where at most `sample` tasks of each user count, drawn at random without replacement. One user then changes the sums
    by at most sqrt(sample) in norm, which makes the noise multiplier `stddev / sqrt(sample)`. The counts of frequent
    and rare tasks shrink alike if users have about equally many tasks.

    Args:
      membership: whether user i has data for task j: `True`, or any number other than 0.
      key: for the sample and the noise; keep it secret, and use it once.
      stddev: of the noise, in users.
      sample: tasks that count per user. With `None` all do, and one user's change is limited only by the number of
        tasks.

    Returns:
      The counts, float32, at least 1.

    Raises:
      ValueError: a number out of its range, or `membership` is not a matrix.

    Source: Multi-Task Differential Privacy Under Distribution Skew (2023, Krichene et al.).
    """
    choices.require_within("stddev", stddev, "[0, inf)")
    if sample is not None:
        choices.require_within("sample", sample, "[1, inf)")
    has_task = _has_task(membership)
    sample_key, noise_key = jax.random.split(key)
    sums = jnp.sum(has_task, axis=0, dtype=jnp.int32) if sample is None else _sampled(has_task, sample_key, sample)
    noise = jax.random.normal(noise_key, sums.shape, jnp.float32)
    return jnp.maximum(1.0, sums.astype(jnp.float32) + stddev * noise)


def _has_task(membership: Shaped[Array, "users tasks"]) -> Shaped[Array, "users tasks"]:
    membership = jnp.asarray(membership)
    if membership.ndim != 2:
        raise ValueError(f"membership must be a matrix [users, tasks], got shape {membership.shape}")
    return membership != 0


def _sampled(has_task: Shaped[Array, "users tasks"], key: Key[Array, ""], sample: int) -> Int[Array, "tasks"]:
    """Sums over users of at most `sample` tasks each: by index, so that equal random numbers cannot let in one more."""
    scores = jnp.where(has_task, jax.random.uniform(key, has_task.shape, jnp.float32), -1)
    _, tasks = jax.lax.top_k(scores, min(sample, has_task.shape[1]))
    drawn = jnp.take_along_axis(has_task, tasks, axis=1)
    return jnp.zeros(has_task.shape[1:], jnp.int32).at[tasks].add(drawn.astype(jnp.int32))
