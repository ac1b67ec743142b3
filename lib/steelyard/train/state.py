"""Everything that persists between steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from steelyard import reparam as reparam_lib

PyTree = Any


class TrainState(NamedTuple):
    """The state of a run: saving it is the checkpoint, restoring it is an exact resume.

    Attributes:
      step: number of steps taken, skipped ones included: it is also the state of the data.
      skipped: number of steps whose update was skipped because a gradient was not finite.
      params: the stored parameters, which the optimizer updates (see `reparam.Reparam`).
      references: named trees that are not differentiated: teachers, anchors, importances, averages.
      reparam_state: what the reparameterization keeps and does not train.
      opt_state: state of the optax transform.
      aggregator_state: state of the aggregator, `()` without one.
      model_state: what a forward pass changes (batch statistics), or `None`.
      example_state: a table with a row for each training example, or `None`.
      rng: the key that every draw of the run is folded from.
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    params: PyTree
    references: dict[str, PyTree]
    reparam_state: PyTree
    opt_state: PyTree
    aggregator_state: PyTree
    model_state: PyTree
    example_state: PyTree
    rng: Key[Array, ""]


def init_state(
    params: PyTree,
    tx: optax.GradientTransformation,
    *,
    rng: Key[Array, ""],
    reparam: reparam_lib.Reparam | None = None,
    aggregator: optax.GradientTransformation | None = None,
    outputs: PyTree | None = None,
    references: dict[str, PyTree] | None = None,
    model_state: PyTree = None,
    example_state: PyTree = None,
) -> TrainState:
    """The state before the first step, for the same `tx`, `reparam` and `aggregator` as `make_step` gets.

    Args:
      params: the model's parameters, as its initialiser gives them.
      tx: the optimizer.
      rng: the key of the run.
      reparam: makes the stored parameters; without it they are `params`.
      aggregator: initialised on the stored parameters, or on `outputs` if they are given.
      outputs: arrays or shapes of the model's outputs, for an aggregator with `mode="outputs"`.
      references: named trees that the hooks of the step may read.
      model_state: what the forward pass changes.
      example_state: a table with a row for each training example.

    Returns:
      A `TrainState`. It works under `jax.eval_shape`, for shapes without memory.
    """
    init_rng, run_rng = jax.random.split(rng)
    stored, reparam_state = (reparam or reparam_lib.identity()).init(params, init_rng)
    aggregator_state = () if aggregator is None else aggregator.init(stored if outputs is None else outputs)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        skipped=jnp.zeros((), jnp.int32),
        params=stored,
        references=references or {},
        reparam_state=reparam_state,
        opt_state=tx.init(stored),
        aggregator_state=aggregator_state,
        model_state=model_state,
        example_state=example_state,
        rng=run_rng,
    )
