"""Bins of the target classified beside the regression: a curve of which most examples show a fifth."""

import functools

import jax
import jax.numpy as jnp
import optax

from experiments.claims import harness, training
from steelyard import losses

SEEDS, BINS = 10, 10
EXAMPLES, HELD_OUT = 200, 500
INSIDE, WIDTH = 0.9, 0.4
STEPS, BATCH = 800, 50
HIDDEN = (1, 32, 32)
WEIGHTS, RATES = (0.01, 0.1, 1.0), (3e-3, 1e-2, 3e-2)
WHY = (
    "without noise the error left is one of optimisation, where a second task helps some curves and costs others: the "
    "errors differ up to a hundredfold from curve to curve"
)
PLAIN_RATES = (1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 1.5e-2, 2e-2, 3e-2, 5e-2)


def bins() -> tuple[harness.Outcome, ...]:
    """Classifying balanced bins of the target helps regression where examples are spread unevenly, and only there.

    Direction: squared error down where 90% of the examples lie in 20% of the range; where they are spread evenly, less
    than 10% of difference in either direction.
    Metric: mean squared error over 500 points that are spread evenly.
    Budget: sum of three sines of x in [-1, 1], amplitudes in (0.3, 1), frequencies in (2, 12), without noise; 200
    examples, of which 90% are drawn from an interval of length 0.4, the others from all of the range; perceptron
    1-32-32-11, 10 bins of equally many examples, 800 Adam steps of 50; weights 0.01, 0.1, 1 with rates 3e-3, 1e-2,
    3e-2, squared error alone with 9 rates from 1e-3 to 5e-2, these three among them (9 configurations each), chosen by
    the squared error on 500 other points that are spread evenly; 10 seeds, which draw curve, interval, examples and
    network.

    A first run, where no part but the last held, had rates up to 1e-2 for the method and up to 2e-2 for squared error
    alone, and each was best at its largest. Then both got larger ones.
    """
    (uneven, plain_uneven), (even, plain_even) = (
        [
            harness.tune(
                functools.partial(_run, inside), grid, seeds=SEEDS, metric="valid", better="less", vectorize=False
            )
            for grid in ({"weight": WEIGHTS, "rate": RATES}, {"weight": (0.0,), "rate": PLAIN_RATES})
        ]
        for inside in (INSIDE, 0.0)
    )
    compare = functools.partial(harness.compare, metric="error", better="less", scale="percent")
    names = ("with bins", "squared error")
    more = "% more error of the other"
    return (
        compare(uneven, plain_uneven, unit=more, labels=names, part="uneven", why=WHY),
        compare(even, plain_even, unit=more, labels=names, margin=-10.0, part="even, not worse", why=WHY),
        compare(plain_even, even, unit=more, labels=names[::-1], margin=-10.0, part="even, not better"),
    )


def _run(inside, config, key):
    """Not traced as a whole: the edges are made of the targets on the host."""
    x, y, *held_out = _data(key, inside)
    return _fit(config["weight"], config["rate"], losses.quantile_edges(y, BINS), key, x, y, *held_out)


@jax.jit
def _fit(weight, rate, edges, key, x, y, x_valid, y_valid, x_test, y_test):
    def loss(params, rows):
        out = training.mlp(params, x[rows])
        return jnp.mean(
            losses.regression_with_classification(out[:, 0], out[:, 1:], y[rows], edges=edges, weight=weight)
        )

    params = training.mlp_init(key, (*HIDDEN, 1 + BINS))
    batches = training.minibatches(key, EXAMPLES, BATCH, STEPS)
    params, *_ = training.fit(loss, params, optax.adam(rate), batches)

    def error(x, y):
        return jnp.mean(losses.squared_error(training.mlp(params, x)[:, 0], y))

    return {"valid": error(x_valid, y_valid), "error": error(x_test, y_test)}


@jax.jit
def _data(key, inside):
    """Examples, of which a share lies in an interval at random, and two sets of points that are spread evenly."""
    keys = jax.random.split(key, 6)
    amplitude, frequency, phase = (
        jax.random.uniform(k, (3,), minval=low, maxval=high)
        for k, (low, high) in zip(keys[:3], ((0.3, 1), (2, 12), (0, 2 * jnp.pi)), strict=True)
    )
    start = jax.random.uniform(keys[3], minval=-1, maxval=1 - WIDTH)
    x = jax.random.uniform(keys[4], (EXAMPLES + 2 * HELD_OUT, 1), minval=-1, maxval=1)
    chosen = jnp.arange(len(x))[:, None] < inside * EXAMPLES
    x = jnp.where(chosen, start + WIDTH / 2 * (x + 1), x)
    y = jnp.sum(amplitude * jnp.sin(frequency * x + phase), axis=1)
    parts = jnp.split(jnp.arange(len(x)), (EXAMPLES, EXAMPLES + HELD_OUT))
    return tuple(a[rows] for rows in parts for a in (x, y))
