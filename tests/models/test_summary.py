"""The table of parameters: rows, totals, packed weights."""

import jax
import jax.numpy as jnp
import numpy as np

from steelyard import formats, models
from tests.models.helpers import init


def cells(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_rows_and_total():
    params = {"a": {"kernel": jnp.ones((30, 40), jnp.bfloat16), "bias": None}, "b": np.zeros((), np.int8)}
    rows = cells(models.table(params))
    assert rows[0] == ["path", "shape", "storage", "count", "bytes"]
    assert rows[1] == ["a/kernel", "(30,", "40)", "bfloat16", "1,200", "2,400"]
    assert rows[2] == ["b", "()", "int8", "1", "1"]
    assert rows[3] == ["total", "1,201", "2,401"]


def test_lines_are_equally_long():
    text = models.table(init(models.MLP((100, 10)), jnp.ones((1, 50)))["params"])
    assert len({len(line) for line in text.splitlines()}) == 1


def test_shapes_without_arrays():
    shapes = jax.eval_shape(models.MLP((4,)).init, jax.random.key(0), jnp.ones((1, 3)))
    # 3 * 4 + 4 float32 numbers.
    assert cells(models.table(shapes))[-1] == ["total", "16", "64"]


def test_a_packed_weight_counts_as_stored():
    packed = formats.NMSparse.from_dense(jnp.ones((16, 5)), n=2, m=4)
    rows = cells(models.table({"kernel": packed}))
    # 8 rows of 5 float32 values and, at 2 bits for each value, 2 rows of 5 bytes: 40 + 10 entries, 160 + 10 bytes.
    assert rows[1] == ["kernel", "(16,", "5)", "NMSparse", "50", "170"]
    assert rows[2] == ["total", "50", "170"]


def test_an_empty_tree():
    assert cells(models.table({}))[1:] == [["total", "0", "0"]]


def test_flops_of_a_product():
    x, kernel = jax.ShapeDtypeStruct((3, 4), jnp.float32), jax.ShapeDtypeStruct((4, 5), jnp.float32)
    # A multiplication and an addition for each of 3 * 4 * 5 triples.
    assert models.flops(jnp.matmul, x, kernel) == 2 * 3 * 4 * 5
