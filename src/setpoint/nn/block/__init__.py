"""How norm, residual and branch of a block are placed: residual units, and placements that backbones take."""

from setpoint.nn.block.base import NormFactory, Placement, placement
from setpoint.nn.block.lns import LayerNormScaling, ScaledPreNorm
from setpoint.nn.block.peri_ln import OutputLN, OutputNorm, PeriLN, PeriNorm
from setpoint.nn.block.pre_ln import PostLN, PostNorm, PreLN, PreNorm

__all__ = [
    "LayerNormScaling",
    "NormFactory",
    "OutputLN",
    "OutputNorm",
    "PeriLN",
    "PeriNorm",
    "Placement",
    "PostLN",
    "PostNorm",
    "PreLN",
    "PreNorm",
    "ScaledPreNorm",
    "placement",
]
