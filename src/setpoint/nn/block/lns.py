"""LayerNorm Scaling: the output of both norms of layer l is multiplied by 1/sqrt(l), l counted from 1.

In a Pre-LN network the stream's variance grows with depth while what a block adds does not grow with it, so deep blocks
come close to the identity and learn little. Shrinking what deep sub-layers read slows the growth:

    y   = x + Attention(s_l N_a(x))        out = y + FeedForward(s_l N_m(y))        s_l = l ** -power

The norm after the last block is not scaled. The factor is a constant: neither trained nor decayed. (Starting the gain
at s_l and training it is another method, equal at the first step only: ``learnable=True``.) Weights are drawn with the
same spread in every layer; with 1/sqrt(2 depth) on the output projections most of the gain is lost, by the authors'
account.

Reference: Sun et al., 2025, "The Curse of Depth in Large Language Models", arXiv 2502.05795.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.block.base import NormFactory, Placement
from setpoint.nn.block.pre_ln import PreLN
from setpoint.optim.decay import no_weight_decay


class LayerNormScaling(nn.Module):
    """``norm(x) * layer_index ** -power``, for any norm.

    Its parameters are those of the norm that it wraps, under the same names (``weight``, not ``norm.weight``): a
    checkpoint fits with the scaling and without.

    Args:
        norm: The norm to scale; its whole output is scaled, its bias too. It shares its parameters from now on.
        layer_index: Number of the layer, counted from 1.
        power: How fast the scale falls; 0.5 as published.
        learnable: Multiply the norm's gain (and bias) by the scale once, here, and train them without a constant
            factor.

    Raises:
        InputError: ``layer_index`` is no integer from 1 on.
        TypeError: ``learnable`` is asked of a norm without a gain, or of one whose output is no multiple of it.

    Example:
        >>> norm = LayerNormScaling(nn.RMSNorm(8), layer_index=4)
        >>> x = torch.randn(2, 8)
        >>> torch.equal(norm(x), 0.5 * nn.RMSNorm(8)(x))
        True
        >>> norm.fold().weight[0].item()
        0.5
    """

    norm: nn.Module
    """The norm alone, with the same parameters."""

    def __init__(self, norm: nn.Module, layer_index: int, *, power: float = 0.5, learnable: bool = False) -> None:
        super().__init__()
        if isinstance(layer_index, bool) or not isinstance(layer_index, int) or layer_index < 1:
            raise InputError(
                f"expected a 1-based layer_index (1 for the first layer), got {layer_index!r}; "
                f"add 1 to an index that counts from 0"
            )
        self.layer_index, self.power, self.learnable = layer_index, power, learnable
        self.scale = 1.0 if learnable else float(layer_index) ** -power
        if learnable:
            _scaled(norm, float(layer_index) ** -power)  # refuses, before anything changes, a norm that can't take it
            _multiply_gain_and_bias(norm, float(layer_index) ** -power)
        # The norm is no child: its parameters are this module's own, so that every tool that goes by names (optimizers,
        # sharding, checkpoints) finds a Pre-LN model.
        self.__dict__["norm"] = norm
        self._parameters, self._buffers, self._modules = norm._parameters, norm._buffers, norm._modules
        self._non_persistent_buffers_set = norm._non_persistent_buffers_set
        no_weight_decay(self)

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """The scaled norm of ``x``."""
        if self.norm.training != self.training:
            self.norm.train(self.training)
        y: Tensor = self.norm(x)
        return y if self.scale == 1.0 else y * self.scale

    def fold(self) -> nn.Module:
        """The same function as a plain norm: gain and bias multiplied by the scale. This module stays as it is.

        Raises:
            TypeError: The norm has no gain to take the scale, or scaling it does not scale the norm's output (a norm
                that stores its gain minus one, for instance).
        """
        return _scaled(self.norm, self.scale)

    def reset_parameters(self) -> None:
        """Start the norm anew: gain at 1, or at the scale if that is learnable."""
        self.norm.reset_parameters()  # type: ignore[operator]
        if self.learnable:
            _multiply_gain_and_bias(self.norm, float(self.layer_index) ** -self.power)

    def extra_repr(self) -> str:
        """The norm and the settings."""
        return f"{self.norm}, layer_index={self.layer_index}, power={self.power}, learnable={self.learnable}"


@dataclass(frozen=True)
class ScaledPreNorm(Placement):
    """Pre-LN with LayerNorm Scaling (Sun et al., 2025); the norm after the last block is not scaled.

    Args:
        embed_norm: Also normalize the embedding.
        power: The scale of layer l is ``l ** -power``.
        learnable: Start the gains at the scale and train them.

    Example:
        >>> unit = ScaledPreNorm().residual(nn.Linear(8, 8), 8, norm=nn.RMSNorm, layer=9, depth=12)
        >>> round(unit.norm.scale, 4)
        0.3333
    """

    name: ClassVar[str] = "lns"

    power: float = 0.5
    learnable: bool = False

    def residual(
        self,
        sublayer: nn.Module,
        dim: int,
        *,
        norm: NormFactory,
        layer: int,
        depth: int,  # noqa: ARG002
        dropout: float = 0.0,
    ) -> nn.Module:
        """``x + F(s_l N(x))``."""
        return PreLN(sublayer, dim, norm_layer=lambda width: self._norm(norm, width, layer), dropout=dropout)

    def _norm(self, norm: NormFactory, dim: int, layer: int) -> nn.Module:
        return LayerNormScaling(norm(dim), layer, power=self.power, learnable=self.learnable)


def _scaled(norm: nn.Module, scale: float) -> nn.Module:
    """A copy whose gain and bias are multiplied, once it is seen that this multiplies the output."""
    gain = getattr(norm, "weight", None)
    if not isinstance(gain, Tensor):
        raise TypeError(
            f"expected a norm with a gain to take the scale {scale:.4g}, got {type(norm).__name__} without one; "
            f"keep the LayerNormScaling module, or build the norm with elementwise_affine=True"
        )
    scaled = deepcopy(norm)
    _multiply_gain_and_bias(scaled, scale)
    if gain.is_meta:
        return scaled
    with torch.no_grad():
        probe = torch.linspace(-2.0, 3.0, 2 * gain.numel(), device=gain.device, dtype=gain.dtype)
        probe = probe.reshape(2, *gain.shape)
        expected = deepcopy(norm)(probe) * scale
        distance = (scaled(probe) - expected).abs().max()
    if float(distance) > 16 * torch.finfo(gain.dtype).eps * float(expected.abs().max()):
        raise TypeError(
            f"expected a norm whose output is a multiple of its weight, got {type(norm).__name__}; "
            f"keep the LayerNormScaling module"
        )
    return scaled


@torch.no_grad()
def _multiply_gain_and_bias(norm: nn.Module, scale: float) -> None:
    for name in ("weight", "bias"):
        parameter = getattr(norm, name, None)
        if isinstance(parameter, Tensor):
            parameter.mul_(scale)
