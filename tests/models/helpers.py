"""Random variables for a model without compiling its `init`, a compiled `apply`, and attention in NumPy."""

import functools

import jax
import numpy as np

from steelyard import tree as tree_lib

KEY = jax.random.key(0)

# What is compiled here runs once: the time goes into compiling, not into running.
compiled = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def normal(*shape: int, seed: int = 1) -> jax.Array:
    return jax.numpy.asarray(np.random.default_rng(seed).normal(size=shape), np.float32)


def init(model, *inputs):
    """Variables of the shapes and dtypes that `model.init` gives, with random values: no bias is 0, no scale 1."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, KEY, *inputs)
    return tree_lib.map_with_path(lambda path, leaf: jax.numpy.asarray(_draw(rng, path, leaf), leaf.dtype), shapes)


def _draw(rng, path: str, leaf) -> np.ndarray:
    noise = rng.normal(size=leaf.shape)
    if path.endswith(("/scale", "/var")):
        return np.exp(0.2 * noise)
    fan_in = np.prod(leaf.shape[:-1])
    return noise / np.sqrt(fan_in) if path.endswith("/kernel") else 0.3 * noise


def apply(model, variables, *inputs, **options):
    return compiled(functools.partial(model.apply, **options))(variables, *inputs)


def assert_finite(tree) -> None:
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))


def to_float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def numpy_rotary(x, positions, base=10000.0):
    """Rotates each pair (i, i + d/2) of x [t, heads, d] by its own 2x2 matrix."""
    y, half = np.empty_like(x), x.shape[-1] // 2
    for t, position in enumerate(positions):
        for i in range(half):
            angle = position * base ** (-2 * i / x.shape[-1])
            turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
            y[t][:, [i, i + half]] = (turn @ np.stack([x[t, :, i], x[t, :, i + half]])).T
    return y


def numpy_attention(params, x, heads, *, causal=False, rotate=False):
    """One example x [t, width], head by head and query by query; all arrays are float64."""
    length, width = x.shape
    split = (length, heads, width // heads)
    query, key, value = (
        (x @ params[n]["kernel"] + params[n].get("bias", 0)).reshape(split) for n in ("query", "key", "value")
    )
    if rotate:
        query, key = numpy_rotary(query, range(length)), numpy_rotary(key, range(length))
    y = np.zeros(split)
    for head in range(heads):
        for t in range(length):
            end = t + 1 if causal else length
            scores = np.exp(key[:end, head] @ query[t, head] / np.sqrt(split[-1]))
            y[t, head] = scores @ value[:end, head] / scores.sum()
    return y.reshape(length, width) @ params["out"]["kernel"] + params["out"].get("bias", 0)
