"""A small residual network on `tfds:mnist_10k`, int8 by learned step sizes.

    python -m experiments.train --config=configs/mnist_resnet.py --config.dataset.data_dir=PATH_OF_TFDS_DATA

Expect about 98.3 % accuracy on the 2,000 test images (a split of the MNIST test set, so not an MNIST result), dense and
packed alike, after two minutes of training on 2 CPU cores.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.steps = 250
    config.batch = 128
    config.dataset = {"name": "tfds:mnist_10k", "data_dir": "../shared/data/tfds", "in_memory": True}
    config.model = {"name": "ResNet", "num_blocks": 1, "width": 16}
    config.task = {"name": "classify", "shift": 2}
    config.optimizer = {
        "name": "sgdp",
        "learning_rate": {
            "name": "cosine_onecycle_schedule",
            "transition_steps": config.get_ref("steps"),
            "peak_value": 0.1,
        },
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 1e-4,
    }
    config.reparam = (ConfigDict({"name": "fake_quant", "format": "int8", "method": "lsq", "where": r"(.*/)?kernel"}),)
    config.mesh = {"data": -1}
    config.sharding = "replicate"
    config.log_every = 10
    config.eval_every = 125
    config.checkpoint_every = 125
    return config
