"""What a measurement was made on and with, in words."""

import datetime
import importlib.metadata
import os
import pathlib
import platform

import jax

PACKAGES = ("steelyard", "jax", "optax", "numpy", "scipy")


def cpu() -> str:
    """The processor's own name and the cores that this process may use."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor() or platform.machine()}, {len(os.sched_getaffinity(0))} cores"


def versions() -> str:
    """Python and the packages that decide a result."""
    packages = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return ", ".join([f"Python {platform.python_version()}", *packages])


def describe() -> str:
    """Date, device, versions."""
    kind = jax.devices()[0].device_kind
    device = cpu() if kind == "cpu" else f"{kind}, {cpu()}"
    return f"{datetime.date.today().isoformat()}; {device}; {versions()}"
