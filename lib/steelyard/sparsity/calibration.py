"""What kernels multiply, gathered in one pass over calibration data, in memory that does not grow with the data.

A kernel [in, out] sees *rows* of `in` features: examples, tokens, or the patches of a convolution. Sums over rows are
all that is kept, in float32:

    squares_i = sum_rows x_i^2,  gram = sum_rows x x^T,  products = sum_batches |w g|,  grad_squares = sum_batches g^2,

with g the gradient of a batch. `scores.wanda` takes `input_norm` of them, `scores.obs` (and second-order quantization)
takes `hessian`; products and grad_squares divided by `batches` are a saliency and a Fisher diagonal.

Where the batch is cut over devices, the sums are too: each device adds up its rows, and an all-reduce of the size of
the statistics joins them. No activations cross the mesh.

*Inputs* are a tree that holds under `path/inputs` what the kernels of the module `path` multiply: one array, or a tuple
with one for each call. The models of `steelyard.models` sow such a tree:

    def inputs_of(params, batch):
        _, sown = model.apply({"params": params}, batch, mutable=["intermediates"])
        return sown["intermediates"]

    statistics = calibration.collect(inputs_of, params, batches)
    score = calibration.map_kernels(scores.wanda, params, calibration.input_norm(statistics))
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from steelyard import precision
from steelyard import tree as tree_lib
from steelyard.sparsity import inputs as inputs_lib
from steelyard.sparsity import moments, prunable
from steelyard.sparsity.moments import Window

PyTree = Any
Shape = tuple[int, ...]

__all__ = ["Statistics", "Window", "collect", "hessian", "init", "input_norm", "map_kernels", "update"]


class Statistics(NamedTuple):
    """Running sums in float32; trees like the parameters, with `None` for leaves that have none.

    Attributes:
      batches: how many updates were made.
      rows: of each kernel, how many rows it has multiplied; one layer of a stack for a stacked kernel.
      squares: sums of squared features, in the shape of the kernel without its last axis.
      gram: X^T X, [n, n], n the product of the kernel's axes but the last (`[layers, n, n]` for a stack); or `None`.
      products: sums of |w g|, like the parameters; or `None`.
      grad_squares: sums of g^2, like the parameters; or `None`.
    """

    batches: Float32[Array, ""]
    rows: PyTree
    squares: PyTree
    gram: PyTree | None
    products: PyTree | None
    grad_squares: PyTree | None


def init(
    params: PyTree,
    inputs: PyTree,
    *,
    where: tree_lib.Where | None = None,
    hessian: bool | tree_lib.Where = False,
    products: bool = False,
    grad_squares: bool = False,
    windows: Mapping[str, Window] | None = None,
) -> Statistics:
    """Statistics of no data.

    Args:
      params: arrays or shapes.
      inputs: of a batch, arrays or shapes (`jax.eval_shape`): which kernels have an input.
      where: the leaves that matter: a regular expression for the whole path, a function of path and leaf, or `None`
        for those with two axes or more.
      hessian: whether to keep `gram`: for all kernels, or for those that a regular expression or function selects.
      products, grad_squares: whether to keep these sums.
      windows: from a regular expression for the path of a convolution's kernel to its window. Other kernels with more
        than two axes are stacks, whose inputs have the same leading axes.

    Raises:
      ValueError: no selected leaf has an input, an input does not fit its kernel, or a pattern matches nothing.
    """
    chosen = prunable.selected(params, where)
    shapes = inputs_lib.kernels(params, chosen, inputs)
    ways = inputs_lib.windows_of(params, windows)
    for path, x in inputs_lib.pairs(shapes, inputs):
        moments.check(path, shapes[path], jnp.shape(x), ways.get(path))
    grams = {}
    if hessian is not False:
        wanted = chosen if hessian is True else tree_lib.select(params, hessian, name="hessian")
        paths = [path for path in inputs_lib.selected_paths(wanted) if path in shapes]
        grams = {path: moments.gram_shape(shapes[path], ways.get(path)) for path in paths}
    use = set(inputs_lib.selected_paths(chosen))
    like = {path: jnp.shape(w) for path, w in tree_lib.flatten(params) if path in use}
    return Statistics(
        jnp.zeros((), jnp.float32),
        inputs_lib.zeros(params, dict.fromkeys(shapes, ())),
        inputs_lib.zeros(params, shapes),
        inputs_lib.zeros(params, grams) if grams else None,
        inputs_lib.zeros(params, like) if products else None,
        inputs_lib.zeros(params, like) if grad_squares else None,
    )


def update(
    statistics: Statistics,
    inputs: PyTree,
    *,
    params: PyTree | None = None,
    grads: PyTree | None = None,
    windows: Mapping[str, Window] | None = None,
) -> Statistics:
    """Adds a batch. Pure, so that it can be jitted, scanned and vmapped; jit it with its first argument donated.

    Args:
      statistics: from `init`.
      inputs: of the batch. Rows of zeros, such as padding, add to `rows` alone.
      params, grads: needed for `products` and `grad_squares` (this one without params): the gradient of the batch.
      windows: as for `init`.

    Cost: for a kernel [in, out] and a row, in for `squares` and in^2 for `gram`; a convolution's `gram` makes its
    patches, height x width times its input, its `squares` those of one image.

    Raises:
      ValueError: what the statistics need is missing or does not fit.
    """
    squares, grams = inputs_lib.by_path(statistics.squares), inputs_lib.by_path(statistics.gram)
    rows, ways = inputs_lib.by_path(statistics.rows), inputs_lib.windows_of(statistics.squares, windows)
    for path, x in inputs_lib.pairs(squares, inputs):
        shape, window = squares[path].shape, ways.get(path)
        moments.check(path, shape, jnp.shape(x), window)
        rows[path] += moments.rows(shape, x, window)
        squares[path] += moments.squares(shape, x, window)
        if path in grams:
            grams[path] += moments.gram(shape, x, window)
    return Statistics(
        statistics.batches + 1,
        inputs_lib.placed(statistics.rows, rows),
        inputs_lib.placed(statistics.squares, squares),
        inputs_lib.placed(statistics.gram, grams),
        _accumulated("products", statistics.products, lambda w, g: jnp.abs(w * g), params=params, grads=grads),
        _accumulated("grad_squares", statistics.grad_squares, lambda g: g * g, grads=grads),
    )


def collect(
    inputs_fn: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    loss_fn: Callable[[PyTree, PyTree], Float[Array, ""]] | None = None,
    windows: Mapping[str, Window] | None = None,
    **options: Any,
) -> Statistics:
    """The statistics of some batches, one after the other, each in one compiled step.

    Args:
      inputs_fn: `(params, batch) -> inputs`; what the model gives besides is not computed.
      params: the parameters, placed in any way.
      batches: of one shape, or each other shape is compiled anew; placed as the model wants them.
      loss_fn: `(params, batch) -> scalar`, where gradients are asked for.
      windows, **options: as for `init`.

    Cost: a forward pass for each batch, and with `loss_fn` a backward pass, beside that of `update`.

    Raises:
      ValueError: there are no batches; or see `init` and `update`.
    """

    def start(params, batch):
        return init(params, jax.eval_shape(inputs_fn, params, batch), windows=windows, **options)

    def step(statistics, params, batch):
        grads = None if loss_fn is None else jax.grad(loss_fn)(params, batch)
        return update(statistics, inputs_fn(params, batch), params=params, grads=grads, windows=windows)

    statistics = None
    for batch in batches:
        if statistics is None:
            places = _places(jax.eval_shape(start, params, batch), params, batch)
            statistics = jax.jit(start, out_shardings=places)(params, batch)
            compiled = jax.jit(step, donate_argnums=0, out_shardings=places)
        statistics = compiled(statistics, params, batch)
    if statistics is None:
        raise ValueError("batches is empty: at least one is needed")
    return statistics


def input_norm(statistics: Statistics) -> PyTree:
    """The root mean square of each input feature, sqrt(squares / rows): a tree for `scores.wanda`."""
    return jax.tree.map(lambda s, n: jnp.sqrt(s / jnp.maximum(n, 1)), statistics.squares, statistics.rows)


def hessian(statistics: Statistics) -> PyTree:
    """2 / rows X^T X, the Hessian of each output unit's mean squared error: a tree for `scores.obs`.

    Raises:
      ValueError: the statistics have no `gram`.
    """
    if statistics.gram is None:
        raise ValueError("the statistics have no gram: make them with hessian=True, or with a pattern of paths")
    rows = inputs_lib.by_path(statistics.rows)
    return tree_lib.map_with_path(lambda path, g: 2 / jnp.maximum(rows[path], 1) * g, statistics.gram)


def map_kernels(fn: Callable[..., Any], params: PyTree, *trees: PyTree) -> PyTree:
    """`fn` of each leaf and what the other trees hold in its place; `None` where one of them holds `None`.

    >>> map_kernels(lambda w, norm: w * norm, {"kernel": 2, "bias": 1}, {"kernel": 3, "bias": None})
    {'bias': None, 'kernel': 6}
    """
    tables = [inputs_lib.by_path(tree) for tree in trees]

    def leaf(path, w):
        return fn(w, *(table[path] for table in tables)) if all(path in table for table in tables) else None

    return tree_lib.map_with_path(leaf, params)


def _places(statistics: Statistics, params: PyTree, batch: PyTree) -> PyTree | None:
    """Sums of gradients where their parameters are, the others on all devices; `None` where there is no mesh.

    Said before the first step, so that the second one finds the sums where the first one did and runs its program.
    """
    known = [getattr(x, "sharding", None) for x in jax.tree.leaves((params, batch))]
    mesh = next((place.mesh for place in known if isinstance(place, jax.NamedSharding)), None)
    if mesh is None:
        return None
    everywhere = jax.NamedSharding(mesh, jax.P())
    own = [getattr(w, "sharding", None) for w in jax.tree.leaves(params)]
    own = [place if isinstance(place, jax.NamedSharding) else everywhere for place in own]
    table = dict(zip(tree_lib.paths(params), own, strict=True))
    like = [inputs_lib.placed(sums, table) for sums in (statistics.products, statistics.grad_squares)]
    return jax.tree.map(lambda _: everywhere, statistics)._replace(products=like[0], grad_squares=like[1])


def _accumulated(name: str, sums: PyTree | None, fn: Callable[..., Array], **trees: PyTree | None) -> PyTree | None:
    """The sums, with `fn` of the leaves of the trees in their places added."""
    if sums is None:
        return None
    if missing := [key for key, tree in trees.items() if tree is None]:
        raise ValueError(f"{name} needs {' and '.join(missing)}")
    tables = [inputs_lib.by_path(tree) for tree in trees.values()]

    def leaf(path, total):
        return total + fn(*(precision.wide(table[path]) for table in tables)).astype(jnp.float32)

    return tree_lib.map_with_path(leaf, sums)
