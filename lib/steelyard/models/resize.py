"""A model for parameters that have become smaller (or larger): widths are read off their shapes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn

from steelyard import tree as tree_lib
from steelyard.models.mlp import MLP
from steelyard.models.resnet import NUM_STAGES, ResNet, stage_widths
from steelyard.models.transformer import Transformer
from steelyard.models.vit import ViT

PyTree = Any


def resize(model: nn.Module, params: PyTree) -> nn.Module:
    """The model with the widths that its parameters have now, and all else as it was.

    What `sparsity.channels.shrink` cuts out of the parameters must be cut out of the module's attributes. Widths that
    can change: hidden layers; heads, each as wide as before; the residual stream; channels of a stem, of the stages of
    a residual network and inside its blocks; the number of blocks of a transformer, counted from `block_0` on.

    Args:
      model: `MLP`, `ResNet`, `ViT` or `Transformer`, whose `apply` the parameters fitted before.
      params: the parameters, or variables with a collection `params`: arrays, weight nodes or shapes.

    Returns:
      A module of the same class. Where nothing changed it is equal to `model`.

    Raises:
      ValueError: another class, a parameter that is missing, or widths that contradict one another.

    >>> import jax.numpy as jnp
    >>> params = {"dense_0": {"kernel": jnp.ones((4, 5))}, "dense_1": {"kernel": jnp.ones((5, 2))}}
    >>> resize(MLP((8, 2)), params).features
    (5, 2)
    """
    reader = next((reader for kind, reader in _READERS.items() if isinstance(model, kind)), None)
    if reader is None:
        known = ", ".join(kind.__name__ for kind in _READERS)
        raise ValueError(f"resize knows {known}, not {type(model).__name__}: make the smaller model by hand.")
    params = params.get("params", params)
    shapes = {path: tuple(leaf.shape) for path, leaf in tree_lib.flatten(params, is_leaf=_has_shape)}
    return model.clone(**reader(model, shapes))


Shapes = Mapping[str, tuple[int, ...]]


def _has_shape(x: Any) -> bool:
    return hasattr(x, "shape")


def _width(shapes: Shapes, path: str, *same: str) -> int:
    """Length of the last axis of the parameter at `path`; those at `same` must agree."""
    for name in (path, *same):
        if name not in shapes:
            near = tree_lib.nearest(name, shapes) or list(shapes)[:3]
            raise ValueError(f"the parameters lack {name}. Nearest paths: {', '.join(near)}.")
    width = shapes[path][-1]
    for other in same:
        if shapes[other][-1] != width:
            raise ValueError(
                f"{path} of shape {shapes[path]} and {other} of shape {shapes[other]} must have one last axis."
            )
    return width


def _mlp(model: MLP, shapes: Shapes) -> dict[str, Any]:
    return {"features": tuple(_width(shapes, f"dense_{i}/kernel") for i in range(len(model.features)))}


def _resnet(model: ResNet, shapes: Shapes) -> dict[str, Any]:
    blocks = [(stage, f"stage_{stage}_block_{i}") for stage in range(NUM_STAGES) for i in range(model.num_blocks)]
    # In a stage without a shortcut the stem makes the channels to which the blocks add.
    makers = ["stem", *(f"stage_{stage}_block_0/shortcut" for stage in range(1, NUM_STAGES))]
    adders = [[f"{block}/conv_1/kernel" for stage, block in blocks if stage == at] for at in range(NUM_STAGES)]
    stages = tuple(_width(shapes, f"{maker}/kernel", *added) for maker, added in zip(makers, adders, strict=True))
    inner = tuple(_width(shapes, f"{block}/conv_0/kernel") for _, block in blocks)
    is_doubled = not isinstance(model.width, Sequence) and stages == stage_widths(stages[0])
    is_inherited = model.inner_width is None and inner == tuple(stages[stage] for stage, _ in blocks)
    return {
        "width": stages[0] if is_doubled else stages,
        "inner_width": None if is_inherited else _in_form_of(model.inner_width, inner),
    }


def _vit(model: ViT, shapes: Shapes) -> dict[str, Any]:
    stem = tuple(_width(shapes, f"stem_{i}/kernel") for i in range(len(model.stem)))
    return {"stem": stem} | _blocks(model, shapes, _width(shapes, "patch/kernel", "position"), ["up"])


def _transformer(model: Transformer, shapes: Shapes) -> dict[str, Any]:
    return _blocks(model, shapes, _width(shapes, "embed/embedding"), ["gate", "up"])


def _blocks(model: ViT | Transformer, shapes: Shapes, features: int, hidden: Sequence[str]) -> dict[str, Any]:
    """Attributes of a model of blocks; `hidden` are the layers that make the hidden features."""
    depth = len({path.split("/")[0] for path in shapes if path.startswith("block_")})
    head_dim = model.width // model.heads if model.head_dim is None else model.head_dim
    heads, widths = [], []
    for i in range(depth):
        query, *others = (f"block_{i}/attention/{name}/kernel" for name in ("query", "key", "value"))
        inner = _width(shapes, query, *others)
        if inner % head_dim:
            raise ValueError(f"{query} of shape {shapes[query]} is not cut into whole heads of {head_dim} features.")
        heads.append(inner // head_dim)
        widths.append(_width(shapes, *(f"block_{i}/mlp/{name}/kernel" for name in hidden)))
    divides = len(set(heads)) == 1 and heads[0] * head_dim == features
    return {
        "width": features,
        "depth": depth,
        "heads": _in_form_of(model.heads, heads),
        "mlp_width": _in_form_of(model.mlp_width, widths),
        "head_dim": model.head_dim if divides else head_dim,
    }


def _in_form_of(before: int | Sequence[int] | None, widths: Sequence[int]) -> int | tuple[int, ...]:
    """One number for all layers where there was one and they are still alike."""
    is_one = not isinstance(before, Sequence) and len(set(widths)) == 1
    return widths[0] if is_one else tuple(widths)


_READERS: dict[type[nn.Module], Callable[[Any, Shapes], dict[str, Any]]] = {
    MLP: _mlp,
    ResNet: _resnet,
    ViT: _vit,
    Transformer: _transformer,
}
