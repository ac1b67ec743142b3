"""What the losses refuse: shapes that do not match, labels that name no class, classes without examples.

Values can only be looked at outside of jit; a traced array is let through.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from steelyard import choices, precision


def labelled(
    logits: Float[Array, "*batch classes"], labels: Int[Array, "*batch"], *, name: str = "logits"
) -> tuple[Float[Array, "*batch classes"], Int[Array, "*batch"]]:
    """The logits in float32 at least, and the labels as an array, if there is one label for each row of logits.

    Args:
      logits: one row for each example.
      labels: classes, in [0, classes).
      name: what the caller calls the logits.

    Raises:
      ValueError: shapes that do not match, labels that are not integers, or a label out of range that is not traced.
    """
    logits, labels = precision.wide(logits), jnp.asarray(labels)
    if not logits.ndim or labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels has shape {labels.shape} and {name} {logits.shape}: "
            "labels must have the shape of all but the last axis, which are the classes"
        )
    check_labels(labels, logits.shape[-1])
    return logits, labels


def check_labels(labels: Int[Array, "..."], classes: int) -> None:
    """Refuses labels that are not integers, and those outside [0, classes) that are not traced."""
    require_integers("labels", labels)
    if isinstance(labels, jax.core.Tracer) or not labels.size:
        return
    values = np.asarray(labels)
    wrong = values[(values < 0) | (values >= classes)]
    if wrong.size:
        raise ValueError(f"labels={wrong[0]} must lie in [0, {classes}), as there are {classes} classes")


def rows(vectors: Float[Array, "n d"], *, name: str = "embeddings", **ids: Int[Array, "n"]) -> Float[Array, "n d"]:
    """The vectors in float32 at least, if they are a matrix with a whole number for each row in each of the `ids`.

    Args:
      vectors: one for each row.
      name: what the caller calls them.
      **ids: integers, by their names.

    Raises:
      ValueError: other shapes, or ids that are not integers.
    """
    vectors = precision.wide(vectors)
    if vectors.ndim != 2:
        raise ValueError(f"{name} has shape {vectors.shape}: it must be [rows, features]")
    for id_name, values in ids.items():
        if jnp.shape(values) != vectors.shape[:1]:
            raise ValueError(
                f"{id_name} has shape {jnp.shape(values)} and {name} {vectors.shape}: "
                f"{id_name} must be {vectors.shape[:1]}, one number for each row"
            )
        require_integers(id_name, values)
    return vectors


def require_integers(name: str, values: Int[Array, "..."]) -> None:
    """Refuses what are no integers."""
    if not jnp.issubdtype(jnp.result_type(values), jnp.integer):
        raise ValueError(f"{name} are {jnp.result_type(values)}; they must be integers")


def alike(
    name_a: str, a: Float[Array, "..."], name_b: str, b: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Both in float32 at least, if their shapes are equal.

    Raises:
      ValueError: they are not.
    """
    a, b = precision.wide(a), precision.wide(b)
    if a.shape != b.shape:
        raise ValueError(f"{name_a} has shape {a.shape} and {name_b} {b.shape}: they must be the same")
    return a, b


def number_or(name: str, value: Float[Array, "..."], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """A number, or an array of this shape, in float32 at least.

    Raises:
      ValueError: another shape.
    """
    value = precision.wide(value)
    if value.shape not in ((), shape):
        raise ValueError(f"{name} has shape {value.shape}: it must be a number or have shape {shape}")
    return value


def require_broadcast(name: str, value: Float[Array, "..."], onto: str, shape: tuple[int, ...]) -> None:
    """Refuses what does not broadcast to a shape, which is that of `onto`, without enlarging it.

    Equal but for axes of length 1, from the right: [n] against [n, 1] would make [n, n].
    """
    own = jnp.shape(value)
    axes = zip(reversed(own), reversed(shape), strict=False)
    if len(own) > len(shape) or any(a not in (1, b) for a, b in axes):
        raise ValueError(f"{name} has shape {own}: it must broadcast to that of {onto}, {shape}")


def class_sizes(counts: Float[Array, "classes"], classes: int | None = None) -> Float[Array, "classes"]:
    """How many examples each class has, in float32 at least.

    Raises:
      ValueError: not one number for each class; a count that is not positive and not traced.
    """
    counts = precision.wide(counts)
    if counts.ndim != 1 or classes not in (None, len(counts)):
        expected = "(classes,)" if classes is None else f"({classes},)"
        raise ValueError(f"counts has shape {counts.shape}: it must be {expected}, one number for each class")
    choices.require_within("counts", counts, "(0, inf)")
    return counts
