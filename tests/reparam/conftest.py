"""A model to train, and cheap stand-ins: a selection takes longer to compile than to sort small arrays in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import selection

# A perceptron of the parameters {"a": {"kernel", "bias"}, "b"}, to be trained.

BATCH = {"x": jax.random.normal(jax.random.key(5), (16, 8)), "y": jnp.arange(16) % 4}


def forward(params, batch, *, rng, train):
    del rng, train
    return jax.nn.relu(batch["x"] @ params["a"]["kernel"] + params["a"]["bias"]) @ params["b"]


def losses(logits, batch):
    return {"loss": optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])}


def best(scores, kept):
    """The mask of the `kept` largest, of equals the first."""
    order = sorted(range(scores.size), key=lambda i: (-scores.flat[i], i))
    mask = np.zeros(scores.size, bool)
    mask[order[:kept]] = True
    return mask.reshape(scores.shape)


@pytest.fixture
def no_jit():
    with jax.disable_jit():
        yield


@pytest.fixture
def selection_by_sorting(monkeypatch):
    """Selections of concrete scores, by `best`."""

    def top_mask(tree, k, *, mesh=None, specs=None):
        del mesh, specs
        leaves, treedef = jax.tree.flatten(tree)
        flat = best(np.concatenate([np.ravel(x) for x in leaves]), int(k))
        parts = np.split(flat, np.cumsum([x.size for x in leaves])[:-1])
        return treedef.unflatten([jnp.asarray(part.reshape(x.shape)) for part, x in zip(parts, leaves, strict=True)])

    def keep_largest(scores, k, axis=None):
        if axis is None:
            return top_mask(scores, k)
        return jnp.asarray(np.apply_along_axis(best, axis, np.asarray(scores), int(k)))

    monkeypatch.setattr(selection, "keep_largest", keep_largest)
    monkeypatch.setattr(selection, "top_mask", top_mask)
