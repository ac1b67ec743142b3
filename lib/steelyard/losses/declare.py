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

    return _declare(loss, "batch_dependent")


def with_example_state(losses: Callable[P, R]) -> Callable[P, R]:
    """Declares that a `losses` function reads and writes the table with a row for each training example.

    `train.make_step` then calls it as `losses(outputs, batch, example_state)`, with the `example_state` of the train
    state and the rows of the batch at `batch["index"]`, and it returns `(losses, example_state)`. Nothing
    differentiates through the new table.

    >>> @with_example_state
    ... def losses(outputs, batch, table):
    ...     return {"class": outputs * table[batch["index"]]}, table.at[batch["index"]].add(1)
    >>> losses.with_example_state
    True
    """
    return _declare(losses, "with_example_state")


def _declare(function: Callable[P, R], name: str) -> Callable[P, R]:
    @functools.wraps(function)
    def declared(*args: P.args, **kwargs: P.kwargs) -> R:
        return function(*args, **kwargs)

    setattr(declared, name, True)
    return declared
