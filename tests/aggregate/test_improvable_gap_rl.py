"""Learned gap weights: memory and schedule by loops, an update by hand, and that the agent learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from steelyard import aggregate

# A mean, a difference, a quotient and a product, each rounded to float32.
TOLERANCE = 16 * 2.0**-24
STEPS, BASE, CAPACITY = 28, 3, 10
SMALL = dict(steps_per_epoch=2, base_epoch=BASE, update_every=3, batch_size=4, capacity=CAPACITY, width=4)


def learning_rate(step):
    return jnp.where(step == 11, 0.0, 0.9**step)


def make(seed=0, **options):
    return aggregate.improvable_gap_rl(2, seed=seed, **{**SMALL, "learning_rate": learning_rate, **options})


@functools.cache
def compiled_step():
    """One program for all tests of the small agent: the seed is in the state alone."""
    return jax.jit(make().weights)


def run(rows, state=None, seed=0):
    """Weights and states after each row of losses."""
    state = make(seed).init(None) if state is None else state
    weights, states = [], []
    for row in np.asarray(rows, np.float32):
        w, state = compiled_step()(row, state)
        weights.append(np.asarray(w))
        states.append(state)
    return np.stack(weights), states


ROWS = np.random.default_rng(0).uniform(0.5, 4, (STEPS, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def history():
    return run(ROWS)


def test_gap_weights_sum_to_the_number_of_tasks_and_are_divided_by_the_losses(history):
    weights, states = history
    actions = np.stack([state.action for state in states])
    np.testing.assert_allclose(weights, actions / ROWS, rtol=TOLERANCE)
    np.testing.assert_allclose(actions.sum(1), 2, rtol=TOLERANCE)
    assert np.all(actions > 0)


def transitions_by_loops(states):
    """The base is the mean of steps 6 and 7; the first transition that is kept is from step 7 to step 8."""
    base, result = ROWS[6:8].astype(np.float64).mean(0), []
    for step in range(8, STEPS):
        gain = min((float(ROWS[step - 1, k]) - float(ROWS[step, k])) / base[k] for k in range(2))
        ratio = 0.0 if step - 1 == 11 else 1 / 0.9 ** (step - 1)
        result.append(np.concatenate([ROWS[step - 1], states[step - 1].action, ROWS[step], [gain * ratio]]))
    return result


@pytest.mark.parametrize("step", [7, 8, 12, 17, 18, STEPS - 1])
def test_the_memory_is_a_ring_of_the_last_transitions(history, step):
    """Of 10 rows, the last is written in step 17, and the first of them again in step 18."""
    state, expected = history[1][step], np.zeros((CAPACITY, 7))
    for i, row in enumerate(transitions_by_loops(history[1])[: max(0, step - 7)]):
        expected[i % CAPACITY] = row
    assert state.stored == max(0, step - 7)
    # A difference of losses is known to the rounding of the losses, and rewards are scaled by up to 1 / 0.9^27.
    np.testing.assert_allclose(state.replay, expected, rtol=TOLERANCE, atol=TOLERANCE / 0.9**STEPS)


def test_a_step_that_did_not_move_the_model_has_no_reward(history):
    """The learning rate of step 11 is zero, and the transition to step 12 is the fifth."""
    rewards = np.asarray(history[1][12].replay)[:5, -1]
    assert rewards[4] == 0
    assert np.all(rewards[:4] != 0)


def test_it_learns_at_every_third_step_after_three_epochs_once_there_is_memory(history):
    """floor(3 f / 2) updates at steps 9, 12, ..., f = 1 + filled / 10; the fourth epoch's step 6 has no memory yet."""
    counts, expected, total = [], [], 0
    for step, state in enumerate(history[1]):
        filled = min(max(0, step - 7), CAPACITY)
        if step >= 3 * 2 and step % 3 == 0 and filled:
            total += 3 * (CAPACITY + filled) // (2 * CAPACITY)
        expected.append(total)
        counts.append(int(state.agent.optimizer[0].count))
    assert counts == expected
    assert np.diff(expected).max() == 3
    assert 1 in np.diff(expected)


def test_the_networks_change_where_it_learns_and_nowhere_else(history):
    _, states = history
    for before, after, learns in ((8, 9, True), (9, 10, False), (5, 6, False)):
        pairs = zip(*(jax.tree.leaves(states[i].agent[:4]) for i in (before, after)), strict=True)
        changed = [not np.array_equal(a, b) for a, b in pairs]
        assert all(changed) if learns else not any(changed)


def test_the_seed_decides(history):
    weights, _ = history
    np.testing.assert_array_equal(run(ROWS[:10])[0], weights[:10])
    others, _ = run(ROWS[:10], seed=1)
    assert np.all(np.abs(others - weights[:10]).max(1) > 1e-4)


def test_the_first_gap_weights_are_softmax_of_normal_numbers():
    """The logits of 2000 first actions differ by a normal number of variance 2, whose spread is known to 1 in 63."""
    rule, state = make(), make().init(None)
    keys = jax.random.split(jax.random.key(7), 2000)
    fn = jax.jit(jax.vmap(lambda key: rule.weights(jnp.ones(2), state._replace(key=key))[0]))
    logits = np.log(np.asarray(fn(keys), np.float64))
    difference = logits[:, 0] - logits[:, 1]
    assert abs(difference.mean()) < 5 * np.sqrt(2 / 2000)
    assert abs(difference.std() - np.sqrt(2)) < 5 * np.sqrt(2) / 63


def test_a_run_stopped_goes_on_as_if_it_had_not(history):
    weights, states = history
    again, _ = run(ROWS[11:], jax.tree.map(jnp.copy, states[10]))
    np.testing.assert_array_equal(again, weights[11:])


def test_losses_of_zero_are_finite():
    weights, states = run(np.zeros((13, 2)))
    assert states[-1].agent.optimizer[0].count > 0
    for leaf in jax.tree.leaves((weights, states[-1]._replace(key=None))):
        assert np.all(np.isfinite(leaf))


def numpy_perceptron(layers, x):
    for i, (kernel, bias) in enumerate(layers):
        x = x @ np.asarray(kernel, np.float64) + np.asarray(bias, np.float64)
        x = np.maximum(x, 0) if i < len(layers) - 1 else x
    return x


def first_update(rate, discount):
    """One update by plain descent of an agent that always gives K softmax(0.3, -0.2) and hardly values entropy.

    Epochs are steps, so the first transition is stored in step 2, and learned from at once.
    """
    options = dict(base_epoch=1, steps_per_epoch=1, idle_epochs=0, update_every=2, target_rate=0.25, random_epochs=0)
    rule = make(optimizer=optax.sgd(rate), discount=discount, learning_rate=None, **options)
    state = rule.init(None)
    actor = jax.tree.map(jnp.zeros_like, state.agent.actor)
    actor[-1] = (actor[-1][0], jnp.array([0.3, -0.2, -30.0, -30.0]))
    before = state.agent._replace(actor=actor, log_alpha=jnp.float32(-50))
    state, step = state._replace(agent=before), jax.jit(rule.weights)
    for row in ROWS[:3]:
        _, state = step(row, state)
    assert state.stored == 1
    return before, state.agent, np.asarray(state.replay[0], np.float64)


def test_the_first_update_by_hand():
    """With d = Q(L, v) - reward - discount min Q'(L', v'), at the rate a of plain descent:

    the last bias of a critic moves by -2 a d, and its target a quarter of the way to it; the mean of u moves by
    a d min Q(L, K softmax(u)) / du, here by central differences; its spread stands where it is clipped; log alpha moves
    by -a (K - mean of log p), where log p of two normal numbers of spread e^-20 is below its highest value, by less
    than 20.
    """
    rate, discount = 0.01, 0.5
    before, after, row = first_update(rate, discount)
    L, v, next_L, reward = row[:2], row[2:4], row[4:6], row[6]
    critics = [jax.tree.map(lambda x, i=i: x[i], before.critics) for i in range(2)]

    def lesser(losses, u):
        action = 2 * np.exp(u) / np.exp(u).sum()
        return min(numpy_perceptron(critic, np.concatenate([losses, action])).item() for critic in critics)

    u = np.array([0.3, -0.2])
    for i, critic in enumerate(critics):
        learned, target = (jax.tree.map(lambda x, i=i: x[i], tree) for tree in (after.critics, after.targets))
        error = numpy_perceptron(critic, np.concatenate([L, v])) - reward - discount * lesser(next_L, u)
        np.testing.assert_allclose(learned[-1][1], -2 * rate * error, rtol=1e-4)
        for a, b, c in zip(*map(jax.tree.leaves, (critic, learned, target)), strict=True):
            np.testing.assert_allclose(c, 0.75 * a + 0.25 * b, atol=1e-6)
    slope = [(lesser(L, u + h) - lesser(L, u - h)) / 2e-4 for h in 1e-4 * np.eye(2)]
    moved = np.asarray(after.actor[-1][1] - before.actor[-1][1], np.float64)
    # The bias is 0.3 in float32, and its move by a hundredth of the slope is known to the rounding of that.
    np.testing.assert_allclose(moved, [*(rate * np.array(slope)), 0, 0], atol=2.0**-24, rtol=1e-4)
    assert np.all(moved[:2] != 0)
    highest = 2 * 20 - np.log(2 * np.pi)
    fall = (-50 - float(after.log_alpha)) / rate
    assert 2 - highest - 1e-2 < fall < 22 - highest


def test_it_learns_which_task_to_weigh():
    """In this world the losses fall by more the more weight the first task gets, and rise if it gets less than 1."""
    options = dict(steps_per_epoch=20, update_every=4, batch_size=32, capacity=200, width=16, base_epoch=0)
    rule = make(optimizer=optax.adam(3e-3), discount=0.0, log_loss=False, learning_rate=None, **options)

    def step(carry, _):
        state, level = carry
        weights, state = rule.weights(jnp.full(2, level), state)
        fall = jnp.where(state.means.step < 20, 0, weights[0] - 1)
        return (state, level - 0.01 * fall), weights[0]

    start = (rule.init(None), jnp.float32(0.01))
    _, first = jax.jit(lambda carry: jax.lax.scan(step, carry, length=600))(start)
    # Of 100 weights within 0 and 2 the mean is known to a tenth at worst.
    assert abs(np.mean(first[:100]) - 1) < 0.3
    assert np.mean(first[-100:]) > 1.5


def test_one_task_without_logarithm_keeps_its_gradient():
    rule = aggregate.improvable_gap_rl(1, seed=0, **SMALL, log_loss=False)
    row = {"w": jnp.array([[1.0, -2.0]], jnp.bfloat16), "none": None}
    update = jax.jit(lambda losses: rule.update(row, rule.init(None), losses=losses)[0])(jnp.array([3.0]))
    np.testing.assert_array_equal(update["w"].astype(jnp.float32), [1, -2])
    assert update["none"] is None


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_tasks": 0}, r"num_tasks=0 must lie in \[1, inf\)"),
        ({"steps_per_epoch": 0}, r"steps_per_epoch=0 must lie in \[1, inf\)"),
        ({"base_epoch": -1}, r"base_epoch=-1 must lie in \[0, inf\)"),
        ({"random_epochs": -1}, r"random_epochs=-1 must lie in \[0, inf\)"),
        ({"idle_epochs": -1}, r"idle_epochs=-1 must lie in \[0, inf\)"),
        ({"update_every": 1}, r"update_every=1 must lie in \[2, 1e3\]"),
        ({"batch_size": 1}, r"batch_size=1 must lie in \[2, 1e3\]"),
        ({"capacity": 0}, r"capacity=0 must lie in \[1, 1e6\]"),
        ({"width": 0}, r"width=0 must lie in \[1, 1e6\]"),
        ({"discount": 1.5}, r"discount=1.5 must lie in \[0, 1\]"),
        ({"target_rate": -0.1}, r"target_rate=-0.1 must lie in \[0, 1\]"),
        ({"learning_rate": lambda step: 0.0}, r"learning_rate\(0\)=0.0 must lie in \(0, inf\)"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        aggregate.improvable_gap_rl(**{"num_tasks": 2, "seed": 0, **SMALL, **options})


def test_losses_are_needed_and_must_be_as_many_as_tasks():
    with pytest.raises(ValueError, match="improvable_gap_rl needs the losses"):
        make().update(jnp.ones((2, 3)), None)
    with pytest.raises(ValueError, match="improvable_gap_rl was made for 2"):
        make().weights(jnp.ones(3), None)
