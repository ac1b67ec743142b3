"""One selector by path for everything that is not the same for all parameters: decay, freezing, rates, rules."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from steelyard import tree as tree_lib

PyTree = Any
Rule = optax.GradientTransformation | optax.ScalarOrSchedule | None

_DEFAULT = "default"


def by_path(rules: Mapping[str, Rule], *, default: Rule = None) -> optax.GradientTransformationExtraArgs:
    """Runs on each leaf what the first pattern that matches its path says.

        by_path({r".*/(bias|scale)": None, r"head/.*": 10.0, r".*": optax.add_decayed_weights(1e-4)})

    freezes biases and scales, takes ten times the step in the head and decays the rest. Each rule is

    - a transformation: it sees its own leaves alone, so that a norm is the norm of these, and gets all extra arguments
      as they are;
    - a number or a schedule c: u <- c u, in the leaf's dtype; the schedule counts this rule's updates from 0;
    - `None`: frozen, u <- 0 without state. The gradient is computed all the same, and a link that comes later (weight
      decay) would move the leaf: put this one last, or the whole chain inside.

    Costs nothing: leaves are told apart while tracing, and moments exist only where their rule is.

    Args:
      rules: from a regular expression for the whole path of a leaf (`block_0/mlp/up/kernel`) to its rule; the order
        counts.
      default: the rule for leaves that no pattern matches; `None` here passes them unchanged.

    Returns:
      A transformation whose state is an `optax.PartitionState`: under `rule_0`, `rule_1`, ... and `default` the state
      of each rule, with the paths of its parameters at the end of its own.

    Raises:
      ValueError: a malformed pattern, or a rule of another kind; at `init`, a pattern that matches no leaf, or only
        leaves that earlier patterns take. A tree without leaves is not looked at.
    """
    for pattern in rules:
        _check_pattern(pattern)
    transforms = {f"rule_{i}": _transform(f"rules[{key!r}]", rule) for i, (key, rule) in enumerate(rules.items())}
    transforms[_DEFAULT] = optax.identity() if default is None else _transform("default", default)

    def label(path: str) -> str:
        return next((f"rule_{i}" for i, key in enumerate(rules) if re.fullmatch(key, path)), _DEFAULT)

    def labels(tree: PyTree) -> PyTree:
        return tree_lib.map_with_path(lambda path, leaf: label(path), tree)

    partition = optax.partition(transforms, labels)

    def init(params):
        # optax.tree.map_params looks at the state's form through a tree without leaves.
        if jax.tree.leaves(params):
            _check_all_used(list(rules), params)
        return partition.init(params)

    return optax.GradientTransformationExtraArgs(init, partition.update)


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"rules: {pattern!r} is not a regular expression: {error}") from error


def _check_all_used(patterns: list[str], params: PyTree) -> None:
    paths = tree_lib.paths(params)
    taken: dict[str, str] = {}
    for pattern in patterns:
        tree_lib.select(params, pattern, name="rules")
        matched = [path for path in paths if re.fullmatch(pattern, path)]
        if all(path in taken for path in matched):
            earlier = ", ".join(sorted({repr(taken[path]) for path in matched}))
            more = ", ..." if len(matched) > 3 else ""
            raise ValueError(
                f"rules: {pattern!r} never applies: its leaves ({', '.join(matched[:3])}{more}) are taken by "
                f"earlier patterns: {earlier}. Put it before them."
            )
        taken |= {path: pattern for path in matched if path not in taken}


def _transform(name: str, rule: Rule) -> optax.GradientTransformation:
    if rule is None:
        return optax.set_to_zero()
    if isinstance(rule, optax.GradientTransformation):
        return rule
    if callable(rule):
        return optax.scale_by_schedule(rule)
    if isinstance(rule, bool) or not isinstance(rule, int | float | np.generic | np.ndarray | jax.Array):
        raise ValueError(f"{name}={rule!r} must be an optax transformation, a number, a schedule or None (frozen)")
    if jnp.ndim(rule) != 0:
        raise ValueError(f"{name} has shape {jnp.shape(rule)}; a multiplier is one number for all entries")
    return _multiply(rule)


def _multiply(factor: float) -> optax.GradientTransformation:
    def scale(updates: PyTree, params: PyTree) -> PyTree:
        del params
        return jax.tree.map(lambda u: jnp.asarray(factor, u.dtype) * u, updates)

    return optax.stateless(scale)
