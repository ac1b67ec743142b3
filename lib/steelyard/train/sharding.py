"""The mesh, and where each array of a train state lies on it.

A mesh has six axes, in order of falling tolerance to distance: the last ones are the closest devices.

- `replica`: plain data parallel across slow links (slices of a pod);
- `data`: plain data parallel within a slice;
- `fsdp`: data parallel whose parameters are sharded too;
- `context`: positions of a sequence;
- `tensor`: features;
- `expert`: experts.

The batch lies over `BATCH_AXES`. Data parallel, ZeRO-1, FSDP, tensor, context and expert parallel differ only in the
sizes of these axes, in the rules (`rules`), and for ZeRO-1 in `optimizer_fill`. All axes are `Auto`: shardings are
given to `jax.jit`, and the compiler finds the collectives.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from steelyard import tree as tree_lib
from steelyard.train import rules as rules_lib

PyTree = Any
Rules = rules_lib.RuleSet | Sequence[rules_lib.Rule]

AXES = rules_lib.AXES
BATCH_AXES = ("replica", "data", "fsdp", "expert")
MIN_SIZE = rules_lib.MIN_SIZE

_LIKE_PARAMETERS = ("references", "reparam_state", "aggregator_state")


# The mesh.


def make_mesh(
    shape: Mapping[str, int], *, devices: Sequence[Any] | None = None, slices: Mapping[str, int] | None = None
) -> Mesh:
    """A mesh with all of `AXES`, near devices along the last ones.

    Args:
      shape: sizes by axis name over all devices; an axis that is not named has size 1, one may be -1 (the rest).
        On several slices an unnamed `replica` has the number of slices.
      devices: the devices; all of `jax.devices()` by default.
      slices: how many slices lie along each axis, if they do not all lie along `replica`.

    Returns:
      A mesh whose axes are all `Auto`.

    Raises:
      ValueError: an unknown axis, sizes that do not multiply to the number of devices, or slices that do not fit.

    >>> dict(make_mesh({"fsdp": -1}, devices=jax.devices()[:1]).shape)["fsdp"]
    1
    """
    devices = list(jax.devices() if devices is None else devices)
    count = len({getattr(device, "slice_index", 0) for device in devices})
    outer = _outer_sizes(slices, count)
    inner_default = {"replica": outer["replica"]} if count > 1 and slices is None else {}
    sizes = _full_sizes({**inner_default, **shape}, len(devices))
    for axis in AXES:
        if sizes[axis] % outer[axis]:
            raise ValueError(
                f"axis {axis} has size {sizes[axis]}, which the {outer[axis]} slices along it do not divide. "
                f"Give shape[{axis!r}] a multiple of {outer[axis]}, or name other axes in slices."
            )
    inner = [sizes[axis] // outer[axis] for axis in AXES]
    # Without splitting physical axes a mesh such as (64, 4) does not fit a 16x16 slice.
    if count > 1:
        layout = mesh_utils.create_hybrid_device_mesh(
            inner, [outer[axis] for axis in AXES], devices, allow_split_physical_axes=True
        )
    else:
        layout = mesh_utils.create_device_mesh(inner, devices, allow_split_physical_axes=True)
    return Mesh(layout, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _outer_sizes(slices: Mapping[str, int] | None, count: int) -> dict[str, int]:
    slices = {"replica": count} if slices is None else slices
    _check_axis_names(slices, "slices")
    if math.prod(slices.values()) != count:
        raise ValueError(
            f"slices={dict(slices)} multiply to {math.prod(slices.values())}, but there are {count} slices"
        )
    return {axis: slices.get(axis, 1) for axis in AXES}


def _full_sizes(shape: Mapping[str, int], count: int) -> dict[str, int]:
    """Sizes of all axes, with -1 replaced by the rest of `count` devices."""
    _check_axis_names(shape, "shape")
    bad = {axis: size for axis, size in shape.items() if size < 1 and size != -1}
    free = [axis for axis, size in shape.items() if size == -1]
    if bad or len(free) > 1:
        raise ValueError(f"shape={dict(shape)}: sizes are positive, and at most one is -1 (the rest of the devices)")
    product = math.prod(size for size in shape.values() if size != -1)
    if count % product or not (free or product == count):
        divisors = [d for d in range(1, count + 1) if count % d == 0]
        near = sorted(sorted(divisors, key=lambda d: abs(d - product))[:2])
        need = f"must divide the {count} devices" if free else f"must be the {count} devices"
        raise ValueError(
            f"shape={dict(shape)}: the given sizes multiply to {product}, which {need}. "
            f"Nearest divisors of {count}: {', '.join(map(str, near))}. One size may be -1: the rest of the devices."
        )
    sizes = {axis: shape.get(axis, 1) for axis in AXES}
    return sizes | {axis: count // product for axis in free}


def _check_axis_names(names: Mapping[str, int], argument: str) -> None:
    for name in names:
        if name not in AXES:
            near = tree_lib.nearest(name, AXES)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{argument} names the axis {name!r}, which is none of {', '.join(AXES)}{hint}")


# The batch.


def batch_spec(mesh: Mesh) -> PartitionSpec:
    """The spec of a batch: its first axis over all axes of `BATCH_AXES` that the mesh has."""
    return PartitionSpec(tuple(axis for axis in BATCH_AXES if axis in mesh.shape))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of every array of a batch, of any rank from 1 on."""
    return NamedSharding(mesh, batch_spec(mesh))


def check_batch(batch: int, mesh: Mesh) -> None:
    """Checks that the mesh divides a global batch of `batch` examples.

    Raises:
      ValueError: it does not; the text names the nearest batches, and the nearest numbers of batch devices, that work.
    """
    product = math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)
    if batch > 0 and batch % product == 0:
        return
    below = batch // product * product
    batches = [size for size in (below, below + product) if size > 0]
    divisors = [d for d in range(1, max(batch, 0) + 1) if batch % d == 0]
    near = sorted(sorted(divisors, key=lambda d: abs(d - product))[:2])
    devices = f", or batch axes that multiply to {' or '.join(map(str, near))}" if near else ""
    sizes = ", ".join(f"{axis} {mesh.shape[axis]}" for axis in BATCH_AXES if mesh.shape.get(axis, 1) > 1)
    raise ValueError(
        f"batch={batch} is not a positive multiple of {product}, the product of the batch axes of the mesh ({sizes}). "
        f"Nearest that work: a batch of {' or '.join(map(str, batches))}{devices}."
    )


# Arrays and trees.


def spec(
    path: str,
    shape: Sequence[int],
    rules: Rules,
    axis_sizes: Mapping[str, int],
    *,
    fill: rules_lib.Axes = None,
    min_size: int = MIN_SIZE,
) -> PartitionSpec:
    """Where one array lies, from its path and shape alone: `rules.choose` as a `PartitionSpec`.

    Args:
      path: keys joined by slashes, as `tree.paths` gives them.
      shape: the array's shape.
      rules: a `rules.RuleSet` or pairs `(regex, entries)`.
      axis_sizes: size of each mesh axis by name: `mesh.shape`.
      fill: overrides the `fill` of the rule set.
      min_size: fewest entries that are worth filling.

    Raises:
      ValueError: the rule has entries for another rank, or names an axis that is neither in `AXES` nor in the mesh.

    >>> tuple(spec("mlp/kernel", (510, 512), [(r".*/kernel", ("tensor", "fsdp"))], {"fsdp": 8, "tensor": 4}))
    (None, 'fsdp')
    """
    return rules_lib.choose(path, shape, rules_lib.as_rule_set(rules, fill), axis_sizes, min_size=min_size).spec


def tree_specs(
    params: PyTree, rules: Rules, mesh: Mesh, *, fill: rules_lib.Axes = None, min_size: int = MIN_SIZE
) -> PyTree:
    """The `PartitionSpec` of every array of a tree of parameters.

    Args:
      params: arrays or shapes; `None` leaves stay `None`.
      rules: as in `spec`.
      mesh: the mesh.
      fill: as in `spec`.
      min_size: as in `spec`.

    Raises:
      ValueError: as in `spec`.
    """
    layout = _Layout(rules_lib.as_rule_set(rules, fill), dict(mesh.shape), min_size)
    return tree_lib.map_with_path(lambda path, leaf: layout.parameter(path, leaf).spec, params)


def state_shardings(
    state_shapes: PyTree,
    rules: Rules,
    mesh: Mesh,
    tx: optax.GradientTransformation | None = None,
    *,
    fill: rules_lib.Axes = None,
    optimizer_fill: rules_lib.Axes = None,
    min_size: int = MIN_SIZE,
) -> PyTree:
    """The sharding of every array of a train state.

    - `params`: by the rules.
    - `opt_state`: a leaf that `optax.tree.map_params` finds, or whose path ends with a parameter's path, lies like that
      parameter if it has its shape; the rest (factored moments) by the rules on its own path and shape.
    - `references`, `reparam_state`, `aggregator_state`: like the parameter whose path they end with and whose shape
      they have, otherwise by the rules.
    - `model_state`: by the rules. `example_state`: rows over the batch axes, as far as these divide them.
    - everything else (step, counters, key): on every device.

    Args:
      state_shapes: a state, or its shapes from `jax.eval_shape`: a named tuple or a dict with the fields above.
      rules: as in `spec`.
      mesh: the mesh.
      tx: the optimizer that made `opt_state`; without it only paths tell which leaf belongs to which parameter.
      fill: as in `spec`.
      optimizer_fill: axes for the optimizer state to lie over where its parameter uses none of them. With
        `rules.REPLICATE` and `"data"` this is ZeRO-1: replicated parameters, sharded moments.
      min_size: as in `spec`.

    Returns:
      A tree of `NamedSharding` of the same structure.

    Raises:
      ValueError: as in `spec`.
    """
    layout = _Layout(rules_lib.as_rule_set(rules, fill), dict(mesh.shape), min_size)
    fields = dict(state_shapes) if isinstance(state_shapes, Mapping) else state_shapes._asdict()
    params = fields["params"]
    known = {path: (np.shape(leaf), layout.parameter(path, leaf)) for path, leaf in tree_lib.flatten(params)}
    owners = _owners(fields.get("opt_state"), params, tx)

    def choose(name: str, path: str, leaf: Any) -> rules_lib.Choice:
        if name == "params":
            return layout.parameter(path, leaf)
        if name == "opt_state":
            choice = layout.like(owners.get(path, path), path, leaf, known)
            return rules_lib.fill(choice, np.shape(leaf), optimizer_fill, layout.axis_sizes, min_size=min_size)
        if name in _LIKE_PARAMETERS:
            return layout.like(path, path, leaf, known)
        if name == "model_state":
            return layout.other(path, leaf)
        return layout.rows(leaf) if name == "example_state" else rules_lib.replicated(np.shape(leaf))

    def to_shardings(name: str) -> PyTree:
        return tree_lib.map_with_path(
            lambda path, leaf: NamedSharding(mesh, choose(name, path, leaf).spec), fields[name]
        )

    shardings = {name: to_shardings(name) for name in fields}
    return type(state_shapes)(**shardings)


class _Layout(NamedTuple):
    """How leaves of each kind are laid out."""

    rules: rules_lib.RuleSet
    axis_sizes: dict[str, int]
    min_size: int

    def parameter(self, path: str, leaf: Any) -> rules_lib.Choice:
        return rules_lib.choose(path, np.shape(leaf), self.rules, self.axis_sizes, min_size=self.min_size)

    def other(self, path: str, leaf: Any) -> rules_lib.Choice:
        shape = np.shape(leaf)
        return rules_lib.choose(path, shape, self.rules, self.axis_sizes, min_size=self.min_size, lenient=True)

    def like(self, owner: str, path: str, leaf: Any, known: Mapping[str, tuple[Any, rules_lib.Choice]]):
        """As the parameter with the longest path that `owner` ends with, if it has the leaf's shape."""
        keys = owner.split("/")
        suffixes = ["/".join(keys[start:]) for start in range(len(keys) + 1)]
        shape, choice = next((known[suffix] for suffix in suffixes if suffix in known), (None, None))
        return choice if shape == np.shape(leaf) else self.other(path, leaf)

    def rows(self, leaf: Any) -> rules_lib.Choice:
        shape = np.shape(leaf)
        entries = (BATCH_AXES, *(None,) * (len(shape) - 1)) if shape else ()
        return rules_lib.fit(shape, entries, self.axis_sizes)


def _owners(opt_state: PyTree, params: PyTree, tx: optax.GradientTransformation | None) -> dict[str, str]:
    """Path of the parameter that each leaf of the optimizer state belongs to, as far as optax can tell."""
    if tx is None:
        return {}
    names = tree_lib.map_with_path(lambda path, leaf: path, params)
    try:
        owners = optax.tree.map_params(
            tx, lambda leaf, name: name, opt_state, names, transform_non_params=lambda leaf: False
        )
    except Exception:
        # An `init` that looks at its parameters cannot run on optax's placeholder, and may fail in any way. Paths do
        # as well, except where two parameters have the same ending.
        return {}
    return {path: owner for path, owner in tree_lib.flatten(owners) if isinstance(owner, str)}


def with_shardings(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Shapes that carry their shardings: what `Checkpoints.restore` and ahead-of-time compilation take."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


# What costs says so.


def explain(
    params: PyTree,
    rules: Rules,
    mesh: Mesh,
    *,
    fill: rules_lib.Axes = None,
    min_size: int = MIN_SIZE,
    tolerance: float = 0.02,
    strict: bool = False,
) -> str:
    """A table of where each parameter lies, why, and what could not be done.

    Args:
      params: arrays or shapes.
      rules: as in `spec`.
      mesh: the mesh.
      fill: as in `spec`.
      min_size: as in `spec`.
      tolerance: the fraction of parameter bytes that may be replicated over `fsdp` without a warning.
      strict: raise instead of warn.

    Returns:
      A line for each array: path, shape, rule, spec, bytes per device, dropped axes; then rules that matched nothing
      and the bytes replicated over `fsdp`, with a warning above `tolerance`.

    Raises:
      ValueError: `strict` and more than `tolerance` is replicated; and as in `spec`.
    """
    layout = _Layout(rules_lib.as_rule_set(rules, fill), dict(mesh.shape), min_size)
    rows = [(path, leaf, layout.parameter(path, leaf)) for path, leaf in tree_lib.flatten(params)]
    lines = [_line(path, leaf, choice, layout.axis_sizes) for path, leaf, choice in rows]
    used = {choice.rule for _, _, choice in rows}
    lines += [f"rule {n} matched nothing: {rule[0]}" for n, rule in enumerate(layout.rules.rules) if n not in used]
    if layout.axis_sizes.get("fsdp", 1) > 1:
        fraction = _replicated_fraction(rows)
        total = f"{100 * fraction:.1f} % of parameter bytes are replicated over fsdp"
        if fraction > tolerance and strict:
            raise ValueError("\n".join((f"{total}; at most {100 * tolerance:.1f} % are allowed.", *lines)))
        lines.append(f"warning: {total}" if fraction > tolerance else total)
    return "\n".join(lines)


def _line(path: str, leaf: Any, choice: rules_lib.Choice, axis_sizes: Mapping[str, int]) -> str:
    parts = math.prod(axis_sizes[name] for entry in choice.entries for name in entry)
    rule = ("no rule" if choice.rule is None else f"rule {choice.rule}") + (" + fill" if choice.filled else "")
    share = f"{_nbytes(leaf) // parts} B/device"
    dropped = (f"dropped: {', '.join(choice.dropped)}",) if choice.dropped else ()
    return "  ".join((path, str(tuple(np.shape(leaf))), rule, str(choice.spec), share, *dropped))


def _nbytes(leaf: Any) -> int:
    return math.prod(np.shape(leaf)) * leaf.dtype.itemsize


def _replicated_fraction(rows: Sequence[tuple[str, Any, rules_lib.Choice]]) -> float:
    whole = sum(_nbytes(leaf) for _, leaf, choice in rows if not any("fsdp" in entry for entry in choice.entries))
    return whole / max(sum(_nbytes(leaf) for _, leaf, _ in rows), 1)
