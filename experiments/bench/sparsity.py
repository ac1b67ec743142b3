"""What masks cost: a train step of every sparse method against the dense step, with and without a refresh."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.bench import page, settings, timing
from steelyard import optim, reparam, train, tree

PyTree = Any

LIMIT = 1.10  # of a step of the transformer whose masks are refreshed every 10 steps
_EVERY = 10
_DUE, _BETWEEN = 10, 11  # steps at which masks are refreshed, and are not


class Case(NamedTuple):
    """A sparse method.

    Attributes:
      make: `interval -> Reparam or None` with masks refreshed at that interval.
      tx: makes the optimizer.
      refreshes: whether there is something to refresh.
    """

    make: Callable[[int], reparam.Reparam | None]
    tx: Callable[[], optax.GradientTransformation] = lambda: optim.sparse(optax.adam(1e-3))
    refreshes: bool = True


def cases() -> dict[str, Case]:
    """What is measured, by name; the first is what the others are compared with."""

    def pruned(**options):
        return Case(lambda every: reparam.pruned(0.9, every=every, **options))

    def nm(recipe):
        return Case(lambda every: reparam.nm_sparse(2, 4, recipe=recipe, refresh_every=every), lambda: optax.adam(1e-3))

    def dynamic(grow):
        return Case(lambda every: reparam.dynamic_sparse(sparsity=0.9, grow=grow, every=every, end=10**6))

    def masked(params):
        return jax.tree.map(lambda w: jnp.abs(w) > 0.01 if w.ndim > 1 else None, params)

    return {
        "dense": Case(lambda every: None, lambda: optax.adam(1e-3), refreshes=False),
        "masked, fixed masks": Case(lambda every: reparam.masked(masked), refreshes=False),
        "pruned, magnitude": pruned(),
        "pruned, magnitude, chain": pruned(backward="chain"),
        "pruned, magnitude, packed": pruned(packed=True),
        "pruned, saliency": pruned(score="saliency"),
        "pruned, random": pruned(score="random"),
        "pruned, global": pruned(allocation="global"),
        "pruned, Erdos-Renyi": pruned(allocation="erdos_renyi"),
        "pruned, 2:4": pruned(pattern="2:4"),
        "pruned, blocks of 4 x 4": pruned(pattern="block:4x4"),
        "pruned, channels": pruned(pattern="channel"),
        "nm_sparse, ste": nm("ste"),
        "nm_sparse, sr_ste": nm("sr_ste"),
        "nm_sparse, mdgf_exponential": nm("mdgf_exponential"),
        "dynamic_sparse, static": Case(lambda every: reparam.dynamic_sparse(sparsity=0.9), refreshes=False),
        "dynamic_sparse, random": dynamic("random"),
        "dynamic_sparse, gradient": dynamic("gradient"),
        "soft_shrinkage, in every step": Case(
            lambda every: None, lambda: optax.chain(optax.adam(1e-3), optim.soft_shrinkage(0.9)), refreshes=False
        ),
    }


def bench() -> None:
    """Measures both models, prints and writes the table."""
    chosen = {
        "transformer": settings.transformer(width=512, depth=8, mlp_width=1376, batch=8),
        "ViT": settings.vit(),
    }
    results = {
        name: _measure(name, setting, rounds=3 if name == "transformer" else 9) for name, setting in chosen.items()
    }
    rows = [[f"`{name}`", *(cell for result in results.values() for cell in result[name])] for name in cases()]
    header = ["step", *(f"{model}, {kind}" for model in chosen for kind in ("between", "every 10", "every step"))]
    sizes = ", ".join(f"{name} {tree.size(setting.params) / 1e6:.1f} million" for name, setting in chosen.items())
    page.write(
        "sparsity", [*_EXPLANATION.format(sizes=sizes, limit=LIMIT).strip().splitlines(), "", *page.table(header, rows)]
    )


_EXPLANATION = """
A train step with Adam under masks as a ratio to the dense step, medians of rounds in which all take turns; parameters:
{sizes}. "between": no refresh; "every step": masks are refreshed in this step; "every 10": nine of the first and one of
the second. At most {limit:.2f} is wanted of "every 10" on the transformer (rows of 8 x 128 bytes). Methods without
masks to refresh have one number. 90 % are removed where the pattern does not say; the default of `nm_sparse` keeps no
mask and computes it anew in every step.
"""


def _measure(name: str, setting: settings.Setting, *, rounds: int) -> dict[str, tuple[str, str, str]]:
    candidates: dict[str, timing.Steps] = {}
    for case_name, case in cases().items():
        candidates |= _candidates(case_name, case, setting)
    timings = timing.ratios(candidates, rounds=rounds)
    print(f"  {name}: {1e3 * timings['dense'].seconds:.1f} ms for a dense step here", flush=True)
    rows = {}
    for case_name, case in cases().items():
        between = timings[case_name].ratio
        due = timings[f"{case_name}, refreshed"].ratio if case.refreshes else between
        values = (between, ((_EVERY - 1) * between + due) / _EVERY, due)
        rows[case_name] = tuple(f"{x:.2f}" for x in values) if case.refreshes else (f"{between:.2f}", "", "")
        print("  " + f"{case_name:<32}" + "".join(f"{x:>10}" for x in rows[case_name]), flush=True)
    return rows


def _candidates(name: str, case: Case, setting: settings.Setting) -> dict[str, timing.Steps]:
    """One compiled step, run at a step of either kind on one state."""
    link, tx = case.make(_EVERY), case.tx()
    step = jax.jit(train.make_step(setting.task.forward, setting.task.losses, tx, reparam=link), donate_argnums=0)
    state = train.init_state(setting.params, tx, rng=jax.random.key(1), reparam=link)
    holder = [jax.tree.map(jnp.copy, state)]

    def at(number: int) -> timing.Steps:
        def steps(count: int) -> None:
            for _ in range(count):
                holder[0], _ = step(holder[0]._replace(step=jnp.int32(number)), setting.batch)
            jax.block_until_ready(holder[0])

        return steps

    return {name: at(_BETWEEN), f"{name}, refreshed": at(_DUE)} if case.refreshes else {name: at(_BETWEEN)}
