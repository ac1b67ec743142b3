"""Which negative examples a query is trained against: the next ones of its list, once it tells these apart.

Conan-embedding: General Text Embedding with More and Better Negative Samples (2024, Li et al.). A first retriever ranks
candidates for every query, the hardest first; the query trains against a window of them.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from steelyard import choices, losses
from steelyard.losses import checks


class NegativeState(NamedTuple):
    """Where in its list of candidates each query is.

    Attributes:
      cursor: the first candidate of its window; 0 at first.
      initial: the window's score when it was chosen, float32 at least; -inf until it is known, and at first.
    """

    cursor: Int[Array, "n"]
    initial: Float[Array, "n"]


def refresh_negatives(
    state: NegativeState,
    score: Float[Array, "n"],
    *,
    window: int,
    num_candidates: int,
    ratio: float | Float[Array, ""] = 1.15,
    ceiling: float | Float[Array, ""] = 0.8,
) -> NegativeState:
    """Moves the windows on whose negatives have become stale, to call every 100 steps or so.

        cursor <- min(cursor + window, num_candidates - window)    where stale_negatives(score, initial)

    A window that has just been chosen has no initial score; it takes the first that is given for it, and cannot be
    stale before. To measure it at once, score the new windows and call this again: the others do not move a second
    time. Who has reached the end of the list stays there.

    Args:
      state: of all queries, or of those of a batch.
      score: similarity of each query with the negatives of its window, as a mean for example, by the model as it is.
      window: negatives of a query, at least 1.
      num_candidates: length of the list, at least `window`.
      ratio: how far a score must have fallen, positive.
      ceiling: a window that scores as high as this is hard still, positive.

    Returns:
      The new state; the negatives of query i are `candidates[i, cursor[i]:cursor[i] + window]`.

    Raises:
      ValueError: a number out of its range, or there is not one score for each query.

    Source: Conan-embedding (2024, Li et al.), dynamic hard negative mining.
    """
    window = choices.require_count("window", window, "[1, inf)")
    num_candidates = choices.require_count("num_candidates", num_candidates, f"[{window}, inf)")
    score, initial = checks.alike("score", score, "state.initial", state.initial)
    if state.cursor.shape != score.shape:
        raise ValueError(f"score has shape {score.shape} and state.cursor {state.cursor.shape}: they must be the same")
    known = initial > -jnp.inf
    # Never true of a score that is not known.
    stale = losses.stale_negatives(score, initial, ratio=ratio, ceiling=ceiling)
    cursor = jnp.where(stale, jnp.minimum(state.cursor + window, num_candidates - window), state.cursor)
    initial = jnp.where(cursor > state.cursor, -jnp.inf, jnp.where(known, initial, score))
    return NegativeState(cursor, initial)
