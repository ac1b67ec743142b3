"""The harness of the claims: tuning, pairing, intervals, resuming, and what the claims themselves must say."""

import importlib
import inspect
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats
from absl import flags
from absl.testing import flagsaver

from experiments.claims import __main__ as main_lib
from experiments.claims import harness, report, training


def arm(values, tried=1, **config):
    return harness.Arm(config, {"value": np.asarray(values, np.float64)}, tried)


# --- intervals and verdicts


def test_interval_of_many_differences_is_that_of_students_t():
    """The bootstrap of a mean of many nearly normal numbers must give the textbook's interval."""
    x = np.random.default_rng(0).normal(0.3, 2.0, 200)
    low, high = harness.interval(x)
    expected = scipy.stats.t.interval(0.95, len(x) - 1, x.mean(), x.std(ddof=1) / math.sqrt(len(x)))
    # 9999 resamples give the 2.5 % point with an error of about 2.5 % of the interval's half width.
    np.testing.assert_allclose((low, high), expected, atol=0.04 * (expected[1] - expected[0]))


@pytest.mark.parametrize("n", [3, 5, 10])
def test_interval_of_few_differences_covers_as_stated(n):
    """A plain percentile interval of 5 normal numbers covers the mean in about 83 % of the cases."""
    rng = np.random.default_rng(1)
    ends = [harness.interval(rng.normal(size=n)) for _ in range(150)]
    covered = np.mean([low <= 0 <= high for low, high in ends])
    # The resampled means never leave the range of the data, which covers a mean in 1 - 2^(1 - n) of the cases.
    expected = min(0.95, 1 - 2 ** (1 - n))
    assert covered >= expected - 2.6 * math.sqrt(expected * (1 - expected) / 150) - 0.03


def test_interval_of_equal_differences_is_a_point():
    assert harness.interval(np.full(5, 0.25)) == (0.25, 0.25)
    assert harness.interval(np.array([-1.0])) == (-1.0, -1.0)


@pytest.mark.parametrize(
    ("low", "high", "margin", "verdict"),
    [
        (0.1, 0.3, 0.0, "holds"),
        (-0.1, 0.3, 0.0, "inconclusive"),
        (-0.3, 0.0, 0.0, "does not hold"),
        (-0.3, 0.1, -0.5, "holds"),
        (0.1, 0.3, 0.2, "inconclusive"),
        (float("nan"), float("nan"), 0.0, "inconclusive"),
    ],
)
def test_verdict(low, high, margin, verdict):
    assert harness.Outcome((low + high) / 2, low, high, 5, "points", margin).verdict == verdict


def test_an_effect_is_positive_in_the_direction_claimed():
    a, b = arm([0.8, 0.9]), arm([0.6, 0.7])
    more = harness.compare(a, b, "value", better="more", unit="points", factor=100)
    less = harness.compare(a, b, "value", better="less", unit="points", factor=100)
    assert more.effect == pytest.approx(20)
    assert less.effect == pytest.approx(-20)
    assert (more.verdict, less.verdict) == ("holds", "does not hold")


def test_percent_is_the_ratio_of_geometric_means():
    outcome = harness.compare(
        arm([10, 40]), arm([20, 80]), "value", better="less", scale="percent", unit="% more steps"
    )
    assert (outcome.effect, outcome.low, outcome.high) == pytest.approx((100, 100, 100))


def test_pairing_ignores_what_both_sides_share():
    shared = np.array([0.0, 10.0, 20.0, 30.0, 40.0])
    outcome = harness.compare(
        arm(shared + 1), arm(shared + np.array([0, 0.1, 0, -0.1, 0])), "value", better="more", unit=""
    )
    assert 0.8 < outcome.low < 1 < outcome.high < 1.2


@pytest.mark.parametrize(
    ("method", "baseline", "options", "message"),
    [
        (
            arm([1], tried=3),
            arm([1], tried=2),
            {},
            "unequal budgets: 3 configurations of the method, 2 of the baseline",
        ),
        (arm([1, 2]), arm([1]), {}, r"value has shape \(2,\) and \(1,\)"),
        (arm([1, math.nan]), arm([1, 2]), {}, "value is not finite"),
        (arm([1, 2]), arm([1, 0]), {"scale": "percent"}, "must be positive"),
        (arm([1]), arm([1]), {"better": "mroe"}, "did you mean 'more'"),
        (arm([1]), arm([1]), {"scale": "percents"}, "did you mean 'percent'"),
    ],
)
def test_comparisons_that_would_be_unfair_are_refused(method, baseline, options, message):
    with pytest.raises(ValueError, match=message):
        harness.compare(method, baseline, "value", **({"better": "more", "unit": ""} | options))


# --- tuning


def test_the_best_configuration_wins_and_one_that_diverges_never_does():
    def run(config, key):
        return {"loss": jnp.where(config["x"] > 2.5, jnp.nan, (config["x"] - 2) ** 2 + jax.random.uniform(key))}

    best = harness.tune(run, {"x": [0.0, 2.0, 3.0]}, seeds=3, metric="loss", better="less")
    noise = [jax.random.uniform(jax.random.key(seed)) for seed in range(3)]
    assert best.config == {"x": 2.0}
    assert best.tried == 3
    np.testing.assert_allclose(best.metrics["loss"], noise, rtol=1e-6)


def test_with_and_without_vectorization_are_the_same():
    def run(config, key):
        return {"loss": config["a"] * jax.random.normal(key), "trace": config["b"] * jnp.arange(3.0)}

    grid = {"a": [1.0, 2.0], "b": [3.0]}
    fast, slow = (
        harness.tune(run, grid, seeds=2, metric="loss", better="more", vectorize=vectorize)
        for vectorize in (True, False)
    )
    assert (fast.config, fast.tried) == (slow.config, slow.tried)
    for name in ("loss", "trace"):
        np.testing.assert_allclose(fast.metrics[name], slow.metrics[name], rtol=1e-6)
    assert fast.metrics["trace"].shape == (2, 3)


def test_a_grid_without_values_or_seeds_is_refused():
    with pytest.raises(ValueError, match="without values"):
        harness.tune(lambda c, k: {}, {"x": []}, seeds=1, metric="loss", better="less")
    with pytest.raises(ValueError, match=r"seeds=0 must lie in \[1, inf\)"):
        harness.tune(lambda c, k: {}, {}, seeds=0, metric="loss", better="less")


# --- training


def test_minibatches_are_whole_permutations():
    indices = np.asarray(training.minibatches(jax.random.key(0), 10, 3, 7))
    assert indices.shape == (7, 3)
    for epoch in (indices[:3], indices[3:6]):
        assert len(set(epoch.ravel())) == 9
    assert not np.array_equal(indices[:3], indices[3:6])


def test_fit_is_the_loop_that_one_would_write():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)

    def loss(w, row):
        return 0.5 * jnp.sum((w - x[row]) ** 2)

    rows = jnp.array([0, 1, 2, 3])
    w, losses, measured = jax.jit(lambda w: training.fit(loss, w, optax.sgd(0.1, momentum=0.9), rows, measure=jnp.sum))(
        jnp.zeros(3)
    )
    expected, momentum = np.zeros(3), np.zeros(3)
    for i, row in enumerate(np.asarray(x, np.float64)):
        np.testing.assert_allclose(losses[i], 0.5 * np.sum((expected - row) ** 2), rtol=1e-5)
        momentum = 0.9 * momentum + (expected - row)
        expected = expected - 0.1 * momentum
        np.testing.assert_allclose(measured[i], expected.sum(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(w, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("norm", "axis"), [("batch", 0), ("layer", 1)])
def test_mlp_normalises_over_the_right_axis(norm, axis):
    params = training.mlp_init(jax.random.key(0), (3, 5, 2), norm=True)
    x = jax.random.normal(jax.random.key(1), (8, 3))
    seen = []
    training.mlp(params, x, norm=norm, activation=lambda h: seen.append(h) or h)
    np.testing.assert_allclose(seen[0].mean(axis), 0, atol=1e-6)
    np.testing.assert_allclose(seen[0].std(axis), 1, atol=1e-3)


def test_load_gives_flat_features_and_both_splits():
    task = training.load("digits")
    assert task.x.shape[1] == 64
    assert len(task.x) + len(task.x_test) == 1797
    assert len(task.y) == len(task.x)


# --- journal and page


ROW = report.Row("a_claim", "A beats B.", (harness.Outcome(1.5, 0.5, 2.5, 5, "points", 0.0, "A 3", "B 1.5"),), 2.0)
BAD = report.Row(
    "another", "C | D.", (harness.Outcome(-1, -2, -0.5, 3, "%", -0.1, part="loss", why="C is too small."),), 3.0
)


def test_the_journal_gives_back_what_was_written_and_survives_a_cut(tmp_path):
    path = tmp_path / "room.jsonl"
    journal = report.Journal(path)
    journal.add(ROW, "code")
    journal.add(BAD, "code")
    path.write_text(path.read_text()[:-20])  # died while writing the second
    again = report.Journal(path)
    assert again.get("a_claim", "code") == ROW
    assert again.get("a_claim", "other code") is None
    assert again.get("another", "code") is None
    again.add(BAD, "code")  # not onto the line that was cut
    assert report.Journal(path).get("another", "code") == BAD
    again.clear()
    assert again.get("a_claim", "code") is None


def test_the_page_grows_and_keeps_what_stood_there(tmp_path):
    page = tmp_path / "docs" / "reproductions.md"
    report.append("room", [ROW, BAD], page)
    first = page.read_text()
    report.append("other", [ROW], page)
    text = page.read_text()
    assert text.startswith(first)
    assert "## room: 1 holds, 1 does not hold, 0 inconclusive" in text
    assert (
        '| <a id="room-a_claim"></a>`a_claim`: A beats B. | A 3 | B 1.5 | +1.5 [+0.5, +2.5] points | 5 | 2 | holds |'
        in text
    )
    assert r'| <a id="room-another"></a>`another` (loss): C \| D. |' in text
    assert "- `another` (loss), does not hold: C is too small." in text
    assert "jax " in text
    for room in ("room", "other"):
        assert (tmp_path / "docs" / f"reproductions-{room}.png").stat().st_size > 1000


# --- the command


@pytest.fixture
def room(tmp_path, monkeypatch):
    """Runs the command over some claims, with its files in a temporary folder."""
    monkeypatch.setattr(report, "PAGE", tmp_path / "reproductions.md")
    if not flags.FLAGS.is_parsed():
        flags.FLAGS(["claims"])

    def run(claims, **values):
        monkeypatch.setattr(main_lib, "claims_of", lambda name: claims)
        with flagsaver.flagsaver(folder=str(tmp_path), **values):
            return main_lib._measure_room("optim")

    run.folder = tmp_path
    return run


def test_a_failing_claim_stops_no_other_and_only_it_is_measured_again(room, capsys):
    calls = []

    def good():
        """A beats B."""
        calls.append("good")
        return ROW.outcomes[0]

    def bad():
        """C beats D."""
        calls.append("bad")
        if calls.count("bad") == 1:
            raise RuntimeError("out of luck")
        return BAD.outcomes

    claims = {"bad": bad, "good": good}
    assert room(claims) is False
    assert "out of luck" in capsys.readouterr().err
    assert not (room.folder / "reproductions.md").exists()
    assert len((room.folder / "optim.jsonl").read_text().splitlines()) == 1
    assert room(claims) is True
    assert calls == ["bad", "good", "bad"]
    assert "A beats B." in (room.folder / "reproductions.md").read_text()
    assert not (room.folder / "optim.jsonl").exists()


def test_a_selection_is_printed_and_not_recorded(room, capsys):
    def good():
        """A beats B."""
        return ROW.outcomes[0]

    assert room({"good": good, "other": None}, only="goo") is True
    assert "holds" in capsys.readouterr().out
    assert list(room.folder.iterdir()) == []


# --- the claims themselves


CLAIMS = [(room, name, claim) for room in main_lib.ROOMS for name, claim in main_lib.claims_of(room).items()]


@pytest.mark.parametrize(("room", "name", "claim"), CLAIMS, ids=[name for _, name, _ in CLAIMS])
def test_a_claim_states_beforehand_what_would_count(room, name, claim):
    lines = [line.strip() for line in inspect.getdoc(claim).splitlines()]
    assert lines[0].endswith(".")
    for word in ("Direction:", "Metric:", "Budget:"):
        assert any(line.startswith(word) for line in lines), f"{room}.{name} says nothing of its {word}"
    assert not [p for p in inspect.signature(claim).parameters.values() if p.default is inspect.Parameter.empty]


@pytest.mark.parametrize("room", [room for room in main_lib.ROOMS if room != "quickstart"])
def test_every_module_of_a_room_is_registered(room):
    package = importlib.import_module(f"experiments.claims.{room}")
    folder = pathlib.Path(package.__file__).parent
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    registered = {claim.__module__.rsplit(".", 1)[1] for claim in main_lib.claims_of(room).values()}
    private = {name for name in modules if name.startswith("_")}
    assert registered == modules - private


def test_json_of_an_outcome_is_lossless():
    outcome = BAD.outcomes[0]
    assert harness.Outcome(**json.loads(json.dumps(outcome._asdict()))) == outcome
