"""Ahead-of-time compilation for an accelerator that is not there.

The real TPU compiler runs on any Linux machine with `pip install "jax[tpu]"`. It must not look for the hardware: set
`JAX_PLATFORMS=cpu`, `TPU_SKIP_MDS_QUERY=1` and, where several processes compile at once,
`ALLOW_MULTIPLE_LIBTPU_LOAD=1` before the first call. libtpu then still writes harmless errors about hosts to stderr.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies


def topology_device(name: str = "v5e:1x1") -> jax.Device:
    """The one device of a single-chip TPU topology, to compile for; it cannot run anything.

    Args:
      name: a topology of one chip, `v5e:1x1`, `v6e:1x1` or `v5p:1x1x1`.

    Raises:
      ValueError: the topology has more than one device.
    """
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name, chips_per_host_bounds=(1, 1, 1)).devices
    if len(devices) != 1:
        raise ValueError(
            f"topology {name!r} has {len(devices)} devices; name one of a single device, such as 'v5e:1x1'"
        )
    return devices[0]


def compile_for(
    device: jax.Device, fn: Callable[..., Any], *args: Any, donate_argnums: tuple[int, ...] = ()
) -> jax.stages.Compiled:
    """Compiles a function for a device that need not be there.

    Args:
      device: what to compile for, such as `topology_device()`.
      fn: the function, not yet jitted.
      *args: its arguments: trees of arrays or of `jax.ShapeDtypeStruct`, of which only shapes and dtypes are used.
      donate_argnums: positions of the arguments whose memory the results may take.
    """
    sharding = jax.sharding.SingleDeviceSharding(device)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args)
    return jax.jit(fn, donate_argnums=donate_argnums).lower(*shapes).compile()
