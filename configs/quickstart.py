"""A small vision transformer on handwritten digits: 2:4 sparse and int8, two tasks, AdamP.

    python -m experiments.train --config=configs/quickstart.py

Expect 98 % test accuracy, dense and packed alike (0.6 more or less, by seed), in 4.7 times fewer bytes, after a
minute of training on 2 CPU cores.
"""

from ml_collections import ConfigDict

# The kernels of the transformer blocks; the stem and the heads stay dense.
BLOCKS = r"(.*/)?block_\d+/.*/kernel"


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 800
    config.batch = 128
    config.dataset = {"name": "digits"}
    config.model = {"name": "ViT", "patch": 4, "width": 64, "depth": 2, "heads": 4, "stem": (32,), "reconstruct": True}
    config.task = {"name": "classify_and_reconstruct", "mask_ratio": 0.1, "shift": 1, "mean": 0.3, "std": 0.4}
    config.optimizer = {
        "name": "adamp",
        "learning_rate": {
            "name": "warmup_cosine_decay_schedule",
            "init_value": 0.0,
            "peak_value": 2e-3,
            "warmup_steps": config.get_ref("steps") // 16,
            "decay_steps": config.get_ref("steps"),
        },
        "weight_decay": 0.01,
    }
    config.aggregator = {"name": "conflict_free", "weights": (3.0, 1.0)}
    config.reparam = (
        ConfigDict(
            {"name": "nm_sparse", "n": 2, "m": 4, "recipe": "mdgf_exponential", "decay_rate": 5e-3, "where": BLOCKS}
        ),
        ConfigDict({"name": "fake_quant", "format": "int8", "where": r"(.*/)?kernel"}),
    )
    config.mesh = {"data": -1}
    config.sharding = "replicate"
    config.log_every = 10
    config.eval_every = 250
    config.checkpoint_every = 500
    return config
