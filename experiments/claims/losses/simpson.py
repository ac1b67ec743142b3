"""Simpson's bias: the Dice loss of small groups, of larger ones, and of a whole batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.claims import harness, training
from steelyard import losses

SEEDS = 5
# Positives and negatives of each part: 5% positives.
SIZES = {"train": (51, 973), "validation": (16, 314), "test": (17, 313)}
STEPS, BATCH = 400, 512
GROUPS = (8, 64, 512)
GRID = {"rate": (0.01, 0.03, 0.1)}
WHY_ENOUGH = (
    "a group of 64 has three positives on average, and its Dice loss is within a hundredth of that of the whole"
)
WHY_EQUAL = "a linear model finds one digit among the others nearly as well by either loss"
_dice = functools.partial(losses.soft_dice_loss, axis=0)


def simpson() -> tuple[harness.Outcome, ...]:
    """A mean of the Dice losses of small groups is biased: the larger the groups, the better the F1 of the whole set.

    Direction: test F1 up from groups of 8 to 64 and from 64 to 512; size of the gap between the Dice loss of the
    training set and the mean of those of its groups down, likewise; F1 with groups of 512 above cross-entropy's.
    Metric: F1 at a probability of 0.5, and |simpson_gap|, the groups being those of the trained side; means over ten
    tasks, one digit against all others.
    Budget: 5% positives: 1024 images to train, 330 to validate, 330 to test; a linear model from zero, 400 Adam steps
    of 512 images, whose loss is the mean of the Dice losses (smooth 1) of groups of 8, 64 or 512 of them, so that
    nothing but the grouping differs; rates 0.01, 0.03, 0.1 (3 configurations each), chosen by the mean F1 in
    validation; 5 seeds, which draw the images.
    """
    tune = functools.partial(harness.tune, grid=GRID, seeds=SEEDS, metric="validation", better="more")
    small, medium, large = (tune(functools.partial(_run, functools.partial(_grouped, n), n)) for n in GROUPS)
    plain = tune(functools.partial(_run, losses.sigmoid_binary_cross_entropy, BATCH))
    f1 = functools.partial(harness.compare, metric="test", better="more", factor=100, unit="points of F1")
    gap = functools.partial(harness.compare, metric="gap", better="less", unit="units of Dice")
    return (
        f1(medium, small, labels=("64", "8"), part="F1, groups of 64 against 8"),
        f1(large, medium, labels=("512", "64"), part="F1, groups of 512 against 64", why=WHY_ENOUGH),
        gap(medium, small, labels=("64", "8"), part="gap, groups of 64 against 8"),
        gap(large, medium, labels=("512", "64"), part="gap, groups of 512 against 64"),
        f1(
            large, plain, labels=("512", "cross-entropy"), part="F1, groups of 512 against cross-entropy", why=WHY_EQUAL
        ),
    )


def _grouped(size, logits, targets):
    groups = (x.reshape(-1, size) for x in (jax.nn.sigmoid(logits), targets))
    return jax.vmap(_dice)(*groups)


def _run(loss, size, config, key):
    digits = jax.vmap(functools.partial(_one_digit, loss, size, config["rate"], key))(jnp.arange(10))
    return {name: jnp.mean(values) for name, values in digits.items()}


def _one_digit(loss, size, rate, key, digit):
    parts = _parts(jax.random.fold_in(key, digit), digit)
    x, y = parts["train"]
    params, *_ = training.fit(
        lambda params, rows: jnp.mean(loss(training.mlp(params, x[rows])[:, 0], y[rows])),
        [{"kernel": jnp.zeros((64, 1)), "bias": jnp.zeros(1)}],
        optax.adam(rate),
        training.minibatches(key, len(x), BATCH, STEPS),
    )
    p = {name: jax.nn.sigmoid(training.mlp(params, part[0])[:, 0]) for name, part in parts.items()}
    f1 = {name: 1 - _dice(jnp.float32(p[name] > 0.5), parts[name][1], smooth=0.0) for name in ("validation", "test")}
    return {**f1, "gap": jnp.abs(losses.simpson_gap(_dice, (p["train"], y), batch_size=size))}


def _parts(key, digit):
    """Images and targets of each part, in random order."""
    task = training.load("digits")
    x, y = (jnp.concatenate(pair) for pair in ((task.x, task.x_test), (task.y, task.y_test)))
    keys = jax.random.split(key)
    order = jnp.lexsort((jax.random.uniform(keys[0], y.shape), y != digit))
    ends = np.cumsum(list(SIZES.values()), axis=0)
    parts = {}
    for i, (name, sizes) in enumerate(SIZES.items()):
        # The digit's images come first, the others last.
        first, last = ends[i] - sizes, len(y) - ends[i]
        rows = jnp.concatenate([order[first[0] : ends[i][0]], order[last[1] : last[1] + sizes[1]]])
        rows = jax.random.permutation(jax.random.fold_in(keys[1], i), rows)
        parts[name] = x[rows], jnp.float32(y[rows] == digit)
    return parts
