"""The claims of the aggregate room, one module a method."""

from experiments.claims.aggregate.balanced_kl import balanced_kl as balanced_kl
from experiments.claims.aggregate.burgers import conflict_free, momentum_conflict_free
from experiments.claims.aggregate.centered_clip import centered_clip as centered_clip
from experiments.claims.aggregate.class_normalized import class_normalized as class_normalized
from experiments.claims.aggregate.domain_penalty import domain_penalty as domain_penalty
from experiments.claims.aggregate.ef21 import ef21 as ef21
from experiments.claims.aggregate.ef21 import ef21_quickstart
from experiments.claims.aggregate.flag import flag as flag
from experiments.claims.aggregate.group_dro import group_dro as group_dro
from experiments.claims.aggregate.improvable_gap import improvable_gap as improvable_gap
from experiments.claims.aggregate.loss_balancer import loss_balancer as loss_balancer
from experiments.claims.aggregate.mgda import mgda as mgda
from experiments.claims.aggregate.multi_teacher import multi_teacher as multi_teacher
from experiments.claims.aggregate.nearest_neighbor import nearest_neighbor as nearest_neighbor
from experiments.claims.aggregate.pareto import pareto as pareto
from experiments.claims.aggregate.private import private as private
from experiments.claims.aggregate.robust import robust as robust
from experiments.claims.aggregate.spsa import spsa as spsa
from experiments.claims.aggregate.svd_reweight import svd_reweight as svd_reweight
from experiments.claims.aggregate.svd_reweight import task_alignment
from experiments.claims.aggregate.trilateral import trilateral as trilateral
from experiments.claims.aggregate.uncertainty import softmax_weights
from experiments.claims.aggregate.uncertainty import uncertainty as uncertainty
from experiments.claims.aggregate.zeropp import zeropp as zeropp

__all__ = [
    "balanced_kl",
    "centered_clip",
    "class_normalized",
    "conflict_free",
    "domain_penalty",
    "ef21",
    "ef21_quickstart",
    "flag",
    "group_dro",
    "improvable_gap",
    "loss_balancer",
    "mgda",
    "momentum_conflict_free",
    "multi_teacher",
    "nearest_neighbor",
    "pareto",
    "private",
    "robust",
    "softmax_weights",
    "spsa",
    "svd_reweight",
    "task_alignment",
    "trilateral",
    "uncertainty",
    "zeropp",
]
