"""Burgers' equation by a small network: residual, initial and boundary losses made into one direction."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims import harness, training
from steelyard import aggregate

SEEDS = 5
STEPS, BATCH = 2000, 125
INTERIOR, INITIAL, BOUNDARY = 1000, 64, 32
WIDTHS = (2, 20, 20, 20, 1)
VISCOSITY = 0.01 / np.pi
RATES = {"rate": (1e-3, 3e-3, 1e-2)}


def conflict_free() -> tuple[harness.Outcome, ...]:
    """A network for Burgers' equation errs less if its three gradients are made conflict-free than if they are added.

    Direction: error down; no step's direction conflicts with a gradient.
    Metric: relative L2 error of u on a grid of 128 x 33 points after the last step, against the exact solution of Cole
    and Hopf; smallest cosine of the direction, before Adam, with any of the three gradients over all steps and seeds.
    Budget: u_t + u u_x = (0.01 / pi) u_xx on x in [-1, 1], t in [0, 1], u(x, 0) = -sin(pi x), u(-1, t) = u(1, t) = 0;
    tanh perceptron 2-20-20-20-1; mean squares of the residual (1000 collocation points, a new 125 of them each step,
    because all of them would take minutes), of the initial values (64) and of the boundary (64); 2000 Adam steps;
    rates 1e-3, 3e-3, 1e-2 on each side (3 configurations); 5 seeds.
    """
    both, added = _simultaneous("conflict-free"), _simultaneous("sum")
    labels = ("conflict-free", "sum")
    options = dict(labels=labels, unit="% more error of the sum", part="error")
    smallest = float(both.metrics["cosine"].min())
    return (
        harness.compare(both, added, "error", better="less", scale="percent", **options),
        harness.exact(
            smallest, 0.0, better="more", unit="in the cosine", labels=("smallest cosine", "zero"), part="no conflict"
        ),
    )


def momentum_conflict_free() -> harness.Outcome:
    """With one loss back-propagated a step and as many backward passes in all, the error is not larger.

    Direction: error not more than 10% larger than with all three gradients a step.
    Metric: relative L2 error of u, as for `conflict_free`.
    Budget: the same problem, network, points and rates (3 configurations each); 6000 steps of one loss in turn, against
    2000 Adam steps on the conflict-free direction of three; 5 seeds.
    """
    in_turn = harness.tune(_in_turn, RATES, seeds=SEEDS, metric="error", better="less")
    return harness.compare(
        in_turn,
        _simultaneous("conflict-free"),
        "error",
        better="less",
        scale="percent",
        margin=-10,
        unit="% more error with three a step",
        labels=("one a step", "three a step"),
        why="the mean error is lower, but with fresh collocation points for stale momenta it differs between the seeds "
        "four times as much as with three gradients a step, too much for five of them",
    )


RULES = {"conflict-free": aggregate.conflict_free, "sum": lambda: aggregate.static([1.0, 1.0, 1.0])}


@functools.cache
def _simultaneous(name: str) -> harness.Arm:
    """All gradients at every step: kept, because both claims need the same arm."""
    run = functools.partial(_all_at_once, RULES[name]())
    return harness.tune(run, RATES, seeds=SEEDS, metric="error", better="less")


def _all_at_once(rule, config, key):
    losses, params, batches = _problem(key)
    adam = optax.adam(config["rate"])

    def step(carry, points):
        params, state = carry
        rows = jax.tree.map(lambda *grads: jnp.stack(grads), *[jax.grad(loss)(params, points) for loss in losses])
        direction, _ = rule.update(rows, rule.init(params))
        updates, state = adam.update(direction, state)
        return (optax.apply_updates(params, updates), state), _smallest_cosine(direction, rows)

    (params, _), cosines = jax.lax.scan(step, (params, adam.init(params)), batches)
    return {"error": _error(params), "cosine": jnp.min(cosines)}


def _in_turn(config, key):
    losses, params, batches = _problem(key)
    tx = optax.chain(aggregate.momentum_conflict_free(len(losses)), optax.scale_by_learning_rate(config["rate"]))
    value_and_grad = aggregate.value_and_grad_cyclic(losses, tx)

    def step(carry, count):
        params, state = carry
        _, updates, state = value_and_grad(params, state, count, batches[count // len(losses)])
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(len(losses) * STEPS))
    return {"error": _error(params)}


def _smallest_cosine(direction, rows):
    gram = aggregate.gram(jax.tree.map(lambda d, g: jnp.concatenate([d[None], g]), direction, rows))
    norms = jnp.sqrt(jnp.diagonal(gram))
    return jnp.min(gram[0, 1:] / (norms[0] * norms[1:]))


def _problem(key) -> tuple[list[Callable], list, jax.Array]:
    """The three losses `(params, points) -> scalar`, a start, and each step's points [x, t] of the residual."""
    start, place, order = jax.random.split(key, 3)
    points = jax.random.uniform(place, (INTERIOR, 2), minval=jnp.array([-1.0, 0.0]), maxval=1.0)
    x, t = jnp.linspace(-1, 1, INITIAL), jnp.linspace(0, 1, BOUNDARY)
    ends = jnp.stack([jnp.repeat(jnp.array([-1.0, 1.0]), BOUNDARY), jnp.tile(t, 2)], -1)

    def residual(params, points):
        return jnp.mean(_residual(params, points[:, 0], points[:, 1]) ** 2)

    def initial(params, points):
        del points
        return jnp.mean((_network(params, x, jnp.zeros_like(x)) + jnp.sin(jnp.pi * x)) ** 2)

    def boundary(params, points):
        del points
        return jnp.mean(_network(params, ends[:, 0], ends[:, 1]) ** 2)

    batches = points[training.minibatches(order, INTERIOR, BATCH, STEPS)]
    return [residual, initial, boundary], training.mlp_init(start, WIDTHS, gain=1.0), batches


def _network(params, x, t):
    return training.mlp(params, jnp.stack([x, t], -1), activation=jnp.tanh)[..., 0]


def _residual(params, x, t):
    """`u_t + u u_x - viscosity u_xx`, with the derivatives pushed forward through the network."""
    one = jnp.ones_like(x)
    (u, u_x), (_, u_xx) = jax.jvp(lambda x: jax.jvp(lambda x: _network(params, x, t), (x,), (one,)), (x,), (one,))
    _, u_t = jax.jvp(lambda t: _network(params, x, t), (t,), (one,))
    return u_t + u * u_x - VISCOSITY * u_xx


def _error(params):
    x, t, u = _exact()
    return jnp.linalg.norm(_network(params, x, t) - u) / jnp.linalg.norm(u)


@functools.cache
def _exact() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points and the solution there.

    Cole and Hopf: u is the mean of `-sin(pi y)` over y = x - s, s normal of variance 2 viscosity t, with the weights
    `exp(-cos(pi y) / (2 pi viscosity))`; the mean is taken by Gauss-Hermite quadrature in float64.
    """
    x, t = (a.ravel() for a in np.meshgrid(np.linspace(-1, 1, 128), np.linspace(0, 1, 33)))
    nodes, weights = np.polynomial.hermite.hermgauss(100)
    y = x[:, None] - nodes * np.sqrt(4 * VISCOSITY * t)[:, None]
    exponent = -np.cos(np.pi * y) / (2 * np.pi * VISCOSITY)
    density = weights * np.exp(exponent - exponent.max(axis=1, keepdims=True))
    u = -(density * np.sin(np.pi * y)).sum(1) / density.sum(1)
    return tuple(a.astype(np.float32) for a in (x, t, u))
