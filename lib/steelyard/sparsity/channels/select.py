"""Which channels stay, given a score for each."""

from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from steelyard import choices, selection
from steelyard.sparsity.channels import groups


def select(
    scores: Mapping[groups.ChannelGroup, Float[Array, " size"]],
    amount: float,
    *,
    scope: str = "local",
    round_to: int = 1,
    min_kept: int = 1,
) -> dict[groups.ChannelGroup, Int[np.ndarray, " kept"]]:
    """The channels that stay: all but the floor(amount * size) with the lowest scores.

    Counts that stay are first raised to `min_kept`, then rounded up to a multiple of `round_to` (or to the whole group
    where that is more than there are). Of equal scores the lower index stays; NaN is the lowest score. On the host.

    Args:
      scores: a vector for each group.
      amount: share of the channels that go, in [0, 1].
      scope: "local": of each group; "global": of all groups together, whose scores should then be normalized.
      round_to: counts that stay are multiples of it, where the hardware wants that.
      min_kept: channels of a group that stay at least.

    Returns:
      For each group the indices of the channels that stay, ascending.

    Raises:
      ValueError: an argument is out of range, or a vector has not one entry a channel.
    """
    choices.require("scope", scope, ("local", "global"))
    choices.require_within("amount", amount, "[0, 1]")
    round_to = choices.require_count("round_to", round_to, "[1, inf)")
    min_kept = choices.require_count("min_kept", min_kept, "[1, inf)")
    for group, vector in scores.items():
        if np.shape(vector) != (group.size,):
            raise ValueError(f"scores of group {group.name!r} have shape {np.shape(vector)}, not ({group.size},)")
    kept = {}
    for group, count in _counts(scores, amount, scope).items():
        count = min(-(-max(count, min_kept) // round_to) * round_to, group.size)
        kept[group] = np.flatnonzero(_largest(scores[group], count))
    return kept


def _counts(scores: Mapping[groups.ChannelGroup, Array], amount: float, scope: str) -> dict[groups.ChannelGroup, int]:
    """How many channels of each group stay, before any rounding."""
    if scope == "local" or not scores:
        return {group: _staying(group.size, amount) for group in scores}
    ends = np.cumsum([group.size for group in scores])
    chosen = _largest(np.concatenate(list(scores.values())), _staying(int(ends[-1]), amount))
    parts = np.split(chosen, ends[:-1])
    return {group: int(np.sum(part)) for group, part in zip(scores, parts, strict=True)}


def _largest(vector: Float[Array, " size"], count: int) -> Bool[np.ndarray, " size"]:
    """Padded at its end to a power of two, so that few programs serve groups of all sizes.

    A padding entry ties at worst with a real one, and then loses because it comes later.
    """
    length = max(_SHORTEST, 1 << (len(vector) - 1).bit_length())
    padded = np.pad(np.asarray(vector, np.float64), (0, length - len(vector)), constant_values=-np.inf)
    return np.asarray(_keep_largest(padded, np.int32(count)))[: len(vector)]


_SHORTEST = 128
_keep_largest = jax.jit(selection.keep_largest)


def _staying(size: int, amount: float) -> int:
    # The slack forgives a product that rounding left just below a whole number, as 0.29 * 100.
    return size - int(np.floor(size * amount + 1e-9))
