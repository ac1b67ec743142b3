"""From a config to the functions that it names.

A component is a mapping with the key `name`, the public name of a function, and the function's arguments:
`dict(name="adamp", learning_rate=1e-3)`. An argument may itself be a component (a schedule). Several components in a
tuple are made in that order.
"""

import difflib
import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any


class ConfigError(ValueError):
    """A config that cannot be run; the text says which key, and what to write instead."""


def plain(value: Any) -> Any:
    """A config as dicts, lists and scalars, for JSON."""
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return value


def check_keys(given: Iterable[str], allowed: Iterable[str], where: str) -> None:
    """Raises a ConfigError that names the first key that is not allowed, and the nearest right ones."""
    allowed = list(allowed)
    for key in given:
        if key not in allowed:
            raise ConfigError(f"{where}.{key} is not a key that is used; {_nearest(key, allowed)}")


def find(name: str, modules: Sequence[ModuleType], where: str) -> Any:
    """The public function `name` of the first module that has it."""
    for module in modules:
        if name in _public(module):
            return getattr(module, name)
    known = [n for module in modules for n in _public(module)]
    homes = " or ".join(module.__name__ for module in modules)
    raise ConfigError(f"{where}.name={name!r} is not a public function of {homes}; {_nearest(name, known)}")


def make(
    spec: Mapping[str, Any], modules: Sequence[ModuleType], where: str, *args: Any, optional: Mapping | None = None
) -> Any:
    """Calls the function that `spec` names with the other keys as its arguments.

    Args:
      spec: a component.
      modules: where its name is looked up, in this order.
      where: its place in the config, for error texts: "config.optimizer".
      *args: leading arguments that the config does not give.
      optional: arguments that the function gets if it has them and the config does not give them.

    Raises:
      ConfigError: an unknown name or key, or an argument that the function refuses.
    """
    spec = {key: spec[key] for key in spec}
    if "name" not in spec:
        raise ConfigError(f"{where} has no key 'name' that says which function to call; it has {sorted(spec)}")
    function = find(spec.pop("name"), modules, where)
    parameters = inspect.signature(function).parameters
    named = [p.name for p in parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)][len(args) :]
    check_keys(spec, named, where)
    arguments = {k: v for k, v in (optional or {}).items() if k in named}
    for key, value in spec.items():
        is_component = hasattr(value, "keys") and "name" in value
        arguments[key] = make(value, modules, f"{where}.{key}") if is_component else _argument(value)
    missing = [n for n in named if parameters[n].default is inspect.Parameter.empty and n not in arguments]
    if missing:
        raise ConfigError(f"{where} ({function.__name__}) needs the key {', '.join(missing)}")
    try:
        return function(*args, **arguments)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: {error}") from error


def make_all(specs: Any, modules: Sequence[ModuleType], where: str, **kwargs: Any) -> list[Any]:
    """Makes one component, or each of a sequence of them; none for `None` or an empty sequence."""
    if not specs:
        return []
    if hasattr(specs, "keys"):
        return [make(specs, modules, where, **kwargs)]
    return [make(spec, modules, f"{where}[{i}]", **kwargs) for i, spec in enumerate(specs)]


def _argument(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    return tuple(value) if isinstance(value, list) else value


def _public(module: ModuleType) -> list[str]:
    names = getattr(module, "__all__", None) or [n for n in dir(module) if not n.startswith("_")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a module may warn of names that nobody asked for
        return [n for n in names if callable(getattr(module, n, None))]


def _nearest(word: str, words: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, words, n=3, cutoff=0.5)
    if near:
        return f"nearest: {', '.join(near)}"
    return f"allowed: {', '.join(sorted(words))}"
