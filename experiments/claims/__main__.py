"""Measures claims: `python -m experiments.claims --room=all`."""

import sys
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from absl import app, flags, logging

from experiments.claims import quickstart

ROOMS: Mapping[str, Callable[[], bool]] = MappingProxyType({"quickstart": quickstart.main})
_ROOM = flags.DEFINE_string("room", "all", f"What to measure: all, {', '.join(ROOMS)}.")


def main(argv: Sequence[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    if _ROOM.value not in ("all", *ROOMS):
        print(f"error: --room={_ROOM.value} is not one of all, {', '.join(ROOMS)}", file=sys.stderr)
        sys.exit(2)
    for room, measure in ROOMS.items():
        if _ROOM.value in ("all", room):
            measure()


if __name__ == "__main__":
    app.run(main)
