"""The vision transformer of the quickstart on handwritten digits, compressed by eight methods.

python -m experiments.compress --config=configs/compress_digits.py
python -m experiments.compress --config=configs/compress_digits.py --config.checkpoint=runs/quickstart

Expect 98 % test accuracy dense. With half of the weights gone the best methods lose nothing; with 80 % gone Wanda,
Erdos-Renyi and gradual pruning lose two or three points and the same share of every layer eleven (one seed, 359 test
images: half a point is noise). Less than four minutes on 2 CPU cores, most of it compilation.
"""

from ml_collections import ConfigDict, FieldReference
from ml_collections.config_dict import placeholder

from configs import quickstart

KERNELS = r"(.*/)?kernel"


def get_config() -> ConfigDict:
    config = quickstart.get_config()
    config.reparam = ()
    config.checkpoint = placeholder(str)  # a folder of experiments.train
    steps = FieldReference(100)
    config.defaults = {
        "where": KERNELS,
        "sparsity": (0.5, 0.8, 0.9),
        "retrain_steps": steps,
        "eval_every": 20,
        "optimizer": {
            "name": "adamp",
            "learning_rate": {"name": "cosine_decay_schedule", "init_value": 1e-3, "decay_steps": steps},
            "weight_decay": 0.01,
        },
    }
    config.methods = {
        "unpruned": {"sparsity": 0.0},  # what the steps of retraining give by themselves
        "uniform": {},
        "global": {"allocation": "global", "min_kept": 400},
        "erdos_renyi": {"allocation": "erdos_renyi"},
        "wanda": {"score": "wanda", "allocation": "output"},
        "gradual": {"schedule": "polynomial", "allocation": "erdos_renyi", "sparsity": (0.8, 0.9)},
        "nm": {"recipe": "mdgf_exponential", "decay_rate": 5e-2, "pattern": ("2:4", "1:4"), "where": quickstart.BLOCKS},
        "channels": {"kind": "channels", "sparsity": (0.5, 0.75)},
    }
    return config
