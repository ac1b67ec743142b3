"""Surrogates in output space: the loss reached with few gradients of an expensive loss."""

import jax
import jax.numpy as jnp
import optax

from experiments.claims import harness, training
from steelyard import optim

SEEDS = 5
BATCH = 64
OUTER_STEPS = 100
INNER_STEPS = 10
SGD_RATES = (0.03, 0.1, 0.2, 0.4, 0.8, 1.6)
ADAM_RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
WHY = (
    "a linear classifier of digits takes very large steps without harm: SGD and Adam are best at the largest rates "
    "tried, and ten steps on the bound, which is best at its largest step too, move it less far"
)


def target_surrogate() -> tuple[harness.Outcome, ...]:
    """Ten model steps a loss gradient reach a lower loss than SGD and Adam with as many loss gradients.

    Direction: training loss lower than that of SGD and of Adam after 100 loss gradients; higher than that of SGD with
    as many model gradients (1000 steps), so that nothing is gained where the loss is cheap.
    Metric: cross entropy on all training digits after the last step, in percent.
    Budget: linear classifier on digits, batch 64, from 0. 6 configurations a side: surrogate step 0.3, 1, 3 times inner
    rate 0.05, 0.2 (in units of the surrogate step); SGD rates 0.03 to 1.6; Adam rates 0.001 to 0.3. 5 seeds.
    """
    task = training.load("digits")
    grid = {"step_size": (0.3, 1.0, 3.0), "rate": (0.05, 0.2)}
    surrogate = _tune(lambda config, key: _surrogate(task, config, key), grid)
    others = {
        "SGD": _tune(lambda config, key: _plain(task, optax.sgd(config["rate"]), key), {"rate": SGD_RATES}),
        "Adam": _tune(lambda config, key: _plain(task, optax.adam(config["rate"]), key), {"rate": ADAM_RATES}),
    }
    steps = OUTER_STEPS * INNER_STEPS
    long = _tune(lambda config, key: _plain(task, optax.sgd(config["rate"]), key, steps), {"rate": SGD_RATES})
    options = dict(better="less", scale="percent", unit="% higher loss of the baseline")
    return (
        *(
            harness.compare(
                surrogate,
                arm,
                "loss",
                **options,
                labels=("surrogate", name),
                part=f"{name}, equal loss gradients",
                why=WHY,
            )
            for name, arm in others.items()
        ),
        harness.compare(
            long, surrogate, "loss", **options, labels=("SGD", "surrogate"), part="SGD ahead at equal model gradients"
        ),
    )


def _tune(run, grid) -> harness.Arm:
    return harness.tune(run, grid, seeds=SEEDS, metric="loss", better="less")


def _init(task: training.Task):
    return {"kernel": jnp.zeros((task.x.shape[1], 10)), "bias": jnp.zeros(10)}


def _predict(params, x):
    return x @ params["kernel"] + params["bias"]


def _loss(task: training.Task, params) -> jax.Array:
    return training.cross_entropy(_predict(params, task.x), task.y)


def _surrogate(task: training.Task, config, key):
    options = dict(step_size=config["step_size"], inner_steps=INNER_STEPS)

    def step(params, batch):
        def losses(logits):
            return optax.softmax_cross_entropy_with_integer_labels(logits, task.y[batch])

        inner = optax.sgd(config["rate"] * config["step_size"])
        return optim.target_surrogate_step(
            lambda p: _predict(p, task.x[batch]), losses, params, inner=inner, **options
        ), None

    batches = training.minibatches(key, len(task.x), BATCH, OUTER_STEPS)
    params, _ = jax.lax.scan(step, _init(task), batches)
    return {"loss": _loss(task, params)}


def _plain(task: training.Task, tx, key, steps: int = OUTER_STEPS):
    def loss(params, batch):
        return training.cross_entropy(_predict(params, task.x[batch]), task.y[batch])

    params, _, _ = training.fit(loss, _init(task), tx, training.minibatches(key, len(task.x), BATCH, steps))
    return {"loss": _loss(task, params)}
