"""Compilation for a TPU that is not there."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from launch import aot

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler: pip install 'jax[tpu]'"
)


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


def test_one_device_and_a_program_for_it():
    device = aot.topology_device("v5e:1x1")
    assert device.platform == "tpu"
    x = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    compiled = aot.compile_for(device, lambda x, y: (x + y, y), x, x, donate_argnums=(0,))
    assert compiled.memory_analysis().alias_size_in_bytes == 8 * 128 * 4
    assert jax.devices()[0].platform == "cpu"


def test_several_devices_are_refused():
    with pytest.raises(ValueError, match="4 devices"):
        aot.topology_device("v5e:2x2")
