"""Metrics of a run: JSON lines and TensorBoard events.

`metrics.jsonl` holds only what the run computes, so that two runs of one config on the same devices write the same
bytes; how long things took goes to `timing.jsonl`.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import tensorboardX


class Writer:
    """Appends records of a step; a restart at `start_step` first drops the records that it will write again."""

    def __init__(self, folder: pathlib.Path, *, start_step: int = 0):
        folder.mkdir(parents=True, exist_ok=True)
        self._files = {}
        for name in ("metrics", "timing"):
            path = folder / f"{name}.jsonl"
            _keep_before(path, start_step)
            self._files[name] = path.open("a")
        self._events = tensorboardX.SummaryWriter(str(folder), purge_step=start_step, flush_secs=10)

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the metrics of a step."""
        values = {key: float(value) for key, value in values.items()}
        self._append("metrics", step, values)
        for key, value in values.items():
            self._events.add_scalar(key, value, step)

    def timing(self, step: int, values: Mapping[str, float]) -> None:
        """Writes how long the steps since the last call took."""
        self._append("timing", step, values)

    def _append(self, name: str, step: int, values: Mapping[str, Any]) -> None:
        self._files[name].write(json.dumps({"step": step, **values}) + "\n")

    def flush(self) -> None:
        """Makes sure that what was written is on disk."""
        for file in self._files.values():
            file.flush()
        self._events.flush()

    def close(self) -> None:
        self.flush()
        for file in self._files.values():
            file.close()
        self._events.close()


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    """Records of a JSON lines file; a last line that a dying process left unfinished is dropped."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _keep_before(path: pathlib.Path, step: int) -> None:
    if path.exists():
        kept = [record for record in read(path) if record["step"] < step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        temporary.replace(path)
