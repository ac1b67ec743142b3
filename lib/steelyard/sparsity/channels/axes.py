"""Which axes of which arrays of a program are one and the same, found by following its operations, in order.

The program is not run. Programs within it (functions jitted, with their own derivatives, or rematerialized; branches
and loops) are entered.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.extend import core

from steelyard.sparsity.channels import rules
from steelyard.sparsity.channels.atoms import Atoms, Axes

_CONSTANT = "an axis of a constant of the function"


def follow(atoms: Atoms, jaxpr: Any, consts: Sequence[Any], arrays: Sequence[Axes]) -> list[Axes]:
    """Goes through a program.

    Args:
      atoms: what is known of all axes; changed.
      jaxpr: the program, a `jax.extend.core.Jaxpr`.
      consts: what it closes over. These cannot be shortened, and block.
      arrays: the axes of its arguments.

    Returns:
      The axes of its results.
    """
    constants = [atoms.array(np.shape(x), _CONSTANT) for x in consts]
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *arrays), strict=True))

    def read(var):
        if isinstance(var, core.Literal):
            return atoms.array(np.shape(var.val), _CONSTANT)
        return known[var]

    for eqn in jaxpr.eqns:
        rule = _RULES.get(eqn.primitive.name, rules.unknown)
        results = rule(atoms, eqn, [read(var) for var in eqn.invars])
        known |= dict(zip(eqn.outvars, results, strict=True))
    return [read(var) for var in jaxpr.outvars]


def _call(atoms, eqn, arrays):
    """Goes into the program that the operation runs."""
    inner = next(eqn.params[name] for name in ("jaxpr", "call_jaxpr", "fun_jaxpr") if name in eqn.params)
    return _enter(atoms, inner, arrays)


def _enter(atoms, inner, arrays):
    jaxpr, consts = (inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ())
    return follow(atoms, jaxpr, consts, arrays)


def _unite_all(atoms, reason, before, after):
    for old, new in zip(before, after, strict=True):
        for a, b in zip(old, new, strict=True):
            atoms.unite(a, b, reason)


def _cond(atoms, eqn, arrays):
    branches = [_enter(atoms, branch, arrays[1:]) for branch in eqn.params["branches"]]
    for other in branches[1:]:
        _unite_all(atoms, eqn.primitive.name, branches[0], other)
    return branches[0]


def _while(atoms, eqn, arrays):
    tests, bodies = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = arrays[tests + bodies :]
    _enter(atoms, eqn.params["cond_jaxpr"], [*arrays[:tests], *carry])
    _unite_all(atoms, eqn.primitive.name, carry, _enter(atoms, eqn.params["body_jaxpr"], arrays[tests:]))
    return carry


def _scan(atoms, eqn, arrays):
    reason = f"{eqn.primitive.name}: steps along the axis"
    num_consts, num_carry = _scan_counts(eqn)
    carry, stacked = arrays[num_consts : num_consts + num_carry], arrays[num_consts + num_carry :]
    for axes in stacked:
        atoms.block(axes[0], reason)
    results = _enter(atoms, eqn.params["jaxpr"], [*arrays[:num_consts], *carry, *(axes[1:] for axes in stacked)])
    _unite_all(atoms, eqn.primitive.name, carry, results[:num_carry])
    return [*carry, *((atoms.axis(eqn.params["length"], reason), *axes) for axes in results[num_carry:])]


def _scan_counts(eqn) -> tuple[int, int]:
    """How many operands are constants, and how many are carried: versions of JAX keep that in different forms.

    What is stacked has an axis less inside of the loop.
    """
    body = eqn.params["jaxpr"].jaxpr if hasattr(eqn.params["jaxpr"], "jaxpr") else eqn.params["jaxpr"]

    def stacked(outer, inner):
        return sum(np.ndim(a.aval) > np.ndim(b.aval) for a, b in zip(outer, inner, strict=True))

    num_carry = len(eqn.outvars) - stacked(eqn.outvars, body.outvars)
    return len(eqn.invars) - stacked(eqn.invars, body.invars) - num_carry, num_carry


_CALLS = """
    checkpoint closed_call core_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr jit pjit remat remat2
"""
_RULES: dict[str, rules.Rule] = {
    **rules.RULES,
    **dict.fromkeys(_CALLS.split(), _call),
    "cond": _cond,
    "scan": _scan,
    "while": _while,
}
