"""What it costs to weigh K losses: memory of each driver, and the time of a step under every rule."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import tqdm

from experiments.bench import page, settings, timing
from steelyard import aggregate, train

PyTree = Any
_MEMORY_COUNTS = (2, 8, 16)
_TIME_COUNTS = (2, 4, 8, 16)


class Rule(NamedTuple):
    """A rule that is timed.

    Attributes:
      make: `K -> aggregator`.
      mode: the driver.
      least: the smallest K for which it is possible.
    """

    make: Callable[[int], optax.GradientTransformation]
    mode: str = "auto"
    least: int = 1


def _of_any_count(name: str) -> Rule:
    return Rule(lambda count: getattr(aggregate, name)())


def rules() -> dict[str, Rule]:
    """Every rule, by name; the first is what the others are compared with."""
    any_count = {
        name: _of_any_count(name) for name in ("mgda", "pcgrad", "cagrad", "nash", "conflict_free", "class_normalized")
    }
    by_count = {
        name: Rule(getattr(aggregate, name))
        for name in (
            "uncertainty_weighting",
            "softmax_weighting",
            "normalized_loss_balance",
            "group_dro",
            "gradnorm",
            "momentum_conflict_free",
        )
    }
    in_epochs = {
        name: Rule(functools.partial(getattr(aggregate, name), steps_per_epoch=10))
        for name in ("dynamic_weight_average", "improvable_gap", "improvable_gap_rl")
    }
    robust = {name: _of_any_count(name) for name in ("median", "geometric_median", "centered_clip", "flag")}
    return {
        "mean": Rule(lambda count: aggregate.mean()),
        "mean, stacked": Rule(lambda count: aggregate.mean(), "stacked"),
        "mean, lean": Rule(lambda count: aggregate.mean(), "lean"),
        "static": Rule(lambda count: aggregate.static(jnp.arange(1.0, count + 1) / count)),
        **by_count,
        **in_epochs,
        "domain_penalty": Rule(lambda count: aggregate.domain_penalty(count, steps_per_epoch=10)),
        **any_count,
        "conflict_free, lean": Rule(lambda count: aggregate.conflict_free(), "lean"),
        "svd_reweight": Rule(lambda count: aggregate.svd_reweight(1)),
        "loss_balancer": Rule(lambda count: aggregate.loss_balancer([1.0] * count, per_example=False)),
        **robust,
        "trimmed_mean": Rule(lambda count: aggregate.trimmed_mean((count - 1) // 4)),
        "krum": Rule(lambda count: aggregate.krum((count - 3) // 2), least=3),
        "nearest_neighbor": Rule(lambda count: aggregate.nearest_neighbor((count - 1) // 4)),
        "worker_momentum, mean": Rule(lambda count: optax.chain(aggregate.worker_momentum(count), aggregate.mean())),
        "ef21, top 1 %": Rule(lambda count: aggregate.ef21(count, aggregate.top_k(1000))),
    }


def bench() -> None:
    """Measures both tables, prints them and writes them to the page."""
    memory = _memory_rows({"ViT": settings.vit(), "transformer": settings.transformer()})
    times = _time_rows(settings.perceptron())
    memory_header = ["model", "driver", *(f"K = {count}" for count in _MEMORY_COUNTS)]
    time_header = ["rule", *(f"K = {count}" for count in _TIME_COUNTS)]
    for row in [memory_header, *memory, time_header, *times]:
        print("  " + f"{row[0]:<28}" + "".join(f"{cell:>12}" for cell in row[1:]), flush=True)
    page.write(
        "aggregate",
        [
            *_MEMORY.strip().splitlines(),
            "",
            *page.table(memory_header, memory),
            "",
            *_TIME.strip().splitlines(),
            "",
            *page.table(time_header, times),
        ],
    )


_MEMORY = """
Memory of a compiled train step with K losses (the examples of a batch dealt out to K domains), as a ratio to the step
with one loss: arguments, results and temporaries, by the compiler's own analysis on this machine, under
`conflict_free`. The ViT is the quickstart's, the transformer that of `configs/language.py`.
"""
_TIME = """
Time of a train step under every rule of the room, as a ratio to uniform weights, `mean()`, with the same K losses;
medians of rounds in which all take turns. A rule on losses alone takes one backward pass, the others K ("stacked")
unless it says "lean". The model is a perceptron of 0.3 million parameters on batches of 128 digits, with Adam: where a
step of the model takes longer, what the rules themselves compute counts for less. K = 2 is too few for `krum`.
"""


def domains(losses: Callable, count: int) -> Callable:
    """The one loss of a task as `count` losses, of every count-th example each: their mean is the loss."""

    def split(outputs, batch):
        (loss,) = losses(outputs, batch).values()
        domain = (jnp.arange(loss.shape[0]) % count).reshape(-1, *(1,) * (loss.ndim - 1))
        return {f"domain {k}": jnp.where(domain == k, count * loss, 0) for k in range(count)}

    return split


def _step(setting: settings.Setting, losses: Callable, **options: Any) -> tuple[Callable, train.TrainState]:
    tx = optax.adam(1e-3)
    step = jax.jit(train.make_step(setting.task.forward, losses, tx, **options), donate_argnums=0)
    return step, train.init_state(setting.params, tx, rng=jax.random.key(1), aggregator=options.get("aggregator"))


def peak_bytes(setting: settings.Setting, losses: Callable, **options: Any) -> int:
    """Arguments, results and temporaries of a compiled step; donated arguments count once."""
    step, state = _step(setting, losses, **options)
    used = step.lower(state, setting.batch).compile().memory_analysis()
    together = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
    return together - used.alias_size_in_bytes


def _memory_rows(chosen: dict[str, settings.Setting]) -> list[list[str]]:
    rows = []
    for name, setting in chosen.items():
        single = peak_bytes(setting, setting.task.losses)
        for mode in ("lean", "stacked"):
            used = [
                peak_bytes(
                    setting, domains(setting.task.losses, count), aggregator=aggregate.conflict_free(), mode=mode
                )
                for count in tqdm.tqdm(_MEMORY_COUNTS, desc=f"{name}, {mode}", disable=None, leave=False)
            ]
            rows.append([name, mode, *(f"{x / single:.2f}" for x in used)])
    return rows


def _time_rows(setting: settings.Setting) -> list[list[str]]:
    timings = {count: _timings(setting, count) for count in _TIME_COUNTS}
    return [
        [
            f"`{name}`",
            *(f"{timings[count][name].ratio:.2f}" if name in timings[count] else "" for count in _TIME_COUNTS),
        ]
        for name in rules()
    ]


def _timings(setting: settings.Setting, count: int) -> dict[str, timing.Timing]:
    candidates = {}
    for name, rule in rules().items():
        if count >= rule.least:
            options = {"aggregator": rule.make(count), "mode": rule.mode}
            step, state = _step(setting, domains(setting.task.losses, count), **options)
            candidates[name] = timing.stepper(step, state, setting.batch)
    print(f"  K = {count}: {len(candidates)} rules", flush=True)
    return timing.ratios(candidates, rounds=5)
