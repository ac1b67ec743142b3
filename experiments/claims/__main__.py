"""Measures claims: `python -m experiments.claims --room=optim`."""

import importlib
import inspect
import pathlib
import re
import sys
import time
import traceback
from collections.abc import Callable, Sequence

import tqdm
from absl import app, flags, logging

from experiments import machine, rooms
from experiments.claims import harness, report

ROOMS = ("quickstart", "optim", "aggregate", "losses", "sparsity")
_ONLY = flags.DEFINE_string("only", None, "Regular expression: measure these claims alone, print them, record nothing.")
_FRESH = flags.DEFINE_bool("fresh", False, "Forget what an unfinished run has measured already.")
_FOLDER = flags.DEFINE_string("folder", "runs/claims", "Where an unfinished run keeps what it has measured.")


def main(argv: Sequence[str]) -> None:
    del argv
    logging.set_verbosity(logging.WARNING)
    chosen = rooms.chosen(ROOMS)
    print(machine.describe(), flush=True)
    complete = [_measure_room(room) for room in chosen]
    sys.exit(0 if all(complete) else 1)


def _measure_room(room: str) -> bool:
    """Measures the claims of a room; whether all of them gave a result."""
    claims = claims_of(room)
    if _ONLY.value is not None:
        claims = {name: claim for name, claim in claims.items() if re.search(_ONLY.value, name)}
    journal = report.Journal(pathlib.Path(_FOLDER.value) / f"{room}.jsonl")
    if _FRESH.value:
        journal.clear()
    print(f"\n{room}: {len(claims)} claims", flush=True)
    rows = []
    with tqdm.tqdm(claims.items(), desc=room, unit="claim", disable=None, leave=False) as bar:
        for name, claim in bar:
            bar.set_postfix_str(name)
            row = _measure(name, claim, journal)
            rows += [] if row is None else [row]
            for outcome in row.outcomes if row else ():
                tqdm.tqdm.write(report.table_line(row, outcome), file=sys.stdout)
                sys.stdout.flush()
    if len(rows) < len(claims):
        print(f"{room}: {len(claims) - len(rows)} claims failed; run again to measure these, the others are kept")
        return False
    if _ONLY.value is None:
        report.append(room, rows, report.PAGE)
        journal.clear()
        print(f"{room}: {sum(row.seconds for row in rows) / 60:.1f} minutes; written to {report.PAGE}")
    return True


def claims_of(room: str) -> dict[str, Callable]:
    """The claims of a room: what its module or package exports."""
    module = importlib.import_module(f"experiments.claims.{room}")
    return {name: getattr(module, name) for name in module.__all__}


def _measure(name: str, claim: Callable, journal: report.Journal) -> report.Row | None:
    """A row from the journal, or measured now; `None` if the claim failed, which must not stop the others."""
    fingerprint = report.fingerprint(pathlib.Path(inspect.getsourcefile(claim)))
    known = journal.get(name, fingerprint)
    if known is not None:
        return known
    start = time.perf_counter()
    try:
        outcomes = claim()
    except Exception:
        tqdm.tqdm.write(f"{name} failed:\n{traceback.format_exc()}", file=sys.stderr)
        return None
    outcomes = (outcomes,) if isinstance(outcomes, harness.Outcome) else tuple(outcomes)
    row = report.Row(name, report.statement(claim), outcomes, time.perf_counter() - start)
    if _ONLY.value is None:
        journal.add(row, fingerprint)
    return row


if __name__ == "__main__":
    app.run(main)
