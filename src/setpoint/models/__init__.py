"""Backbones, assembled from `setpoint.nn` by a configuration and the objects passed in."""

from setpoint.models.stack import MLP, Attention, SwiGLU
from setpoint.models.transformer import Transformer, TransformerConfig

__all__ = ["MLP", "Attention", "SwiGLU", "Transformer", "TransformerConfig"]
