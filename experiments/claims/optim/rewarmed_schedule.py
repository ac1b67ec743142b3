"""Re-warming the learning rate for a new domain, against going on at the low rate and against starting anew."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.claims import harness, language
from steelyard import optim

SEEDS = 3
PEAKS = (3e-3, 1e-2, 3e-2)
_AFTER = slice(language.STEPS + language.WARMUP, language.STEPS + language.WARMUP + 20)


def rewarmed_schedule() -> tuple[harness.Outcome, ...]:
    """Re-warming and re-decaying learns a new domain better than the low end rate and than a new start.

    Direction: loss on the new domain lower than with the end rate kept, and lower than from scratch on the new domain
    alone; in the first tens of steps after the re-warming both domains lose.
    Metric: held-out loss on the new domain after 150 steps on it, in percent; and the mean loss of the first 20 steps
    after the re-warming minus that before it, the smaller of the two domains' rises.
    Budget: 150 steps on Python source and 150 on other source with upper and lower case swapped, batch 8 of 64 bytes,
    transformer of one block and width 32, Adam with its state kept; peak rate 3e-3, 1e-2 or 3e-2 on each side (3
    configurations), end rate a tenth, warm-up 4 steps, 3 seeds. (First measured with two blocks and 2 x 200 steps,
    which took too long: the same verdicts.)
    """
    domains = language.load()
    n, warmup = language.STEPS, language.WARMUP

    def tune(phase_peaks, warmups, shares):
        def run(config, key):
            peak = config["peak"]
            phases = [n] * len(shares)
            schedule = optim.rewarmed_cosine_schedule(
                phase_peaks(peak), peak / 10, phase_steps=phases, warmup_steps=warmups
            )
            keys = jax.random.split(key, 2)[-len(shares) :]
            rows = [language.rows_of(k, n, share) for k, share in zip(keys, shares, strict=True)]
            return language.train(domains, schedule, jnp.concatenate(rows), key)

        return harness.tune(run, {"peak": PEAKS}, seeds=SEEDS, metric="end_b", better="less", vectorize=False)

    rewarmed = tune(lambda peak: [peak, peak], [warmup, warmup], [0.0, 1.0])
    low = tune(lambda peak: [peak, peak / 10], [warmup, 0], [0.0, 1.0])
    scratch = tune(lambda peak: [peak], [warmup], [1.0])
    rises = [np.mean(rewarmed.metrics[d][:, _AFTER], 1) - rewarmed.metrics[d][:, n - 1] for d in ("a", "b")]
    after = harness.Arm(rewarmed.config, {"rise": np.minimum(*rises)}, rewarmed.tried)
    before = harness.Arm({}, {"rise": np.zeros(SEEDS)}, rewarmed.tried)
    better = dict(better="less", scale="percent")
    return (
        harness.compare(
            rewarmed,
            low,
            "end_b",
            unit="% more loss otherwise",
            labels=("re-warmed", "end rate"),
            part="end rate",
            **better,
        ),
        harness.compare(
            rewarmed,
            scratch,
            "end_b",
            unit="% more loss otherwise",
            labels=("re-warmed", "scratch"),
            part="scratch",
            **better,
        ),
        harness.compare(
            after,
            before,
            "rise",
            better="more",
            unit="nats a byte",
            labels=("after", "before"),
            part="both rise",
            why="the new domain is so different here that its loss falls from its first steps on; the old one's rises.",
        ),
    )
