"""Patterns from their texts."""

import pytest

from steelyard.sparsity import patterns


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("unstructured", patterns.Unstructured()),
        ("2:4", patterns.NM(2, 4)),
        ("1:16:-1", patterns.NM(1, 16, -1)),
        ("block:4x4", patterns.Block()),
        ("block:8x1:max", patterns.Block((8, 1), "max")),
        ("channel", patterns.Channel()),
        ("channel:-2", patterns.Channel(-2)),
    ],
)
def test_parse(text, pattern):
    assert patterns.parse(text) == pattern
    assert type(patterns.parse(text)) is type(pattern)  # tuples of different patterns may be equal
    assert patterns.parse(pattern) is pattern


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("unstructurd", "did you mean 'unstructured'"),
        ("2-4", "pattern='2-4'"),
        ("block:4", "pattern='block:4'"),
        ("5:4", "n=5, m=4"),
        (patterns.NM(1, 0), "n=1, m=0"),
        ("block:0x4", "shape=\\(0, 4\\)"),
        ("block:2x2:man", "pool='man'.*max"),
        (patterns.Block((2,)), "shape=\\(2,\\)"),
        (None, "pattern=None"),
    ],
)
def test_what_is_refused(pattern, text):
    with pytest.raises(ValueError, match=text):
        patterns.parse(pattern)
