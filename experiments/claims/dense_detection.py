"""A dense detector in small: points of which one in 200 is an object, with a box; no claim of its own.

Background has normally distributed features, objects lie about four centres among it, and the two numbers of an
object's box are smooth functions of its features. A perceptron gives a score and a box for each point. As in RetinaNet
the last kernel is small and losses are sums over a batch divided by its number of objects.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Key

from experiments.claims import harness, training
from steelyard import losses

SEEDS = 5
STEPS, EARLY, BATCH = 300, 50, 1000
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
POINTS, OBJECTS, FEATURES, CENTRES = 20_000, 100, 8, 4
WIDTHS = (FEATURES, 32, 32, 3)

Elementwise = Callable[[Array, Array], Array]
Combine = Callable[[Array, Array], Array]


class Points(NamedTuple):
    """Features, whether a point is an object, and its box."""

    x: Float[Array, "n d"]
    is_object: Bool[Array, "n"]
    box: Float[Array, "n 2"]


class Data(NamedTuple):
    """Points to train on, to choose by and to report, and the rows of each step."""

    fit: Points
    valid: Points
    test: Points
    rows: Int[Array, "steps batch"]


def tune(elementwise: Elementwise, combine: Combine, bias: float, rates: Sequence[float] = RATES) -> harness.Arm:
    """Trains by SGD with momentum at each of the rates.

    Args:
      elementwise: `(logits, targets) -> losses`, of the scores.
      combine: `(classification, regression) -> loss` of a batch.
      bias: of the scores, at the start.
      rates: to choose from.

    Returns:
      The arm of best average precision on held-out points, `valid` to choose by and `precision` to report; `gradient`:
      mean norm of the gradient of the last layer's score over the first steps.
    """

    def run(config, key):
        return _run(elementwise, combine, bias, config["rate"], _data(key), key)

    # Not vectorized, so that all arms with these functions share one program: it takes longer to compile than to run.
    return harness.tune(run, {"rate": rates}, seeds=SEEDS, metric="valid", better="more", vectorize=False)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(elementwise: Elementwise, combine: Combine, bias: float, rate: float, data: Data, key: Key[Array, ""]):
    points, targets = data.fit, data.fit.is_object.astype(jnp.float32)

    def loss(params, rows):
        outputs, objects = training.mlp(params, points.x[rows]), targets[rows]
        found = jnp.maximum(jnp.sum(objects), 1)
        classification = jnp.sum(elementwise(outputs[:, 0], objects)) / found
        boxes = jnp.sum(losses.huber_loss(outputs[:, 1:], points.box[rows]), axis=-1)
        return combine(classification, jnp.sum(objects * boxes) / found)

    tx = optax.sgd(rate, momentum=0.9)

    def step(carry, rows):
        params, state = carry
        grads = jax.grad(loss)(params, rows)
        updates, state = tx.update(grads, state)
        last = jnp.append(grads[-1]["kernel"][:, 0], grads[-1]["bias"][0])
        return (optax.apply_updates(params, updates), state), jnp.linalg.norm(last)

    params = _init(key, bias)
    (params, _), norms = jax.lax.scan(step, (params, tx.init(params)), data.rows)
    found = {name: _precision(params, part) for name, part in (("valid", data.valid), ("precision", data.test))}
    return {**found, "gradient": jnp.mean(norms[:EARLY])}


def _init(key: Key[Array, ""], bias: float) -> list[dict[str, Array]]:
    *hidden, last = training.mlp_init(key, WIDTHS)
    kernel = 0.01 * jax.random.normal(jax.random.fold_in(key, 10), last["kernel"].shape)
    return [*hidden, {"kernel": kernel, "bias": last["bias"].at[0].set(bias)}]


@jax.jit
def _data(key: Key[Array, ""]) -> Data:
    keys = jax.random.split(jax.random.fold_in(key, 20), 4)
    centres = 3 * losses.normalize(jax.random.normal(keys[0], (CENTRES, FEATURES)))
    maps = jax.random.normal(keys[1], (FEATURES, 2)) / jnp.sqrt(FEATURES)
    # Objects come last: equal scores, as those of a network that died, then rank them last and not first.
    is_object = jnp.arange(POINTS) >= POINTS - OBJECTS
    noise = jax.random.normal(keys[2], (3, POINTS, FEATURES))
    near = centres[jnp.arange(POINTS) % CENTRES] + 0.7 * noise
    parts = [Points(x, is_object, jnp.tanh(x @ maps)) for x in jnp.where(is_object[:, None], near, noise)]
    return Data(*parts, jax.random.randint(keys[3], (STEPS, BATCH), 0, POINTS))


def _precision(params: list[dict[str, Array]], points: Points) -> Float[Array, ""]:
    """Average precision; scores that are not finite count as equal."""
    scores = training.mlp(params, points.x)[:, 0]
    order = jnp.argsort(-jnp.where(jnp.all(jnp.isfinite(scores)), scores, 0))
    hits = points.is_object[order]
    precision = jnp.cumsum(hits) / jnp.arange(1, POINTS + 1)
    return jnp.sum(precision * hits) / OBJECTS
