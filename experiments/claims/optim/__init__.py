"""The claims of the optim room, one module a method."""

from experiments.claims.optim.adamp import adamp as adamp
from experiments.claims.optim.adamp import sgdp
from experiments.claims.optim.batch_size import batch_size as batch_size
from experiments.claims.optim.bilevel import bilevel as bilevel
from experiments.claims.optim.bilevel import bilevel_ridge
from experiments.claims.optim.block_coordinate import block_coordinate as block_coordinate
from experiments.claims.optim.block_coordinate import block_coordinate_l1
from experiments.claims.optim.convex_relu import convex_relu as convex_relu
from experiments.claims.optim.curvature import curvature as curvature
from experiments.claims.optim.ghost_batch_norm import ghost_batch_norm as ghost_batch_norm
from experiments.claims.optim.halpern import halpern as halpern
from experiments.claims.optim.infinite_schedule import infinite_schedule as infinite_schedule
from experiments.claims.optim.landscape import landscape as landscape
from experiments.claims.optim.low_rank import low_rank as low_rank
from experiments.claims.optim.mixed_precision import mixed_precision as mixed_precision
from experiments.claims.optim.normalized import normalized as normalized
from experiments.claims.optim.one_cycle import one_cycle as one_cycle
from experiments.claims.optim.refined_schedule import refined_schedule as refined_schedule
from experiments.claims.optim.rewarmed_schedule import rewarmed_schedule as rewarmed_schedule
from experiments.claims.optim.rms_norm import rms_norm as rms_norm
from experiments.claims.optim.sam import sam as sam
from experiments.claims.optim.shuffling import shuffling as shuffling
from experiments.claims.optim.target_surrogate import target_surrogate as target_surrogate
from experiments.claims.optim.weight_compander import weight_compander as weight_compander
from experiments.claims.optim.weight_norm import weight_norm as weight_norm

__all__ = [
    "adamp",
    "batch_size",
    "bilevel",
    "bilevel_ridge",
    "block_coordinate",
    "block_coordinate_l1",
    "convex_relu",
    "curvature",
    "ghost_batch_norm",
    "halpern",
    "infinite_schedule",
    "landscape",
    "low_rank",
    "mixed_precision",
    "normalized",
    "one_cycle",
    "refined_schedule",
    "rewarmed_schedule",
    "rms_norm",
    "sam",
    "sgdp",
    "shuffling",
    "target_surrogate",
    "weight_compander",
    "weight_norm",
]
