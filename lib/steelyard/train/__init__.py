"""The train step and what a run needs around it: state, sharding, checkpoints."""

from steelyard.train.evaluate import make_evaluate, means
from steelyard.train.state import TrainState, init_state
from steelyard.train.step import Step, make_step, seen_params
from steelyard.train.track import ema

__all__ = ["Step", "TrainState", "ema", "init_state", "make_evaluate", "make_step", "means", "seen_params"]
