"""What a model is trained to do: the functions that `make_step` and evaluation get, for each kind of experiment.

`config.task = dict(name="classify_and_reconstruct", mask_ratio=0.3)` calls the function of that name with the model.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from experiments import components
from steelyard import losses as losses_lib

PyTree = Any


class Task(NamedTuple):
    """The functions of a task.

    Attributes:
      names: tasks in the order of their gradients; `losses` gives one loss for each.
      inputs: `batch -> model inputs`, to initialise the model.
      forward, losses, measure, prepare: see `train.make_step`.
      score: the metric of `measure` by which runs are compared.
      direction: "higher" or "lower" is better.
      predict: `outputs -> predictions`, integers: packed and unpacked weights must agree on them.
      example_state: `number of training examples -> table`, for losses that keep a value for each of them.
    """

    names: tuple[str, ...]
    inputs: Callable[[PyTree], Array]
    forward: Callable[..., Any]
    losses: Callable[[PyTree, PyTree], dict[str, Array]]
    measure: Callable[[PyTree, PyTree], dict[str, Array]]
    prepare: Callable[..., PyTree] | None
    score: str
    direction: str
    predict: Callable[[PyTree], Array]
    example_state: Callable[[int], PyTree] | None = None


def classify(
    model,
    *,
    column: str = "image",
    mean: float = 0.0,
    std: float = 1.0,
    label_smoothing: float = 0.0,
    shift: int = 0,
    loss: str = "softmax_cross_entropy_with_integer_labels",
    loss_options: Mapping[str, Any] | None = None,
    counts: Sequence[int] | None = None,
) -> Task:
    """Classes of images (or of rows of features).

    Args:
      model: gives logits, or a mapping with `logits`.
      column: the column of the data set that the model sees.
      mean, std: the model sees (x - mean) / std; images of bytes are first brought to [0, 1].
      label_smoothing: share of the target that is spread over all classes, in [0, 1).
      shift: in training, images are moved by up to so many pixels along each axis.
      loss: the name of a function `(logits, labels, **options) -> losses` of `steelyard.losses`.
        "adaptive_ldr_loss" keeps a temperature for each training example.
      loss_options: its options, such as `dict(gamma=2.0)`.
      counts: how many training examples each class has; a loss that has this option gets it. The data set's own if
        the config leaves it out.
    """
    loss_options = dict(loss_options or {})
    function = _loss_of(loss, loss_options, counts, label_smoothing)

    def inputs(batch):
        return (_unit(batch[column]) - mean) / std

    def losses(outputs, batch):
        return {"class": function(_logits(outputs), batch["label"])}

    @losses_lib.with_example_state
    def adaptive_losses(outputs, batch, temperatures):
        rows = batch["index"]
        loss, new = function(_logits(outputs), batch["label"], temperatures[rows])
        return {"class": loss}, temperatures.at[rows].set(new)

    if loss == "adaptive_ldr_loss":
        reference = loss_options.get("reference", 1.0)
        losses, example_state = adaptive_losses, lambda examples: jnp.full(examples, reference, jnp.float32)
    else:
        example_state = None
        losses = losses_lib.batch_dependent(losses) if _is_batch_dependent(loss) else losses

    def prepare(params, batch, references, rng, **model_state):
        del params, references, model_state
        return batch | {column: shift_images(batch[column], rng, shift)}

    return Task(
        names=("class",),
        inputs=inputs,
        forward=_forward(model, inputs),
        losses=losses,
        measure=_measure_classes,
        prepare=prepare if shift else None,
        score="accuracy",
        direction="higher",
        predict=lambda outputs: jnp.argmax(_logits(outputs), -1),
        example_state=example_state,
    )


def classify_and_reconstruct(
    model,
    *,
    mask_ratio: float = 0.25,
    patch: int = 2,
    mean: float = 0.0,
    std: float = 1.0,
    label_smoothing: float = 0.0,
    shift: int = 0,
) -> Task:
    """Two tasks on one forward pass: the class of an image with holes, and what was in the holes.

    In training, square patches are hidden at random (set to `mean`); the model classifies what is left (`class`, cross
    entropy) and predicts the pixels that it did not see (`reconstruction`, mean squared error over the hidden pixels).
    In evaluation images are whole, and the reconstruction error is over all pixels.

    Args:
      model: gives a mapping with `logits` [B, classes] and `reconstruction` like the image.
      mask_ratio: share of patches that are masked, in [0, 1).
      patch: side of a patch, in pixels.
      mean, std, label_smoothing, shift: as in `classify`; what is reconstructed is the image in [0, 1].
    """
    if not 0.0 <= mask_ratio < 1.0:
        raise ValueError(f"mask_ratio={mask_ratio} must be in [0, 1)")

    def inputs(batch):
        image = (_unit(batch["image"]) - mean) / std
        return jnp.where(batch["hidden"], 0.0, image) if "hidden" in batch else image

    def prepare(params, batch, references, rng, **model_state):
        del params, references, model_state
        shift_rng, mask_rng = jax.random.split(rng)
        image = shift_images(_unit(batch["image"]), shift_rng, shift)
        return batch | {"image": image, "hidden": patch_mask(image.shape, mask_rng, mask_ratio, patch)}

    def losses(outputs, batch):
        return {
            "class": _cross_entropy(outputs["logits"], batch["label"], label_smoothing),
            "reconstruction": reconstruction_error(outputs["reconstruction"], batch),
        }

    def measure(outputs, batch):
        error = reconstruction_error(outputs["reconstruction"], batch)
        return _measure_classes(outputs, batch) | {"reconstruction_error": error}

    return Task(
        names=("class", "reconstruction"),
        inputs=inputs,
        forward=_forward(model, inputs),
        losses=losses,
        measure=measure,
        prepare=prepare,
        score="accuracy",
        direction="higher",
        predict=lambda outputs: jnp.argmax(outputs["logits"], -1),
    )


def predict_next(model, *, column: str = "tokens") -> Task:
    """The next byte of a text, by cross entropy; measured in bits per byte.

    Args:
      model: tokens [B, T] to logits [B, T, vocabulary].
      column: windows of T + 1 tokens.
    """

    def losses(outputs, batch):
        return {"next": _cross_entropy(outputs, batch[column][:, 1:].astype(jnp.int32), 0.0)}

    def measure(outputs, batch):
        targets = batch[column][:, 1:].astype(jnp.int32)
        bits = _cross_entropy(outputs, targets, 0.0) / jnp.log(2.0)
        return {"bits_per_byte": bits, "accuracy": jnp.argmax(outputs, -1) == targets}

    return Task(
        names=("next",),
        inputs=lambda batch: batch[column][:, :-1].astype(jnp.int32),
        forward=_forward(model, lambda batch: batch[column][:, :-1].astype(jnp.int32)),
        losses=losses,
        measure=measure,
        prepare=None,
        score="bits_per_byte",
        direction="lower",
        predict=lambda outputs: jnp.argmax(outputs, -1),
    )


def shift_images(images: Float[Array, "b h w c"], rng: Array, most: int) -> Float[Array, "b h w c"]:
    """Moves each image by -most..most pixels along each axis; what comes in is zero."""
    if most == 0:
        return images
    padded = jnp.pad(images, ((0, 0), (most, most), (most, most), (0, 0)))
    offsets = jax.random.randint(rng, (images.shape[0], 2), 0, 2 * most + 1)

    def crop(image, offset):
        return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])

    return jax.vmap(crop)(padded, offsets)


def patch_mask(shape: tuple[int, ...], rng: Array, ratio: float, patch: int) -> Array:
    """True on square patches, each with probability `ratio`: bool [b, h, w, 1]."""
    b, h, w, _ = shape
    hidden = jax.random.bernoulli(rng, ratio, (b, -(-h // patch), -(-w // patch), 1))
    return jnp.repeat(jnp.repeat(hidden, patch, 1), patch, 2)[:, :h, :w]


def reconstruction_error(predicted: Float[Array, "b h w c"], batch: PyTree) -> Float[Array, "b"]:
    """Mean squared error of each image over its hidden pixels, over all pixels if none is marked as hidden."""
    image = _unit(batch["image"])
    error = jnp.mean(jnp.square(predicted - image), -1)
    if "hidden" not in batch:
        return jnp.mean(error, (1, 2))
    hidden = batch["hidden"][..., 0]
    return jnp.sum(jnp.where(hidden, error, 0.0), (1, 2)) / jnp.maximum(jnp.sum(hidden, (1, 2)), 1)


def _forward(model, inputs: Callable[[PyTree], Array]) -> Callable[..., Any]:
    def forward(params, batch, *, rng, train, model_state=None):
        rngs = {} if rng is None else {"dropout": rng}
        if model_state is None:
            return model.apply({"params": params}, inputs(batch), train=train, rngs=rngs)
        variables = {"params": params, **model_state}
        if not train:
            return model.apply(variables, inputs(batch), train=False, rngs=rngs), model_state
        return model.apply(variables, inputs(batch), train=True, rngs=rngs, mutable=list(model_state))

    return forward


def _unit(image: Array) -> Array:
    """Images of bytes as floats in [0, 1]; others as they are."""
    return image.astype(jnp.float32) / 255.0 if image.dtype == jnp.uint8 else image


def _logits(outputs: PyTree) -> Array:
    return outputs["logits"] if isinstance(outputs, dict) else outputs


def _loss_of(name: str, options: dict[str, Any], counts, label_smoothing: float) -> Callable[..., Any]:
    """The loss of this name with its options, checked."""
    if name == "softmax_cross_entropy_with_integer_labels":
        components.check_keys(options, (), "loss_options")
        return functools.partial(_cross_entropy, smoothing=label_smoothing)
    if label_smoothing:
        raise ValueError(f"label_smoothing={label_smoothing} belongs to cross entropy; loss={name!r} has no use for it")
    function = components.find(name, [losses_lib], "loss")
    allowed = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    components.check_keys(options, allowed, "loss_options")
    if counts is not None and "counts" in allowed:
        options = {"counts": counts} | options
    return functools.partial(function, **options)


def _is_batch_dependent(name: str) -> bool:
    return getattr(getattr(losses_lib, name), "batch_dependent", False)


def _cross_entropy(logits: Array, labels: Array, smoothing: float) -> Array:
    if smoothing == 0.0:
        return losses_lib.softmax_cross_entropy_with_integer_labels(logits, labels)
    targets = losses_lib.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return losses_lib.softmax_cross_entropy(logits, targets)


def _measure_classes(outputs: PyTree, batch: PyTree) -> dict[str, Array]:
    logits = _logits(outputs)
    cross_entropy = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return {"accuracy": jnp.argmax(logits, -1) == batch["label"], "cross_entropy": cross_entropy}
