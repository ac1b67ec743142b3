"""Contract 3: what stands between the stored parameters and those that the model sees.

The optimizer updates `stored`; the model computes with `apply(stored, state)`. What trains lives in `stored`, what
does not lives in `state`. `chain` and `only` make new reparameterizations from old ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from steelyard import formats
from steelyard import tree as tree_lib

PyTree = Any


class _Fields(NamedTuple):
    init: Callable[..., tuple[PyTree, PyTree]]
    apply: Callable[..., PyTree]
    update: Callable[..., PyTree]
    project: Callable[[PyTree, PyTree], PyTree]
    finish: Callable[[PyTree, PyTree], PyTree]
    masks: Callable[..., PyTree | None]


class Reparam(_Fields):
    """A reparameterization: pure functions between stored and seen parameters.

    Attributes:
      init: `(params, rng) -> (stored, state)`. `stored` is what the optimizer sees and updates.
      apply: `(stored, state, *, step, rng, train) -> params` that the model sees; differentiable in `stored`.
        With `train=False` the result is what `finish` stores, whatever `step` is, and `rng` may be `None`.
      update: `(state, stored, grads, *, step, rng) -> state`, after each step. `grads` are those of `stored`.
      project: `(stored, state) -> stored`, after the optimizer: constraints and vetoes.
      finish: `(stored, state) -> params` in their storage format, once, outside jit. A leaf may already be a weight
        node of `steelyard.formats` (the link before in a chain made it).
      masks: `(stored, state, *, step) -> tree like stored | None`: bool masks, `None` for a dense leaf. The train step
        hands them to the optimizer as the extra argument `masks`.

    Only `init` and `apply` are needed: the others keep what they are given, and `finish` is `apply(train=False)`.
    `None` leaves pass through all of them.
    """

    def __new__(cls, init, apply, update=None, project=None, finish=None, masks=None):
        if finish is None:

            def finish(stored, state):
                return apply(stored, state, step=0, rng=None, train=False)

        return super().__new__(
            cls, init, apply, update or _keep_state, project or _keep_stored, finish, masks or _no_masks
        )


def _keep_state(state, stored, grads, *, step, rng):
    del stored, grads, step, rng
    return state


def _keep_stored(stored, state):
    del state
    return stored


def _no_masks(stored, state, *, step):
    del stored, state, step


def identity() -> Reparam:
    """The model sees the stored parameters as they are."""

    def init(params, rng):
        del rng
        return params, ()

    def apply(stored, state, *, step, rng, train):
        del state, step, rng, train
        return stored

    return Reparam(init, apply)


def chain(*links: Reparam) -> Reparam:
    """Composes reparameterizations: `chain(a, b)` shows the model `b.apply(a.apply(stored))`.

    The links act in the order of their arguments, on the way from the stored to the seen parameters, and `finish`
    runs in the same order: each finisher gets what the one before it left, an array or a weight node. A link that adds
    leaves or renames them is the stored tree of the link before it, so paths keep their tails.

    `update` and `masks` of a link get the values that enter it; its gradients are those of the stored parameters,
    or `None` if a link before it changed the structure. `project` of every link acts on the stored parameters.

    Raises:
      ValueError: at `init`, if a link with a `project` of its own stands behind a link that changes the structure.
    """

    def init(params, rng):
        states = []
        structures = [jax.tree.structure(params)]
        for i, link in reversed(list(enumerate(links))):
            params, state = link.init(params, _fold(rng, i))
            states.insert(0, state)
            structures.insert(0, jax.tree.structure(params))
        for i, link in enumerate(links):
            if link.project is not _keep_stored and structures[i] != structures[0]:
                raise ValueError(
                    f"chain: link {i} constrains the stored parameters (it has a `project`), but a link before it "
                    f"changes their structure. Put link {i} first."
                )
        return params, tuple(states)

    def apply(stored, state, *, step, rng, train):
        for i, (link, link_state) in enumerate(zip(links, state, strict=True)):
            stored = link.apply(stored, link_state, step=step, rng=_fold(rng, i), train=train)
        return stored

    def entering(stored, state, *, step, rng):
        """The values that enter each link, in training mode."""
        for i, (link, link_state) in enumerate(zip(links, state, strict=True)):
            yield link, link_state, stored, _fold(rng, i)
            stored = link.apply(stored, link_state, step=step, rng=_fold(rng, i), train=True)

    def update(state, stored, grads, *, step, rng):
        structure = jax.tree.structure(stored)
        return tuple(
            link.update(
                link_state, value, grads if jax.tree.structure(value) == structure else None, step=step, rng=link_rng
            )
            for link, link_state, value, link_rng in entering(stored, state, step=step, rng=rng)
        )

    def project(stored, state):
        for link, link_state in zip(links, state, strict=True):
            stored = link.project(stored, link_state)
        return stored

    def finish(stored, state):
        for link, link_state in zip(links, state, strict=True):
            stored = link.finish(stored, link_state)
        return stored

    def masks(stored, state, *, step):
        structure = jax.tree.structure(stored)
        result = None
        for link, link_state, value, _ in entering(stored, state, step=step, rng=None):
            if jax.tree.structure(value) == structure:
                result = _both(result, link.masks(value, link_state, step=step))
        return result

    has_masks = any(link.masks is not _no_masks for link in links)
    has_project = any(link.project is not _keep_stored for link in links)
    return Reparam(init, apply, update, project if has_project else None, finish, masks if has_masks else None)


def _fold(rng, i: int):
    return None if rng is None else jax.random.fold_in(rng, i)


def _both(a: PyTree | None, b: PyTree | None) -> PyTree | None:
    """Entries that both masks keep; a missing mask keeps all."""
    if a is None or b is None:
        return b if a is None else a

    def leaf(x, y):
        return (x & y) if x is not None and y is not None else (y if x is None else x)

    return jax.tree.map(leaf, a, b, is_leaf=tree_lib.is_none)


class Split(NamedTuple):
    """Stored parameters of `only` around a link that changes the structure of its leaves."""

    selected: PyTree
    rest: PyTree


def only(inner: Reparam, where: tree_lib.Where) -> Reparam:
    """Restricts a reparameterization to the leaves that `where` selects; the model sees the others as stored.

    The stored tree keeps its structure if `inner` keeps that of the selected leaves; otherwise it is a `Split`.

    Raises:
      ValueError: at `init`, if a pattern matches no parameter.
    """

    def divide(values, like):
        """Selected leaves and the others, of values that are structured as the stored tree `like`."""
        return (
            values if isinstance(like, Split) else Split(*tree_lib.partition(values, where, is_leaf=formats.is_weight))
        )

    def join(selected, rest, like):
        return Split(selected, rest) if isinstance(like, Split) else _combine(selected, rest)

    def init(params, rng):
        selected, rest = tree_lib.partition(params, where)
        stored, state = inner.init(selected, rng)
        if jax.tree.structure(stored) == jax.tree.structure(selected):
            return _combine(stored, rest), state
        return Split(stored, rest), state

    def apply(stored, state, *, step, rng, train):
        selected, rest = divide(stored, stored)
        return _combine(inner.apply(selected, state, step=step, rng=rng, train=train), rest)

    def update(state, stored, grads, *, step, rng):
        if grads is not None:
            grads = divide(grads, stored).selected
        return inner.update(state, divide(stored, stored).selected, grads, step=step, rng=rng)

    def project(stored, state):
        selected, rest = divide(stored, stored)
        return join(inner.project(selected, state), rest, stored)

    def finish(stored, state):
        selected, rest = divide(stored, stored)
        return _combine(inner.finish(selected, state), rest)

    def masks(stored, state, *, step):
        selected, rest = divide(stored, stored)
        inner_masks = inner.masks(selected, state, step=step)
        return None if inner_masks is None else join(inner_masks, jax.tree.map(lambda _: None, rest), stored)

    return Reparam(
        init,
        apply,
        update,
        None if inner.project is _keep_stored else project,
        finish,
        None if inner.masks is _no_masks else masks,
    )


def _combine(a: PyTree, b: PyTree) -> PyTree:
    return tree_lib.combine(a, b, is_leaf=formats.is_weight)
