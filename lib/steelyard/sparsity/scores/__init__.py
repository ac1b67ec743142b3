"""Scores: how much each entry of the parameters is worth; the larger, the longer it stays.

A score is a tree (or an array) like what it is a score of. `sparsity.masks` turns scores into masks.
"""

from steelyard.sparsity.scores.disturbed import disturbed_loss
from steelyard.sparsity.scores.elementary import (
    fisher,
    magnitude,
    magnitude_increase,
    movement,
    prefer,
    random,
    saliency,
    taylor,
)
from steelyard.sparsity.scores.lamp import lamp as lamp
from steelyard.sparsity.scores.lora import lora as lora
from steelyard.sparsity.scores.obs import dual_gradient
from steelyard.sparsity.scores.obs import obs as obs
from steelyard.sparsity.scores.sensitivity import grasp, snip, synflow
from steelyard.sparsity.scores.wanda import wanda as wanda
from steelyard.sparsity.scores.zeroth_order import zeroth_order as zeroth_order

__all__ = [
    "disturbed_loss",
    "dual_gradient",
    "fisher",
    "grasp",
    "lamp",
    "lora",
    "magnitude",
    "magnitude_increase",
    "movement",
    "obs",
    "prefer",
    "random",
    "saliency",
    "snip",
    "synflow",
    "taylor",
    "wanda",
    "zeroth_order",
]
