"""Building blocks, flat to import: ``from setpoint.nn import RMSNorm, DyT``.

Every layer is an ordinary `torch.nn.Module`, and every norm can be made from a width alone (``RMSNorm(512)``), so that
a model takes norms as arguments: a class, or ``functools.partial(DyT, alpha_init_value=0.8)``.
"""

# norms: statistics over an example, over a batch, or none at all
from setpoint.nn.norm.dyt import DyT
from setpoint.nn.norm.functional import crms_norm, rms_norm
from setpoint.nn.norm.layernorm import LayerNorm, LayerNorm2d, LayerNormCHW
from setpoint.nn.norm.rmsnorm import CRMSNorm, RMSNorm

__all__ = [
    "CRMSNorm",
    "DyT",
    "LayerNorm",
    "LayerNorm2d",
    "LayerNormCHW",
    "RMSNorm",
    "crms_norm",
    "rms_norm",
]
