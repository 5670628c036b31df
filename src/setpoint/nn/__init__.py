"""Building blocks, flat to import: ``from setpoint.nn import RMSNorm, DyT``.

Every layer is an ordinary `torch.nn.Module`, and every norm can be made from a width alone (``RMSNorm(512)``), so that
a model takes norms as arguments: a class, or ``functools.partial(DyT, alpha_init_value=0.8)``.
"""

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
from setpoint.nn.norm.functional import crms_norm, rms_norm
from setpoint.nn.norm.layernorm import LayerNorm, LayerNorm2d, LayerNormCHW
from setpoint.nn.norm.rmsnorm import CRMSNorm, RMSNorm

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
    "LNGRUCell",
    "LNLSTMCell",
    "LayerNorm",
    "LayerNorm2d",
    "LayerNormCHW",
    "MaskedBatchNorm1d",
    "RMSNorm",
    "crms_norm",
    "fold_batchnorm",
    "freeze_batchnorm",
    "recalibrate",
    "rms_norm",
]
