"""The byte transformer of `configs/language.py`: single weights, N:M groups, and channels of SwiGLU.

python -m experiments.compress --config=configs/compress_language.py

A short run: expect 3.3 bits per byte dense after 120 steps, and about the same with half of the weights or of SwiGLU's
channels gone, as all retrained models have seen a fifth more text; `unpruned` shows what that alone gives. Eight
minutes of CPU time, a large part of it evaluation on the whole test split.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from configs import language


def get_config() -> ConfigDict:
    config = language.get_config()
    config.steps = 120
    config.reparam = ()
    config.checkpoint = placeholder(str)  # a folder of experiments.train
    steps = FieldReference(24)
    config.defaults = {
        "where": r"block_.*/kernel",
        "sparsity": (0.5, 0.75),
        "retrain_steps": steps,
        "optimizer": {
            "name": "adamp",
            "learning_rate": {"name": "cosine_decay_schedule", "init_value": 1e-3, "decay_steps": steps},
            "weight_decay": 0.01,
        },
    }
    config.methods = {
        "unpruned": {"sparsity": 0.0},
        "wanda": {"score": "wanda", "allocation": "output"},
        "wanda_nm": {"score": "wanda", "pattern": "2:4"},
        "nm": {"recipe": "sr_ste", "pattern": "2:4"},
        "swiglu": {"kind": "channels", "groups": r".*/mlp", "round_to": 8},
    }
    return config
