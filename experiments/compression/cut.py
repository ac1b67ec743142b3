"""From weights and a job's settings to masks: score, allocation, pattern."""

import inspect
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from experiments import components
from experiments.compression import mask_files, methods
from experiments.compression.calibration import Calibration, Weights, kernels
from steelyard import choices
from steelyard import tree as tree_lib
from steelyard.sparsity import allocation as allocation_lib
from steelyard.sparsity import calibration as calibration_lib
from steelyard.sparsity import masks as masks_lib
from steelyard.sparsity import patterns, prunable
from steelyard.sparsity import scores as scores_lib

PyTree = Any
AMOUNTS = np.linspace(0, 1, 21)  # at which distortions are measured, for the allocation of that name
WHOLE = ("global", "output")  # who competes, where that is not a leaf


def masks_for(
    job: methods.Job, calibration: Calibration, target: float, before: PyTree | None
) -> tuple[PyTree, list[str]]:
    """The masks of a pruning to the sparsity `target`, within the masks `before` of the pruning before it.

    Args:
      job: what is asked for.
      calibration: of the weights to prune.
      target: the share that is gone afterwards.
      before: masks, or `None`.

    Returns:
      Masks, `None` for a leaf that is not pruned; and what the reader should know: which layers are down to the
      minimum that is kept.
    """
    settings, pattern, params = job.settings, job.pattern, calibration.params
    where = f"config.methods.{job.method}"
    if settings["masks"] is not None:
        return mask_files.read(pathlib.Path(settings["masks"]), params, pattern, where), []
    chosen = select(params, settings["where"], f"{where}.where")
    scores = score(settings["score"], chosen, calibration, f"{where}.score")
    if before is not None:  # what is gone stays so, whatever its score
        scores = jax.tree.map(lambda s, mask: jnp.where(mask, s, -jnp.inf), scores, before)
    masks = _masks(settings, pattern, scores, target, calibration, where)
    if before is not None:
        masks = jax.tree.map(jnp.logical_and, masks, before)
    return masks, [] if isinstance(pattern, patterns.NM) else _at_minimum(masks, settings["min_kept"])


def select(params: PyTree, where: str | None, name: str) -> PyTree:
    """The leaves to prune, `None` in place of the others."""
    flags = prunable.selected(params, where, name=name)
    return jax.tree.map(lambda w, keep: w if keep else None, params, flags)


def score(spec: Any, chosen: PyTree, calibration: Calibration, where: str) -> PyTree:
    """Scores of the chosen leaves by the function of `sparsity.scores` that a config names.

    What the function needs is told by the names of its arguments.

    Raises:
      ConfigError: no such function, an option that it lacks, or one that needs what is not measured here.
    """
    spec = _component(spec)
    required = _required(spec, where)
    if required[0] == "weight":
        measured = getattr(calibration, required[1])
        return calibration_lib.map_kernels(
            lambda w, m: components.make(spec, [scores_lib], where, w, m), chosen, measured
        )
    known = {
        "params": lambda: calibration.params,
        "grads": lambda: calibration.grads,
        "second_moment": lambda: calibration.second_moment,
        "rng": lambda: calibration.rng,
        "loss_fn": lambda: calibration.loss_fn,
        "apply_fn": lambda: _outputs(calibration),
        "inputs": lambda: jnp.ones_like(calibration.weights.experiment.task.inputs(next(calibration.stream()))[:1]),
    }
    scores = components.make(spec, [scores_lib], where, *(known[name]() for name in required))
    return jax.tree.map(lambda w, s: None if w is None else s, chosen, scores, is_leaf=tree_lib.is_none)


def check_score(spec: Any, weights: Weights, leaves: str | None, where: str) -> None:
    """Refuses a score that cannot be measured; of the weights only the shapes are looked at.

    Raises:
      ConfigError: no such function, or it needs what is not measured here, or not of all leaves that are to be pruned.
    """
    required, place = _required(_component(spec), f"{where}.score"), f"{where}.score={spec!r}"
    if {"grads", "second_moment", "loss_fn"} & set(required) and weights.experiment.task.example_state is not None:
        raise components.ConfigError(f"{place} needs a loss that keeps no value for each training example")
    if required[0] == "weight":
        known = kernels(weights)
        odd = [path for path, _ in tree_lib.flatten(select(weights.params, leaves, f"{where}.where"))]
        odd = [path for path in odd if path not in known]
        if odd:
            raise components.ConfigError(
                f"{place} is measured at the inputs of kernels, and {odd[0]} is none: where=r'(.*/)?kernel' selects "
                f"only kernels; nearest: {', '.join(tree_lib.nearest(odd[0], known) or list(known)[:3])}"
            )


def _required(spec: Mapping[str, Any], where: str) -> list[str]:
    """The arguments that a score needs, all of which can be measured."""
    function = components.find(spec.get("name"), [scores_lib], where)
    positional = [p for p in inspect.signature(function).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    required = [p.name for p in positional if p.default is p.empty]
    is_of_kernels = required[:1] == ["weight"]
    missing = required[1:] if is_of_kernels else required
    missing = [name for name in missing if name not in (_OF_INPUTS if is_of_kernels else _OF_TREES)]
    if missing or required == ["weight"]:
        raise components.ConfigError(
            f"{where}={spec['name']!r} is no score of single weights that could be measured here: it needs "
            f"{', '.join(missing) or 'more'}"
        )
    return required


# What scores may ask for: of a kernel by its inputs, or of the whole tree.
_OF_INPUTS = {"input_norm", "hessian"}
_OF_TREES = {"params", "grads", "second_moment", "rng", "loss_fn", "apply_fn", "inputs"}


def _outputs(calibration: Calibration):
    """`(params, inputs) -> all outputs in one vector`."""
    weights = calibration.weights

    def apply(params: PyTree, inputs: Array) -> Array:
        outputs = weights.experiment.model.apply(weights.variables | {"params": params}, inputs, train=False)
        return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(outputs)])

    return apply


def _masks(settings, pattern, scores: PyTree, target: float, calibration: Calibration, where: str) -> PyTree:
    allocation, least = _component(settings["allocation"]), settings["min_kept"]
    if isinstance(pattern, patterns.NM):
        return masks_lib.masks(scores, jax.tree.map(lambda _: target, scores), pattern)
    if allocation["name"] == "output":
        return jax.tree.map(lambda s: masks_lib.topk_mask_along(s, target), scores)
    if allocation["name"] == "global":
        sizes = [math.prod(s.shape) for s in jax.tree.leaves(scores)]
        most = 1 - sum(min(least, size) for size in sizes) / sum(sizes)
        return masks_lib.global_masks(scores, min(target, most), normalize=settings["normalize"], min_kept=least)
    sparsities = _allocate(allocation, scores, target, calibration, settings["where"], where)
    if isinstance(pattern, patterns.Unstructured):
        return jax.tree.map(lambda s, share: masks_lib.topk_mask(s, share, min_kept=least), scores, sparsities)
    return masks_lib.masks(scores, sparsities, pattern)


def check_allocation(spec: Any, pattern: patterns.Pattern, where: str) -> None:
    """Refuses what is no allocation, or does not fit the pattern.

    Raises:
      ConfigError: the text says what to write instead.
    """
    name = _component(spec).get("name")
    if name not in WHOLE:
        known = [n for n in allocation_lib.__all__ if _kind_of(getattr(allocation_lib, n)) is not None]
        choices.require(where, name, [*known, *WHOLE])
    elif not isinstance(pattern, patterns.Unstructured):
        raise components.ConfigError(f"{where}={name!r} ranks single entries: it needs pattern='unstructured'")


def _allocate(spec, scores: PyTree, target: float, calibration: Calibration, leaves: str | None, where: str) -> PyTree:
    """The sparsity of each leaf, by the function of `sparsity.allocation` that a config names."""
    where, params = f"{where}.allocation", calibration.params
    kind = _kind_of(getattr(allocation_lib, spec["name"]))
    if kind == "params":
        return components.make(spec, [allocation_lib], where, params, target, optional={"where": leaves})
    sizes = np.array([math.prod(s.shape) for s in jax.tree.leaves(scores)])
    if kind == "distortions":
        outputs = lambda p, batch: _samples(calibration.forward(p, batch, calibration.weights.model_state))  # noqa: E731
        curves = jax.jit(lambda p, batch: allocation_lib.distortion_curves(outputs, p, batch, AMOUNTS, where=leaves))
        measured = np.mean([np.asarray(curves(params, batch)) for batch in calibration.stream()], 0)
        shares = AMOUNTS[components.make(spec, [allocation_lib], where, measured, AMOUNTS, sizes, target)]
    else:
        probed = jax.jit(lambda p: scores_lib.zeroth_order(calibration.loss_fn, p, calibration.rng))(params)
        chosen = zip(*(jax.tree.leaves(t, is_leaf=tree_lib.is_none) for t in (scores, probed)), strict=True)
        layers = np.array([layer for s, layer in chosen if s is not None], np.float64)
        shares = components.make(spec, [allocation_lib], where, layers, sizes, target)
    return jax.tree.unflatten(jax.tree.structure(scores), [float(share) for share in shares])


def _kind_of(function: Any) -> str | None:
    """What an allocation starts from, by the names of its arguments; `None` for what is none."""
    names = tuple(inspect.signature(function).parameters)
    if names[:2] == ("params", "sparsity"):
        return "params"
    if names[:4] == ("distortions", "amounts", "sizes", "sparsity"):
        return "distortions"
    return "scores" if names[:3] == ("scores", "sizes", "sparsity") else None


def _samples(outputs: PyTree) -> Array:
    """All outputs of a batch, one row a sample."""
    return jnp.concatenate([x.reshape(len(x), -1) for x in jax.tree.leaves(outputs)], axis=1)


def _component(spec: Any) -> dict[str, Any]:
    return {"name": spec} if isinstance(spec, str) else dict(spec)


def _at_minimum(masks: PyTree, least: int) -> list[str]:
    """Leaves that only the minimum has saved."""
    notes = []
    for path, mask in tree_lib.flatten(masks):
        kept = int(jnp.count_nonzero(mask))
        if kept <= max(least, 1) < mask.size:
            notes.append(f"{path} is down to the minimum: {kept} of {mask.size} weights are kept")
    return notes
