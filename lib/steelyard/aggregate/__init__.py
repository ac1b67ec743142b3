"""Many gradients, or losses, into one: of tasks, classes, workers or clients."""

from steelyard.aggregate.conflict_free import conflict_free
from steelyard.aggregate.entry import Report, value_and_grad, value_and_grad_at, weighted_gradient
from steelyard.aggregate.loss_balancer import LossBalancerState, loss_balancer
from steelyard.aggregate.stacked import Aggregator, combine, count_rows, from_gram, from_losses, gram
from steelyard.aggregate.static import mean, static

__all__ = [
    "Aggregator",
    "LossBalancerState",
    "Report",
    "combine",
    "conflict_free",
    "count_rows",
    "from_gram",
    "from_losses",
    "gram",
    "loss_balancer",
    "mean",
    "static",
    "value_and_grad",
    "value_and_grad_at",
    "weighted_gradient",
]
