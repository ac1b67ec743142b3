"""A norm plus a linear function, minimised over convex combinations by walking from face to face.

The *face* of a set of entries are the combinations of them alone. On the flat space around a face the minimum has a
closed form. Where it lies outside of the face, the walk goes towards it up to the boundary, and the entry that got to
zero leaves; where it lies inside, the entry along which the function falls fastest joins. The value falls from minimum
to minimum, so no face comes twice, and the last one is the solution: entries that do not count are exactly zero. Where
the values of two minima are equal up to rounding, the slopes still tell which is nearer to the solution; an entry that
leaves while the value stands still does not come back, so that this ends too.

With the norm alone this is Wolfe's algorithm for the point of least norm in a polytope: Finding the nearest point in a
polytope (1976). Its number of faces is near the number of entries that stay, whatever the condition of the problem;
projected gradients need a number of steps that grows with the root of the condition.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from steelyard.aggregate.stacked import matvec

_EPS = float(jnp.finfo(jnp.float32).eps)


class _Walk(NamedTuple):
    """Where the walk is.

    Attributes:
      point: the current combination, zero outside of the face.
      face: which entries may differ from zero.
      barred: entries that cannot join before the value falls: they left while it stood still.
      best: minimum of the last face that had one inside, divided by its norm.
      value: the least value so far.
      is_still: whether it did not fall at the last minimum.
      count: faces seen.
      is_done: whether nothing can join.
    """

    point: Float[Array, "K"]
    face: Bool[Array, "K"]
    barred: Bool[Array, "K"]
    best: Float[Array, "K"]
    value: Float[Array, ""]
    is_still: Bool[Array, ""]
    count: Int[Array, ""]
    is_done: Bool[Array, ""]


class _Problem(NamedTuple):
    """`sqrt(y^T matrix y) + <linear, y>` over `y >= 0`, `<normal, y> = 1`."""

    matrix: Float[Array, "K K"]
    linear: Float[Array, "K"]
    normal: Float[Array, "K"]

    def norm(self, y: Float[Array, "K"]) -> Float[Array, ""]:
        return jnp.sqrt(jnp.maximum(jnp.vdot(y, matvec(self.matrix, y)), 0))

    def value(self, y: Float[Array, "K"]) -> Float[Array, ""]:
        return self.norm(y) + jnp.vdot(self.linear, y)


def unit_gram(gram: Float[Array, "K K"]) -> tuple[Float[Array, "K K"], Float[Array, "K"], Float[Array, "K"]]:
    """Cosines of the gradients, raised so that they are positive definite in float32; norms; and `1 / norm`.

    The diagonal is raised by `(K + 4) eps`, eps of float32: the entries of the Gram matrix are rounded, which K such
    errors add up to at most, and so are the divisions. A zero gradient has cosine 0 with the others and `1 / norm` of
    0. A Gram matrix that is not finite gives NaN everywhere.
    """
    count = gram.shape[0]
    norms = jnp.where(jnp.all(jnp.isfinite(gram)), jnp.sqrt(jnp.maximum(jnp.diagonal(gram), 0)), jnp.nan)
    units = jnp.where(norms == 0, 0, 1 / norms)
    cosines = gram * units[:, None] * units
    cosines = (cosines + cosines.T) / 2
    return jnp.where(jnp.eye(count, dtype=bool), 1 + (count + 4) * _EPS + 0 * norms, cosines), norms, units


def normal_of(norms: Float[Array, "K"]) -> Float[Array, "K"]:
    """The simplex `sum(w) = 1` for entries `y = w norms / min(norms)`: `<normal, y> = 1`; 0 for a norm of 0."""
    least = jnp.min(jnp.where(norms == 0, jnp.inf, norms))
    return jnp.where(norms == 0, 0, least / norms)


def minimize(
    matrix: Float[Array, "K K"], linear: Float[Array, "K"], normal: Float[Array, "K"], *, iterations: int
) -> Float[Array, "K"]:
    """The y with the least `|y| + <linear, y>`, `|y|^2 = y^T matrix y`, among `y >= 0` with `<normal, y> = 1`.

    Args:
      matrix: positive definite in float32, its diagonal near 1.
      linear: any.
      normal: in [0, 1]; where it is 0, so is y.
      iterations: the greatest number of faces to look at, each at the cost of a Cholesky decomposition; the walk ends
        by itself well before.

    Returns:
      `y / |y|`, which keeps its digits where `|y|` has lost them; NaN if an argument is.
    """
    problem = _Problem(matrix, linear, normal)

    def advance(walk):
        target, unit = _flat_minimum(problem, walk)
        is_out = walk.face & (target < 0)
        reach = jnp.where(is_out, walk.point / jnp.where(is_out, walk.point - target, 1), jnp.inf)
        inside, outside = _join(problem, walk, target, unit), _leave(walk, target, reach)
        walk = jax.tree.map(lambda a, b: jnp.where(jnp.any(is_out), b, a), inside, outside)
        return walk._replace(count=walk.count + 1)

    walk = jax.lax.while_loop(lambda w: ~w.is_done & (w.count < iterations), advance, _corner(problem))
    # Out of iterations between two minima, the point on the way is better than the last minimum.
    unit = jnp.where(walk.is_done, walk.best, walk.point / _positive(problem.norm(walk.point)))
    return jnp.where(jnp.isnan(jnp.sum(matrix) + jnp.sum(linear) + jnp.sum(normal)), jnp.nan, unit)


def _corner(problem: _Problem) -> _Walk:
    """The start: the entry that is best alone."""
    values = (jnp.sqrt(jnp.diagonal(problem.matrix)) + problem.linear) / _positive(problem.normal)
    corner = jnp.argmin(jnp.where(problem.normal == 0, jnp.inf, values))
    face = jnp.arange(len(values)) == corner
    point = jnp.where(face & (problem.normal > 0), 1 / _positive(problem.normal), 0)
    return _Walk(
        point=point,
        face=face,
        barred=jnp.zeros_like(face),
        best=point / _positive(problem.norm(point)),
        value=jnp.full((), jnp.inf, point.dtype),
        is_still=jnp.bool_(False),
        count=jnp.int32(0),
        is_done=jnp.bool_(False),
    )


def _flat_minimum(problem: _Problem, walk: _Walk) -> tuple[Float[Array, "K"], Float[Array, "K"]]:
    """The minimum y over all that is zero outside of the face, with `<normal, y> = 1` alone, and `y / |y|`.

    With `p = M^-1 q`, `r = M^-1 b` on the face, `a = <q, p>` and `s = (<q, r> / a) p - r`, along which `<q, y>` does
    not change, it is `y / |y| = sqrt(f / a) p + s` and `|y| = 1 / sqrt(a f)`, `f = 1 + <b, s>`. Where f is not positive
    the function falls without end along s; then y is a point so far along s that it lies outside of the face.
    """
    count, face = len(walk.face), walk.face
    inner = jnp.where(face[:, None] & face, problem.matrix, jnp.eye(count, dtype=problem.matrix.dtype))
    sides = jnp.where(face[:, None], jnp.stack([problem.normal, problem.linear], axis=1), 0)
    (p, r), (q, b) = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(inner), True), sides).T, sides.T
    a = _positive(jnp.vdot(q, p))
    share = jnp.vdot(q, r) / a
    along = share * p - r
    # <q, s> = 0 by the entry that counts most there: where lengths are very different, the others alone hide its sign.
    pivot = jnp.argmax(q)
    along = along.at[pivot].set((along[pivot] * q[pivot] - jnp.vdot(q, along)) / _positive(q[pivot]))
    fall = 1 + jnp.vdot(b, along)
    is_bounded = fall > count * _EPS * (1 + jnp.abs(share * jnp.vdot(b, p)) + jnp.vdot(b, r))
    fall = jnp.where(is_bounded, fall, 1)
    unit = jnp.sqrt(fall / a) * p + along
    edge = jnp.min(jnp.where(along < 0, walk.point / jnp.where(along < 0, -along, 1), jnp.inf))
    far = walk.point + jnp.maximum(2 * edge, 1) * along
    return jnp.where(is_bounded, unit / jnp.sqrt(a * fall), far), unit


def _join(problem: _Problem, walk: _Walk, target: Float[Array, "K"], unit: Float[Array, "K"]) -> _Walk:
    """Takes the face's minimum, and lets the entry with the steepest descent join."""
    value, rounding = problem.value(target), 4 * _EPS * _magnitude(problem, target)
    has_fallen = value < walk.value - rounding
    is_good = has_fallen | (value <= walk.value + rounding)
    best = jnp.where(is_good, unit, walk.best)
    barred = walk.barred & ~has_fallen
    slope, rounding = _slopes(problem, best)
    can_join = ~walk.face & ~barred & (problem.normal > 0) & (slope < -rounding)
    entry = jnp.argmin(jnp.where(can_join, slope, jnp.inf))
    return _Walk(
        point=target,
        face=walk.face.at[entry].set(walk.face[entry] | can_join[entry]),
        barred=barred,
        best=best,
        value=jnp.where(is_good, jnp.minimum(value, walk.value), walk.value),
        is_still=~has_fallen,
        count=walk.count,
        is_done=~is_good | ~can_join[entry],
    )


def _leave(walk: _Walk, target: Float[Array, "K"], reach: Float[Array, "K"]) -> _Walk:
    """Goes towards a minimum outside of the face until the first entry is zero, which leaves."""
    first = jnp.argmin(reach)
    point = jnp.maximum(walk.point + reach[first] * (target - walk.point), 0)
    is_still = walk.is_still | (reach[first] == 0)
    return walk._replace(
        point=jnp.where(walk.face, point, 0).at[first].set(0),
        face=walk.face.at[first].set(False),
        barred=walk.barred.at[first].set(walk.barred[first] | is_still),
    )


def _slopes(problem: _Problem, unit: Float[Array, "K"]) -> tuple[Float[Array, "K"], Float[Array, "K"]]:
    """How the function changes when entry k grows and the others shrink; and what of that is rounding."""
    total = _positive(jnp.vdot(problem.normal, unit))
    level = (1 + jnp.vdot(problem.linear, unit)) / total
    slope = problem.linear + matvec(problem.matrix, unit) - level * problem.normal
    terms = jnp.abs(problem.linear) + matvec(jnp.abs(problem.matrix), unit)
    return slope, 4 * _EPS * (terms + (1 + jnp.vdot(jnp.abs(problem.linear), unit)) / total * problem.normal)


def _magnitude(problem: _Problem, y: Float[Array, "K"]) -> Float[Array, ""]:
    """The size of the terms that `value` adds up, to which its rounding is relative."""
    terms = matvec(jnp.abs(problem.matrix), y) / _positive(problem.norm(y))
    return jnp.vdot(y, terms + jnp.abs(problem.linear))


def _positive(x: Array) -> Array:
    return jnp.where(x > 0, x, 1)
