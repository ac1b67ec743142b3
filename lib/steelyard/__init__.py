"""steelyard: which updates, losses, tasks, examples and parameters count, how much, and in how many bits.

Rooms are imported when they are first named, so that `import steelyard` costs nothing and borrowing one
transform pulls in no framework.
"""

import importlib

ROOMS = (
    "aggregate",
    "data",
    "examples",
    "formats",
    "losses",
    "models",
    "optim",
    "quant",
    "reparam",
    "sparsity",
    "train",
    "tree",
)
__version__ = "0.1.0"
__all__ = ["ROOMS", "__version__", *ROOMS]


def __getattr__(name: str):
    if name in ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; its rooms are {', '.join(ROOMS)}")


def __dir__() -> list[str]:
    return sorted(__all__)
