"""Saving a train state, and getting exactly it back: on this mesh, on another, or from before a crash.

`Checkpoints` is a thin skin over `orbax.checkpoint.CheckpointManager`. What it adds: a restore always takes the
shardings of the current mesh; the state's structure is checked before anything is read; the bits are checked after;
a damaged checkpoint is passed over for the one before; a save that failed in the background is reported.

On disk, each step is a folder with two items: `state`, the arrays as nested dicts by path (a typed random key as its
key data, empty arrays not at all), and `meta`, a JSON file with what the caller gave, the mesh, the versions of the
packages and, for each array, its path, shape, dtype and checksum.
"""

import contextlib
import importlib.metadata
import json
import os
import pathlib
import re
import signal
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jaxtyping import Array

from steelyard import tree as tree_lib
from steelyard.train import stored

PyTree = Any

_RESERVED = ("step", "mesh", "processes", "versions", "arrays")
_PACKAGES = ("jax", "jaxlib", "numpy", "optax", "orbax-checkpoint", "steelyard")


class DamagedCheckpointError(OSError):
    """A checkpoint that is there and cannot be read, or whose bits have changed."""


class Checkpoints:
    """The checkpoints of one run, in one directory; use it in a `with` statement, or call `close`.

    Args:
      directory: a local path or a bucket (`gs://...`); created if it is missing.
      keep: how many of the newest steps to keep.
      every: `save` does nothing at steps that are no multiple of this, unless forced.
      keep_every: steps that are a multiple of this are kept for good.
      read_only: for readers beside a running training: writes nothing, and the directory must exist.

    Raises:
      ValueError: `directory` is a file, or a number is not positive.
      OSError: `directory` cannot be created or written.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int = 3,
        every: int = 1000,
        keep_every: int | None = None,
        read_only: bool = False,
    ):
        for name, value in (("keep", keep), ("every", every), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be positive")
        self.directory = _checked_directory(directory, read_only)
        self._every = every
        self._read_only = read_only
        self._manager = _make_manager(self.directory, keep, keep_every, read_only)
        self._pending: int | None = None  # the step whose save has not been waited for
        self._own: set[int] = set()  # steps that this object has saved or restored
        self._damaged: set[int] = set()
        self._preemption: Preemption | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def save(self, step: int, state: PyTree, *, meta: Mapping[str, Any] | None = None, force: bool = False) -> bool:
        """Copies the state to the host and writes it in the background.

        When it returns, the arrays of `state` may be donated. A step that is already saved is not saved again.

        Args:
          step: number of the step.
          state: a pytree of arrays; typed random keys are allowed, `None` leaves too.
          meta: what to store beside it, JSON: the config, the fingerprint of the data...
          force: also at a step that is no multiple of `every`, and also if parameters (leaves under `params`) are not
            finite.

        Returns:
          Whether a save was started.

        Raises:
          ValueError: parameters are not finite, `meta` is not JSON or uses a reserved name.
          OSError: the save before this one failed in the background; this one has not been started.
        """
        if self._read_only:
            raise ValueError(f"the checkpoints in {self.directory} were opened with read_only=True")
        if self._pending is not None and not self._manager.is_saving_in_progress():
            self.wait()
        if not force and step % self._every:
            return False
        self.wait()
        self._set_damaged_aside()
        if step in self._manager.all_steps():
            self._warn_if_foreign(step)
            return False
        leaves = stored.by_path(state)
        arrays = stored.key_data(leaves)
        sums, finite = stored.digest(arrays)
        if not force:
            _require_finite(step, finite)
        described = _describe(step, leaves, dict(meta or {})) | {"arrays": stored.record(leaves, sums)}
        self._start(step, arrays, described)
        return True

    def _start(self, step: int, arrays: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        import orbax.checkpoint as ocp

        items = stored.nest(stored.nonempty(arrays))
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(items), meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=args, force=True)
        self._pending = step
        self._own.add(step)

    def restore(self, shapes: PyTree, *, step: int | None = None, only: str | None = None) -> tuple[PyTree, dict]:
        """Reads a state onto the current mesh.

        Args:
          shapes: the state's structure as `jax.ShapeDtypeStruct` with shardings (`sharding.with_shardings`).
          step: the step to read; by default the newest that can be read. A damaged one is passed over with a warning.
          only: a regular expression for whole paths (`params/.*`): reads these leaves, and leaves `None` in the others.
            `tree.combine(restored, state)` then starts a new run from them.

        Returns:
          The state, bit for bit what was saved, and the `meta` of its step.

        Raises:
          FileNotFoundError: there is no checkpoint, or not that one.
          ValueError: a leaf has no sharding, or the checkpoint has another structure, shape or dtype.
          DamagedCheckpointError: `step` is damaged, or all are, or any is and there are several processes (which must
            not fall back to different steps: give `step`).
        """
        self.wait()
        steps = self._steps()
        if not steps or (step is not None and step not in steps):
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            raise FileNotFoundError(f"no {wanted} in {self.directory}; steps there: {steps or 'none'}")
        failures: dict[int, DamagedCheckpointError] = {}
        for candidate in [step] if step is not None else steps[::-1]:
            try:
                state, meta = self._read(candidate, shapes, only)
            except DamagedCheckpointError as error:
                failures[candidate] = error
                if step is not None or jax.process_count() > 1:
                    raise
                continue
            if failures:
                passed = "; ".join(map(str, failures.values()))
                warnings.warn(f"restored step {candidate} instead of a newer one: {passed}", stacklevel=2)
            self._damaged.update(failures)
            self._own.add(candidate)
            return state, meta
        raise DamagedCheckpointError("; ".join(map(str, failures.values())))

    def _read(self, step: int, shapes: PyTree, only: str | None) -> tuple[PyTree, dict]:
        import orbax.checkpoint as ocp

        wanted = _wanted(shapes, only)
        with self._reading(step):
            meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta
            saved = {p: pair for p, pair in meta.pop("arrays").items() if only is None or re.fullmatch(only, p)}
        stored.require_fit(f"checkpoint {step} in {self.directory}", saved, wanted)
        with self._reading(step):
            arrays = self._read_arrays(step, stored.key_data(wanted))
            stored.require_same_bits(saved, arrays)
        restored = stored.wrap_keys(arrays, wanted)
        leaves = [restored.get(path) for path in tree_lib.paths(shapes)]
        return jax.tree.unflatten(jax.tree.structure(shapes), leaves), meta

    def _read_arrays(self, step: int, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, Array]:
        import orbax.checkpoint as ocp

        full = stored.nonempty(targets)
        item = stored.nest(full)
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
        args = ocp.args.PyTreeRestore(item, restore_args=restore_args, partial_restore=True)
        found = self._manager.restore(step, args=ocp.args.Composite(state=args)).state if full else {}
        return dict(tree_lib.flatten(found)) | {p: stored.empty(x) for p, x in targets.items() if p not in full}

    @contextlib.contextmanager
    def _reading(self, step: int):
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError):
            raise  # the device or the host is too small: no fault of the checkpoint
        except Exception as error:
            # Orbax and its storage raise all kinds, a bare Exception among them.
            reason = str(error).strip().partition("\n")[0][:300]
            raise DamagedCheckpointError(f"checkpoint {step} in {self.directory} is damaged: {reason}") from error

    def latest(self) -> int | None:
        """The newest step that is completely written, or `None`. A save in the background does not count yet."""
        return max(self._steps(), default=None)

    def _steps(self) -> list[int]:
        import orbax.checkpoint as ocp

        return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(self.directory))

    def wait(self) -> None:
        """Waits for the save in the background.

        Raises:
          OSError: it failed. Nothing of it counts as a checkpoint; the next `save` starts afresh.
        """
        step, self._pending = self._pending, None
        if step is None:
            return
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._own.discard(step)
            self._manager.reload()
            raise OSError(f"saving step {step} to {self.directory} failed: {error}") from error

    def close(self) -> None:
        """Waits for the save in the background and frees threads and the signal handler. Raises as `wait`."""
        try:
            self.wait()
        finally:
            self._manager.close()
            if self._preemption is not None:
                self._preemption.__exit__()
                self._preemption = None

    def preempted(self, step: int | None = None) -> bool:
        """Whether the run is to save (with `force`), `wait` and leave.

        With one process: whether it has got a SIGTERM since the first call, which installs a handler until `close`.
        With several: whether all of them have reached the step that JAX's preemption service chose; `step` is needed
        then, and all must call it at each step.
        """
        if jax.process_count() > 1:
            return self._manager.reached_preemption(step)
        if self._preemption is None:
            self._preemption = Preemption().__enter__()
        return self._preemption.requested

    def _set_damaged_aside(self) -> None:
        """Renames checkpoints that could not be read: they would bar their step, and count among those to keep."""
        root = self._manager.directory
        for step in sorted(self._damaged):
            number = 0
            while (aside := root / f"{step}.damaged-{number}").exists():
                number += 1
            (root / str(step)).rename(aside)
        if self._damaged:
            self._damaged.clear()
            self._manager.reload()

    def _warn_if_foreign(self, step: int) -> None:
        if step not in self._own:
            warnings.warn(
                f"{self.directory} already has a checkpoint of step {step}, from an earlier run. It is kept, and the "
                "new state is not saved; give each run its own directory.",
                stacklevel=3,
            )


class Preemption:
    """Notes a SIGTERM instead of ending the process; the old handler is back when the `with` statement ends.

    Use it in the main thread. Where `jax.distributed` runs, its own handler is left in place, and `requested` stays
    False: there `Checkpoints.preempted` asks all processes.

    Attributes:
      requested: whether a SIGTERM has come.
    """

    def __init__(self):
        self.requested = False
        self._old: Any = None
        self._installed = False

    def __enter__(self) -> "Preemption":
        if not jax.distributed.is_initialized():
            self._old = signal.signal(signal.SIGTERM, self._note)
            self._installed = True
        return self

    def __exit__(self, *exc_info) -> None:
        if self._installed:
            # None: the handler before was not set from Python and cannot be set again.
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._old is None else self._old)
            self._installed = False

    def _note(self, signum: int, frame: Any) -> None:
        del signum, frame
        self.requested = True


# The directory.


def _checked_directory(directory: str | os.PathLike, read_only: bool) -> str:
    if "://" in str(directory):
        return str(directory)
    path = pathlib.Path(directory).expanduser().absolute()
    if path.exists() and not path.is_dir():
        raise ValueError(f"directory={str(path)!r} is a file; checkpoints need a directory")
    if read_only:
        if not path.exists():
            raise FileNotFoundError(f"directory={str(path)!r} does not exist, and read_only=True creates none")
        return str(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"directory={str(path)!r} cannot be created: {error.strerror}") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(f"directory={str(path)!r} is not writable; read_only=True would read it")
    return str(path)


def _make_manager(directory: str, keep: int, keep_every: int | None, read_only: bool):
    import orbax.checkpoint as ocp

    policies = [ocp.checkpoint_managers.LatestN(keep)]
    policies += [] if keep_every is None else [ocp.checkpoint_managers.EveryNSteps(keep_every)]
    options = ocp.CheckpointManagerOptions(
        preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
        create=not read_only,
        read_only=read_only,
    )
    return ocp.CheckpointManager(directory, options=options)


# Checks, and what is stored beside the arrays.


def _wanted(shapes: PyTree, only: str | None) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves to read, by path."""
    leaves = stored.by_path(shapes)
    if only is not None:
        chosen = jax.tree.leaves(tree_lib.select(shapes, only, name="only"))
        leaves = {path: leaf for (path, leaf), take in zip(leaves.items(), chosen, strict=True) if take}
    bare = [path for path, leaf in leaves.items() if getattr(leaf, "sharding", None) is None]
    if bare:
        raise ValueError(
            f"restore needs the sharding of every leaf on the current mesh (sharding.with_shardings gives it); "
            f"{len(bare)} have none: {', '.join(bare[: stored.SHOWN])}"
        )
    for leaf in leaves.values():
        leaf.sharding.shard_shape(leaf.shape)  # a sharding that does not divide its array is an error of the caller
    return leaves


def _require_finite(step: int, finite: Mapping[str, bool]) -> None:
    bad = [path for path, fine in finite.items() if not fine and path.split("/")[0] == "params"]
    if bad:
        shown = ", ".join(bad[: stored.SHOWN])
        raise ValueError(
            f"step {step} is not saved: {len(bad)} parameters are not finite: {shown}. force=True saves it."
        )


def _describe(step: int, leaves: Mapping[str, Any], meta: dict[str, Any]) -> dict[str, Any]:
    reserved = [name for name in meta if name in _RESERVED]
    if reserved:
        raise ValueError(f"meta has the reserved keys {reserved}; reserved are {', '.join(_RESERVED)}")
    try:
        meta = json.loads(json.dumps(meta))
    except (TypeError, ValueError) as error:
        raise ValueError(f"meta must be JSON: {error}") from error
    return meta | {
        "step": int(step),
        "mesh": _mesh_sizes(leaves.values()),
        "processes": jax.process_count(),
        "versions": _versions(),
    }


def _mesh_sizes(leaves: Iterable[Any]) -> dict[str, int]:
    shardings = (getattr(leaf, "sharding", None) for leaf in leaves)
    meshes = (sharding.mesh for sharding in shardings if isinstance(sharding, jax.sharding.NamedSharding))
    mesh = next(meshes, None)
    return {} if mesh is None else dict(mesh.shape)


def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
