"""Flax modules that the experiments train; their weights may be stored in any format of `steelyard.formats`."""

from steelyard.models.attention import SelfAttention, rotary
from steelyard.models.gated_conv import GatedConv
from steelyard.models.layers import Conv, Dense, Embed, weight
from steelyard.models.mlp import MLP
from steelyard.models.norms import GhostBatchNorm, RMSNorm, rms_norm
from steelyard.models.resize import resize
from steelyard.models.resnet import ResNet
from steelyard.models.summary import flops, table
from steelyard.models.task_alignment import TaskAlignment
from steelyard.models.transformer import SwiGLU, Transformer
from steelyard.models.vit import ViT, patchify, unpatchify

__all__ = [
    "MLP",
    "Conv",
    "Dense",
    "Embed",
    "GatedConv",
    "GhostBatchNorm",
    "RMSNorm",
    "ResNet",
    "SelfAttention",
    "SwiGLU",
    "TaskAlignment",
    "Transformer",
    "ViT",
    "flops",
    "patchify",
    "resize",
    "rms_norm",
    "rotary",
    "table",
    "unpatchify",
    "weight",
]
