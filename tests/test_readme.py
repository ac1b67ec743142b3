"""The examples of the README run."""

import pathlib
import re

import jax
import jax.numpy as jnp
import optax

from steelyard import losses as losses_lib
from steelyard import optim

README = (pathlib.Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_borrowers_example_runs_and_is_ten_lines():
    (block,) = [block for block in BLOCKS if "jacrev" in block]
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    names = {}
    exec(block, names)
    before, after = jnp.ones((4, 2)), names["params"]["kernel"]
    # AdamP's first step moves every entry by about the learning rate, against the common direction of both tasks.
    assert bool(jnp.all(after < before))
    assert bool(jnp.all(names["params"]["bias"] == 0.0))


def test_what_no_other_library_has_runs():
    (block,) = [block for block in BLOCKS if "low_bit_state" in block]
    params = {
        "embed": {"embedding": jnp.ones((128, 64))},
        "block": {"kernel": jnp.ones((64, 128)), "scale": jnp.ones(64)},
    }
    names = {"optim": optim, "optax": optax, "params": params}
    exec(block, names)
    updates, _ = names["tx"].update(jax.tree.map(jnp.ones_like, params), names["state"], params)
    # AdamW's first step is the learning rate, and 1e-4 of it by decay; 8 bits move it by less than a hundredth.
    assert bool(jnp.all(updates["block"]["scale"] == 0))
    assert jnp.allclose(updates["block"]["kernel"], -1e-3, rtol=0.01)
    assert jnp.allclose(updates["embed"]["embedding"], -1e-4, rtol=0.01)


def test_the_composed_step_runs():
    (block,) = [block for block in BLOCKS if "make_step" in block]
    names = {
        "jax": jax,
        "key": jax.random.key(0),
        "params": {"kernel": jnp.ones((8, 4))},
        "batch": {"x": jnp.ones((2, 8)), "y": jnp.zeros((2, 4))},
        "forward": lambda params, batch, *, rng, train: batch["x"] @ params["kernel"],
        "losses": lambda outputs, batch: {"fit": losses_lib.squared_error(outputs, batch["y"])},
    }
    exec(block, names)
    assert names["packed"]["kernel"].values.format == "int8"


def test_it_is_short():
    assert len(README.splitlines()) < 150
