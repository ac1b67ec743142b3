"""How much of a teacher's answer to take, example by example, from how student, teacher and truth lie to each other.

Less or More From Teacher: Exploiting Trilateral Geometry For Knowledge Distillation (2024, Hu et al.). The loss of an
example is `alpha T^2 KL(teacher || student) + (1 - alpha) cross entropy` with alpha from a small network, which
`steelyard.examples.bilevel_step` trains on the loss of other examples.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from steelyard import choices, precision

Probs = Float[Array, "batch classes"]


def trilateral_features(
    student_probs: Probs, teacher_probs: Probs, targets_onehot: Probs, class_mean_probs: Probs
) -> Float[Array, "batch 5*classes"]:
    """The sides of the triangles between student S, teacher T, truth G, and the teacher's mean for the class, Tbar.

        concat(S - G, T - G, S - T, Tbar - G, S - Tbar)

    Args:
      student_probs: S, predictions at temperature 1.
      teacher_probs: T, likewise.
      targets_onehot: G.
      class_mean_probs: Tbar, for each example the row of its class: `class_means(...)[labels]`.

    Returns:
      Float32 at least; all zero where the four agree. Nothing differentiates through them.

    Raises:
      ValueError: the shapes differ.

    Source: Less or More From Teacher: Exploiting Trilateral Geometry For Knowledge Distillation (2024, Hu et al.); the
    order of the parts is ours.
    """
    corners = (student_probs, teacher_probs, targets_onehot, class_mean_probs)
    shapes = [jnp.shape(corner) for corner in corners]
    if len(set(shapes)) > 1 or len(shapes[0]) != 2:
        raise ValueError(
            "student_probs, teacher_probs, targets_onehot and class_mean_probs must all be [batch, classes]: "
            f"their shapes are {', '.join(map(str, shapes))}"
        )
    student, teacher, truth, mean = (precision.wide(jax.lax.stop_gradient(corner)) for corner in corners)
    sides = (student - truth, teacher - truth, student - teacher, mean - truth, student - mean)
    return jnp.concatenate(sides, axis=-1)


def class_means(
    probs: Float[Array, "n classes"], labels: Int[Array, "n"], num_classes: int
) -> Float[Array, "num_classes classes"]:
    """The mean prediction over the examples of each class; uniform for a class without examples.

    Computed once, from a teacher's predictions on the training set.

    Args:
      probs: predictions at temperature 1.
      labels: in [0, num_classes); examples with other labels are left out.
      num_classes: how many rows the result has.

    Returns:
      Row c is the mean for class c, float32 at least. Nothing differentiates through it.

    Raises:
      ValueError: `num_classes` is less than 1, or there is not one label for each row of `probs`.
    """
    choices.require_within("num_classes", num_classes, "[1, inf)")
    if jnp.ndim(probs) != 2 or jnp.shape(labels) != jnp.shape(probs)[:1]:
        raise ValueError(
            "class_means needs probs [n, classes] and labels [n]: "
            f"their shapes are {jnp.shape(probs)} and {jnp.shape(labels)}"
        )
    probs = precision.wide(jax.lax.stop_gradient(probs))
    members = jax.nn.one_hot(labels, num_classes, dtype=probs.dtype)
    sums = jnp.matmul(members.T, probs, precision=jax.lax.Precision.HIGHEST)
    counts = jnp.sum(members, axis=0)[:, None]
    return jnp.where(counts == 0, 1 / probs.shape[1], sums / jnp.maximum(counts, 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class FusionRatio:
    """A network from features of an example to its share alpha of the teacher, in (0, 1).

        alpha = sigmoid(relu(features W1 + b1) W2 + b2)

    It keeps no parameters: `init(key, features) -> params` and `apply(params, features) -> alpha`, as a Flax module
    does it, without the framework.

    Attributes:
      hidden: width of the layer between, at least 1.

    Source: Less or More From Teacher: Exploiting Trilateral Geometry For Knowledge Distillation (2024, Hu et al.); its
    width and depth are ours.
    """

    hidden: int = 64

    def __post_init__(self):
        choices.require_within("hidden", self.hidden, "[1, inf)")

    def init(self, key: Key[Array, ""], features: Float[Array, "batch d"]) -> dict[str, dict[str, Array]]:
        """Float32 kernels [in, out] of variance 1 / in, and zero biases; of `features` only the shape is used."""
        widths = {"hidden": (jnp.shape(features)[-1], self.hidden), "ratio": (self.hidden, 1)}
        draw = jax.nn.initializers.lecun_normal()
        return {
            name: {"kernel": draw(k, shape, jnp.float32), "bias": jnp.zeros(shape[1:], jnp.float32)}
            for k, (name, shape) in zip(jax.random.split(key), widths.items(), strict=True)
        }

    def apply(self, params: dict[str, dict[str, Array]], features: Float[Array, "batch d"]) -> Float[Array, "batch"]:
        """The ratios, differentiable with respect to `params`."""
        hidden = jax.nn.relu(features @ params["hidden"]["kernel"] + params["hidden"]["bias"])
        return jax.nn.sigmoid(hidden @ params["ratio"]["kernel"] + params["ratio"]["bias"])[..., 0]
