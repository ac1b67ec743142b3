"""Dense, Conv and Embed layers whose weights may be stored in any format.

The layers name their parameters `kernel`, `bias` and `embedding`, as Flax does, and multiply through
`steelyard.formats`. A model is initialised with dense weights; afterwards any kernel or embedding may be replaced by a
weight node of `steelyard.formats` (quantized, N:M sparse, low rank) and the same `model.apply` runs on it.

Dense and Conv sow their input as `inputs` in the collection `intermediates`: `apply(..., mutable=["intermediates"])`
collects what each kernel multiplies, and without that argument it costs nothing.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from steelyard import formats

DType = Any
Initializer = Callable[..., Array]


def weight(module: nn.Module, name: str, init: Initializer, shape: Sequence[int], dtype: DType = jnp.float32) -> Any:
    """The module's parameter `name`: the stored value as it is, or a new one from `init(rng, shape, dtype)`.

    `flax.linen.Module.param` compares shapes leaf by leaf, which a packed weight cannot pass; here the logical `shape`
    of the stored value is compared, which an array and a weight node both have.

    Args:
      module: the module that owns the parameter; call this from its `setup` or compact method.
      name: name of the parameter in the collection `params`.
      init: initializer `(rng, shape, dtype) -> array`.
      shape: logical shape of the parameter.
      dtype: dtype of a new parameter; a stored value keeps its own.

    Returns:
      An array or a weight node.

    Raises:
      ValueError: the stored value has another shape.
    """
    shape = tuple(shape)
    if not module.has_variable("params", name):
        return module.param(name, init, shape, dtype)
    stored = module.variable("params", name).value
    if tuple(stored.shape) != shape:
        path = "/".join((*module.path, name))
        raise ValueError(f"the stored parameter {path} has shape {tuple(stored.shape)}, but the layer needs {shape}.")
    return stored


def to_dtype(value: Any, dtype: DType | None) -> Any:
    """Casts an array; weight nodes and `dtype=None` leave the value as it is."""
    return value if dtype is None or formats.is_weight(value) else value.astype(dtype)


def require_positive(**values: int) -> None:
    """Raises a `ValueError` that names the first argument below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")


def per_layer(name: str, value: int | Sequence[int], count: int) -> tuple[int, ...]:
    """A width for each of `count` layers: the one number for all, or the given ones.

    Raises:
      ValueError: a number below 1, or another number of them.
    """
    widths = tuple(value) if isinstance(value, Sequence) else (value,) * count
    if len(widths) != count:
        raise ValueError(f"{name} must be one number, or {count}, one for each layer; got {value!r}.")
    if min(widths) < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}.")
    return widths


def require_fraction(**values: float) -> None:
    """Raises a `ValueError` that names the first argument outside [0, 1)."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value}.")


class Dense(nn.Module):
    """y = x @ kernel + bias over the last axis.

    Parameters: `kernel` [in, features], `bias` [features].

    Attributes:
      features: number of output features.
      use_bias: whether a bias is added.
      dtype: dtype of the computation; `None` takes the result type of input and parameters.
      param_dtype: dtype of new parameters.
      kernel_init: initializer of the kernel.
      bias_init: initializer of the bias.
    """

    features: int
    use_bias: bool = True
    dtype: DType | None = None
    param_dtype: DType = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Shaped[Array, "*batch d_in"]) -> Float[Array, "*batch d_out"]:
        """Maps [..., in] to [..., features]."""
        self.sow("intermediates", "inputs", x)
        kernel = weight(self, "kernel", self.kernel_init, (x.shape[-1], self.features), self.param_dtype)
        y = formats.matmul(to_dtype(x, self.dtype), to_dtype(kernel, self.dtype))
        return _add_bias(self, y)


class Conv(nn.Module):
    """A 2-D convolution (cross-correlation) over images with channels last, plus a bias.

    Parameters: `kernel` [height, width, in, features], `bias` [features].

    Attributes:
      features: number of output channels.
      kernel_size: height and width of the window.
      strides: steps of the window, along height and width.
      padding: `"SAME"`, `"VALID"`, or two pairs of pixels (before, after).
      use_bias, dtype, param_dtype, kernel_init, bias_init: as in `Dense`.
    """

    features: int
    kernel_size: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    padding: str | Sequence[tuple[int, int]] = "SAME"
    use_bias: bool = True
    dtype: DType | None = None
    param_dtype: DType = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    bias_init: Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Shaped[Array, "batch h_in w_in c_in"]) -> Float[Array, "batch h_out w_out c_out"]:
        """Maps images [B, H, W, in] to [B, H', W', features]."""
        self.sow("intermediates", "inputs", x)
        shape = (*self.kernel_size, x.shape[-1], self.features)
        kernel = weight(self, "kernel", self.kernel_init, shape, self.param_dtype)
        x, kernel = to_dtype(x, self.dtype), to_dtype(kernel, self.dtype)
        return _add_bias(self, formats.conv(x, kernel, strides=self.strides, padding=self.padding))


def _add_bias(layer: Dense | Conv, y: Array) -> Array:
    y = to_dtype(y, layer.dtype)
    if not layer.use_bias:
        return y
    return y + to_dtype(weight(layer, "bias", layer.bias_init, (layer.features,), layer.param_dtype), y.dtype)


class Embed(nn.Module):
    """Rows of a table, looked up by integer.

    Parameters: `embedding` [num_embeddings, features].

    Attributes:
      num_embeddings: number of rows.
      features: length of a row.
      dtype: dtype of the result; `None` keeps that of the table.
      param_dtype: dtype of a new table.
      embedding_init: initializer of the table; the default has standard deviation 1 / sqrt(features).
    """

    num_embeddings: int
    features: int
    dtype: DType | None = None
    param_dtype: DType = jnp.float32
    embedding_init: Initializer = nn.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0)

    @nn.compact
    def __call__(self, indices: Int[Array, "*batch"]) -> Float[Array, "*batch d"]:
        """Maps integers [...] to rows [..., features]."""
        shape = (self.num_embeddings, self.features)
        table = weight(self, "embedding", self.embedding_init, shape, self.param_dtype)
        return to_dtype(formats.take(table, indices), self.dtype)

    def attend(self, x: Float[Array, "*batch d"]) -> Float[Array, "*batch v"]:
        """Inner products with every row, x @ embedding.T: the output layer of a model with tied embeddings.

        Call it after the table exists, that is, after `__call__`.
        """
        table = formats.dense(nn.unbox(self.get_variable("params", "embedding")))
        return formats.matmul(x, table.T.astype(x.dtype))
