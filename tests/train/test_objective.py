"""Cutting batches, stacking losses, naming tasks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from steelyard.train import objective


@pytest.mark.parametrize("microbatches", [1, 2, 3, 6])
def test_split_and_merge_keep_every_row(microbatches):
    batch = {"x": jnp.arange(12.0).reshape(6, 2), "label": jnp.arange(6)}
    parts = objective.split(batch, microbatches)
    assert parts["x"].shape == (microbatches, 6 // microbatches, 2)
    np.testing.assert_array_equal(parts["x"][..., 0], 2.0 * parts["label"])
    assert sorted(np.ravel(objective.merge(parts)["label"])) == list(range(6))


def test_a_sharded_batch_is_cut_inside_each_device():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    parts = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    x = jax.ShapeDtypeStruct((16, 8), jnp.float32)
    compiled = jax.jit(lambda x: objective.split(x, 2), in_shardings=rows, out_shardings=parts).lower(x).compile()
    text = compiled.as_text()
    assert not any(word in text for word in ("all-to-all", "all-gather", "collective-permute"))


def test_a_penalty_under_the_name_of_a_task_adds_to_it():
    losses = objective.stack({"a": jnp.array(1.0), "b": jnp.array(2.0)}, {"b": jnp.array(0.5)}, ("a", "b"))
    np.testing.assert_array_equal(losses, [1.0, 2.5])
    losses = objective.stack({"a": jnp.array(1.0)}, {"c": jnp.array(3.0)}, ("a", "c"))
    np.testing.assert_array_equal(losses, [1.0, 3.0])


def test_what_is_counted_is_no_output():
    outputs = {"logits": jnp.ones(2), "aux": {"count": jnp.array(3)}}
    assert set(objective.without_aux(outputs)) == {"logits"}
    assert int(objective.aux_of(outputs)["count"]) == 3
    assert objective.aux_of(jnp.ones(2)) == {}
