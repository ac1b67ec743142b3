"""A wrong name is answered with the right one."""

import re

import jax
import jax.numpy as jnp
import pytest

from steelyard import choices


def test_an_allowed_value_passes():
    choices.require("mode", "lean", ("lean", "stacked"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("stackd", "mode='stackd' is not one of lean, stacked; did you mean 'stacked'?"),
        ("zzz", "mode='zzz' is not one of lean, stacked"),
        (None, "mode=None is not one of lean, stacked"),
    ],
)
def test_another_is_named_with_what_is_allowed(value, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        choices.require("mode", value, ("lean", "stacked"))


@pytest.mark.parametrize(("value", "interval"), [(0, "[0, 1)"), (0.5, "(0, 1)"), (1, "[0, 1]"), (1e30, "(0, inf)")])
def test_a_number_inside_passes(value, interval):
    choices.require_within("rate", value, interval)


@pytest.mark.parametrize(
    ("value", "interval"),
    [(1, "[0, 1)"), (0, "(0, 1)"), (-1e-9, "[0, inf)"), (float("nan"), "[0, 1]"), (float("inf"), "[0, inf)")],
)
def test_a_number_outside_is_named_with_the_interval(value, interval):
    with pytest.raises(ValueError, match=f"^{re.escape(f'rate={value} must lie in {interval}')}$"):
        choices.require_within("rate", value, interval)


def test_the_first_number_of_an_array_that_is_outside_is_named():
    choices.require_within("counts", jnp.array([1.0, 3.0]), "(0, inf)")
    with pytest.raises(ValueError, match=r"^counts=-2\.0 must lie in \(0, inf\)$"):
        choices.require_within("counts", jnp.array([[1.0, -2.0], [0.0, 3.0]]), "(0, inf)")


def test_a_schedule_where_a_number_must_stand_is_told_what_to_do():
    with pytest.raises(ValueError, match=r"rate is a function.*optax\.inject_hyperparams"):
        choices.require_within("rate", lambda step: 0.1, "[0, 1]")


def test_a_traced_number_passes():
    jax.jit(lambda rate: choices.require_within("rate", rate, "[0, 1]"))(2.0)
