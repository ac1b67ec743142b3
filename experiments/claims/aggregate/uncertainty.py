"""Uncertainty weighting and softmax weights: two regressions on digits whose losses differ in scale."""

import jax
import jax.numpy as jnp
import optax

from experiments.claims import harness, training
from steelyard import aggregate

SEEDS = 5
STEPS, BATCH = 600, 64
WIDTHS = (64, 64, 2)
SCALES = jnp.array([1.0, 100.0])
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
STATICS = ((0.1, 0.9), (0.5, 0.5), (0.9, 0.1))


def uncertainty() -> harness.Outcome:
    """With one loss a hundred times the other, uncertainty weighting predicts better than the mean of the losses.

    Direction: normalised error down.
    Metric: squared error on the test digits over the variance of the target there, mean of the two tasks, after the
    last step.
    Budget: digits; the targets are the number itself and the horizontal centre of its brightness, both standardised,
    with the second loss times 100; perceptron with a hidden layer of 64, Adam, 600 steps of 64 examples; the
    log-variances learn with Adam at the model's own rate. Rates 1e-3, 3e-3, 1e-2, 3e-2 on each side (4 configurations),
    5 seeds.
    """
    arms = (
        _tune(lambda config: aggregate.uncertainty_weighting(2, optimizer=optax.adam(config["rate"]))),
        _tune(lambda config: aggregate.mean()),
    )
    return harness.compare(
        *arms,
        "error",
        better="less",
        scale="percent",
        unit="% more error of the mean",
        labels=("uncertainty", "mean"),
    )


def softmax_weights() -> tuple[harness.Outcome, ...]:
    """On these tasks softmax weights predict better than the worst of three static weightings, and drift to one task.

    Direction: normalised error below that of the worst static weighting; weight of the task of smaller loss up from its
    prior 1/2.
    Metric: normalised error as for uncertainty weighting; the weight after the last step, at the rate of least error.
    Budget: tasks and model as for uncertainty weighting; the logits learn with Adam at the model's own rate. Static
    weights (0.1, 0.9), (0.5, 0.5), (0.9, 0.1), each at its best rate, of which the one with most error is the baseline.
    Rates 1e-3, 3e-3, 1e-2, 3e-2 on each side (4 configurations each), 5 seeds.
    """
    learned = _tune(lambda config: aggregate.softmax_weighting(2, optimizer=optax.adam(config["rate"])))
    statics = {weights: _tune(lambda config, w=weights: aggregate.static(jnp.array(w))) for weights in STATICS}
    worst = max(statics, key=lambda weights: statics[weights].metrics["error"].mean())
    labels = ("softmax", f"static {worst}")
    return (
        harness.compare(
            learned,
            statics[worst],
            "error",
            better="less",
            scale="percent",
            unit="% more error of the static one",
            labels=labels,
            part="worst static weighting",
        ),
        harness.compare(
            learned,
            statics[0.5, 0.5],
            "share",
            better="more",
            unit="of weight on the task of smaller loss",
            labels=("softmax", "prior"),
            part="drift",
        ),
    )


def _tune(make_rule) -> harness.Arm:
    task = training.load("digits")
    targets = _targets(task.x, task.y), _targets(task.x_test, task.y_test)
    mean, spread = targets[0].mean(0), targets[0].std(0)
    y, y_test = ((t - mean) / spread for t in targets)

    def run(config, key):
        params, share = _train(task.x, y, make_rule(config), config["rate"], key)
        errors = jnp.mean((training.mlp(params, task.x_test) - y_test) ** 2, axis=0) / jnp.var(y_test, axis=0)
        return {"error": jnp.mean(errors), "share": share}

    return harness.tune(run, {"rate": RATES}, seeds=SEEDS, metric="error", better="less")


def _targets(x, y):
    """The number, and the horizontal centre of brightness of its image in pixels."""
    columns = x.reshape(-1, 8, 8).sum(1)
    return jnp.stack([y.astype(jnp.float32), columns @ jnp.arange(8.0) / columns.sum(1)], axis=1)


def _train(x, y, rule, rate, key):
    """The parameters, and the weight that the rule gives to the first loss in the last step."""

    def losses_fn(params, rows):
        return SCALES * jnp.mean((training.mlp(params, x[rows]) - y[rows]) ** 2, axis=0)

    value_and_grad, tx = aggregate.value_and_grad(losses_fn, rule, report=True), optax.adam(rate)

    def step(carry, rows):
        params, rule_state, state = carry
        _, grads, rule_state, seen = value_and_grad(params, rule_state, rows)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), rule_state, state), seen.weights[0]

    params = training.mlp_init(key, WIDTHS)
    start = (params, rule.init(params), tx.init(params))
    (params, *_), shares = jax.lax.scan(step, start, training.minibatches(key, len(x), BATCH, STEPS))
    return params, shares[-1]
