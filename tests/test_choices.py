"""A wrong name is answered with the right one."""

import re

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
