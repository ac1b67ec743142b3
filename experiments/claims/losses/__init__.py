"""The claims of the losses room, one module a method."""

from experiments.claims.losses.amplify import amplify as amplify
from experiments.claims.losses.asymmetric import asymmetric as asymmetric
from experiments.claims.losses.batch_hard import batch_hard as batch_hard
from experiments.claims.losses.bellman_saddle import bellman_saddle as bellman_saddle
from experiments.claims.losses.bins import bins as bins
from experiments.claims.losses.class_gaussians import class_gaussians as class_gaussians
from experiments.claims.losses.dice import dice as dice
from experiments.claims.losses.encouraging import encouraging as encouraging
from experiments.claims.losses.ensloss import ensloss as ensloss
from experiments.claims.losses.focal import focal as focal
from experiments.claims.losses.generalized_gaussian import generalized_gaussian as generalized_gaussian
from experiments.claims.losses.hard_negatives import hard_negatives as hard_negatives
from experiments.claims.losses.hashing import hashing as hashing
from experiments.claims.losses.inverse_image_frequency import inverse_image_frequency as inverse_image_frequency
from experiments.claims.losses.label_robust import label_robust as label_robust
from experiments.claims.losses.long_tail_baselines import long_tail_baselines as long_tail_baselines
from experiments.claims.losses.macro_auc import macro_auc as macro_auc
from experiments.claims.losses.metric_mixup import metric_mixup as metric_mixup
from experiments.claims.losses.multi_head import multi_head as multi_head
from experiments.claims.losses.neural_collapse import neural_collapse as neural_collapse
from experiments.claims.losses.presto import presto as presto
from experiments.claims.losses.pseudo_huber import pseudo_huber as pseudo_huber
from experiments.claims.losses.ride import ride as ride
from experiments.claims.losses.robust_iql import robust_iql as robust_iql
from experiments.claims.losses.sampling_free import sampling_free as sampling_free
from experiments.claims.losses.sigmoid_contrastive import sigmoid_contrastive as sigmoid_contrastive
from experiments.claims.losses.simpson import simpson as simpson
from experiments.claims.losses.squentropy import squentropy as squentropy
from experiments.claims.losses.subclass_contrastive import subclass_contrastive as subclass_contrastive
from experiments.claims.losses.supervised_contrastive import supervised_contrastive as supervised_contrastive
from experiments.claims.losses.targeting import targeting as targeting
from experiments.claims.losses.weight_balancing import weight_balancing as weight_balancing
from experiments.claims.losses.weighting_study import weighting_study as weighting_study

__all__ = [
    "amplify",
    "asymmetric",
    "batch_hard",
    "bellman_saddle",
    "bins",
    "class_gaussians",
    "dice",
    "encouraging",
    "ensloss",
    "focal",
    "generalized_gaussian",
    "hard_negatives",
    "hashing",
    "inverse_image_frequency",
    "label_robust",
    "long_tail_baselines",
    "macro_auc",
    "metric_mixup",
    "multi_head",
    "neural_collapse",
    "presto",
    "pseudo_huber",
    "ride",
    "robust_iql",
    "sampling_free",
    "sigmoid_contrastive",
    "simpson",
    "squentropy",
    "subclass_contrastive",
    "supervised_contrastive",
    "targeting",
    "weight_balancing",
    "weighting_study",
]
