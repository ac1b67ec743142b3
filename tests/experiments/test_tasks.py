"""What the tasks do to images, and how they score."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import tasks
from steelyard import losses


class Linear:
    """Stands for a Flax model: logits are the first pixels, the reconstruction is the input."""

    def apply(self, variables, x, *, train, rngs):
        del variables, train, rngs
        return {"logits": x.reshape(x.shape[0], -1)[:, :3], "reconstruction": x}


IMAGES = jax.random.uniform(jax.random.key(0), (6, 8, 8, 1))
BATCH = {"image": IMAGES, "label": jnp.array([0, 1, 2, 0, 1, 2])}


def test_shifted_images_are_crops_of_the_padded_image():
    shifted = tasks.shift_images(IMAGES, jax.random.key(1), 2)
    padded = np.pad(IMAGES, ((0, 0), (2, 2), (2, 2), (0, 0)))
    for image, source in zip(np.asarray(shifted), padded, strict=True):
        crops = [source[i : i + 8, j : j + 8] for i in range(5) for j in range(5)]
        assert any(np.array_equal(image, crop) for crop in crops)
    np.testing.assert_array_equal(tasks.shift_images(IMAGES, jax.random.key(1), 0), IMAGES)


@pytest.mark.parametrize("shape", [(64, 8, 8, 1), (64, 7, 9, 3)])
def test_masks_are_whole_patches_at_about_the_ratio(shape):
    hidden = np.asarray(tasks.patch_mask(shape, jax.random.key(0), 0.25, 2))
    assert hidden.shape == (*shape[:3], 1)
    assert (hidden[:, 0::2, 0::2][:, :3, :3] == hidden[:, 1::2, 1::2][:, :3, :3]).all()
    # 64 x 16 patches or more: four standard deviations of the share are below 0.06.
    assert abs(hidden.mean() - 0.25) < 0.06


def test_reconstruction_is_scored_where_the_image_was_hidden():
    task = tasks.classify_and_reconstruct(Linear(), mask_ratio=0.5)
    batch = task.prepare(None, BATCH, {}, jax.random.key(2))
    np.testing.assert_array_equal(batch["image"], IMAGES)
    outputs = task.forward({}, batch, rng=None, train=True)
    assert not np.any(np.asarray(outputs["reconstruction"])[np.asarray(batch["hidden"])])
    errors = task.losses(outputs, batch)["reconstruction"]
    for image, hidden, error in zip(np.asarray(IMAGES), np.asarray(batch["hidden"]), np.asarray(errors), strict=True):
        np.testing.assert_allclose(error, np.mean(image[hidden] ** 2), rtol=1e-5)
    whole = task.measure(task.forward({}, BATCH, rng=None, train=False), BATCH)
    np.testing.assert_array_equal(whole["reconstruction_error"], 0.0)


def test_images_are_shown_standardised_and_bytes_are_brought_to_the_unit_interval():
    task = tasks.classify(Linear(), mean=0.5, std=0.25)
    as_bytes = jnp.array([[0, 51, 255]], jnp.uint8).reshape(1, 1, 3, 1)
    shown = task.inputs({"image": as_bytes})
    np.testing.assert_allclose(shown.ravel(), [-2.0, (0.2 - 0.5) / 0.25, 2.0], rtol=1e-6)


def test_label_smoothing_mixes_in_the_uniform_distribution():
    plain, smooth = (tasks.classify(Linear(), label_smoothing=s) for s in (0.0, 0.3))
    outputs = plain.forward({}, BATCH, rng=None, train=True)
    log_p = np.log(np.asarray(jax.nn.softmax(outputs["logits"])))
    own = -log_p[np.arange(6), np.asarray(BATCH["label"])]
    np.testing.assert_allclose(plain.losses(outputs, BATCH)["class"], own, rtol=1e-5)
    np.testing.assert_allclose(smooth.losses(outputs, BATCH)["class"], 0.7 * own - 0.3 * log_p.mean(1), rtol=1e-5)


def test_the_next_byte_is_the_target():
    class Copy:
        def apply(self, variables, tokens, *, train, rngs):
            return 100.0 * jax.nn.one_hot(tokens + 1, 256)  # predicts the successor

    task = tasks.predict_next(Copy())
    batch = {"tokens": jnp.array([[1, 2, 3, 9]])}
    outputs = task.forward({}, batch, rng=None, train=False)
    measured = task.measure(outputs, batch)
    np.testing.assert_array_equal(measured["accuracy"], [[True, True, False]])
    np.testing.assert_allclose(measured["bits_per_byte"], [[0.0, 0.0, 100.0 / np.log(2)]], atol=1e-4)


def test_a_mask_ratio_out_of_range_is_refused():
    with pytest.raises(ValueError, match="mask_ratio=1"):
        tasks.classify_and_reconstruct(Linear(), mask_ratio=1.0)


def test_a_loss_is_chosen_by_name_with_its_options_and_gets_the_counts():
    task = tasks.classify(Linear(), loss="softmax_focal_loss", loss_options={"gamma": 1.0})
    logits, labels = jnp.array([[1.0, 0.0, -1.0]]), jnp.array([1])
    expected = losses.softmax_focal_loss(logits, labels, gamma=1.0)
    np.testing.assert_array_equal(task.losses(logits, {"label": labels})["class"], expected)
    task = tasks.classify(Linear(), loss="logit_adjusted_cross_entropy", counts=(5, 3, 1))
    expected = losses.logit_adjusted_cross_entropy(logits, labels, counts=jnp.array([5, 3, 1]))
    np.testing.assert_array_equal(task.losses(logits, {"label": labels})["class"], expected)


def test_a_loss_of_the_whole_batch_stays_declared():
    assert tasks.classify(Linear(), loss="supervised_contrastive").losses.batch_dependent


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "softmax_focal_los"}, "nearest: softmax_focal_loss"),
        ({"loss": "softmax_focal_loss", "loss_options": {"gama": 1.0}}, "loss_options.gama .*nearest: gamma"),
        ({"loss": "softmax_focal_loss", "label_smoothing": 0.1}, "label_smoothing=0.1"),
    ],
)
def test_a_loss_that_is_misspelt_is_answered_with_the_right_one(options, message):
    with pytest.raises(ValueError, match=message):
        tasks.classify(Linear(), **options)
