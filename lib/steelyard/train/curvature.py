"""How curved the loss is, and how far the parameters and the loss surface have moved.

The largest eigenvalue of the Hessian bounds the learning rate (gradient descent diverges along it above 2 / largest),
and warm-up, normalization and small initial weights all lower it. All of it is found from products of the Hessian
with vectors; the Hessian itself is never formed.

A loss here is a function of the parameters alone: it is closed over one batch, and it is deterministic (no dropout;
batch normalization in training mode, with the statistics of that batch).

Sources: A Loss Curvature Perspective on Training Instability in Deep Learning (2021, Gilmer et al.); for classes:
Escaping Saddle Points for Effective Generalization on Class-Imbalanced Data (2022, Rangwani et al.); for distances:
Train longer, generalize better (2017, Hoffer et al.); for sample sizes: Unraveling the Hessian: A Key to Smooth
Convergence in Loss Function Landscapes (2024, Kiselev et al.).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float, Key

from steelyard import choices, precision

PyTree = Any
Loss = Callable[[PyTree], Float[Array, ""]]

# A new direction this much shorter than the largest diagonal entry is rounding: the Krylov space is exhausted.
_EXHAUSTED = 1e-6


class ClassCurvature(NamedTuple):
    """Curvature of each class's own loss, arrays over classes; a large ratio marks a saddle.

    Attributes:
      min: smallest Ritz value of the Hessian, not below the true smallest eigenvalue.
      max: largest Ritz value, not above the true largest eigenvalue.
      ratio: |min| / |max|; 0 where the Hessian is zero.
    """

    min: Float[Array, "classes"]
    max: Float[Array, "classes"]
    ratio: Float[Array, "classes"]


def hvp(loss: Loss, params: PyTree, tangent: PyTree) -> PyTree:
    """The Hessian of the loss times a vector, by differentiating the gradient forward.

        hvp(f, p, v) = d/dt grad f(p + t v)  at t = 0

    Costs about two gradients.

    Args:
      loss: `params -> scalar`.
      params: where the Hessian is taken; `None` leaves stay `None`.
      tangent: the vector, with the structure, shapes and dtypes of `params`.

    Returns:
      A tree like `params`.

    Source: Fast Exact Multiplication by the Hessian (1994, Pearlmutter).
    """
    return jax.jvp(jax.grad(loss), (params,), (tangent,))[1]


def lanczos(
    matvec: Callable[[Float[Array, "d"]], Float[Array, "d"]], init: Float[Array, "d"], *, num_steps: int
) -> tuple[Float[Array, "k"], Float[Array, "k-1"]]:
    """Diagonal and off-diagonal of the tridiagonal matrix of a symmetric matrix in a Krylov basis.

        q_1 = init / |init|
        w = A q_j;  alpha_j = <q_j, w>;  w <- w - Q Q' w, twice;  beta_j = |w|;  q_{j+1} = w / beta_j

    The eigenvalues of the tridiagonal matrix, the Ritz values, approach those of A from inside: the largest from
    below, the smallest from above. An eigenvalue that repeats is found once.

    If beta_j is zero, or rounding beside the largest |alpha|, there is nothing further to find from this start. The
    shapes do not depend on that (so `jit` and `vmap` work): betas from there on are 0, which splits off what follows,
    and alphas from there on repeat the first. As the first alpha is a mean of Ritz values, smallest and largest
    eigenvalue are right as they are; for all Ritz values take the leading block up to the first beta that is 0.

    Costs k products and k vectors of memory, for the reorthogonalization. Half precision is widened to float32.

    Args:
      matvec: `vector -> A vector`, linear, with A symmetric.
      init: start, not zero; a random one sees every eigenvalue.
      num_steps: largest number of products, k = min(num_steps, d).

    Returns:
      `(alphas [k], betas [k-1])`, NaN where A is not finite.

    Raises:
      ValueError: `num_steps` below 1, or `init` that is not a vector with entries.

    Source: Numerical Linear Algebra (1997, Trefethen and Bau), algorithm 36.1, with full reorthogonalization.
    """
    choices.require_within("num_steps", num_steps, "[1, inf)")
    init = jnp.asarray(init)
    if init.ndim != 1 or not init.size:
        raise ValueError(f"init has shape {init.shape}; it must be a vector with at least one entry")
    init = precision.wide(init)
    steps = min(num_steps, init.size)
    basis = jnp.zeros((steps, init.size), init.dtype).at[0].set(init / jnp.linalg.norm(init))

    def step(j, carry):
        basis, alphas, betas = carry
        w = matvec(basis[j]).astype(init.dtype)
        alphas = alphas.at[j].set(_dot(basis[j], w))
        w = _orthogonalize(_orthogonalize(w, basis), basis)
        beta = jnp.linalg.norm(w)
        # Neither 0 > 0 nor a comparison with NaN is true: both stop here. A zero row then keeps all that follows zero.
        goes_on = beta > _EXHAUSTED * jnp.max(jnp.abs(alphas))
        row = jnp.where(goes_on, w / jnp.where(goes_on, beta, 1), 0)
        return basis.at[j + 1].set(row, mode="drop"), alphas, betas.at[j].set(jnp.where(goes_on, beta, 0))

    zeros = jnp.zeros(steps, init.dtype)
    _, alphas, betas = jax.lax.fori_loop(0, steps, step, (basis, zeros, zeros))
    is_reached = jnp.concatenate([jnp.ones(1, bool), betas[:-1] > 0])
    return jnp.where(is_reached, alphas, alphas[0]), betas[:-1]


def hessian_eigenvalues(loss: Loss, params: PyTree, *, num_steps: int = 20, rng: Key[Array, ""]) -> Float[Array, "k"]:
    """Ritz values of the Hessian, ascending: good estimates of its outer eigenvalues, and fair ones of the rest.

    Half precision parameters are widened to float32 before anything is differentiated. Costs `num_steps` products of
    about two gradients each, and `num_steps` vectors of the parameters' size.

    Args:
      loss: `params -> scalar`.
      params: where the Hessian is taken; `None` leaves are ignored.
      num_steps: largest number of products with the Hessian.
      rng: key of the random start.

    Returns:
      k values, k <= min(num_steps, number of parameters): fewer where the Hessian has fewer different eigenvalues, as
      [0] for a Hessian of zeros. NaN where loss or gradient are not finite.

    Raises:
      ValueError: `num_steps` below 1, no parameters, or under `jit` and `vmap`, as k depends on the values
        (`hessian_top_eigenvalue` and `lanczos` work there).

    Source: A Loss Curvature Perspective on Training Instability in Deep Learning (2021, Gilmer et al.).
    """
    alphas, betas = _hessian_lanczos(loss, params, num_steps, rng)
    if isinstance(alphas, jax.core.Tracer):
        raise ValueError(
            "hessian_eigenvalues has a result whose length depends on values, which jit and vmap cannot have: "
            "use hessian_top_eigenvalue, or lanczos"
        )
    count = 1 + int(jnp.sum(betas > 0))
    return _tridiagonal_eigenvalues(alphas[:count], betas[: count - 1])


def hessian_top_eigenvalue(loss: Loss, params: PyTree, *, num_steps: int = 20, rng: Key[Array, ""]) -> Float[Array, ""]:
    """The last of `hessian_eigenvalues`, never above the true largest eigenvalue; it runs under `jit` and `vmap` too.

    Args:
      loss, params, num_steps, rng: as in `hessian_eigenvalues`.

    Raises:
      ValueError: `num_steps` below 1, or no parameters.
    """
    return _tridiagonal_eigenvalues(*_hessian_lanczos(loss, params, num_steps, rng))[-1]


def class_curvature(
    loss_fn: Callable[[PyTree, PyTree], Float[Array, ""]],
    params: PyTree,
    batches_by_class: Sequence[PyTree],
    *,
    num_steps: int = 20,
    rng: Key[Array, ""],
) -> ClassCurvature:
    """Smallest and largest Hessian eigenvalue of each class's own mean loss, and their ratio.

    A class whose ratio is large lies at a saddle: it could still fall along the direction of negative curvature.
    Costs `num_steps` products with the Hessian a class; batches of the same shapes are compiled once.

    Args:
      loss_fn: `(params, batch) -> mean loss`.
      params: where the Hessians are taken.
      batches_by_class: one batch for each class, of any sizes.
      num_steps: products with each Hessian.
      rng: key of the random starts.

    Returns:
      Arrays over classes.

    Raises:
      ValueError: no class, `num_steps` below 1, or no parameters.

    Source: Escaping Saddle Points for Effective Generalization on Class-Imbalanced Data (2022, Rangwani et al.).
    """
    if not len(batches_by_class):
        raise ValueError("batches_by_class is empty; it must hold one batch for each class")

    @jax.jit
    def extremes(params, batch, key):
        ritz = _tridiagonal_eigenvalues(*_hessian_lanczos(lambda p: loss_fn(p, batch), params, num_steps, key))
        return ritz[0], ritz[-1]

    pairs = [extremes(params, batch, jax.random.fold_in(rng, c)) for c, batch in enumerate(batches_by_class)]
    low, high = (jnp.stack(column) for column in zip(*pairs, strict=True))
    return ClassCurvature(low, high, jnp.where(low == 0, 0, jnp.abs(low) / jnp.abs(high)))


def distance_from_init(params: PyTree, init: PyTree) -> Float[Array, ""]:
    """The distance |params - init| over the whole tree, in float32 at least.

    At a high learning rate it grows like the logarithm of the number of updates.

    Args:
      params: parameters; `None` leaves are ignored.
      init: earlier parameters of the same structure and shapes.

    Source: Train longer, generalize better (2017, Hoffer et al.), section 3.
    """
    return optax.tree.norm(jax.tree.map(lambda p, q: precision.wide(p) - precision.wide(q), params, init))


def landscape_difference(losses: Float[Array, "n points"]) -> Float[Array, "n-1"]:
    """How much the mean loss surface moves when one more example is added.

        L_k(w) = mean of the first k losses at w
        output[k-1] = mean over w of (L_{k+1}(w) - L_k(w))^2 = mean over w of ((l_{k+1}(w) - L_k(w)) / (k+1))^2

    It falls like 1 / k^2, so k^2 times it levels off, at a height that tells how much examples differ. The order of
    the rows matters: average over permutations. The points are w* + r d with random unit directions d, or directions
    in the span of the top Hessian eigenvectors.

    The differences are taken from the first row, and summed in blocks: equal rows give 0 and not rounding, and the
    error grows with the logarithm of n. Costs one pass over the losses; these cost n * points forward passes.

    Args:
      losses: loss of each example (row) at each point of parameter space (column).

    Returns:
      One squared difference for each k = 1 ... n - 1.

    Raises:
      ValueError: fewer than two examples, no points, or not a matrix.

    Source: Unraveling the Hessian (2024, Kiselev et al.).
    """
    losses = jnp.asarray(losses)
    if losses.ndim != 2 or losses.shape[0] < 2 or not losses.shape[1]:
        raise ValueError(f"losses has shape {losses.shape}; it must be [examples, points] with at least [2, 1]")
    losses = precision.wide(losses)
    counts = jnp.arange(1, losses.shape[0], dtype=losses.dtype)[:, None]
    offsets = losses - losses[0]
    means = jnp.cumsum(offsets[:-1], axis=0) / counts
    return jnp.mean(jnp.square((offsets[1:] - means) / (counts + 1)), axis=1)


def _hessian_lanczos(loss: Loss, params: PyTree, num_steps: int, rng) -> tuple[Array, Array]:
    params = jax.tree.map(precision.wide, params)
    flat, unravel = ravel_pytree(params)
    if not flat.size:
        raise ValueError("params has no entries: there is no Hessian")

    # Compiled as a whole, where the caller has not: op by op this would take many times as long.
    @jax.jit
    def run(params, rng):
        start = jax.random.normal(rng, flat.shape, flat.dtype)
        return lanczos(lambda v: ravel_pytree(hvp(loss, params, unravel(v)))[0], start, num_steps=num_steps)

    return run(params, rng)


@jax.jit
def _tridiagonal_eigenvalues(alphas: Float[Array, "k"], betas: Float[Array, "k-1"]) -> Float[Array, "k"]:
    matrix = jnp.diag(alphas) + jnp.diag(betas, 1) + jnp.diag(betas, -1)
    # What a solver makes of an infinite entry differs between machines.
    return jnp.where(jnp.all(jnp.isfinite(matrix)), jnp.linalg.eigvalsh(matrix), jnp.nan)


def _orthogonalize(w: Float[Array, "d"], basis: Float[Array, "k d"]) -> Float[Array, "d"]:
    """Removes the parts of w along the rows; rows that are zero remove nothing."""
    return w - _dot(_dot(basis, w), basis)


def _dot(a: Array, b: Array) -> Array:
    # The default of some accelerators is to multiply in bfloat16, whose basis would not be orthogonal.
    return jnp.dot(a, b, precision=jax.lax.Precision.HIGHEST)
