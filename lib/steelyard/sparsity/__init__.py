"""Which parameters stay: masks and their schedules.

The submodules are exported, not their functions, because one name may serve twice (a score and an allocation).
"""

from steelyard.sparsity import masks, schedules

__all__ = ["masks", "schedules"]
