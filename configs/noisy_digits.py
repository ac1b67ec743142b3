"""Handwritten digits of which 40 % are labelled wrong: a loss that learns how far to trust each training example.

    python -m experiments.train --config=configs/noisy_digits.py
    python -m experiments.train --config=configs/noisy_digits.py:cross_entropy --workdir=runs/noisy_cross_entropy

Expect 95 % test accuracy, and 75 % of cross-entropy with the same optimizer; a thousand times its weight decay brings
cross-entropy near (docs/losses.md). The temperatures of the training examples are a table in the train state
(`example_state`), so that a run that is stopped goes on with the same ones.
"""

from ml_collections import ConfigDict

LOSSES = {
    "adaptive": {"loss": "adaptive_ldr_loss", "loss_options": {"reference": 10.0, "margin": 1.0}},
    "cross_entropy": {"loss": "softmax_cross_entropy_with_integer_labels"},
}


def get_config(loss: str = "adaptive") -> ConfigDict:
    if loss not in LOSSES:
        raise ValueError(f"noisy_digits.py:{loss} is not known; give {' or '.join(LOSSES)}")
    config = ConfigDict()
    config.seed = 0
    config.steps = 1500
    config.batch = 64
    config.dataset = {"name": "digits", "label_noise": 0.4}
    config.model = {"name": "MLP", "features": (64, 64, 10), "flatten": True}
    config.task = {"name": "classify", **LOSSES[loss]}
    config.optimizer = {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 1e-3}
    config.log_every = 10
    config.eval_every = 250
    config.checkpoint_every = 500
    return config
