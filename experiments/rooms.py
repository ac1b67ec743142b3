"""The flag `--room` of the mains that measure."""

import sys
from collections.abc import Sequence

from absl import flags

from steelyard import choices

_ROOM = flags.DEFINE_string("room", "all", "What to measure: a room, or all.")


def chosen(known: Sequence[str]) -> Sequence[str]:
    """The rooms that the flag asks for; a wrong one ends the program with the right ones."""
    try:
        choices.require("--room", _ROOM.value, ("all", *known))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    return known if _ROOM.value == "all" else (_ROOM.value,)
