"""What each operation of a program says about the axes of its operands and results.

A rule `(atoms, eqn, arrays) -> results` gets the equation of a traced program and the axes of its operands, changes
what is known of the atoms, and gives the axes of the results. An operation that needs two axes to agree unites them;
one after which a shorter axis would mean something else blocks it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from steelyard.sparsity.channels.atoms import Atoms, Axes, Axis

Rule = Callable[[Atoms, Any, list[Axes]], list[Axes]]


def _name(eqn) -> str:
    return eqn.primitive.name


def _shapes(eqn) -> list[tuple[int, ...]]:
    return [getattr(var.aval, "shape", ()) for var in eqn.outvars]


def unknown(atoms, eqn, arrays, why="there is no rule for this operation"):
    reason = f"{_name(eqn)}: {why}"
    for axes in arrays:
        for axis in axes:
            atoms.block(axis, reason)
    return [atoms.array(shape, reason) for shape in _shapes(eqn)]


def _elementwise(atoms, eqn, arrays):
    """Axis i of all operands and of the result is one; operands without axes, or with length 1 there, do not matter."""
    (shape,) = _shapes(eqn)
    result = []
    for i, size in enumerate(shape):
        axes = [axes[i] for axes in arrays if axes and atoms.size(*axes[i]) == size]
        for axis in axes[1:]:
            atoms.unite(axes[0], axis, _name(eqn))
        result.append(axes[0] if axes else atoms.axis(size))
    return [tuple(result)]


def _same(atoms, eqn, arrays):
    """Results are the operands."""
    del atoms
    return arrays[: len(eqn.outvars)]


def _iota(atoms, eqn, arrays):
    del arrays
    reason = f"{_name(eqn)}: counts along the axis"
    dimension = eqn.params["dimension"]
    return [tuple(atoms.axis(n, reason if i == dimension else None) for i, n in enumerate(eqn.params["shape"]))]


def _reduction(atoms, eqn, arrays):
    dimensions = eqn.params["axes"]
    for i in dimensions:
        atoms.mark(arrays[0][i], "reduced")
    return [tuple(axis for i, axis in enumerate(arrays[0]) if i not in dimensions)]


def _index_reduction(atoms, eqn, arrays):
    for i in eqn.params["axes"]:
        atoms.block(arrays[0][i], f"{_name(eqn)}: the result is a position on the axis")
    return _reduction(atoms, eqn, arrays)


def _broadcast_in_dim(atoms, eqn, arrays):
    places = dict(zip(eqn.params["broadcast_dimensions"], arrays[0], strict=True))
    return [tuple(places.get(i) or atoms.axis(size) for i, size in enumerate(eqn.params["shape"]))]


def _transpose(atoms, eqn, arrays):
    del atoms
    return [tuple(arrays[0][i] for i in eqn.params["permutation"])]


def _squeeze(atoms, eqn, arrays):
    del atoms
    return [tuple(axis for i, axis in enumerate(arrays[0]) if i not in eqn.params["dimensions"])]


def _reshape(atoms, eqn, arrays):
    """Deals the atoms out to the new axes, in order; one that is too long for its axis is cut.

    The outer part of a cut is what a head is: channels of several entries each. Its inner part is blocked, because the
    program may know its length (the scale of attention is one over its root).
    """
    (shape,) = _shapes(eqn)
    left = atoms.resolve(sum(arrays[0], ()))
    result = []
    for size in shape:
        axis: Axis = ()
        while (missing := size // max(atoms.size(*axis), 1)) > 1:
            if not left or (atoms.size(left[0]) > missing and atoms.size(left[0]) % missing):
                return unknown(atoms, eqn, arrays, "the old axes are not cut into the new ones")
            if atoms.size(left[0]) > missing:
                atoms.cut(left[0], missing)
                inner = atoms.resolve((left[0],))[1:]
                atoms.block(inner, f"{_name(eqn)}: the inner part of an axis that is cut")
                left = atoms.resolve(left)
            axis, left = (*axis, left[0]), left[1:]
        if atoms.size(*axis) != size:
            return unknown(atoms, eqn, arrays, "the old axes are not cut into the new ones")
        result.append(axis)
    return [tuple(result)]


def _dot_general(atoms, eqn, arrays):
    """Joins batch and contracted axes, and carries the others.

    A product for each example is one of two activations, as of queries and keys: the program may know the lengths, and
    a single head, which no reshape has cut from others, must be left whole.
    """
    (contract, batch), (a, b) = eqn.params["dimension_numbers"], arrays
    if any("input" in atoms.marks(a[i]) for i in batch[0]):
        for side, axes in enumerate(arrays):
            for i, axis in enumerate(axes):
                if i not in batch[side]:
                    atoms.block(axis, f"{_name(eqn)}: a product of two activations")
    for pairs in (contract, batch):
        for i, j in zip(*pairs, strict=True):
            atoms.unite(a[i], b[j], _name(eqn))
    free = [
        tuple(axis for i, axis in enumerate(axes) if i not in (*contract[side], *batch[side]))
        for side, axes in enumerate((a, b))
    ]
    return [(*(a[i] for i in batch[0]), *free[0], *free[1])]


def _conv(atoms, eqn, arrays):
    (image, kernel), spec = arrays, eqn.params["dimension_numbers"]
    groups = eqn.params["feature_group_count"]
    features, out_channels = image[spec.lhs_spec[1]], kernel[spec.rhs_spec[0]]
    depthwise = groups > 1 and groups == atoms.size(*features) == atoms.size(*out_channels)
    if eqn.params["batch_group_count"] > 1 or (groups > 1 and not depthwise):
        return unknown(atoms, eqn, arrays, "grouped, and not one channel a group")
    atoms.unite(features, out_channels if depthwise else kernel[spec.rhs_spec[1]], _name(eqn))
    reason = f"{_name(eqn)}: a window slides along the axis"
    for axis in (*(image[i] for i in spec.lhs_spec[2:]), *(kernel[i] for i in spec.rhs_spec[2:])):
        atoms.block(axis, reason)
    result = list(atoms.array(_shapes(eqn)[0], reason))
    result[spec.out_spec[0]], result[spec.out_spec[1]] = image[spec.lhs_spec[0]], out_channels
    return [tuple(result)]


def _gather(atoms, eqn, arrays):
    """Axes that are taken whole are kept; those that are looked up are blocked."""
    (operand, indices), numbers = arrays, eqn.params["dimension_numbers"]
    sizes, (shape,) = eqn.params["slice_sizes"], _shapes(eqn)
    if numbers.operand_batching_dims:
        return unknown(atoms, eqn, arrays)
    windows = []
    for i, axis in enumerate(operand):
        if i in numbers.start_index_map or sizes[i] != atoms.size(*axis):
            atoms.block(axis, f"{_name(eqn)}: entries of the axis are looked up")
            axis = atoms.axis(sizes[i], f"{_name(eqn)}: entries of the axis are looked up")
        if i not in numbers.collapsed_slice_dims:
            windows.append(axis)
    windows, rows = iter(windows), iter(indices[:-1])
    return [tuple(next(windows if i in numbers.offset_dims else rows) for i in range(len(shape)))]


def _along(why: str, dimensions: Callable[[Any], Sequence[int]]) -> Callable[..., list[Axes]]:
    """An operation that mixes entries along some dimensions and treats all others alike."""

    def rule(atoms, eqn, arrays):
        reason, touched = f"{_name(eqn)}: {why}", {i % len(arrays[0]) for i in dimensions(eqn)}
        kept = arrays[0]
        for axes in arrays:
            for i, axis in enumerate(axes):
                if i in touched:
                    atoms.block(axis, reason)
                else:
                    atoms.unite(kept[i], axis, _name(eqn))
        return [
            tuple(atoms.axis(n, reason) if i in touched else kept[i] for i, n in enumerate(shape))
            for shape in _shapes(eqn)
        ]

    return rule


def _first_operand(rule: Callable[..., list[Axes]]) -> Callable[..., list[Axes]]:
    """The other operands are scalars that say where."""
    return lambda atoms, eqn, arrays: rule(atoms, eqn, arrays[:1])


def _changed(eqn) -> list[int]:
    """Dimensions along which operand and result have different lengths."""
    lengths = zip(eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape, strict=True)
    return [i for i, (before, after) in enumerate(lengths) if before != after]


def _update_slice(atoms, eqn, arrays):
    operand, update = arrays[:2]
    for i, (axis, new) in enumerate(zip(operand, update, strict=True)):
        if eqn.invars[0].aval.shape[i] == eqn.invars[1].aval.shape[i]:
            atoms.unite(axis, new, _name(eqn))
        else:
            for part in (axis, new):
                atoms.block(part, f"{_name(eqn)}: a part of the axis is written")
    return [operand]


def _windowed(eqn) -> list[int]:
    """Dimensions along which a pooling window, or its step or padding, is not trivial."""
    names = ("window_dimensions", "window_strides", "base_dilation", "window_dilation")
    trivial = zip(*(eqn.params[name] for name in names), eqn.params["padding"], strict=True)
    return [i for i, (*ones, padding) in enumerate(trivial) if any(n != 1 for n in ones) or tuple(padding) != (0, 0)]


_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz complex conj
    convert_element_type copy copy_p cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac
    imag integer_pow is_finite le lgamma log log1p logistic lt max min mul name ne neg nextafter not or polygamma
    population_count pow real reduce_precision regularized_incomplete_beta rem round rsqrt select_n sharding_constraint
    shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta
"""
_REDUCTIONS = "reduce_and reduce_max reduce_min reduce_or reduce_prod reduce_sum reduce_xor"
_CUMULATIVE = "cumlogsumexp cummax cummin cumprod cumsum"
_POOLINGS = "reduce_window_max reduce_window_min reduce_window_sum"

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_REDUCTIONS.split(), _reduction),
    **dict.fromkeys(_CUMULATIVE.split(), _along("runs along the axis", lambda eqn: [eqn.params["axis"]])),
    **dict.fromkeys(_POOLINGS.split(), _along("a window slides along the axis", _windowed)),
    "argmax": _index_reduction,
    "argmin": _index_reduction,
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _along("arrays are joined along the axis", lambda eqn: [eqn.params["dimension"]]),
    "conv_general_dilated": _conv,
    "device_put": _same,
    "dot_general": _dot_general,
    "dynamic_slice": _first_operand(_along("a part of the axis is taken", _changed)),
    "dynamic_update_slice": _update_slice,
    "gather": _gather,
    "iota": _iota,
    "optimization_barrier": _same,
    "pad": _first_operand(
        _along("the axis is padded", lambda eqn: [i for i, p in enumerate(eqn.params["padding_config"]) if any(p)])
    ),
    "reshape": _reshape,
    "rev": _along("the axis is reversed", lambda eqn: eqn.params["dimensions"]),
    "slice": _along("a part of the axis is taken", _changed),
    "sort": _along("the axis is sorted", lambda eqn: [eqn.params["dimension"]]),
    "split": _along("the axis is split", lambda eqn: [eqn.params["axis"]]),
    "squeeze": _squeeze,
    "transpose": _transpose,
}
