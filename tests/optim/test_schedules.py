"""Schedules against their formulas in float64, optax's own, and each other: exact at joints, traced and not."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from steelyard import optim

quick = hypothesis.settings(max_examples=25, deadline=None)

# Values of at most 1 that pass through fewer than ten float32 operations of half an ulp (6e-8) each.
FLOAT32 = {"rtol": 5e-7, "atol": 5e-7}


def values_of(schedule, steps):
    """The values of an array of counts, after checking that Python counts and traced ones give the same."""
    together = np.asarray(schedule(jnp.asarray(steps)))
    traced = jax.jit(jax.vmap(schedule))(jnp.asarray(steps))
    assert together.shape == (len(steps),)
    assert traced.dtype == together.dtype == jnp.float32
    # Compiled together, a product and a sum may be rounded once instead of twice.
    np.testing.assert_allclose(traced, together, rtol=2e-7, atol=2e-7)
    some = list(steps)[:: max(1, len(steps) // 4)]
    np.testing.assert_array_equal([float(schedule(int(s))) for s in some], together[:: max(1, len(steps) // 4)])
    return together


# --- Refinement -------------------------------------------------------------------------------------------------------


def refined_by_hand(norms, power):
    """The rule in loops, without smoothing."""
    weights = [norm**-power for norm in norms]
    rates = [w * sum(weights[t + 1 :]) for t, w in enumerate(weights)]
    return np.array(rates) / max(rates)


def smoothed_by_hand(norms, smoothing):
    """The running median in loops: the first value repeated before the start, mirror images after the end."""
    half = int(smoothing * len(norms)) // 2
    period = 2 * (len(norms) - 1)

    def at(t):
        t = max(t, 0) % period
        return norms[t if t < len(norms) else period - t]

    return [np.median([at(t + d) for d in range(-half, half + 1)]) for t in range(len(norms))]


norms_of_a_run = st.lists(st.floats(0.01, 100), min_size=2, max_size=40)


@quick
@hypothesis.given(norms_of_a_run, st.sampled_from(["inverse", "inverse_square"]))
def test_refined_values_are_the_rule(norms, weights):
    got = optim.refined_schedule_values(norms, weights=weights, smoothing=0.0)
    np.testing.assert_allclose(got, refined_by_hand(norms, 1 if weights == "inverse" else 2), rtol=1e-12)
    assert got.dtype == np.float64
    assert got.max() == 1
    assert got[-1] == 0


@quick
@hypothesis.given(norms_of_a_run, st.floats(0, 1))
def test_smoothing_is_a_running_median(norms, smoothing):
    expected = refined_by_hand(smoothed_by_hand(norms, smoothing), 2)
    np.testing.assert_allclose(optim.refined_schedule_values(norms, smoothing=smoothing), expected, rtol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("weights", ["inverse", "inverse_square"])
def test_constant_norms_give_linear_decay_exactly(smoothing, weights):
    steps = 37
    got = optim.refined_schedule_values(np.full(steps, 0.3), smoothing=smoothing, weights=weights)
    np.testing.assert_array_equal(got, (steps - 1 - np.arange(steps)) / (steps - 1))


def test_refinement_worked_by_hand():
    # w = (1, 1, 1/4), what comes after = (5/4, 1/4, 0), product over its largest = (1, 1/5, 0).
    np.testing.assert_array_equal(optim.refined_schedule_values([1, 1, 2], smoothing=0), [1.0, 0.2, 0.0])


def test_large_norms_at_first_give_a_warmup_and_the_scale_does_not_matter():
    norms = np.concatenate([np.linspace(10, 1, 10), np.ones(90)])
    got = optim.refined_schedule_values(norms)
    assert np.all(np.diff(got[:9]) > 0)
    assert np.all(np.diff(got[15:]) < 0)
    for scale in (1e-200, 1e200):
        np.testing.assert_allclose(optim.refined_schedule_values(scale * norms), got, rtol=1e-12)


def test_refined_schedule_holds_zero_after_the_end():
    norms = [3.0, 1.0, 2.0, 1.5]
    expected = 0.5 * optim.refined_schedule_values(norms, smoothing=0.0)
    schedule = optim.refined_schedule(norms, peak_value=0.5, smoothing=0.0)
    np.testing.assert_array_equal(values_of(schedule, [0, 1, 2, 3, 4, 10**6]), np.float32([*expected, 0, 0]))
    traced = jax.jit(lambda peak: optim.refined_schedule(norms, peak_value=peak, smoothing=0.0)(1))
    np.testing.assert_allclose(traced(0.5), expected[1], rtol=1e-6)


def test_a_resampled_schedule_keeps_its_shape():
    """The recipe of the docstring, on the line that constant norms give."""
    values = optim.refined_schedule_values(np.ones(5))
    resampled = np.interp(np.linspace(0, 1, 9), np.linspace(0, 1, len(values)), values)
    np.testing.assert_allclose(resampled, np.linspace(1, 0, 9), atol=1e-15)


# --- Re-warming -------------------------------------------------------------------------------------------------------


def rewarmed_by_hand(step, peaks, end, phases, warmups, init):
    start, first = 0, init
    for peak, steps, warmup in zip(peaks, phases, warmups, strict=True):
        k = step - start
        if k < steps:
            if k < warmup:
                return first + (peak - first) * k / warmup
            return end + (peak - end) * (1 + math.cos(math.pi * (k - warmup) / (steps - warmup))) / 2
        start, first = start + steps, end
    return end


# Steps, the part of them that is warm-up, and the peak of each of three phases.
three_phases = st.lists(st.tuples(st.integers(1, 30), st.floats(0, 0.99), st.floats(0.1, 1)), min_size=3, max_size=3)


@quick
@hypothesis.given(three_phases)
def test_rewarmed_is_the_rule(phases):
    steps, parts, peaks = zip(*phases, strict=True)
    warmups = [int(part * n) for part, n in zip(parts, steps, strict=True)]
    schedule = optim.rewarmed_cosine_schedule(peaks, 0.05, phase_steps=steps, warmup_steps=warmups, init_value=0.01)
    expected = [rewarmed_by_hand(t, peaks, 0.05, steps, warmups, 0.01) for t in range(100)]
    np.testing.assert_allclose(schedule(jnp.arange(100)), expected, **FLOAT32)


@pytest.mark.parametrize("warmup", [0, 7])
def test_one_phase_is_optax_warmup_cosine(warmup):
    ours = optim.rewarmed_cosine_schedule(0.3, 0.03, phase_steps=[40], warmup_steps=warmup, init_value=0.1)
    theirs = optax.warmup_cosine_decay_schedule(0.1, 0.3, warmup, 40, 0.03)
    counts = jnp.arange(60)
    np.testing.assert_allclose(values_of(ours, counts), jax.vmap(theirs)(counts), **FLOAT32)


def test_rewarming_worked_by_hand():
    schedule = optim.rewarmed_cosine_schedule(1.0, 0.1, phase_steps=(10, 10), warmup_steps=2)
    # The second phase starts at the end value, is halfway up a step later, and at the peak after two.
    np.testing.assert_array_equal(values_of(schedule, [10, 11, 12]), np.float32([0.1, 0.55, 1.0]))
    np.testing.assert_array_equal(values_of(schedule, [0, 2, 20, 21, 10**9]), np.float32([0, 1, 0.1, 0.1, 0.1]))


def test_without_warmup_the_phase_starts_at_its_peak():
    schedule = optim.rewarmed_cosine_schedule([0.7, 0.3], 0.1, phase_steps=(5, 5), init_value=0.2)
    np.testing.assert_array_equal(values_of(schedule, [0, 5, 10]), np.float32([0.7, 0.3, 0.1]))


def test_rewarming_is_continuous():
    """Stretched a thousandfold, no step is larger than the steepest slope allows: (pi / 2) range / shortest piece."""
    schedule = optim.rewarmed_cosine_schedule(1.0, 0.1, phase_steps=(8000, 12000), warmup_steps=1000)
    steps = np.abs(np.diff(np.asarray(schedule(jnp.arange(20_001)))))
    assert steps.max() <= 1.0 / 1000 + 1e-6


def test_late_counts_lose_nothing():
    """2^24 + 1 is no float32; counts are subtracted as integers first."""
    late = 2**24
    schedule = optim.rewarmed_cosine_schedule(1.0, 0.0, phase_steps=(late, 8), warmup_steps=4)
    np.testing.assert_array_equal(values_of(schedule, [late, late + 1, late + 3]), [0.0, 0.25, 0.75])


# --- Infinite schedules -----------------------------------------------------------------------------------------------

PEAK, CONSTANT, END = 0.3, 0.15, 0.01


def infinite(**options):
    defaults = dict(warmup_steps=10, cooldown_steps=20, anneal_start=50, anneal_steps=10, init_value=0.05)
    return optim.infinite_schedule(PEAK, CONSTANT, END, **(defaults | options))


def infinite_by_hand(t, cooldown, steepness):
    if t < 10:
        return 0.05 + (PEAK - 0.05) * t / 10
    if t < 30:
        x = (t - 10) / 20
        if cooldown == "cosine":
            return CONSTANT + (PEAK - CONSTANT) * (1 + math.cos(math.pi * x)) / 2
        return PEAK + (CONSTANT - PEAK) * (1 / math.sqrt(1 + steepness * x) - 1) / (1 / math.sqrt(1 + steepness) - 1)
    return CONSTANT * (END / CONSTANT) ** (min(max(t - 50, 0), 10) / 10)


@pytest.mark.parametrize(("cooldown", "steepness"), [("inverse_sqrt", 10.0), ("inverse_sqrt", 0.5), ("cosine", 10.0)])
def test_infinite_is_the_rule(cooldown, steepness):
    counts = range(80)
    got = values_of(infinite(cooldown=cooldown, steepness=steepness), counts)
    np.testing.assert_allclose(got, [infinite_by_hand(t, cooldown, steepness) for t in counts], **FLOAT32)


@pytest.mark.parametrize("cooldown", ["inverse_sqrt", "cosine"])
def test_infinite_is_exact_at_its_joints(cooldown):
    counts = [0, 10, 30, 40, 49, 50, 60, 61, 10**9]
    expected = [0.05, PEAK, CONSTANT, CONSTANT, CONSTANT, CONSTANT, END, END, END]
    np.testing.assert_array_equal(values_of(infinite(cooldown=cooldown), counts), np.float32(expected))


def test_infinite_worked_by_hand():
    schedule = optim.infinite_schedule(3e-4, 1.5e-4, 1e-5, warmup_steps=10, cooldown_steps=5)
    np.testing.assert_allclose(schedule(5), 1.5e-4, rtol=2e-7)
    # Halfway through the annealing stands the geometric mean.
    np.testing.assert_allclose(infinite()(55), math.sqrt(CONSTANT * END), rtol=5e-7)


def test_without_a_start_of_the_annealing_the_constant_stays():
    schedule = infinite(anneal_start=None, anneal_steps=0)
    np.testing.assert_array_equal(values_of(schedule, [30, 1000, 2**30]), np.float32([CONSTANT] * 3))


def test_pieces_of_no_length_are_jumps():
    no_warmup = infinite(warmup_steps=0)
    np.testing.assert_array_equal(values_of(no_warmup, [0, 20]), np.float32([PEAK, CONSTANT]))
    no_cooldown = infinite(cooldown_steps=0)
    np.testing.assert_array_equal(values_of(no_cooldown, [0, 10, 11]), np.float32([0.05, CONSTANT, CONSTANT]))
    neither = infinite(warmup_steps=0, cooldown_steps=0, anneal_start=0)
    np.testing.assert_array_equal(values_of(neither, [0, 10]), np.float32([CONSTANT, END]))


def test_inverse_sqrt_cooldown_is_convex_and_with_little_steepness_a_line():
    x = np.arange(10, 31)
    steep = np.asarray(infinite()(jnp.asarray(x)), np.float64)
    # Second differences of values near 0.3 that are rounded to 2^-26 and off by a few roundings.
    assert np.all(np.diff(steep, 2) > -1e-7)
    line = PEAK + (CONSTANT - PEAK) * (x - 10) / 20
    # h(x) / h(1) differs from x by at most steepness 3 / 16.
    np.testing.assert_allclose(infinite(steepness=1e-6)(jnp.asarray(x)), line, **FLOAT32)


# --- One cycle --------------------------------------------------------------------------------------------------------


def test_one_cycle_momentum_at_its_breakpoints():
    for steps in (10, 97, 1000):
        schedule = optim.one_cycle_momentum_schedule(steps)
        counts = [0, int(0.3 * steps), int(0.85 * steps), steps, 10 * steps]
        np.testing.assert_array_equal(values_of(schedule, counts), np.float32([0.95, 0.85, 0.95, 0.95, 0.95]))


@pytest.mark.parametrize("steps", [2, 3, 20, 101])
def test_one_cycle_momentum_mirrors_optax_learning_rate(steps):
    """optax's linear cycle, scaled to 0 at its ends and 1 at its peak, is one minus ours until the cycle is closed."""
    for start, final in ((0.3, 0.85), (0.5, 0.7), (0.0, 0.9)):
        counts = jnp.arange(int(final * steps))
        if int(start * steps) == len(counts):
            continue  # optax keeps one of two equal breakpoints, and so loses the peak
        rates = optax.linear_onecycle_schedule(steps, 2.0, start, final, div_factor=2.0)
        schedule = optim.one_cycle_momentum_schedule(
            steps, peak_value=0.5, valley_value=0.25, pct_start=start, pct_final=final
        )
        risen = jax.vmap(rates)(counts) - 1.0
        np.testing.assert_allclose(schedule(counts), 0.5 - 0.25 * risen, **FLOAT32)


def test_one_cycle_drives_sgd():
    rates, momenta = optax.linear_onecycle_schedule(10, 0.1), optim.one_cycle_momentum_schedule(10)
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=rates, momentum=momenta)
    state, update = tx.init(jnp.ones(2)), jax.jit(tx.update)
    for t in range(10):
        _, state = update(jnp.ones(2), state)
        np.testing.assert_allclose(state.hyperparams["momentum"], momenta(t), rtol=2e-7)
    assert update._cache_size() == 1


# --- Regime adaptation ------------------------------------------------------------------------------------------------


def test_adapt_regime():
    assert optim.adapt_regime(0.1, (80, 120), batch_size=512, base_batch_size=128) == (0.2, (320.0, 480.0))
    lr, boundaries = optim.adapt_regime(0.1, (80, 120), batch_size=32, base_batch_size=128, adapt_updates=False)
    assert (lr, boundaries) == (0.05, (80.0, 120.0))
    assert optim.adapt_regime(0.1, (), batch_size=7, base_batch_size=7) == (0.1, ())
    # The number of updates before a boundary, epochs * examples / batch, is the same.
    _, (stretched,) = optim.adapt_regime(0.1, [60], batch_size=4096, base_batch_size=128)
    assert stretched * 50_000 / 4096 == 60 * 50_000 / 128


# --- Everywhere -------------------------------------------------------------------------------------------------------


def test_schedules_drive_optimizers_without_recompilation():
    for schedule in (
        optim.refined_schedule([2.0, 1.0, 1.0], smoothing=0.0),
        optim.rewarmed_cosine_schedule(0.1, 0.01, phase_steps=(3, 3), warmup_steps=1),
        infinite(),
    ):
        tx = optax.sgd(schedule)
        state, update = tx.init(jnp.ones(2)), jax.jit(tx.update)
        for t in range(4):
            updates, state = update(jnp.ones(2), state)
            np.testing.assert_allclose(updates, -float(schedule(t)), rtol=1e-6, atol=1e-8)
        assert update._cache_size() == 1


def test_values_may_be_traced():
    def values(peak, end):
        rewarmed = optim.rewarmed_cosine_schedule([peak, 2 * peak], end, phase_steps=(4, 4), warmup_steps=1)
        infinite = optim.infinite_schedule(
            peak, 0.5 * peak, end, warmup_steps=2, cooldown_steps=2, anneal_start=6, anneal_steps=2
        )
        one_cycle = optim.one_cycle_momentum_schedule(8, peak_value=peak, valley_value=end)
        return [schedule(jnp.arange(9)) for schedule in (rewarmed, infinite, one_cycle)]

    for traced, plain in zip(jax.jit(values)(0.4, 0.1), values(0.4, 0.1), strict=True):
        np.testing.assert_allclose(traced, plain, rtol=1e-6, atol=1e-7)


def test_schedules_in_float64():
    with jax.enable_x64():
        counts = jnp.arange(0, 80)
        expected = [infinite_by_hand(t, "inverse_sqrt", 10.0) for t in range(80)]
        np.testing.assert_allclose(infinite()(counts), expected, rtol=1e-14)
        refined = optim.refined_schedule([3.0, 1.0, 2.0], smoothing=0.0)(jnp.arange(3))
        np.testing.assert_allclose(refined, refined_by_hand([3.0, 1.0, 2.0], 2), rtol=1e-15)


def refuse_refined(**change):
    optim.refined_schedule(**({"grad_norms": [1.0, 2.0]} | change))


def refuse_rewarmed(**change):
    optim.rewarmed_cosine_schedule(**({"peak_value": 1.0, "end_value": 0.1, "phase_steps": (5, 5)} | change))


def refuse_cycle(**change):
    optim.one_cycle_momentum_schedule(**({"transition_steps": 10} | change))


def refuse_infinite(**change):
    values = dict(peak_value=1.0, constant_value=0.5, end_value=0.1, warmup_steps=5, cooldown_steps=5)
    optim.infinite_schedule(**(values | change))


def refuse_regime(**change):
    optim.adapt_regime(**(dict(learning_rate=0.1, boundaries=[1], batch_size=8, base_batch_size=8) | change))


@pytest.mark.parametrize(
    ("make", "change", "text"),
    [
        (refuse_refined, {"weights": "inverse_squared"}, "did you mean 'inverse_square'"),
        (refuse_refined, {"smoothing": -0.1}, r"smoothing=-0.1 must lie in \[0, 1\]"),
        (refuse_refined, {"smoothing": 1.5}, r"smoothing=1.5 must lie in \[0, 1\]"),
        (refuse_refined, {"peak_value": -1.0}, "peak_value=-1.0"),
        (refuse_refined, {"grad_norms": [1.0]}, r"grad_norms has shape \(1,\)"),
        (refuse_refined, {"grad_norms": np.ones((2, 2))}, r"grad_norms has shape \(2, 2\)"),
        (refuse_refined, {"grad_norms": [1.0, 0.0]}, r"grad_norms\[1\]=0.0 must lie in \(0, inf\)"),
        (refuse_refined, {"grad_norms": [1.0, 2.0, math.inf]}, r"grad_norms\[2\]=inf"),
        (refuse_refined, {"grad_norms": [math.nan, 2.0]}, r"grad_norms\[0\]=nan"),
        (refuse_rewarmed, {"phase_steps": ()}, r"phase_steps=\(\)"),
        (refuse_rewarmed, {"phase_steps": (5, 0)}, r"phase_steps=0 must lie in \[1, inf\)"),
        (refuse_rewarmed, {"warmup_steps": 5}, r"warmup_steps=5 must lie in \[0, 5\)"),
        (refuse_rewarmed, {"warmup_steps": -1}, r"warmup_steps=-1 must lie in \[0, 5\)"),
        (refuse_rewarmed, {"warmup_steps": [1, 2, 3]}, "warmup_steps=.* has 3 entries for 2 phases"),
        (refuse_rewarmed, {"peak_value": [1.0]}, "peak_value=.* has 1 entries for 2 phases"),
        (refuse_rewarmed, {"end_value": -0.1}, "end_value=-0.1"),
        (refuse_rewarmed, {"init_value": -0.1}, "init_value=-0.1"),
        (refuse_infinite, {"cooldown": "cosin"}, "did you mean 'cosine'"),
        (refuse_infinite, {"anneal_start": 9, "anneal_steps": 3}, r"anneal_start=9 must lie in \[10, inf\)"),
        (refuse_infinite, {"anneal_start": 10}, r"anneal_steps=0 must lie in \[1, inf\)"),
        (refuse_infinite, {"end_value": 0.0}, r"end_value=0.0 must lie in \(0, inf\)"),
        (refuse_infinite, {"constant_value": 0.0}, r"constant_value=0.0 must lie in \(0, inf\)"),
        (refuse_infinite, {"steepness": 0.0}, r"steepness=0.0 must lie in \(0, inf\)"),
        (refuse_infinite, {"warmup_steps": -1}, "warmup_steps=-1"),
        (refuse_infinite, {"cooldown_steps": -1}, "cooldown_steps=-1"),
        (refuse_infinite, {"peak_value": -1.0}, "peak_value=-1.0"),
        (refuse_cycle, {"transition_steps": 1}, r"transition_steps=1 must lie in \[2, inf\)"),
        (refuse_cycle, {"pct_start": 0.9}, r"pct_start=0.9 must lie in \[0, 0.85\)"),
        (refuse_cycle, {"pct_final": 1.5}, r"pct_final=1.5 must lie in \(0, 1\]"),
        (refuse_cycle, {"peak_value": 1.0}, r"peak_value=1.0 must lie in \[0, 1\)"),
        (refuse_cycle, {"valley_value": -0.1}, r"valley_value=-0.1 must lie in \[0, 1\)"),
        (refuse_regime, {"batch_size": 0}, r"batch_size=0 must lie in \[1, inf\)"),
        (refuse_regime, {"base_batch_size": 0}, r"base_batch_size=0 must lie in \[1, inf\)"),
        (refuse_regime, {"learning_rate": -1.0}, "learning_rate=-1.0"),
        (refuse_regime, {"boundaries": [10, -1]}, "boundaries=-1"),
    ],
)
def test_refuses(make, change, text):
    with pytest.raises(ValueError, match=text):
        make(**change)
