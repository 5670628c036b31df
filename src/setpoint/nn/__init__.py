"""Building blocks, flat to import: ``from setpoint.nn import RMSNorm, DyT``.

Every layer is an ordinary `torch.nn.Module`, and every norm can be made from a width alone (``RMSNorm(512)``), so that
a model takes norms as arguments: a class, or ``functools.partial(DyT, alpha_init_value=0.8)``.
"""

# attention
from setpoint.nn.attention.kv_bias import KVBias
from setpoint.nn.attention.qk_norm import QKNorm

# blocks: where norms stand around a sub-layer, as residual units and as placements for a backbone
from setpoint.nn.block.base import Placement, placement
from setpoint.nn.block.layer_scale import LayerScale
from setpoint.nn.block.lns import LayerNormScaling, ScaledPreNorm
from setpoint.nn.block.peri_ln import OutputLN, OutputNorm, PeriLN, PeriNorm
from setpoint.nn.block.pre_ln import PostLN, PostNorm, PreLN, PreNorm

# masks and segmentation maps for layers deep inside a model
from setpoint.nn.conditioning import Conditioned, condition, conditioned, keep_conditions, nearest

# token tables and heads
from setpoint.nn.embedding_projection import EmbeddingProjection, ProjectedEmbedding, ProjectedHead

# how weights start
from setpoint.nn.init.data_dependent import data_dependent_init
from setpoint.nn.init.small_init import small_init_

# norms: statistics over an example, over a batch, or none at all
from setpoint.nn.norm.alpha_bn import AlphaBatchNorm, adapt_batchnorm, batchnorm_adapted
from setpoint.nn.norm.batchnorm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    FrozenBatchNorm,
    GhostBatchNorm,
    MaskedBatchNorm1d,
)
from setpoint.nn.norm.batchnorm_tools import fold_batchnorm, freeze_batchnorm, recalibrate
from setpoint.nn.norm.dyt import DyT
from setpoint.nn.norm.evonorm import (
    EvoNorm2dB0,
    EvoNorm2dB1,
    EvoNorm2dB2,
    EvoNorm2dS0,
    EvoNorm2dS1,
    EvoNorm2dS2,
)
from setpoint.nn.norm.fixnorm import FixNormEmbedding
from setpoint.nn.norm.functional import crms_norm, layer_norm, rms_norm
from setpoint.nn.norm.gdn import GDN, GDN1
from setpoint.nn.norm.gdn_density import GDNDensity
from setpoint.nn.norm.gdwct import GDWCT, group_wct, whitening_loss
from setpoint.nn.norm.grn import GRN
from setpoint.nn.norm.groupnorm import GroupNorm
from setpoint.nn.norm.instancenorm import InstanceNorm1d, InstanceNorm2d, InstanceNorm3d
from setpoint.nn.norm.layernorm import LayerNorm, LayerNorm2d, LayerNormCHW
from setpoint.nn.norm.lpnorm import LpNorm, lp_norm, prenormalize
from setpoint.nn.norm.mean_only_batchnorm import MeanOnlyBatchNorm1d, MeanOnlyBatchNorm2d, MeanOnlyBatchNorm3d
from setpoint.nn.norm.mpbn import MPBNLIF
from setpoint.nn.norm.online_norm import OnlineNorm1d, OnlineNorm2d, OnlineNorm3d
from setpoint.nn.norm.powernorm import GroupScaling, PowerNorm, PowerNormV
from setpoint.nn.norm.region_norm import RNB, RNL, RegionNorm, region_norm
from setpoint.nn.norm.rmsnorm import CRMSNorm, RMSNorm
from setpoint.nn.norm.scalenorm import ScaleNorm, scale_norm
from setpoint.nn.norm.sdd import SDDLinear
from setpoint.nn.norm.spade import SPADE
from setpoint.nn.norm.ssnorm import SSNorm
from setpoint.nn.norm.unified_norm import UnifiedNorm

# recurrent cells
from setpoint.nn.recurrent import LNLSTM, LNGRUCell, LNLSTMCell

# neurons that spike
from setpoint.nn.spiking import LIF, OverTime, fire

# weights as functions of other parameters: put on a layer, folded away again
from setpoint.nn.weight.conditioning import WeightConditioning, condition_model, condition_number, condition_weight
from setpoint.nn.weight.reparametrize import fold_weights
from setpoint.nn.weight.spectral_norm import spectral_norm
from setpoint.nn.weight.standardization import WeightStandardization, standardize_weights, weight_standardization
from setpoint.nn.weight.weightnorm import WeightNorm, apply_weight_norm, remove_weight_norm, weight_norm

__all__ = [
    "GDN",
    "GDN1",
    "GDWCT",
    "GRN",
    "LIF",
    "LNLSTM",
    "MPBNLIF",
    "RNB",
    "RNL",
    "SPADE",
    "AlphaBatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "CRMSNorm",
    "Conditioned",
    "DyT",
    "EmbeddingProjection",
    "EvoNorm2dB0",
    "EvoNorm2dB1",
    "EvoNorm2dB2",
    "EvoNorm2dS0",
    "EvoNorm2dS1",
    "EvoNorm2dS2",
    "FixNormEmbedding",
    "FrozenBatchNorm",
    "GDNDensity",
    "GhostBatchNorm",
    "GroupNorm",
    "GroupScaling",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "KVBias",
    "LNGRUCell",
    "LNLSTMCell",
    "LayerNorm",
    "LayerNorm2d",
    "LayerNormCHW",
    "LayerNormScaling",
    "LayerScale",
    "LpNorm",
    "MaskedBatchNorm1d",
    "MeanOnlyBatchNorm1d",
    "MeanOnlyBatchNorm2d",
    "MeanOnlyBatchNorm3d",
    "OnlineNorm1d",
    "OnlineNorm2d",
    "OnlineNorm3d",
    "OutputLN",
    "OutputNorm",
    "OverTime",
    "PeriLN",
    "PeriNorm",
    "Placement",
    "PostLN",
    "PostNorm",
    "PowerNorm",
    "PowerNormV",
    "PreLN",
    "PreNorm",
    "ProjectedEmbedding",
    "ProjectedHead",
    "QKNorm",
    "RMSNorm",
    "RegionNorm",
    "SDDLinear",
    "SSNorm",
    "ScaleNorm",
    "ScaledPreNorm",
    "UnifiedNorm",
    "WeightConditioning",
    "WeightNorm",
    "WeightStandardization",
    "adapt_batchnorm",
    "apply_weight_norm",
    "batchnorm_adapted",
    "condition",
    "condition_model",
    "condition_number",
    "condition_weight",
    "conditioned",
    "crms_norm",
    "data_dependent_init",
    "fire",
    "fold_batchnorm",
    "fold_weights",
    "freeze_batchnorm",
    "group_wct",
    "keep_conditions",
    "layer_norm",
    "lp_norm",
    "nearest",
    "placement",
    "prenormalize",
    "recalibrate",
    "region_norm",
    "remove_weight_norm",
    "rms_norm",
    "scale_norm",
    "small_init_",
    "spectral_norm",
    "standardize_weights",
    "weight_norm",
    "weight_standardization",
    "whitening_loss",
]
