"""Value and gradient of every loss against optax's cross-entropy, and the matrices that a loss of pairs holds."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from experiments.bench import page, timing
from launch import aot, hlo
from steelyard import losses

BATCH, CLASSES, FEATURES, HEADS = 4096, 1000, 64, 2
LIMIT = 2.0  # of a loss per example, as a ratio to cross-entropy


class Case(NamedTuple):
    """A loss to be differentiated.

    Attributes:
      loss: `(inputs, targets) -> losses`.
      inputs: what it is differentiated by, and its shape: "logits" [batch, classes], "embeddings" [batch, features],
        "heads" [heads, batch, features], "scores" [batch], "similarities" [batch, batch].
      matrices: for a loss of pairs, how many [batch, batch] matrices it is allowed.
      given: how many the case itself makes, as inputs of the loss; they are not counted.
    """

    loss: Callable[[Array, Array], Array]
    inputs: str = "logits"
    matrices: int = 0
    given: int = 0


def per_example() -> dict[str, Case]:
    """Losses of a classification, an example or an entry at a time; the first is what the others are compared with."""
    counts = jnp.round(1000 * 0.995 ** jnp.arange(CLASSES)) + 1
    temperatures = jnp.full(BATCH, 2.0)

    def with_counts(loss):
        return functools.partial(loss, counts=counts)

    def ride(logits, labels):
        experts = logits.reshape(4, BATCH // 4, CLASSES)
        return losses.ride_loss(experts, labels[: BATCH // 4])

    return {
        "softmax_cross_entropy_with_integer_labels": Case(losses.softmax_cross_entropy_with_integer_labels),
        "squentropy": Case(losses.squentropy),
        "rescaled_square_loss": Case(losses.rescaled_square_loss),
        "encouraging_loss": Case(losses.encouraging_loss),
        "ldr_loss": Case(losses.ldr_loss),
        "adaptive_ldr_loss": Case(lambda z, y: losses.adaptive_ldr_loss(z, y, temperatures)[0]),
        "softmax_focal_loss": Case(losses.softmax_focal_loss),
        "asymmetric_softmax_loss": Case(losses.asymmetric_softmax_loss),
        "logit_adjusted_cross_entropy": Case(with_counts(losses.logit_adjusted_cross_entropy)),
        "vector_scaling_loss": Case(with_counts(losses.vector_scaling_loss)),
        "ldam_loss": Case(with_counts(losses.ldam_loss)),
        "iif_loss": Case(with_counts(losses.iif_loss)),
        "ride_loss, 4 experts of 1024 rows": Case(ride),
        "cumulative_nll": Case(lambda z, y: losses.cumulative_nll(z, y)),
    }


def per_entry() -> dict[str, Case]:
    """Losses of several labels at once; the first is what the others are compared with."""

    def binary(loss, **options):
        return Case(lambda z, y: loss(z, jax.nn.one_hot(y, CLASSES), **options))

    def of_probabilities(loss):
        return Case(lambda z, y: loss(jax.nn.sigmoid(z), jax.nn.one_hot(y, CLASSES), axis=0))

    return {
        "sigmoid_binary_cross_entropy": binary(losses.sigmoid_binary_cross_entropy),
        "sigmoid_focal_loss": binary(losses.sigmoid_focal_loss),
        "asymmetric_loss": binary(losses.asymmetric_loss),
        "macro_auc_univariate": binary(losses.macro_auc_univariate),
        "soft_dice_loss": of_probabilities(losses.soft_dice_loss),
        "soft_tversky_loss": of_probabilities(losses.soft_tversky_loss),
    }


def of_pairs() -> dict[str, Case]:
    """Losses of pairs in a batch."""

    def same(s, y):
        return s, (y[:, None] == y).astype(s.dtype)

    def two_views(loss, **options):
        return lambda x, y: loss(x, jnp.roll(x, 1, 0), **options)

    def several_heads(x, y):
        return losses.multi_head_contrastive(x, jnp.roll(x, 1, 1), jnp.full((HEADS, BATCH, BATCH), 0.1))

    scale = {"log_scale": losses.INITIAL_LOG_SCALE, "bias": losses.INITIAL_BIAS}
    ids = jnp.arange(BATCH) // 2
    return {
        "supervised_contrastive": Case(losses.supervised_contrastive, "embeddings", 1),
        "subclass_contrastive": Case(lambda x, y: losses.subclass_contrastive(x, y, y, ids), "embeddings", 1),
        "info_nce": Case(two_views(losses.info_nce), "embeddings", 1),
        "sigmoid_contrastive": Case(two_views(losses.sigmoid_contrastive, **scale), "embeddings", 1),
        "multi_head_contrastive": Case(several_heads, "heads", HEADS, HEADS),
        "batch_hard_triplet": Case(losses.batch_hard_triplet, "embeddings", 1),
        "contrastive_pair_loss": Case(lambda s, y: losses.contrastive_pair_loss(*same(s, y)), "similarities", 1, 1),
        "multi_similarity_loss": Case(lambda s, y: losses.multi_similarity_loss(*same(s, y)), "similarities", 1, 1),
        "cosent": Case(lambda s, y: losses.cosent(s, y / CLASSES), "scores", 1),
        "macro_auc_pairwise, 1 label": Case(
            lambda s, y: losses.macro_auc_pairwise(s[:, None], same(s, y)[1][:, :1]), "scores", 1
        ),
    }


def bench() -> None:
    """Measures the tables, prints them and writes them to the page."""
    lines = _EXPLANATION.format(batch=BATCH, classes=CLASSES, features=FEATURES).strip().splitlines()
    for title, chosen in (("per example", per_example()), ("several labels", per_entry())):
        timings = timing.ratios({name: _runner(case) for name, case in chosen.items()}, rounds=9)
        moved = {name: _tpu_bytes(case) for name, case in chosen.items()}
        first = next(iter(moved.values()))
        rows = [[f"`{name}`", f"{timings[name].ratio:.2f}", _ratio(moved[name], first)] for name in chosen]
        _report(["loss, " + title, "time here", "bytes on v5e"], rows, lines)
        over = [name for name in chosen if timings[name].ratio > LIMIT]
        print(f"  above {LIMIT:g}x: {', '.join(over) or 'none'}", flush=True)
    cross_entropy = next(iter(per_example().items()))
    chosen = dict([cross_entropy]) | of_pairs()
    timings = timing.ratios({name: _runner(case) for name, case in chosen.items()}, rounds=5)
    rows = [
        [f"`{name}`", f"{timings[name].ratio:.1f}", *_matrices(case), str(case.matrices)]
        for name, case in chosen.items()
        if case.matrices
    ]
    header = ["loss of pairs", "time here", "matrices here", "matrices on v5e", "one for each head"]
    _report(header, rows, lines)
    page.write("losses", lines)


_EXPLANATION = """
Value and gradient, as ratios to optax's softmax cross-entropy with integer labels at {batch} x {classes} float32
logits, and for losses of several labels to its binary cross-entropy at as many entries. Time here: median of rounds in
which all take turns on the CPU. Bytes on v5e: read and written by the fusions, as compiled for a TPU v5e.
Losses of pairs compare {batch} embeddings of {features} features, against the same cross-entropy. Their memory is the
compiled gradient's temporaries in {batch} x {batch} float32 matrices, on this machine and as compiled for a TPU v5e;
those that the benchmark makes as inputs are left out.
"""


def _report(header: list[str], rows: list[list[str]], lines: list[str]) -> None:
    for row in [header, *rows]:
        print("  " + f"{row[0]:<48}" + "".join(f"{cell:>20}" for cell in row[1:]), flush=True)
    lines += ["", *page.table(header, rows)]


def _shape(case: Case) -> tuple[int, ...]:
    return {
        "logits": (BATCH, CLASSES),
        "embeddings": (BATCH, FEATURES),
        "heads": (HEADS, BATCH, FEATURES),
        "scores": (BATCH,),
        "similarities": (BATCH, BATCH),
    }[case.inputs]


def _step(case: Case) -> Callable[[Array, Array], tuple[Array, Array]]:
    def total(inputs, labels):
        vectors = case.inputs in ("embeddings", "heads")
        return jnp.mean(case.loss(losses.normalize(inputs) if vectors else inputs, labels))

    return jax.value_and_grad(total)


def _labels() -> Array:
    return jax.random.randint(jax.random.key(1), (BATCH,), 0, CLASSES)


def _runner(case: Case) -> timing.Steps:
    inputs = jax.random.normal(jax.random.key(0), _shape(case))
    labels, step = _labels(), jax.jit(_step(case))

    def steps(count: int) -> None:
        result: Any = None
        for _ in range(count):
            result = step(inputs, labels)
        jax.block_until_ready(result)

    return steps


def _arguments(case: Case) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]:
    return jax.ShapeDtypeStruct(_shape(case), jnp.float32), jax.ShapeDtypeStruct((BATCH,), jnp.int32)


def _tpu_bytes(case: Case) -> int | None:
    """Bytes that the fusions of value and gradient move on a TPU; None if there are loops."""
    compiled = aot.compile_for(aot.topology_device(), _step(case), *_arguments(case))
    try:
        return hlo.fusion_bytes(compiled.as_text())
    except ValueError:
        return None


def _ratio(moved: int | None, first: int | None) -> str:
    return f"{moved / first:.2f}" if moved and first else ""


def _matrices(case: Case) -> tuple[str, str]:
    """Temporaries in batch x batch matrices, compiled for this machine and for a TPU."""
    here = jax.jit(_step(case)).lower(*_arguments(case)).compile()
    there = aot.compile_for(aot.topology_device(), _step(case), *_arguments(case))
    used = (c.memory_analysis().temp_size_in_bytes / (4 * BATCH**2) for c in (here, there))
    return tuple(f"{max(matrices - case.given, 0):.2f}" for matrices in used)
