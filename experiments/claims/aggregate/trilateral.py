"""A teacher that learned wrong labels: how much of it to take, learned for each example or fixed for all."""

import jax
import jax.numpy as jnp
import optax

from experiments.claims import harness, training
from steelyard import examples, losses

SEEDS = 5
HELD_OUT = 288  # Of the 1438 training digits; they judge the ratios and nothing else.
FLIPPED = 0.2
TEACHER_STEPS, ROUNDS, EVERY, BATCH = 300, 120, 5, 64
TEACHER, STUDENT = (64, 128, 10), (64, 32, 10)
TEMPERATURE = 4.0
RATES = (0.03, 0.1, 0.3)
WHY = (
    "with true labels the student does best with no teacher at all, which all ratios move towards; the teacher errs on "
    "only some thirty of 1150 digits and is unsure of them, so that its answer there smooths more than it misleads"
)


def trilateral() -> tuple[harness.Outcome, ...]:
    """Learned ratios between a faulty teacher and the labels beat the best fixed one, and are lower where it errs.

    Direction: test accuracy of the student up; mean ratio on training examples that the teacher gets wrong below that
    on the others.
    Metric: test accuracy after the last step; mean ratios there, over the student's training examples.
    Budget: digits, 288 training examples held out for the outer loss. Teacher 64-128-10, 300 steps of 64 at Adam's rate
    3e-3, on the others with 20% of the labels flipped to another class. Student 64-32-10 on true labels, 600 steps of
    64 by gradient descent, temperature 4. Rates 0.03, 0.1, 0.3 on each side, times Adam's rates 1e-3, 3e-3, 1e-2 for
    the network of ratios (width 64, one step in five), or times the fixed ratios 0.3, 0.5, 0.9 (9 configurations
    each); 5 seeds.
    """
    learned, fixed = (
        harness.tune(_run, {"rate": RATES, **grid}, seeds=SEEDS, metric="accuracy", better="more")
        for grid in ({"outer_rate": (1e-3, 3e-3, 1e-2)}, {"ratio": (0.3, 0.5, 0.9)})
    )
    right, wrong = (harness.Arm({}, {"ratio": learned.metrics[name]}, 1) for name in ("right", "wrong"))
    return (
        harness.compare(
            learned,
            fixed,
            "accuracy",
            better="more",
            factor=100,
            unit="points of accuracy",
            labels=("learned", "fixed"),
            part="accuracy",
            why=WHY,
        ),
        harness.compare(
            wrong,
            right,
            "ratio",
            better="less",
            unit="in the ratio",
            labels=("teacher wrong", "teacher right"),
            part="ratios",
            why=WHY,
        ),
    )


def _run(config, key):
    """Trains a teacher and a student; `config` has either the rate of the ratios or the ratio of all."""
    task = training.load("digits")
    rows = jax.random.permutation(jax.random.fold_in(key, 0), len(task.x))
    held_out, rows = rows[:HELD_OUT], rows[HELD_OUT:]
    x, y = task.x[rows], task.y[rows]
    teacher = training.mlp(_teacher(x, y, jax.random.fold_in(key, 1)), x)
    means = examples.class_means(jax.nn.softmax(teacher), y, 10)
    network = examples.FusionRatio()

    def ratios(weigher, params, i):
        if "ratio" in config:
            return config["ratio"]
        student, truth = jax.nn.softmax(training.mlp(params, x[i])), jax.nn.one_hot(y[i], 10)
        features = examples.trilateral_features(student, jax.nn.softmax(teacher[i]), truth, means[y[i]])
        return network.apply(weigher, features)

    def inner(params, weigher, i):
        student, alpha = training.mlp(params, x[i]), ratios(weigher, params, i)
        distilled = TEMPERATURE**2 * losses.forward_kl(student, teacher[i], temperature=TEMPERATURE)
        plain = losses.softmax_cross_entropy_with_integer_labels(student, y[i])
        return jnp.mean(alpha * distilled + (1 - alpha) * plain)

    def outer(params, i):
        return training.cross_entropy(training.mlp(params, task.x[held_out[i]]), task.y[held_out[i]])

    tx = optax.adam(config.get("outer_rate", 0.0))
    step = examples.bilevel_step(inner, outer, inner_rate=config["rate"], outer_tx=tx)

    def plain_step(state, i):
        grads = jax.grad(inner)(state.params, state.weigher, i)
        return state._replace(params=optax.tree.add_scale(state.params, -config["rate"], grads)), None

    def round_of_steps(state, batch):
        (first, *_), judged = batch
        state = plain_step(state, first)[0] if "ratio" in config else step(state, first, judged)[0]
        return jax.lax.scan(plain_step, state, batch[0][1:])

    params = training.mlp_init(jax.random.fold_in(key, 2), STUDENT)
    weigher = network.init(jax.random.fold_in(key, 3), jnp.zeros((1, 50)))
    order = training.minibatches(jax.random.fold_in(key, 4), len(x), BATCH, ROUNDS * EVERY)
    judges = training.minibatches(jax.random.fold_in(key, 5), HELD_OUT, BATCH, ROUNDS)
    start = examples.BilevelStepState(params, weigher, tx.init(weigher))
    state, _ = jax.lax.scan(round_of_steps, start, (order.reshape(ROUNDS, EVERY, BATCH), judges))
    alpha = jnp.broadcast_to(ratios(state.weigher, state.params, jnp.arange(len(x))), y.shape)
    is_wrong = jnp.argmax(teacher, -1) != y
    return {
        "accuracy": training.accuracy(training.mlp(state.params, task.x_test), task.y_test),
        "right": jnp.mean(alpha, where=~is_wrong),
        "wrong": jnp.mean(alpha, where=is_wrong),
    }


def _teacher(x, y, key):
    """Parameters of a network trained with flipped labels."""
    is_flipped = jax.random.bernoulli(jax.random.fold_in(key, 0), FLIPPED, y.shape)
    shift = jax.random.randint(jax.random.fold_in(key, 1), y.shape, 1, 10)
    labels = jnp.where(is_flipped, (y + shift) % 10, y)

    def loss(params, i):
        return training.cross_entropy(training.mlp(params, x[i]), labels[i])

    rows = training.minibatches(key, len(x), BATCH, TEACHER_STEPS)
    return training.fit(loss, training.mlp_init(key, TEACHER), optax.adam(3e-3), rows)[0]
