"""Trees that follow the parameters: hooks for `make_step(track=...)`."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jaxtyping import Array, Int

PyTree = Any


def ema(decay: float, *, name: str = "ema", debias: bool = False) -> Callable[..., dict[str, PyTree]]:
    """Exponential moving average of the stored parameters, in `references[name]`.

    average <- decay * average + (1 - decay) * params. With `debias` the decay of step t (from 0) is
    min(decay, (1 + t) / (10 + t)), so that the first parameters are soon forgotten.

    Args:
      decay: in [0, 1].
      name: the reference that holds the average; `init_state(references={name: stored parameters})` starts it.
      debias: warm the decay up.

    Returns:
      A hook `(references, params, *, step) -> references`.

    Raises:
      ValueError: decay outside of [0, 1]; at trace time, a reference that is not there.

    Source: Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging (1992).
    """
    if not 0.0 <= decay <= 1.0:
        raise ValueError(f"decay={decay} must be in [0, 1]")

    def track(references: dict[str, PyTree], params: PyTree, *, step: Int[Array, ""]) -> dict[str, PyTree]:
        if name not in references:
            raise ValueError(f"references has no {name!r} to average into; it has {sorted(references)}")
        rate = 1.0 - (jax.numpy.minimum(decay, (1 + step) / (10 + step)) if debias else decay)
        return references | {name: optax.incremental_update(params, references[name], rate)}

    return track
