"""Group normalization: torch's own, with refusals in words (Wu and He, 2018, arXiv 1803.08494).

The channels of each example are parted into groups, and each group is normalized by its own mean and variance over
channels and positions. Nothing depends on the batch.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from setpoint.errors import InputError
from setpoint.nn.norm.checks import expect_channels


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm`, and a refusal of what it can't normalize that says what to do.

    Args:
        num_groups: Into how many groups the channels are parted.
        num_channels: Size of axis 1, a multiple of ``num_groups``.
        eps: Added to the variance, inside the root.
        affine: Have ``weight`` (initially 1) and ``bias`` (initially 0) per channel.
        device, dtype: Of the parameters.

    Shape:
        Input and output ``(N, num_channels, *)``.

    Raises:
        InputError: Channels that are no multiple of the groups, or fewer than one of either; on call, another number of
            channels.
        TypeError: On call, an input that is not floating-point.

    Reference:
        Wu and He, 2018, "Group Normalization", arXiv 1803.08494.

    Example:
        >>> GroupNorm(1, 2)(torch.tensor([[1.0, 3.0]])).detach()
        tensor([[-1.0000,  1.0000]])
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_groups < 1 or num_channels < 1 or num_channels % num_groups:
            raise InputError(
                f"GroupNorm: expected num_channels to be a multiple of num_groups, got {num_channels!r} channels in "
                f"{num_groups!r} groups; choose a divisor of the channels"
            )
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)

    def forward(self, x: Float[Tensor, "batch channels ..."]) -> Float[Tensor, "batch channels ..."]:
        """Normalize every group of ``(N, C, *)``; shape and dtype stay."""
        expect_channels(x, self.num_channels, "GroupNorm")
        return super().forward(x)
