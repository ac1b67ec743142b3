"""The benchmarks' own machinery: taking turns, and the page that keeps what came out."""

import jax
import jax.numpy as jnp
import pytest

from experiments.bench import optim, page, timing


def test_ratios_are_to_the_first_of_the_same_round(monkeypatch):
    """On a clock of our own: the machine slows down from round to round, and the ratio stays."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def candidate(seconds):
        def run(count):
            now[0] += seconds * count * (1 + now[0])

        return run

    timings = timing.ratios({"one": candidate(1e-4), "three": candidate(3e-4)}, rounds=3, seconds=2e-4)
    assert timings["one"].ratio == 1
    # Between two turns of a round the clock slows by less than a thousandth.
    assert timings["three"].ratio == pytest.approx(3, rel=2e-3)
    assert timings["three"].seconds == pytest.approx(3e-4, rel=1e-2)


def test_a_stepper_leaves_the_given_state_alone():
    step = jax.jit(lambda state, batch: (state + batch, None), donate_argnums=0)
    state = jnp.zeros(3)
    timing.stepper(step, state, jnp.ones(3))(4)
    assert state.tolist() == [0, 0, 0]


def test_the_page_keeps_the_parts_of_other_rooms(tmp_path):
    path = tmp_path / "docs" / "performance.md"
    page.write("one", ["first"], path)
    page.write("two", ["second"], path)
    page.write("one", ["third"], path)
    text = path.read_text()
    assert text.count("## one") == text.count("## two") == 1
    assert text.index("third") < text.index("second")
    assert "first" not in text
    assert text.startswith("# Performance")


def test_the_tree_that_is_timed_has_25_million_parameters():
    shapes = jax.eval_shape(optim._transformer_tree)
    assert 24e6 < sum(leaf.size for leaf in jax.tree.leaves(shapes)) < 26e6
