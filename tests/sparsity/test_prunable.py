"""Which leaves are pruned."""

import jax.numpy as jnp
import pytest

from steelyard.sparsity import prunable

PARAMS = {
    "dense": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)},
    "embed": {"table": jnp.ones((4, 2))},
    "counts": jnp.ones((2, 2), int),
    "none": None,
}


def chosen(where):
    flags = prunable.selected(PARAMS, where)
    assert flags["none"] is None
    return flags["dense"]["kernel"], flags["dense"]["bias"], flags["embed"]["table"], flags["counts"]


def test_what_each_selector_takes():
    assert chosen(None) == (True, False, True, False)
    assert chosen(r".*kernel") == (True, False, False, False)
    assert chosen(r"dense/.*") == (True, False, False, False)  # the vector that matches too is skipped
    assert chosen(lambda path, leaf: path.endswith("bias")) == (False, True, False, False)


@pytest.mark.parametrize(
    ("where", "text"),
    [
        (r".*/kernl", "keep='.\\*/kernl' matches none.*dense/kernel"),
        (r".*/bias", "keep='.\\*/bias' matches dense/bias and nothing else.*dense/kernel, embed/table"),
        (r"counts", "counts and nothing else"),
    ],
)
def test_what_is_refused(where, text):
    with pytest.raises(ValueError, match=text):
        prunable.selected(PARAMS, where, name="keep")
