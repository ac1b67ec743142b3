"""One cycle of learning rate and momentum, with the peak from a range test."""

import jax
import jax.numpy as jnp
import optax

from experiments.claims import harness, training
from steelyard import optim, train

SEEDS = 5
STEPS = 200
BATCH = 64
FACTORS = (0.5, 1.0, 2.0, 4.0, 8.0)
DECAY_PEAKS = (0.5, 2.0, 8.0)
DECAYS = (1e-4, 1e-3, 1e-2)


def one_cycle() -> tuple[harness.Outcome, ...]:
    """Within few steps one cycle beats the best constant rate, and a larger peak wants less weight decay.

    Direction: test loss lower; best weight decay at the largest peak below that at the smallest.
    Metric: loss on the held-out 20% of the digits after 200 steps, in percent; factors of 10 between the weight decays
    that are best by it (of 1e-4, 1e-3 and 1e-2, for each seed), at peaks of 0.5 and 8 times the suggestion.
    Budget: perceptron with two hidden layers of 64 units, batch 64, SGD. Both sides try 0.5, 1, 2, 4 and 8 times the
    rate that one range test suggests (5 configurations); momentum 0.9 where it is constant. 5 seeds.
    """
    task = training.load("digits")
    suggestion = _suggestion(task)

    def cycled(config, key):
        return {"loss": _test_loss(task, _one_cycle(config["factor"] * suggestion, 0.0), key)}

    def constant(config, key):
        return {"loss": _test_loss(task, optax.sgd(config["factor"] * suggestion, momentum=0.9), key)}

    def decays(config, key):
        def best(factor):
            losses = [_test_loss(task, _one_cycle(factor * suggestion, decay), key) for decay in DECAYS]
            return jnp.log10(jnp.asarray(DECAYS))[jnp.argmin(jnp.nan_to_num(jnp.stack(losses), nan=jnp.inf))]

        return {str(factor): best(factor) for factor in (DECAY_PEAKS[0], DECAY_PEAKS[-1])}

    grid = {"factor": FACTORS}
    arms = [harness.tune(run, grid, seeds=SEEDS, metric="loss", better="less") for run in (cycled, constant)]
    found = harness.tune(decays, {}, seeds=SEEDS, metric=str(DECAY_PEAKS[0]), better="less").metrics
    large, small = (harness.Arm({}, {"decay": found[str(DECAY_PEAKS[i])]}, 1) for i in (-1, 0))
    return (
        harness.compare(
            *arms,
            "loss",
            better="less",
            scale="percent",
            unit="% more test loss if constant",
            labels=("one cycle", "constant"),
            part="test loss",
        ),
        harness.compare(
            large,
            small,
            "decay",
            better="less",
            unit="factors of 10",
            labels=("large peak", "small peak"),
            part="weight decay",
            why="in 200 steps a small peak does not fit the digits yet and any decay slows it; a large one overfits.",
        ),
    )


def _suggestion(task: training.Task) -> float:
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.0, momentum=0.9)
    loss = _loss(task)

    @jax.jit
    def step(state, batch, lr):
        params, opt_state = state
        value, grads = jax.value_and_grad(loss)(params, batch)
        opt_state.hyperparams["learning_rate"] = lr
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), value

    key = jax.random.key(SEEDS)
    params = _init(task, key)
    batches = training.minibatches(key, len(task.x), BATCH, 100)
    return train.lr_range_test(step, (params, tx.init(params)), batches, min_lr=1e-4).suggestion


def _one_cycle(peak, decay: float) -> optax.GradientTransformation:
    rates, momenta = optax.linear_onecycle_schedule(STEPS, peak), optim.one_cycle_momentum_schedule(STEPS)
    sgd = optax.inject_hyperparams(optax.sgd)(learning_rate=rates, momentum=momenta)
    return optax.chain(optax.add_decayed_weights(decay), sgd)


def _test_loss(task: training.Task, tx: optax.GradientTransformation, key) -> jax.Array:
    batches = training.minibatches(key, len(task.x), BATCH, STEPS)
    params, _, _ = training.fit(_loss(task), _init(task, key), tx, batches)
    return training.cross_entropy(training.mlp(params, task.x_test), task.y_test)


def _loss(task: training.Task):
    return lambda params, batch: training.cross_entropy(training.mlp(params, task.x[batch]), task.y[batch])


def _init(task: training.Task, key) -> list[dict[str, jax.Array]]:
    return training.mlp_init(key, (task.x.shape[1], 64, 64, 10))
