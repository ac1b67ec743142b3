"""Groups of channels that live or die together: found in a model, scored, selected, masked, and cut out."""

from steelyard.sparsity.channels.groups import (
    ChannelGroup,
    Member,
    as_masks,
    mask_tree,
    score,
    shrink,
)
from steelyard.sparsity.channels.infer import blocked, describe, infer
from steelyard.sparsity.channels.performance_aware import drop_schedule, performance_aware
from steelyard.sparsity.channels.select import select
from steelyard.sparsity.channels.shrink_state import shrink_state

__all__ = [
    "ChannelGroup",
    "Member",
    "as_masks",
    "blocked",
    "describe",
    "drop_schedule",
    "infer",
    "mask_tree",
    "performance_aware",
    "score",
    "select",
    "shrink",
    "shrink_state",
]
