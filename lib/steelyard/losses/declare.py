"""Declarations that the train step reads."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def batch_dependent(loss: Callable[P, R]) -> Callable[P, R]:
    """Declares that a loss is not a mean over examples (contrastive, AUC, batch Dice).

    `train.make_step` then refuses to cut its batch into microbatches. A `losses` function that calls such a loss
    declares itself too.

    >>> @batch_dependent
    ... def losses(outputs, batch):
    ...     return {"contrast": outputs - outputs.mean()}
    >>> losses.batch_dependent
    True
    """

    @functools.wraps(loss)
    def declared(*args: P.args, **kwargs: P.kwargs) -> R:
        return loss(*args, **kwargs)

    declared.batch_dependent = True
    return declared
