"""The folder of a run: whose it is, and files that are whole or not there."""

import json
import os
import pathlib
import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import steelyard
from experiments import components

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def claim(workdir: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Makes the folder of the run, or checks that what it holds is a run of the same config.

    Raises:
      ValueError, OSError: it is a file, cannot be written to, or holds another run; nothing is changed then.
    """
    if workdir.exists() and not workdir.is_dir():
        raise ValueError(f"workdir {workdir} is a file: give a folder")
    record = {"config": components.plain(settings), "versions": _versions()}
    path = workdir / "config.json"
    if path.exists():
        known = json.loads(path.read_text())["config"]
        found = differing(known, record["config"])
        if found:
            raise ValueError(
                f"workdir {workdir} holds a run of another config: {'; '.join(found[:3])}. Give another --workdir, "
                "or the config of that run to go on with it."
            )
        return
    if workdir.exists() and any(workdir.iterdir()):
        raise ValueError(f"workdir {workdir} is not empty and holds no run (no config.json): give another --workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"workdir {workdir}: a part of this path is a file: {error}") from error
    if not os.access(workdir, os.W_OK):
        raise ValueError(f"workdir {workdir} is not writable")
    write_json(path, record)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes by renaming, so that a reader never sees half a file."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    temporary.replace(path)


def differing(known: Mapping[str, Any], given: Mapping[str, Any], prefix: str = "") -> list[str]:
    """A line for each key, nested ones by their path, in which two configs differ."""
    lines = []
    for key in sorted({*known, *given}):
        a, b = known.get(key), given.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differing(a, b, f"{prefix}{key}.")
        elif json.dumps(a, sort_keys=True) != json.dumps(b, sort_keys=True):
            lines.append(f"{prefix}{key} is {a!r} there and {b!r} here")
    return lines


def _versions() -> dict[str, str]:
    own = {"python": sys.version.split()[0], "steelyard": steelyard.__version__}
    return own | {name: metadata.version(name) for name in _PACKAGES}
