"""The residual network of `configs/mnist_resnet.py` with fewer channels: smaller, faster, and trained on.

python -m experiments.compress --config=configs/compress_resnet.py --config.dataset.data_dir=PATH_OF_TFDS_DATA

Expect 98 % accuracy dense on the 2,000 test images, 95 % with half of the channels (a quarter of bytes and operations)
and 77 to 93 % with a quarter of them, by method, after 60 steps of retraining; one seed.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from configs import mnist_resnet


def get_config() -> ConfigDict:
    config = mnist_resnet.get_config()
    config.reparam = ()
    config.checkpoint = placeholder(str)  # a folder of experiments.train
    steps = FieldReference(60)
    config.defaults = {
        "sparsity": (0.5, 0.75),
        "retrain_steps": steps,
        "eval_every": 20,
        "round_to": 4,
        "optimizer": {
            "name": "sgdp",
            "learning_rate": {"name": "cosine_decay_schedule", "init_value": 0.03, "decay_steps": steps},
            "momentum": 0.9,
            "nesterov": True,
            "weight_decay": 1e-4,
        },
    }
    config.methods = {
        "channels": {"kind": "channels"},
        "channels_global": {"kind": "channels", "scope": "global"},
        "channels_taylor": {"kind": "channels", "score": "taylor"},
        "weights": {"allocation": "erdos_renyi", "sparsity": (0.5, 0.75, 0.9)},
    }
    return config
