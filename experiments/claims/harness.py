"""How a claim is measured: two arms, tuned over equally many configurations, compared seed by seed.

A claim is a function without arguments whose docstring was written before it was first run. The first line says what
is claimed; lines that begin with `Direction:`, `Metric:` and `Budget:` say what would count as what. It returns an
`Outcome`, or a tuple of them. Training loops, data and small networks for claims are in `experiments.claims.training`,
a byte language model on two domains in `experiments.claims.language`.

Words: a *configuration* is a setting of the hyperparameters of one side, an *arm* is one side at its best
configuration, an *effect* is a paired difference, positive in the direction that the claim states.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.stats
from jaxtyping import Array, Float

from steelyard import choices

Run = Callable[[dict[str, Any], Any], Mapping[str, Array]]
Better = Literal["less", "more"]

VERDICTS = ("holds", "does not hold", "inconclusive")
_RESAMPLES = 9999


class Arm(NamedTuple):
    """One side of a comparison, at its best configuration.

    Attributes:
      config: that configuration.
      metrics: what `run` gave there: name -> array with a leading axis of seeds.
      tried: how many configurations were tried.
    """

    config: dict[str, Any]
    metrics: dict[str, Float[np.ndarray, "seeds ..."]]
    tried: int


class Outcome(NamedTuple):
    """What a claim came to. Effect, interval and margin are positive in the direction that is claimed.

    Attributes:
      effect: mean over seeds of the paired differences.
      low, high: ends of its 95% interval; equal to the effect for a deterministic claim.
      seeds: how many there were; 1 for a deterministic claim.
      unit: of the effect: "points of accuracy", "% fewer steps".
      margin: the claim holds if the interval lies above. 0 for "better"; negative for "not worse by more than that".
      method, baseline: the two sides in words, with their means and configurations.
      part: which part of the claim this is, where a claim has several.
      why: why it does not hold, in the judgement of who measured it.
    """

    effect: float
    low: float
    high: float
    seeds: int
    unit: str
    margin: float = 0.0
    method: str = ""
    baseline: str = ""
    part: str = ""
    why: str = ""

    @property
    def verdict(self) -> str:
        """ "holds" if the whole interval lies above the margin, "does not hold" if all of it lies at or below."""
        if self.low > self.margin:
            return "holds"
        return "does not hold" if self.high <= self.margin else "inconclusive"


def tune(
    run: Run,
    grid: Mapping[str, Sequence[Any]],
    *,
    seeds: int,
    metric: str,
    better: Better,
    vectorize: bool = True,
) -> Arm:
    """Runs all configurations of a grid with all seeds, and keeps the one whose mean over the seeds is best.

    Seed s gets the key `jax.random.key(s)`, on both sides of a comparison.

    Args:
      run: `(config, key) -> {name: array}`. Jitted once and vmapped over the seeds, with the numbers of `config`
        traced; with `vectorize=False` it is called once for each seed, with the values of the grid as they are.
      grid: name -> values to try; all combinations are tried. `{}` is one configuration without hyperparameters.
      seeds: how many.
      metric: the name of the scalar that decides. A value that is not finite counts as worst.
      better: whether less or more of it is better.
      vectorize: whether `run` can be traced.

    Returns:
      The best arm; the first on ties.

    Raises:
      ValueError: an unknown direction, no seeds, or an empty grid entry.
    """
    choices.require("better", better, ("less", "more"))
    choices.require_within("seeds", seeds, "[1, inf)")
    configs = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    if not configs:
        raise ValueError(f"grid={dict(grid)} has a hyperparameter without values")
    keys = jax.vmap(jax.random.key)(jnp.arange(seeds))
    vectorized = jax.jit(jax.vmap(run, (None, 0)))

    def run_all(config):
        if vectorize:
            results = vectorized({name: jnp.asarray(value, jnp.float32) for name, value in config.items()}, keys)
        else:
            results = jax.tree.map(lambda *rows: np.stack(rows), *[run(config, key) for key in keys])
        return {name: np.asarray(values, np.float64) for name, values in results.items()}

    trials = [run_all(config) for config in configs]
    best = min(range(len(configs)), key=lambda i: _cost(trials[i][metric], better))
    return Arm(configs[best], trials[best], len(configs))


def _cost(values: Float[np.ndarray, "seeds"], better: Better) -> float:
    if not np.all(np.isfinite(values)):
        return math.inf
    return float(values.mean() if better == "less" else -values.mean())


def compare(
    method: Arm,
    baseline: Arm,
    metric: str,
    *,
    better: Better,
    unit: str,
    scale: Literal["difference", "percent"] = "difference",
    margin: float = 0.0,
    factor: float = 1.0,
    labels: tuple[str, str] = ("method", "baseline"),
    part: str = "",
    why: str = "",
) -> Outcome:
    """The paired effect of a method over its baseline.

        difference:  d_s = factor (method_s - baseline_s)              effect = mean d
        percent:     d_s = log(method_s / baseline_s)                  effect = 100 (exp(mean d) - 1)

    with the sign of d turned where less is better: "percent" then says how many percent more the baseline needs.

    Args:
      method, baseline: the two arms.
      metric: name of a scalar of both.
      better: whether less or more of it is claimed.
      unit: of the effect, in words.
      scale: see above; "percent" needs positive values.
      margin: see `Outcome`.
      factor: from the metric's unit to that of the effect, such as 100 for points; for "difference".
      labels: the two sides in words.
      part: which part of the claim this is.
      why: why it does not hold, if it does not.

    Raises:
      ValueError: the arms tried different numbers of configurations or seeds; values that are not finite, or not
        positive for "percent"; an unknown direction or scale.
    """
    choices.require("better", better, ("less", "more"))
    choices.require("scale", scale, ("difference", "percent"))
    if method.tried != baseline.tried:
        raise ValueError(
            f"unequal budgets: {method.tried} configurations of the method, {baseline.tried} of the baseline"
        )
    a, b = method.metrics[metric], baseline.metrics[metric]
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"{metric} has shape {a.shape} and {b.shape}; both must be (seeds,)")
    if not (np.all(np.isfinite(a)) and np.all(np.isfinite(b))):
        raise ValueError(f"{metric} is not finite at the best configuration: {a} against {b}")
    if scale == "percent" and (a.min() <= 0 or b.min() <= 0):
        raise ValueError(f"{metric} must be positive for scale='percent': {a} against {b}")
    differences = np.log(a / b) if scale == "percent" else factor * (a - b)
    differences = -differences if better == "less" else differences
    ends = (differences.mean(), *interval(differences))
    if scale == "percent":
        ends = tuple(100 * math.expm1(end) for end in ends)
    sides = [_describe(label, arm, metric) for label, arm in zip(labels, (method, baseline), strict=True)]
    return Outcome(*map(float, ends), len(differences), unit, margin, *sides, part, why)


def exact(
    method: float, baseline: float, *, better: Better, unit: str, labels=("method", "baseline"), **options: Any
) -> Outcome:
    """The outcome of a deterministic claim, from one number a side; options as in `compare`."""
    arms = [Arm({}, {"value": np.asarray([value], np.float64)}, 1) for value in (method, baseline)]
    return compare(*arms, "value", better=better, unit=unit, labels=labels, **options)


def interval(differences: Float[np.ndarray, "seeds"], *, confidence: float = 0.95) -> tuple[float, float]:
    """The paired bootstrap's percentile interval of a mean, expanded for few seeds.

    A percentile interval of n differences is too narrow by the factor sqrt((n - 1) / n) z / t. Its percentiles are
    moved outwards to where a normal distribution would have the t interval: alpha' / 2 = Phi(-sqrt(n / (n - 1)) t).
    With one difference, or equal ones, it is a point.

    Source: What Teachers Should Know About the Bootstrap (2015, Hesterberg), section 3.3.
    """
    n = len(differences)
    if n == 1 or np.ptp(differences) == 0:
        return float(differences[0]), float(differences[0])
    t = scipy.stats.t.ppf((1 + confidence) / 2, n - 1)
    tail = scipy.stats.norm.cdf(-math.sqrt(n / (n - 1)) * t)
    rng = np.random.default_rng(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        result = scipy.stats.bootstrap(
            (differences,),
            np.mean,
            confidence_level=1 - 2 * tail,
            n_resamples=_RESAMPLES,
            method="percentile",
            rng=rng,
        )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _describe(label: str, arm: Arm, metric: str) -> str:
    values = arm.metrics[metric]
    spread = f" +- {values.std(ddof=1):.2g}" if len(values) > 1 else ""
    settings = ", ".join(f"{name}={_short(value)}" for name, value in arm.config.items())
    return f"{label} {values.mean():.4g}{spread}" + (f" ({settings})" if settings else "")


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else str(value)
