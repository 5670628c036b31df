"""Building blocks, flat to import: ``from setpoint.nn import RMSNorm, DyT``.

Every layer is an ordinary `torch.nn.Module`, and every norm can be made from a width alone (``RMSNorm(512)``), so that
a model takes norms as arguments: a class, or ``functools.partial(DyT, alpha_init_value=0.8)``.
"""

# attention
from setpoint.nn.attention.kv_bias import KVBias

# blocks: where norms stand around a sub-layer, as residual units and as placements for a backbone
from setpoint.nn.block.base import Placement, placement
from setpoint.nn.block.lns import LayerNormScaling, ScaledPreNorm
from setpoint.nn.block.peri_ln import OutputLN, OutputNorm, PeriLN, PeriNorm
from setpoint.nn.block.pre_ln import PostLN, PostNorm, PreLN, PreNorm

# norms: statistics over an example, over a batch, or none at all
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
from setpoint.nn.norm.functional import crms_norm, layer_norm, rms_norm
from setpoint.nn.norm.layernorm import LayerNorm, LayerNorm2d, LayerNormCHW
from setpoint.nn.norm.online_norm import OnlineNorm1d, OnlineNorm2d, OnlineNorm3d
from setpoint.nn.norm.powernorm import GroupScaling, PowerNorm, PowerNormV
from setpoint.nn.norm.rmsnorm import CRMSNorm, RMSNorm
from setpoint.nn.norm.unified_norm import UnifiedNorm

# recurrent cells
from setpoint.nn.recurrent import LNLSTM, LNGRUCell, LNLSTMCell

__all__ = [
    "LNLSTM",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "CRMSNorm",
    "DyT",
    "FrozenBatchNorm",
    "GhostBatchNorm",
    "GroupScaling",
    "KVBias",
    "LNGRUCell",
    "LNLSTMCell",
    "LayerNorm",
    "LayerNorm2d",
    "LayerNormCHW",
    "LayerNormScaling",
    "MaskedBatchNorm1d",
    "OnlineNorm1d",
    "OnlineNorm2d",
    "OnlineNorm3d",
    "OutputLN",
    "OutputNorm",
    "PeriLN",
    "PeriNorm",
    "Placement",
    "PostLN",
    "PostNorm",
    "PowerNorm",
    "PowerNormV",
    "PreLN",
    "PreNorm",
    "RMSNorm",
    "ScaledPreNorm",
    "UnifiedNorm",
    "crms_norm",
    "fold_batchnorm",
    "freeze_batchnorm",
    "layer_norm",
    "placement",
    "recalibrate",
    "rms_norm",
]
