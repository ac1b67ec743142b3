"""Two domains of bytes and a small transformer that meets one after the other; no claim of its own.

Domain a is source code of the standard library, domain b is other source code in which upper and lower case are
swapped: another language in the same bytes, with the same punctuation and layout.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Key

from experiments.claims import training
from steelyard import data, models

STEPS = 150  # of each phase
WARMUP = 4
_ROWS, _LENGTH, _BATCH = 8000, 64, 8
_HELD_OUT, _EVERY = 64, 8  # held-out rows of a domain; every eighth is looked at after each step


class Domains(NamedTuple):
    """Rows of tokens: the training rows of a and then those of b, and the held-out rows of each."""

    rows: Int[Array, "rows length"]
    a: Int[Array, "held length"]
    b: Int[Array, "held length"]


def source(held_out: int) -> tuple[Int[np.ndarray, "rows length"], Int[np.ndarray, "held length"]]:
    """Rows of Python source: all of the training files, and some spread over the test files."""
    train, test = (data.load("python_source", split=s, length=_LENGTH).columns["tokens"] for s in ("train", "test"))
    return train, test[:: len(test) // held_out][:held_out]


def load() -> Domains:
    """Domain a is the first part of the training files and b the last; held-out rows come from the test files."""
    train, held_out = source(2 * _HELD_OUT)
    rows = np.concatenate([train[:_ROWS], _swap_case(train[-_ROWS:])])
    return Domains(*map(jnp.asarray, (rows, held_out[:_HELD_OUT], _swap_case(held_out[_HELD_OUT:]))))


def _swap_case(tokens: Int[np.ndarray, "..."]) -> Int[np.ndarray, "..."]:
    lower = tokens | 32
    return np.where((lower >= ord("a")) & (lower <= ord("z")), tokens ^ 32, tokens)


@functools.partial(jax.jit, static_argnums=1)
def rows_of(key: Key[Array, ""], steps: int, share_of_b: float) -> Int[Array, "steps batch"]:
    """Rows for some steps of training, each from domain b with this probability, else from a."""
    keys = jax.random.split(key, 3)
    a, b = (training.minibatches(k, _ROWS, _BATCH, steps) for k in keys[:2])
    return jnp.where(jax.random.bernoulli(keys[2], share_of_b, a.shape), _ROWS + b, a)


def train(
    domains: Domains, schedule: optax.Schedule, rows: Int[Array, "steps batch"], key: Key[Array, ""]
) -> dict[str, Float[Array, "..."]]:
    """Trains with Adam from scratch; its state, like the schedule, goes through all phases.

    Returns:
      `a` and `b`: loss after each step on a few held-out rows of the domain; `end_a` and `end_b`: the last loss on
      all of them, in nats a byte; `end`: their mean.
    """
    # Rates as numbers, so that all schedules of a length share one program, which takes longer to compile than to run.
    return _train(domains, jnp.asarray(schedule(jnp.arange(len(rows)))), rows, key)


@jax.jit
def _train(domains: Domains, rates: Float[Array, "steps"], rows: Int[Array, "steps batch"], key: Key[Array, ""]):
    model = models.transformer.Transformer(256, width=32, depth=1, heads=2, mlp_width=64)
    params = model.init(key, domains.a[:1, :-1])["params"]

    def loss(params, tokens):
        return training.cross_entropy(model.apply({"params": params}, tokens[:, :-1]), tokens[:, 1:])

    def step_loss(params, batch):
        return loss(params, domains.rows[batch])

    def watch(params):
        return loss(params, domains.a[::_EVERY]), loss(params, domains.b[::_EVERY])

    params, _, (a, b) = training.fit(step_loss, params, optax.adam(lambda count: rates[count]), rows, measure=watch)
    ends = {"end_a": loss(params, domains.a), "end_b": loss(params, domains.b)}
    return {"a": a, "b": b, **ends, "end": (ends["end_a"] + ends["end_b"]) / 2}
