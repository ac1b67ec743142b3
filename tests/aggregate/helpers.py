"""What several test modules of the room need: stacked trees as vectors, and the definition of top-k."""

import jax
import numpy as np


def flat(stacked):
    """Rows, in the order of `jax.tree.leaves`."""
    leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(stacked)]
    return np.concatenate([x.reshape(len(x), -1) for x in leaves], axis=1)


def flat_one(tree):
    return flat(jax.tree.map(lambda x: x[None], tree))[0]


def compress(row, k):
    """The k largest, one after the other, the first of equal ones."""
    out = np.zeros_like(row)
    left = np.abs(row)
    for _ in range(min(k, row.size)):
        i = int(np.argmax(left))
        out[i], left[i] = row[i], -1
    return out
