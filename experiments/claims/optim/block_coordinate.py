"""Greedy block rules with more and with less curvature, against fixed and random orders."""

import itertools

import jax
import jax.numpy as jnp

from experiments.claims import harness, training
from steelyard import optim

SEEDS = 5
STEPS = 100
L1_STEPS = 3000
ORDER = ("gsq", "gsl", "gs", "cyclic", "random")
# Relative suboptimality below this is rounding of float64.
FLOOR = 1e-14
WHYS = {
    ("diabetes", "gsl"): "columns are standardized, so the constants of the blocks differ by less than a factor of two",
    ("diabetes", "gs"): "with 5 blocks 100 steps visit each often in any order",
    ("diabetes", "cyclic"): "with 5 blocks 100 steps visit each often in any order",
    ("scaled columns", "gs"): "the largest gradients are in the columns of large scale, where a step gains little",
}


def block_coordinate() -> tuple[harness.Outcome, ...]:
    """The more curvature a greedy rule sees, the further 100 block steps of least squares get.

    Direction: gsq below gsl below gs below cyclic below random; each of these four comparisons on each data set.
    Metric: (f - f*) / (f(0) - f*) after 100 block steps from 0, in percent; not below 1e-14.
    Budget: one configuration, nothing to tune: matrix steps for gsq, gradient steps 1/L_b for the others. Diabetes (10
    coordinates, 5 blocks of 2) and a Gaussian design of 400 x 200 with columns scaled by 10^U(-1, 1) (40 blocks of 5).
    5 seeds: partition into blocks, design and random order. In float64.
    """
    task = training.load("diabetes")
    diabetes = task.x, (task.y - task.y.mean()) / task.y.std()
    with jax.enable_x64(True):
        problems = {"diabetes": (lambda key: diabetes, 2), "scaled columns": (_scaled_columns, 5)}
        arms = {name: {rule: _arm(*problem, rule) for rule in ORDER} for name, problem in problems.items()}
    return tuple(
        harness.compare(
            arms[name][better],
            arms[name][worse],
            "suboptimality",
            better="less",
            scale="percent",
            unit="% higher suboptimality of the baseline",
            labels=(better, worse),
            part=f"{name}: {better} against {worse}",
            why=WHYS.get((name, better), ""),
        )
        for name in arms
        for better, worse in itertools.pairwise(ORDER)
    )


def block_coordinate_l1() -> harness.Outcome:
    """On an l1 problem a greedy rule settles which weights are zero in fewer block steps than a cyclic order.

    Direction: fewer steps until the set of zeros is that of all later steps.
    Metric: last of 3000 block steps at which the set of zeros changes, in percent.
    Budget: one configuration, nothing to tune: breast cancer, logistic loss + 0.01 |w|_1, 10 blocks of 3, proximal
    gradient steps 1/L_b; the greedy rule is gsl on the gradient mapping. 5 seeds (partitions into blocks).
    """
    task = training.load("breast_cancer")
    x, y = task.x, 2.0 * task.y - 1
    arms = [
        harness.tune(lambda _, key, rule=rule: _l1_run(x, y, key, rule), {}, seeds=SEEDS, metric="last", better="less")
        for rule in ("gsl", "cyclic")
    ]
    return harness.compare(
        *arms, "last", better="less", scale="percent", unit="% more steps by the baseline", labels=("gsl", "cyclic")
    )


def _scaled_columns(key):
    k1, k2, k3 = jax.random.split(jax.random.fold_in(key, 1), 3)
    x = jax.random.normal(k1, (400, 200)) * 10 ** jax.random.uniform(k2, (200,), minval=-1, maxval=1)
    return x, jax.random.normal(k3, (400,))


def _arm(data_of, size: int, rule: str) -> harness.Arm:
    def run(_, key):
        x, y = data_of(key)
        x, y = x.astype(jnp.float64), y.astype(jnp.float64)
        return _least_squares(x.T @ x / len(x), x.T @ y / len(x), key, size, rule)

    return harness.tune(run, {}, seeds=SEEDS, metric="suboptimality", better="less")


def _least_squares(hessian, linear, key, size: int, rule: str):
    blocks, lipschitz = _partition(hessian, key, size)
    order = _order(rule, len(blocks), STEPS, key)

    def step(w, index):
        grad = hessian @ w - linear
        if rule in ("gs", "gsl", "gsq"):
            given = {"gs": {}, "gsl": dict(lipschitz=lipschitz), "gsq": dict(hessian=hessian)}[rule]
            index = jnp.argmax(optim.block_scores(grad, blocks, rule=rule, **given))
        bound = dict(hessian=hessian) if rule == "gsq" else dict(lipschitz=lipschitz[index])
        return w + optim.block_direction(grad, blocks[index], **bound), None

    w, _ = jax.lax.scan(step, jnp.zeros_like(linear), order)
    best = jnp.linalg.solve(hessian, linear)
    gap = (w - best) @ hessian @ (w - best) / (best @ hessian @ best)
    return {"suboptimality": jnp.maximum(gap, FLOOR)}


def _l1_run(x, y, key, rule: str, strength: float = 0.01):
    blocks, lipschitz = _partition(x.T @ x / (4 * len(x)), key, 3)
    of_coordinate = jnp.zeros(x.shape[1]).at[blocks].set(lipschitz[:, None])
    loss = jax.grad(lambda w: jnp.mean(jax.nn.softplus(-y * (x @ w))))

    def step(w, at):
        count, index = at
        moved = w - loss(w) / of_coordinate
        moved = jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - strength / of_coordinate, 0)
        if rule == "gsl":
            mapping = of_coordinate * (w - moved)
            index = jnp.argmax(optim.block_scores(mapping, blocks, rule="gsl", lipschitz=lipschitz))
        new = w.at[blocks[index]].set(moved[blocks[index]])
        return new, jnp.where(jnp.any((new == 0) != (w == 0)), count + 1, 0)

    order = _order(rule, len(blocks), L1_STEPS, key)
    _, changes = jax.lax.scan(step, jnp.zeros(x.shape[1]), (jnp.arange(L1_STEPS), order))
    return {"last": jnp.max(changes)}


def _partition(hessian, key, size: int):
    """A random partition into blocks, and the top eigenvalue of each block of the Hessian."""
    blocks = jax.random.permutation(jax.random.fold_in(key, 0), len(hessian)).reshape(-1, size)
    parts = jax.vmap(lambda b: hessian[b][:, b])(blocks)
    return blocks, jnp.linalg.eigvalsh(parts)[:, -1]


def _order(rule: str, num_blocks: int, steps: int, key):
    if rule == "random":
        return jax.random.randint(jax.random.fold_in(key, 2), (steps,), 0, num_blocks)
    return jnp.arange(steps) % num_blocks
