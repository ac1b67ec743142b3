"""The train step and what a run needs around it: state, sharding, checkpoints."""

from steelyard.train.batch_size import (
    CriticalBatch,
    NoiseScale,
    critical_batch_size,
    gradient_noise_scale,
    steps_to_target,
)
from steelyard.train.curvature import (
    ClassCurvature,
    class_curvature,
    distance_from_init,
    hessian_eigenvalues,
    hessian_top_eigenvalue,
    hvp,
    lanczos,
    landscape_difference,
)
from steelyard.train.evaluate import make_evaluate, means
from steelyard.train.lr_range import RangeTest, lr_range_test
from steelyard.train.state import TrainState, init_state
from steelyard.train.step import Step, make_step, seen_params
from steelyard.train.track import ema

__all__ = [
    "ClassCurvature",
    "CriticalBatch",
    "NoiseScale",
    "RangeTest",
    "Step",
    "TrainState",
    "class_curvature",
    "critical_batch_size",
    "distance_from_init",
    "ema",
    "gradient_noise_scale",
    "hessian_eigenvalues",
    "hessian_top_eigenvalue",
    "hvp",
    "init_state",
    "lanczos",
    "landscape_difference",
    "lr_range_test",
    "make_evaluate",
    "make_step",
    "means",
    "seen_params",
    "steps_to_target",
]
