"""Datasets and the order in which they are read: embedded sets, TFDS, and batches whose only state is the step."""

from steelyard.data import embedded, order, pipeline, source, tfds
from steelyard.data.displacement import displace, random_displacement
from steelyard.data.load import load
from steelyard.data.order import EpochOrder, epoch_order, epoch_rows, rows
from steelyard.data.pipeline import batches, evaluation
from steelyard.data.source import Arrays, Info, Records, Source, check, fingerprint, materialize, windows
from steelyard.data.tfds import to_unit

__all__ = [
    "Arrays",
    "EpochOrder",
    "Info",
    "Records",
    "Source",
    "batches",
    "check",
    "displace",
    "embedded",
    "epoch_order",
    "epoch_rows",
    "evaluation",
    "fingerprint",
    "load",
    "materialize",
    "order",
    "pipeline",
    "random_displacement",
    "rows",
    "source",
    "tfds",
    "to_unit",
    "windows",
]
