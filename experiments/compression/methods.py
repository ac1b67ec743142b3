"""What a config asks for: methods with their settings, and the jobs that follow, checked before anything is trained.

A method is a mapping of settings; what it leaves out is taken from the config's `defaults`, then from the tables
below. `sparsity` and `pattern` may be several: each makes a job of its own, a point of the method's curve.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from experiments import components
from steelyard import choices, reparam
from steelyard.sparsity import patterns

COMMON: Mapping[str, Any] = {
    "sparsity": (0.5, 0.8, 0.9),  # the share that is removed: of the weights selected, or of each group's channels
    "retrain_steps": 200,  # after each pruning; 0 for none
    "optimizer": None,  # of retraining; the config's own by default
    "eval_every": 0,  # while retraining; 0 evaluates before and after
}
WEIGHTS: Mapping[str, Any] = {
    "score": "magnitude",  # a function of sparsity.scores, or a mapping with its name and options
    "allocation": "uniform",  # of sparsity.allocation; "global"; "output": each column of a kernel by itself
    "pattern": "unstructured",  # "2:4", "block:4x4", "channel:-1"; N:M ones say their sparsity themselves
    "where": None,  # a regular expression for the paths of the leaves; those with two axes or more by default
    "min_kept": 1,  # entries of a leaf that stay at least
    "calibration_batches": 4,  # training batches on which scores are measured
}
ONE_SHOT = WEIGHTS | {
    "schedule": "one_shot",  # or "iterative": `rounds` times, what is left by the same factor each time
    "rounds": 4,
    "normalize": False,  # of the allocation "global"
    "masks": None,  # the folder of a finished job, whose masks are taken instead of a score's
}
GRADUAL = WEIGHTS | {
    "schedule": "polynomial",  # during retraining, from dense to `sparsity`, between these shares of the steps
    "ramp": (0.0, 0.7),
}
RECIPE: Mapping[str, Any] = {"recipe": "mdgf_exponential", "pattern": "2:4", "where": None}
CHANNELS: Mapping[str, Any] = {
    "kind": "channels",
    "score": "magnitude",
    "combine": "mean",  # over the members of a group
    "normalize": "mean",  # of the scores of a group
    "scope": "local",  # "global": all groups compete
    "round_to": 1,  # what stays of a group is a multiple of it
    "min_kept": 1,
    "groups": None,  # a regular expression for the names of groups; by default those that no norm runs over
    "protect": (),  # paths whose axes may not change
    "calibration_batches": 4,
    "schedule": "one_shot",
    "rounds": 4,
}
# Arguments of these functions that methods may set, beside the keys above.
_FUNCTIONS = {"gradual": (reparam.pruned, ("schedule", "start", "end")), "recipe": (reparam.nm_sparse, ("n", "m"))}
_TABLES = {"one_shot": ONE_SHOT, "gradual": GRADUAL, "recipe": RECIPE, "channels": CHANNELS}
SCHEDULES = ("one_shot", "iterative", "polynomial")


class Job(NamedTuple):
    """One point of one method's curve.

    Attributes:
      method: the method's name in the config.
      kind: "one_shot" (also in rounds), "gradual", "recipe" or "channels".
      point: what tells it from the method's other jobs: "0.9", "2:4".
      sparsity: the share that is removed.
      settings: of the method, with one sparsity and one pattern.
    """

    method: str
    kind: str
    point: str
    sparsity: float
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.method} {self.point}"

    @property
    def folder(self) -> str:
        """Where it is kept, below the folder of the run."""
        return re.sub(r"[^\w.+-]+", "_", self.name)

    @property
    def rounds(self) -> int:
        """How many times it prunes and retrains."""
        return self.settings["rounds"] if self.settings.get("schedule") == "iterative" else 1

    @property
    def pattern(self) -> Any:
        """What of a leaf is removed together."""
        return patterns.parse(self.settings.get("pattern", "unstructured"))

    def option(self, *keys: str) -> dict[str, Any]:
        """Some of the settings, as keyword arguments."""
        return {key: self.settings[key] for key in keys if key in self.settings}

    def extras(self) -> dict[str, Any]:
        """The settings that are no keys of the tables: arguments of the method's reparameterization."""
        own = {"kind", *COMMON, *_TABLES[self.kind]}
        return {key: value for key, value in self.settings.items() if key not in own}


def jobs(methods: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[Job]:
    """The jobs of all methods, in order.

    Raises:
      ConfigError, ValueError: a setting that cannot be run; the text says which, and what to write instead.
    """
    # What decides the kind of a method stands with the method.
    everything = {key for kind in _TABLES for key in _allowed(kind)} - {"kind", "schedule", "recipe"}
    components.check_keys(defaults, everything, "config.defaults")
    if not methods:
        raise components.ConfigError("config.methods is empty: name at least one method")
    found = [job for name in methods for job in _jobs(name, dict(methods[name]), defaults)]
    folders = [job.folder for job in found]
    twice = [job.name for job in found if folders.count(job.folder) > 1]
    if twice:
        raise components.ConfigError(f"config.methods: {' and '.join(twice)} would be kept in one folder: rename one")
    return found


def _jobs(name: str, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[Job]:
    where = f"config.methods.{name}"
    kind = _kind(given, where)
    allowed = _allowed(kind)
    components.check_keys(given, allowed, where)
    # A default that this kind has no use for is for the other methods.
    table = COMMON | _TABLES[kind]
    settings = components.plain(dict(table) | {key: defaults[key] for key in defaults if key in allowed} | given)
    _check(kind, settings, where)
    found = []
    several = _several(settings.get("pattern", "unstructured"))
    for pattern in several:
        parsed = _pattern(pattern, where)
        is_nm = isinstance(parsed, patterns.NM)
        if kind == "recipe" and not is_nm:
            raise components.ConfigError(f"{where}.pattern={pattern!r}: a recipe trains N:M patterns such as '2:4'")
        for sparsity in [1 - parsed.n / parsed.m] if is_nm else _several(settings["sparsity"]):
            choices.require_within(f"{where}.sparsity", sparsity, "[0, 1]")
            point = pattern if is_nm else f"{pattern} {sparsity:g}" if len(several) > 1 else f"{sparsity:g}"
            one = settings | {"sparsity": sparsity} | ({"pattern": pattern} if "pattern" in settings else {})
            found.append(Job(name, kind, point, float(sparsity), one))
    return found


def _kind(given: Mapping[str, Any], where: str) -> str:
    choices.require(f"{where}.kind", given.get("kind", "weights"), ("weights", "channels"))
    choices.require(f"{where}.schedule", given.get("schedule", "one_shot"), SCHEDULES)
    is_gradual = given.get("schedule") == "polynomial"
    if given.get("kind") == "channels":
        if is_gradual:
            raise components.ConfigError(f"{where}: channels are removed at once or in rounds (schedule='iterative')")
        return "channels"
    if "recipe" in given:
        return "recipe"
    return "gradual" if is_gradual else "one_shot"


def _allowed(kind: str) -> set[str]:
    function, taken = _FUNCTIONS.get(kind, (None, ()))
    arguments = () if function is None else inspect.signature(function).parameters
    return {"kind", *COMMON, *_TABLES[kind], *(name for name in arguments if name not in taken)}


def _check(kind: str, settings: Mapping[str, Any], where: str) -> None:
    for key, interval in {
        "retrain_steps": "[0, inf)", "rounds": "[1, inf)", "eval_every": "[0, inf)", "min_kept": "[1, inf)",
        "calibration_batches": "[1, inf)",
    }.items():  # fmt: skip
        if key in settings:
            choices.require_count(f"{where}.{key}", settings[key], interval)
    if kind in ("gradual", "recipe") and settings["retrain_steps"] < 1:
        raise components.ConfigError(f"{where} prunes while it trains: retrain_steps must be at least 1")
    if kind == "gradual":
        choices.require_within(f"{where}.ramp", settings["ramp"], "[0, 1]")


def _pattern(pattern: Any, where: str) -> Any:
    try:
        return patterns.parse(pattern)
    except ValueError as error:
        raise components.ConfigError(f"{where}.pattern: {error}") from error


def _several(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]
