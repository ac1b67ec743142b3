"""SlimSAM: an encoder made narrow with 200 unlabelled images, in two alternating stages of pruning and distillation.

The recipe: prune the width of the residual stream, distill; measure again, prune the widths inside the blocks, distill.
While one of the two is pruned, features of the other width are still aligned with the teacher's.

Source: 0.1% Data Makes Segment Anything Slim (2023, Chen et al.).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from experiments.claims import harness, training
from steelyard.sparsity import channels, scores

SEEDS = 3
PATCHES, WIDTH, HEADS, HEAD_WIDTH, HIDDEN, BLOCKS, OUT = 16, 32, 4, 8, 64, 2, 16
TEACHER_STEPS, TEACHER_BATCH, TEACHER_RATE = 400, 64, 2e-3
IMAGES, STAGE_STEPS, BATCH = 200, 200, 50
AMOUNT, STD = 0.5, 0.01
GRID = {"rate": (1e-3, 3e-3)}
WHY = (
    "after distillation the scores differ by no more than seeds do: in so small an encoder, trained from scratch, "
    "channels of little use to the embedding also have small weights"
)


class Features(NamedTuple):
    """The embedding, and for each block what lies inside it (queries, keys, values, hidden units) and what it gives."""

    output: Array
    inside: list[tuple[Array, ...]]
    between: list[Array]


def slimming() -> tuple[harness.Outcome, ...]:
    """With half of all widths, a disturbed Taylor score loses less than magnitude, and two stages less than one.

    Direction: error lower, for both.
    Metric: mean squared error of the student's embedding to the teacher's by the variance of the teacher's, on the test
    images.
    Budget: digits as 4 x 4 patches, 2 blocks of width 32 with 4 heads of 8 and 64 hidden units, an embedding of 16
    features a patch; the teacher is trained to classify, 400 Adam steps of 64 at 2e-3. All widths lose half of their
    channels, with 200 unlabelled images: the stream, then the widths inside, with a distillation of 200 Adam steps of
    50 after each; the one-stage side prunes all widths at once and is distilled twice as long, without features, none
    of which have the teacher's width. Rates 1e-3, 3e-3 with a cosine decay (2 configurations each, chosen by the error
    on the other training images); 3 seeds.

    After the first run it was tried, to save time, with 300 steps of the teacher and 150 in each distillation. The
    error of all at once was then 9.6% higher, with an interval from -4.9 to 19.2: the second part depends on the
    number of steps. The budget above is the one that was registered.
    """
    task = training.load("digits")
    arms = {
        name: harness.tune(
            functools.partial(_run, task, score, alternate),
            GRID,
            seeds=SEEDS,
            metric="validation",
            better="less",
            vectorize=False,
        )
        for name, score, alternate in (
            ("disturbed Taylor", _disturbed, True),
            ("magnitude", _magnitude, True),
            ("at once", _disturbed, False),
        )
    }
    taylor, magnitude, once = arms.values()
    compare = functools.partial(
        harness.compare, metric="test", better="less", scale="percent", unit="% higher error of the baseline"
    )
    return (
        compare(taylor, magnitude, labels=("disturbed Taylor", "magnitude"), part="against magnitude", why=WHY),
        compare(taylor, once, labels=("two stages", "at once"), part="against all at once"),
    )


def _run(task: training.Task, score, alternate, config, key):
    teacher, images = _teacher(int(jax.random.key_data(key)[-1])), task.x[:IMAGES]
    target = _encode(teacher, images).output
    if alternate:
        stages = ([_stream()], _inside), (_inner(), _between)
    else:
        stages = ([_stream(), *_inner()], _nothing), ([], _nothing)
    student = teacher
    for i, (groups, aligned) in enumerate(stages):
        prune_key, distill_key = jax.random.split(jax.random.fold_in(key, i))
        before = _encode(student, images)
        if groups:
            student = _prune(student, groups, score(student, images, before.output, prune_key))
        student = _distill(student, images, target, aligned(before), distill_key, config["rate"], aligned)
    return {"validation": _error(student, teacher, task.x[IMAGES:]), "test": _error(student, teacher, task.x_test)}


def _inside(features: Features):
    return features.inside


def _between(features: Features):
    return features.between


def _nothing(features: Features):
    del features
    return []


# The encoder.


def _init(key):
    keys = iter(jax.random.split(key, 3 + 6 * BLOCKS))

    def kernel(*shape):
        return jax.random.normal(next(keys), shape) / jnp.sqrt(shape[0])

    def norm():
        return {"scale": jnp.ones(WIDTH), "bias": jnp.zeros(WIDTH)}

    def block():
        attention = {name: kernel(WIDTH, HEADS * HEAD_WIDTH) for name in ("query", "key", "value")}
        attention |= {"out": kernel(HEADS * HEAD_WIDTH, WIDTH), "norm": norm()}
        mlp = {"up": kernel(WIDTH, HIDDEN), "bias": jnp.zeros(HIDDEN), "down": kernel(HIDDEN, WIDTH), "norm": norm()}
        return {"attention": attention, "mlp": mlp}

    blocks = [block() for _ in range(BLOCKS)]
    ends = {"patch": kernel(4, WIDTH), "position": 0.1 * kernel(PATCHES, WIDTH), "out": kernel(WIDTH, OUT)}
    return {"blocks": blocks, "norm": norm(), **ends}


def _stream() -> channels.ChannelGroup:
    """The residual stream: whatever is added to it or reads it."""
    places = [("patch", -1), ("position", -1), ("norm/scale", 0), ("norm/bias", 0), ("out", -2)]
    for i in range(BLOCKS):
        for part, writes in (("attention", "out"), ("mlp", "down")):
            places += [(f"blocks/{i}/{part}/norm/{name}", 0) for name in ("scale", "bias")]
            places.append((f"blocks/{i}/{part}/{writes}", -1))
        places += [(f"blocks/{i}/attention/{name}", -2) for name in ("query", "key", "value")]
        places.append((f"blocks/{i}/mlp/up", -2))
    return channels.ChannelGroup("stream", WIDTH, tuple(channels.Member(*place) for place in places))


def _inner() -> list[channels.ChannelGroup]:
    """Widths inside the blocks; a channel of a head is one in every head, so that heads stay equally wide."""

    def group(path, size, *places, width=1):
        members = (channels.Member(f"{path}/{name}", axis, width, "strided") for name, axis in places)
        return channels.ChannelGroup(f"{path}/{places[0][0]}", size, tuple(members))

    groups = []
    for i in range(BLOCKS):
        attention, mlp = (f"blocks/{i}/{part}" for part in ("attention", "mlp"))
        groups.append(group(attention, HEAD_WIDTH, ("query", -1), ("key", -1), width=HEADS))
        groups.append(group(attention, HEAD_WIDTH, ("value", -1), ("out", -2), width=HEADS))
        groups.append(group(mlp, HIDDEN, ("up", -1), ("bias", 0), ("down", -2)))
    return groups


@jax.jit
def _encode(params, images) -> Features:
    """Widths are read from the parameters; what attention divides by stays the teacher's."""
    patches = images.reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, PATCHES, 4)
    x = patches @ params["patch"] + params["position"]
    inside, between = [], []
    for block in params["blocks"]:
        attention, mlp = block["attention"], block["mlp"]
        normed = _norm(x, attention["norm"])
        query, key, value = (normed @ attention[name] for name in ("query", "key", "value"))
        x = x + _attend(query, key, value) @ attention["out"]
        hidden = jax.nn.gelu(_norm(x, mlp["norm"]) @ mlp["up"] + mlp["bias"])
        x = x + hidden @ mlp["down"]
        inside.append((query, key, value, hidden))
        between.append(x)
    return Features(_norm(x, params["norm"]) @ params["out"], inside, between)


def _norm(x, params):
    return jax.nn.standardize(x, epsilon=1e-5) * params["scale"] + params["bias"]


def _attend(query, key, value):
    query, key, value = (x.reshape(*x.shape[:2], HEADS, -1) for x in (query, key, value))
    return jax.nn.dot_product_attention(query, key, value, scale=HEAD_WIDTH**-0.5).reshape(*query.shape[:2], -1)


# Teacher, scores, pruning, distillation.


@functools.cache
def _teacher(seed):
    """An encoder that has learned the classes of the digits; what read them from its embedding is gone."""
    return _taught(jax.random.key(seed), training.load("digits"))


@jax.jit
def _taught(key, task: training.Task):
    head = jax.random.normal(jax.random.fold_in(key, 1), (OUT, 10)) / jnp.sqrt(OUT)
    start = {"encoder": _init(key), "head": head}

    def loss(params, rows):
        pooled = jnp.mean(_encode(params["encoder"], task.x[rows]).output, axis=1)
        return training.cross_entropy(pooled @ params["head"], task.y[rows])

    order = training.minibatches(key, len(task.x), TEACHER_BATCH, TEACHER_STEPS)
    return training.fit(loss, start, optax.adam(TEACHER_RATE), order)[0]["encoder"]


def _magnitude(params, images, reached, key):
    del images, reached, key
    return scores.magnitude(params)


@jax.jit
def _disturbed(params, images, reached, key):
    """The gradient summed over images, up to a factor, by which no ranking changes; each image has noise of its own."""
    loss = scores.disturbed_loss(lambda p: _encode(p, images).output, reached, key, std=STD)
    return scores.saliency(params, jax.grad(loss)(params))


def _prune(params, groups, score_tree):
    vectors = {g: channels.score(score_tree, g, combine="mean", normalize="mean") for g in groups}
    return channels.shrink(params, channels.select(vectors, AMOUNT))


@functools.partial(jax.jit, static_argnames="aligned")
def _distill(student, images, target, features, key, rate, aligned):
    """The embedding alone in the second half; in the first half what is aligned counts as much."""
    order = training.minibatches(key, IMAGES, BATCH, STAGE_STEPS)
    share = jnp.where(jnp.arange(STAGE_STEPS) < STAGE_STEPS // 2, 0.5, 0.0)

    def loss(params, batch):
        rows, share = batch
        seen = _encode(params, images[rows])
        errors = jax.tree.map(lambda a, b: jnp.mean((a - b[rows]) ** 2), aligned(seen), features)
        final = jnp.mean((seen.output - target[rows]) ** 2)
        return (1 - share) * final + share * sum(jax.tree.leaves(errors))

    tx = optax.adam(optax.cosine_decay_schedule(rate, STAGE_STEPS))
    return training.fit(loss, student, tx, (order, share))[0]


def _error(student, teacher, images):
    target = _encode(teacher, images).output
    return np.mean((_encode(student, images).output - target) ** 2) / np.var(target)
