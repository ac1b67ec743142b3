"""Two quadratics in the plane: where the shortest convex combination of their gradients leads."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims import harness
from steelyard import aggregate

STEPS = 1000
RATE = 0.1
LIMIT = 1e-3
CENTERS = jnp.array([[1.0, 0.0], [-1.0, 0.5]])
CURVATURES = jnp.array([[[4.0, 1.0], [1.0, 1.0]], [[1.0, -0.5], [-0.5, 2.0]]])


def mgda() -> tuple[harness.Outcome, ...]:
    """On two quadratics MGDA reaches the Pareto set from any start, and on the way neither of them rises.

    Direction: distance from the Pareto set below 1e-3; no rise, where gradient descent on the mean has some.
    Metric: greatest distance after the last step, over the starts, from the curve of the minima of all weighted sums
    (20001 weights); greatest rise of a quadratic in a step, over steps and starts.
    Budget: 15 x 15 starts on [-4, 4]^2, 1000 steps of 0.1 on both sides; centres (1, 0) and (-1, 0.5), curvatures
    [[4, 1], [1, 1]] and [[1, -0.5], [-0.5, 2]]. Deterministic, one configuration a side.
    """
    starts = jnp.stack(jnp.meshgrid(*[jnp.linspace(-4, 4, 15)] * 2), axis=-1).reshape(-1, 2)
    ends, rises = jax.jit(jax.vmap(lambda start: _descend(aggregate.mgda(), start)))(starts)
    _, rises_of_mean = jax.jit(jax.vmap(lambda start: _descend(aggregate.mean(), start)))(starts)
    distances = np.linalg.norm(np.asarray(ends, np.float64)[:, None] - _pareto_set(), axis=2).min(axis=1)
    return (
        harness.exact(
            distances.max(),
            LIMIT,
            better="less",
            unit="below the limit",
            labels=("greatest distance", "limit"),
            part="distance",
        ),
        harness.exact(
            float(rises.max()),
            float(rises_of_mean.max()),
            better="less",
            unit="in the greatest rise of a loss in a step",
            labels=("MGDA", "mean"),
            part="rise",
        ),
    )


def _losses(p):
    shifts = p - CENTERS
    return jnp.einsum("ki,kij,kj->k", shifts, CURVATURES, shifts) / 2


def _descend(rule, start):
    """The last point, and the greatest rise of a loss in a step."""
    value_and_grad = aggregate.value_and_grad(_losses, rule, mode="stacked")

    def step(carry, _):
        p, state = carry
        losses, update, state = value_and_grad(p, state)
        moved = p - RATE * update
        return (moved, state), jnp.max(_losses(moved) - losses)

    (end, _), rises = jax.lax.scan(step, (start, optax.EmptyState()), length=STEPS)
    return end, jnp.max(rises)


def _pareto_set() -> np.ndarray:
    """The minima of `t f_1 + (1 - t) f_2`."""
    curvatures, centers = np.asarray(CURVATURES, np.float64), np.asarray(CENTERS, np.float64)
    pulls = np.einsum("kij,kj->ki", curvatures, centers)
    weights = np.stack([np.linspace(0, 1, 20001), np.linspace(1, 0, 20001)], axis=1)
    sums = np.einsum("nk,kij->nij", weights, curvatures)
    return np.linalg.solve(sums, (weights @ pulls)[..., None])[..., 0]
